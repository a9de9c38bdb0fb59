"""What is timed of every runtime, in the same way: a prompt's first token, and the tokens after it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Generate = Callable[[list[int], int], Iterator[int]]
"""From a prompt and a number of tokens to greedy tokens one by one, the first when the prompt has been read."""


def job() -> dict[str, Any]:
    """What the first argument says: folder, threads, the prompts `long` and `short`, new_tokens, `cpu_time` where CPU
    seconds count instead of those that pass, and more for some.
    """
    content: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    return content


def measure(generate: Generate, job: dict[str, Any]) -> None:
    """Reads both prompts to warm up, then times each once. Writes the result where the second argument says."""
    clock = time.process_time if job.get("cpu_time") else time.perf_counter
    for prompt in (job["long"], job["short"]):
        list(generate(prompt, 4))
    start = clock()
    next(generate(job["long"], 1))
    first_token = clock() - start
    tokens, times = [], []
    for token in generate(job["short"], job["new_tokens"] + 1):
        tokens.append(token)
        times.append(clock())
    if len(tokens) <= job["new_tokens"]:
        raise SystemExit(f"the text ended after {len(tokens)} tokens; take another --text")
    speed = job["new_tokens"] / (times[-1] - times[0])
    result = {"tokens_per_second": speed, "first_token": first_token, "tokens": tokens}
    Path(sys.argv[2]).write_text(json.dumps(result))
