"""The vllm layout: a folder that vLLM serves, its launch files, and vLLM's rules for plans and folders."""
