"""Chat templates, rendered in a process of their own with limits of time and memory.

A template is a program from the model's folder. Jinja's sandbox keeps it from files and from Python's internals, but
does not end its loops and does not bound what it allocates. `python -m qexport.text.chat_templates` is that process: it
imports only jinja2, is started for the first conversation and serves all others. A line of JSON is a request, a line of
JSON its answer.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Lock, Timer
from typing import Any, BinaryIO, Final

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from qexport.errors import InputError

SECONDS: Final = 2.0
"""Processor time of one conversation. Real templates take about a millisecond."""

SECONDS_FOR_EACH: Final = 0.02
"""How much each conversation adds to `SECONDS`, which all conversations share."""

WAITING_SECONDS: Final = 60.0
"""Until an answer is given up, however little processor time the process has got."""

MEMORY_BYTES: Final = 512 << 20
"""Address space of the process, without what a long conversation needs."""

TEXT_CHARACTERS: Final = 1 << 23
"""Of a rendered text, without what a long conversation needs."""

_LONG_MEMORY: Final = 32
"""Bytes more for each byte of a request."""

_LONG_TEXT: Final = 8
"""Characters more for each byte of a request."""

WITHOUT_TEMPLATE: Final = "set chat_template: false, or use a model whose chat template fits these conversations"
"""What to do about a template that cannot be used."""


class TemplateProcess:
    """The process, started when it is first needed. May be used by several threads.

    A template that broke a limit is not rendered again.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._used = 0.0
        self._rendered = 0
        self._refused: dict[str, str] = {}

    def render(self, template: str, variables: Mapping[str, Any], *, where: str) -> str:
        """The text that `tokenizer.apply_chat_template` gives for the same variables, on 1 January 2024.

        Args:
            template: its source.
            variables: JSON values; `messages`, `add_generation_prompt`, special tokens and others.
            where: the tokenizer's name, for errors.

        Raises:
            InputError: the template is malformed or rejects the conversation, it broke a limit, or its text holds a
                lone surrogate.
        """
        with self._lock:
            answer = self._answer(template, variables)
        if "text" in answer:
            return str(answer["text"])
        raise InputError(
            f"the chat template cannot render a conversation: {answer['error']}", where=where, mend=WITHOUT_TEMPLATE
        )

    def close(self) -> None:
        """Ends the process; the next conversation starts another one."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def _answer(self, template: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        if template in self._refused:
            return {"error": self._refused[template]}
        allowed = SECONDS + SECONDS_FOR_EACH * self._rendered - self._used
        answer = self._exchange({"template": template, "variables": variables, "seconds": max(allowed, 0.001)})
        self._rendered += 1
        self._used += answer.get("seconds", 0.0)
        if answer.get("limit"):
            self._refused[template] = answer["error"]
            self._used = 0.0  # another template is not to blame
        return answer

    def _exchange(self, request: Mapping[str, Any]) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        timer = Timer(WAITING_SECONDS, process.kill)
        timer.start()
        try:
            with suppress(BrokenPipeError):  # it was ended while it read
                process.stdin.write(json.dumps(request, default=_placeholder).encode() + b"\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except BaseException:
            self.close()
            raise
        finally:
            timer.cancel()
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        ended = process.wait()
        self.close()
        return {"error": _ending(ended), "limit": True}

    def _running(self) -> subprocess.Popen[bytes]:
        """A fork of this process must not read the answers to its parent's requests, so it starts its own."""
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            paths = [path for path in sys.path if path]
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "qexport.text.chat_templates"],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._process


CHAT_TEMPLATES: Final = TemplateProcess()
"""The one of this program."""

atexit.register(CHAT_TEMPLATES.close)


def _placeholder(value: object) -> str:
    """What transformers, too, shows a template in place of anything that is not JSON."""
    return f"<{type(value).__name__}>"


def _ending(code: int) -> str:
    if code == -signal.SIGPROF:
        return f"it takes more than {SECONDS:.0f} s of processor time"
    if code == -signal.SIGKILL:
        return f"it was ended after {WAITING_SECONDS:.0f} s, or by the system"
    return f"its process ended with {code}"


# The rest runs in the process.


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers each line until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the end of the input ends this one
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in requests:
        answers.write(json.dumps(_answered(line)).encode() + b"\n")
        answers.flush()


def _answered(line: bytes) -> dict[str, Any]:
    request, began = json.loads(line), time.process_time()
    try:
        with _limits(request["seconds"], len(line)):
            text = _compiled(request["template"]).render(**request["variables"])
        _check(text, len(line))
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory", "limit": True}
    except OverflowError as error:
        return {"error": f"it is too large: {error}", "limit": True}
    except Exception as error:  # a template may raise anything
        return {"error": str(error)[:1000] or type(error).__name__, "seconds": time.process_time() - began}
    return {"text": text, "seconds": time.process_time() - began}


def _check(text: str, request_bytes: int) -> None:
    if len(text) > TEXT_CHARACTERS + _LONG_TEXT * request_bytes:
        raise OverflowError(f"its text has {len(text)} characters")
    text.encode()  # a lone surrogate is an error of its own


@contextmanager
def _limits(seconds: float, request_bytes: int) -> Iterator[None]:
    """The timer ends the process, also inside one long operation; too much memory is a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = _size() + MEMORY_BYTES + _LONG_MEMORY * request_bytes
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _size() -> int:
    """Bytes of address space in use; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


@cache
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives to templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControlExtension]
    )
    environment.filters["tojson"] = _as_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _today,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here it is only its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """The built-in type with nothing else of it in reach."""

    def __call__(self, *values: Any, **named: Any) -> dict[Any, Any]:
        return dict(*values, **named)

    def fromkeys(self, *values: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*values)


class _Namespace(Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*values: Any, **named: Any) -> None:
        self, *rest = values
        found = dict(*rest, **named)
        for name in found:
            _refuse_private(name)
        Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no {name!r}: names must not begin with an underscore")


def _as_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _today(format: str) -> str:
    """The same day whenever it is asked, in one form, so that a template's tokens do not change overnight."""
    return "2024-01-01"


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
