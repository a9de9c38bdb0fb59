"""Pure bit layouts, one file a format."""
