"""Programs as in a fresh interpreter that has imported torch and transformers, in forks of one process.

The imports take some six seconds of processor time. The process has imported nothing else: neither qexport nor what
tests import. It has another seed of Python's hashes than the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ended:
    """Exit code and outputs of a program."""

    code: int
    out: str
    err: str


class Fresh:
    """The process; it is started with the first program."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, program: str, *arguments: str) -> Ended:
        """Runs the source of a program, which finds the arguments in `sys.argv[1:]`."""
        if self._process is None:
            paths = os.pathsep.join(filter(None, sys.path))
            seed = 1 + (os.environ.get("PYTHONHASHSEED") == "1")
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": str(seed)},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([program, arguments]) + "\n")
        self._process.stdin.flush()
        return Ended(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()


def serve() -> None:
    import transformers.modeling_utils  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        program, arguments = json.loads(line)
        print(json.dumps(ended(program, arguments)), file=answers, flush=True)


def ended(program: str, arguments: list[str]) -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os._exit(executed(program, arguments))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        return code, out.read().decode(), err.read().decode()


def executed(program: str, arguments: list[str]) -> int:
    sys.argv = ["-c", *arguments]

    def execute() -> int:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
        return 0

    return exit_code(execute)


def exit_code(call: Callable[[], int]) -> int:
    """What a call in a fork returns, 1 with a traceback after any exception; both outputs are written out."""
    try:
        code = call()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    del sys.path[0]  # the folder of the tests, which a fresh interpreter would not have first
    serve()
