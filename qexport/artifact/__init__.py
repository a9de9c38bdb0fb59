"""A finished or growing folder: manifest, digests, publishing."""
