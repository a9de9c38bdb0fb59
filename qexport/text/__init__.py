"""Text for calibration and for verification: documents, token windows, prompts."""
