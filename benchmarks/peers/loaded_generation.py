"""A folder, loaded in one of several ways as a model of transformers. Usage: loaded_generation.py JOB RESULT

The job's `way` is `transformers`, `peft` (with the job's `adapter`), `qexport` (with the job's `options`) or
`gptqmodel`. The model is called directly, without `generate` around it, and computes the logits of the last position
only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from generation import job, measure

sys.path.pop(0)  # files here have the names of packages

import torch


def main() -> None:
    """Loads, measures."""
    todo = job()
    torch.set_num_threads(todo["threads"])
    model = WAYS[todo["way"]](todo)

    @torch.inference_mode()
    def generate(prompt: list[int], count: int) -> Iterator[int]:
        tokens, cache = torch.tensor([prompt]), None
        for _ in range(count):
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
            yield int(tokens)

    measure(generate, todo)


def _transformers(todo: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(todo["folder"], dtype=torch.bfloat16).eval()


def _peft(todo: dict[str, Any]) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(_transformers(todo), todo["adapter"]).eval()


def _qexport(todo: dict[str, Any]) -> Any:
    import qexport

    return qexport.load(todo["folder"], device="cpu", **todo["options"])


def _gptqmodel(todo: dict[str, Any]) -> Any:
    from gptqmodel import GPTQModel

    return GPTQModel.load(todo["folder"], device="cpu", dtype=torch.bfloat16).model.eval()


WAYS = {"transformers": _transformers, "peft": _peft, "qexport": _qexport, "gptqmodel": _gptqmodel}


if __name__ == "__main__":
    main()
