"""Adapters as lazy weight deltas."""
