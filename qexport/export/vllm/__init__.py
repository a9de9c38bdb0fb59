"""The vllm layout: refusals, launch files, and the checker of finished folders."""
