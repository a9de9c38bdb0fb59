"""A report for its readers: a page, a pull request's comment, test results, tables on the terminal."""
