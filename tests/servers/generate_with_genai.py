"""Runs in the environment of onnxruntime-genai: continues texts, alone and as a batch, writes the tokens as JSON.

    python generate_with_genai.py FOLDER REQUEST RESPONSE

REQUEST holds `texts` and `max_tokens`. RESPONSE holds `version`, `prompts` (tokens of each text, by the runtime's own
tokenizer), `alone` and `together` (the greedy tokens of each text), with what follows an end of text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og  # type: ignore[import-not-found]


def continued(model: og.Model, prompts: np.ndarray, max_tokens: int) -> list[list[int]]:
    """The new tokens of each row; padding tokens behind an end of text."""
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(batch_size=len(prompts), max_length=prompts.shape[1] + max_tokens, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompts)
    steps = []
    while not generator.is_done():
        generator.generate_next_token()
        steps.append(generator.get_next_tokens().copy())
    tokens: list[list[int]] = np.array(steps).T.tolist()
    return tokens


def main(folder: Path, request: Path, response: Path) -> None:
    """Answers one request."""
    asked = json.loads(request.read_text())
    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    prompts = [tokenizer.encode(text) for text in asked["texts"]]
    alone = [continued(model, prompt[None], asked["max_tokens"])[0] for prompt in prompts]
    answer: dict[str, Any] = {
        "version": og.__version__,
        "prompts": [prompt.tolist() for prompt in prompts],
        "alone": alone,
        "together": continued(model, tokenizer.encode_batch(asked["texts"]).as_numpy(), asked["max_tokens"]),
    }
    response.write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
