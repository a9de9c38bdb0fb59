"""The finished artifact against its reference: perplexity, divergence, generation."""
