"""What a base, an adapter, a GGUF file or an artifact is, from headers alone, without torch and transformers."""
