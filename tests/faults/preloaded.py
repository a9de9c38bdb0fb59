"""A process that has imported everything, and forks for each command line that it is given. Started with the shim.

Each line of stdin is a JSON object: `arguments` of the program, `fault` (arguments of the shim's `fault_arm`, or null),
`fork`, and `plant` (the name of a function in plants.py that breaks the code on purpose, or null). The answer is a line
with the exit code, or minus the signal; the number of operations that counted; and what was written to stderr.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import tempfile
from typing import Any

import torch

import qexport.pipeline  # noqa: F401 - imported before the first fork
from faults import plants
from onnx_exports import traced_once
from qexport.cli import main

LIMIT = 120
"""Seconds after which a run counts as hanging."""

SHIM = ctypes.CDLL(None)
SHIM.fault_arm.argtypes = [ctypes.c_char_p, *[ctypes.c_int] * 2, ctypes.c_long, *[ctypes.c_int] * 3]
SHIM.fault_count.restype = ctypes.c_long


def serve() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with traced_once():
        for line in sys.stdin:
            print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)


def answer(arguments: list[str], fault: list[Any] | None, fork: bool, plant: str | None) -> dict[str, Any]:
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as counted:
        own = os.dup(2)
        os.dup2(told.fileno(), 2)
        if fork:
            code = in_child(arguments, fault, plant, counted.fileno())
        else:
            code = main(arguments)
            gc.freeze()  # a collection would copy every page in each child
        os.dup2(own, 2)
        os.close(own)
        told.seek(0)
        counted.seek(0)
        return {"code": code, "count": int(counted.read() or 0), "told": told.read().decode(errors="replace")}


def in_child(arguments: list[str], fault: list[Any] | None, plant: str | None, counted: int) -> int:
    child = os.fork()
    if not child:
        gc.disable()
        signal.alarm(LIMIT)
        code = 97
        try:
            if plant:
                getattr(plants, plant)()
            if fault:
                below, log, *rest = fault
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666) if log else -1
                SHIM.fault_arm(os.fsencode(below), *rest, descriptor)
            code = main(arguments)
        finally:
            SHIM.fault_disarm()
            os.write(counted, str(SHIM.fault_count()).encode())
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    serve()
