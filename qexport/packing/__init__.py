"""Pure bit layouts: how codes lie in the words of a file format."""
