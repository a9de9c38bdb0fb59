"""The finished artifact compared with its reference: perplexity, divergence, generation."""
