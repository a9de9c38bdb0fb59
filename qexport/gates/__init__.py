"""Gates: which limits hold for an artifact's figures, and whether they are kept."""
