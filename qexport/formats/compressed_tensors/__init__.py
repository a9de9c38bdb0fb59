"""compressed-tensors: `tensors` (codes in words), `config` (written and read), `format` (both sides of a folder)."""
