"""Task accuracy by lm-evaluation-harness, paired by item."""
