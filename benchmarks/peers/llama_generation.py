"""A GGUF file through llama-cpp-python, as it is served. Usage: llama_generation.py JOB RESULT"""

from __future__ import annotations

from collections.abc import Iterator

import llama_cpp
import numpy as np
from generation import job, measure


def main() -> None:
    """Loads, measures."""
    todo = job()
    longest = max(len(todo["long"]), len(todo["short"]) + todo["new_tokens"]) + 1
    threads = {"n_threads": todo["threads"], "n_threads_batch": todo["threads"]}
    model = llama_cpp.Llama(todo["file"], n_ctx=longest, n_batch=longest, n_ubatch=longest, verbose=False, **threads)

    def generate(prompt: list[int], count: int) -> Iterator[int]:
        model.reset()
        tokens = prompt
        for _ in range(count):
            model.eval(tokens)
            logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            tokens = [int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())]
            yield tokens[0]

    measure(generate, todo)


if __name__ == "__main__":
    main()
