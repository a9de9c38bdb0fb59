"""The uncertainty of measured figures: intervals of means and quantiles over windows, and a test for paired items."""
