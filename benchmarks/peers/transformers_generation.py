"""A dense model with transformers, on the CPU. Usage: transformers_generation.py JOB RESULT

The model is called directly, without `generate` around it, and computes the logits of the last position only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from generation import job, measure

sys.path.pop(0)  # files here have the names of packages

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Loads in the job's dtype, measures."""
    todo = job()
    torch.set_num_threads(todo["threads"])
    model = AutoModelForCausalLM.from_pretrained(todo["folder"], dtype=getattr(torch, todo["dtype"])).eval()

    @torch.inference_mode()
    def generate(prompt: list[int], count: int) -> Iterator[int]:
        tokens, cache = torch.tensor([prompt]), None
        for _ in range(count):
            output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
            yield int(tokens)

    measure(generate, todo)


if __name__ == "__main__":
    main()
