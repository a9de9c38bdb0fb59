"""AutoGPTQ v1: `format` (what is written), `reading` (the way back), `tensors` (bits in words)."""
