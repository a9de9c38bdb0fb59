"""Finished artifacts, read back from disk."""
