"""Runs in the environment of a runtime: answers requests about one folder until the pipe is closed.

    python answering.py PROGRAM READ_FD WRITE_FD

PROGRAM is the path of a file with a class `Model`. Two pipes of their own carry lines: the path of a file with a
request, and its answer, both JSON. Whatever the runtime prints goes to the log and disturbs nothing.
Log-probabilities go through a file.

    {"do": "open", "folder": F, "dtype": D, "longest": N}  -> {"facts": {...}}
    {"do": "score", "ids": [...], "into": FILE}            -> {"shape": [tokens, vocabulary]}, float32 in FILE
    {"do": "continue", "prompts": [[...]], "new": N}       -> {"tokens": [[...]]}
    {"do": "tokenize", "texts": [...]}                     -> {"tokens": [[...]]}, null for a runtime without tokenizer

An answer `{"error": TEXT}` says that a request could not be met.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


class Answering:
    """The state between requests: the opened model.

    Args:
        program: the module with the class `Model`.
    """

    def __init__(self, program: Any) -> None:
        self._program, self._model = program, None  # type: Any, Any

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        if request["do"] == "open":
            self._model = self._program.Model(request["folder"], request["dtype"], request["longest"])
            return {"facts": self._model.facts()}
        if request["do"] == "score":
            scores = self._model.score(request["ids"])
            scores.tofile(request["into"])
            return {"shape": list(scores.shape)}
        if request["do"] == "continue":
            return {"tokens": self._model.continued(request["prompts"], request["new"])}
        if request["do"] == "tokenize":
            tokenized = getattr(self._model, "tokenized", None)
            return {"tokens": tokenized and tokenized(request["texts"])}
        raise ValueError(f"unknown request {request['do']!r}")


def load(program: str) -> Any:
    """The module in a file."""
    spec = importlib.util.spec_from_file_location("program", program)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(program: str, reading: int, writing: int) -> None:
    """Answers requests, one after the other."""
    with os.fdopen(reading, encoding="utf-8") as requests, os.fdopen(writing, "w", encoding="utf-8") as answers:
        state: Any = None
        for line in requests:
            try:
                state = state or Answering(load(program))
                found = state.answer(json.loads(Path(line.rstrip("\n")).read_text(encoding="utf-8")))
            except Exception as error:
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(found) + "\n")
            answers.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the runtime's threads and workers must not keep the process alive


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
