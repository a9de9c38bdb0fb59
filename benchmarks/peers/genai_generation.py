"""A graph of onnxruntime-genai's builder in that runtime's own loop. Usage: genai_generation.py JOB RESULT"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from generation import job, measure

sys.path.pop(0)  # files here have the names of packages

import onnxruntime_genai as og


def main() -> None:
    """Opens the folder, measures."""
    todo = job()
    config = og.Config(todo["folder"])
    session = {"session_options": {"intra_op_num_threads": todo["threads"]}}
    config.overlay(json.dumps({"model": {"decoder": session}}))
    model = og.Model(config)

    def generate(prompt: list[int], count: int) -> Iterator[int]:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    measure(generate, todo)


if __name__ == "__main__":
    main()
