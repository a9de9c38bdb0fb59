"""A runtime in a Python environment of its own: a child process that answers requests about one folder."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor

from qexport.amounts import parse_size, size
from qexport.artifact.served import RuntimeFacts
from qexport.errors import CompatibilityError, InputError, ResourceError
from qexport.runtimes import MODULES, RuntimeName, RuntimeSettings

PROGRAMS: Final[Mapping[RuntimeName, str]] = {
    "vllm": "vllm_program",
    "onnxruntime-genai": "genai_program",
    "gptqmodel": "gptqmodel_program",
    "llama.cpp": "llama_cpp_program",
}
FOLDER: Final = Path(__file__).with_name("programs")

_LONGEST_ANSWER: Final = 1 << 26
"""Bytes; log-probabilities go through a file."""

_POLL_SECONDS: Final = 0.25
_ENDING_SECONDS: Final = 20.0
_LOG_TAIL: Final = 1500
_ROWS_AT_ONCE: Final = 128
_DTYPES: Final[Mapping[RuntimeName, str]] = {
    "vllm": "float16",
    "onnxruntime-genai": "float32",
    "gptqmodel": "float32",
    "llama.cpp": "as served",
}
"""What is asked for by default: what allows the narrowest `fidelity_kl`, since vLLM has no float32 for GPTQ; but what
users of llama.cpp get, since nobody serves with its float32."""

_OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "NO_COLOR": "1"}
"""Neither prompts nor usage statistics leave the machine."""


class ChildRuntime:
    """A program with a model, valid within its context.

    What it prints goes to a log, which is kept where an error names it and removed otherwise.

    Args:
        settings: the entry of `verify.through`.
        folder: the artifact's.
        longest: the most tokens of a window, or of a prompt with its continuation.
        programs: the folder of the programs; by default qexport's.

    Raises:
        InputError: the program cannot be started, ends, or answers something else than what was asked.
        CompatibilityError: it says that it cannot do what it is asked, for example load the folder.
        ResourceError: it takes more time or memory than allowed.
    """

    def __init__(self, settings: RuntimeSettings, folder: Path, *, longest: int, programs: Path | None = None) -> None:
        assert settings.runtime is not None
        self._settings, self._name = settings, settings.runtime
        self._limit = None if settings.max_memory is None else parse_size(settings.max_memory)
        self._folder, self._longest, self._programs = folder.resolve(), longest, programs or FOLDER

    def __enter__(self) -> Self:
        self._scratch = tempfile.TemporaryDirectory(prefix="qexport-runtime-")
        handle, name = tempfile.mkstemp(prefix=f"qexport-{self._name}-", suffix=".log")
        self.log = Path(name)
        with os.fdopen(handle, "wb") as log:
            self._start(log)
        try:
            asked = self._settings.dtype or _DTYPES[self._name]
            told = self._ask({"do": "open", "folder": str(self._folder), "dtype": asked, "longest": self._longest})
            self.facts = self._facts(told.get("facts"), asked)
        except BaseException:
            self._end(patient=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._end(patient=kind is None)
        if kind is None:
            self.log.unlink(missing_ok=True)

    def logits(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """Log-probabilities of what follows each token but the last.

        Args:
            ids: a window's tokens.

        Returns:
            float32 [tokens, vocabulary] in small copies, so that not all of a window is in memory.
        """
        place = Path(self._scratch.name) / "scores"
        answer = self._ask({"do": "score", "ids": list(ids), "into": str(place)})
        shape = answer.get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or shape[0] != len(ids) - 1:
            raise self._wrong(f"scores of shape {shape} for {len(ids)} tokens")
        if place.stat().st_size != 4 * shape[0] * shape[1]:
            raise self._wrong(f"{place.stat().st_size} bytes for scores of shape {shape}")
        scores = np.memmap(place, dtype=np.float32, mode="r", shape=(shape[0], shape[1]))
        for first in range(0, len(scores), _ROWS_AT_ONCE):
            yield torch.from_numpy(np.array(scores[first : first + _ROWS_AT_ONCE]))
        del scores
        place.unlink()

    def continued(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The greedy continuation of each prompt; it may go on behind an end of text."""
        answer = self._ask({"do": "continue", "prompts": [list(ids) for ids in prompts], "new": new_tokens})
        return self._lists(answer.get("tokens"), len(prompts), "prompt")

    def tokenized(self, texts: Sequence[str]) -> list[list[int]] | None:
        """The tokens that it makes of each text, special ones included; None if it takes tokens alone."""
        tokens = self._ask({"do": "tokenize", "texts": list(texts)}).get("tokens")
        return None if tokens is None else self._lists(tokens, len(texts), "text")

    def _lists(self, tokens: Any, count: int, each: str) -> list[list[int]]:
        if not isinstance(tokens, list) or len(tokens) != count or not all(map(_are_tokens, tokens)):
            raise self._wrong(f"no list of tokens for each {each}")
        return tokens

    def _start(self, log: Any) -> None:
        """The pipes are not its standard input and output, which runtimes write to as they like."""
        their_requests, self._requests = os.pipe()
        self._answers, their_answers = os.pipe()
        program = self._programs / f"{PROGRAMS[self._name]}.py"
        command = [self._settings.interpreter, str(FOLDER / "answering.py"), str(program)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | _OFFLINE
        try:
            self._process = subprocess.Popen(
                [*command, str(their_requests), str(their_answers)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self._scratch.name,
                pass_fds=(their_requests, their_answers),
                start_new_session=True,
            )
        except OSError as error:
            for each in (self._requests, self._answers):
                os.close(each)
            self._scratch.cleanup()
            raise InputError(
                f"{self._name} cannot be started: {error.strerror}",
                where=self._settings.interpreter,
                mend="name the interpreter of the environment that has it: python: PATH",
            ) from error
        finally:
            for each in (their_requests, their_answers):
                os.close(each)

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The request goes through a file: a long one could fill the pipe of a program that hangs."""
        self._doing = _WORDS[request["do"]]
        place = Path(self._scratch.name) / "request.json"
        place.write_text(json.dumps(request), encoding="utf-8")
        with suppress(BrokenPipeError):  # then it has ended, which the answer shows
            os.write(self._requests, f"{place}\n".encode())
        line = self._line()
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise self._wrong("something that is not JSON") from error
        if not isinstance(answer, dict):
            raise self._wrong("something that is not a JSON object")
        if "error" in answer:
            raise CompatibilityError(
                f"{self._name} cannot {self._doing}: {str(answer['error'])[:_LOG_TAIL]}",
                where=f"{self._folder}; the log is {self.log}",
                mend="read the log; another dtype, or another layout of the artifact, may be what it takes",
            )
        return answer

    def _line(self) -> bytes:
        """The next line of the answers, within the limits of time, memory and length."""
        found, deadline = b"", time.monotonic() + self._settings.timeout
        while not found.endswith(b"\n"):
            ready, _, _ = select.select([self._answers], [], [], _POLL_SECONDS)
            if ready:
                piece = os.read(self._answers, 1 << 16)
                if not piece:
                    raise self._ended()
                found += piece
            if len(found) > _LONGEST_ANSWER:
                raise self._wrong(f"more than {_LONGEST_ANSWER} bytes")
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"{self._name} did not answer within {self._settings.timeout} s",
                    where=f"the log is {self.log}",
                    mend="give it more time: timeout",
                )
            self._refuse_memory()
        return found

    def _refuse_memory(self) -> None:
        if self._limit is None:
            return
        with suppress(OSError, ValueError, IndexError):
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text(encoding="ascii").split()[1])
            if (taken := pages * os.sysconf("SC_PAGE_SIZE")) > self._limit:
                raise ResourceError(
                    f"{self._name} takes {size(taken)} of memory, more than the allowed {size(self._limit)}",
                    where=f"the log is {self.log}",
                    mend="allow more: max_memory",
                )

    def _facts(self, told: Any, asked: str) -> RuntimeFacts:
        try:
            return RuntimeFacts(
                name=self._name,
                version=str(told["version"]),
                kernels={str(name): int(count) for name, count in told["kernels"].items()},
                dtype=str(told["dtype"] or asked),
                arguments={str(name): str(value) for name, value in told["arguments"].items()},
            )
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise self._wrong("no description of itself") from error

    def _ended(self) -> InputError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING_SECONDS)
        log = self.log.read_text(encoding="utf-8", errors="replace")
        if (status := self._process.returncode) is not None and status < 0:
            return self._crashed(signal.Signals(-status), log)
        return InputError(
            f"{self._name} ended without an answer (exit status {status}): {log[-_LOG_TAIL:].strip()}",
            where=f"{self._settings.interpreter}; the log is {self.log}",
            mend=f"check that this environment has {MODULES[self._name]} and enough memory",
        )

    def _crashed(self, by: signal.Signals, log: str) -> InputError:
        known = _CRASHES.get(self._name)
        cause, mend = known[1:] if known and by in _FAULTS and known[0] in log else ("", _MEND_OF_CRASHES)
        return InputError(
            f"{self._name} crashed ({by.name}) when it was asked to {self._doing}{cause}",
            where=f"{self._settings.interpreter}; the log is {self.log}",
            mend=mend,
        )

    def _wrong(self, what: str) -> InputError:
        return InputError(f"{self._name} answered {what}", where=f"the log is {self.log}", mend="please report this")

    def _end(self, *, patient: bool) -> None:
        """Asks it to end, and ends it with all processes that it started where it does not."""
        for each in (self._requests, self._answers):
            os.close(each)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING_SECONDS if patient else 0)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._scratch.cleanup()


_WORDS: Final = {
    "open": "load the artifact",
    "score": "score the text",
    "continue": "continue the prompts",
    "tokenize": "make tokens of texts",
}


_FAULTS: Final = (signal.SIGSEGV, signal.SIGILL, signal.SIGBUS)
_MEND_OF_CRASHES: Final = (
    "read the log; where memory was short give it more, else use another version or build of the runtime"
)
_CRASHES: Final[Mapping[RuntimeName, tuple[str, str, str]]] = {
    "llama.cpp": (
        "AMX model buffer",
        "; the matrices were in its buffers for AMX, and GCC 12, for one, builds llama.cpp so that it loads an "
        "incomplete configuration of AMX's tiles. Its server crashes likewise",
        "build llama-cpp-python without AMX, CFLAGS and CXXFLAGS '-mno-amx-tile -mno-amx-int8 -mno-amx-bf16', or with "
        "a newer compiler; dtype=float32 does not use AMX",
    ),
}
"""By runtime: what its log has where the cause is known, the cause, and the way out."""


def _are_tokens(row: Any) -> bool:
    return isinstance(row, list) and all(type(each) is int for each in row)
