"""compressed-tensors: `format` (what is written), `reading` (the way back), `tensors` (codes in words)."""
