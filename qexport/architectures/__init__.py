"""A model's structure, the quirks of model families, and the block runner."""
