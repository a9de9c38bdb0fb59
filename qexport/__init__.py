"""Merge, quantize, export and verify language models in one streaming pass."""
