"""Merges PEFT adapters into a base, one tensor at a time."""
