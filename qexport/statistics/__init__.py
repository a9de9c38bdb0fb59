"""How sure a measured figure is: intervals for means and quantiles over windows, and a test for paired items."""
