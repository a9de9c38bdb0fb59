"""Gates: which limits apply to an artifact's figures, and whether the figures meet them."""
