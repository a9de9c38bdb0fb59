"""AutoGPTQ v1: `tensors` (bits in words), `config` (written and read), `format` (both sides of a folder)."""
