"""Renders reports: an HTML page, a comment on a pull request, test results, and tables on the terminal."""
