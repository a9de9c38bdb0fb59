"""Where a base model comes from: a folder, a hub, a GGUF file inside a package."""
