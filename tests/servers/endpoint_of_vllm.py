"""vLLM's own server on loopback, in the environment that `QEXPORT_VLLM_PYTHON` names."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import OK, HTTPConnection
from pathlib import Path

from qexport.runtimes import ServedDtype

STARTING_SECONDS = 900
_POLL_SECONDS = 0.5
_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
_OPTIONS = ["--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8"]


@contextmanager
def serving(python: str, folder: Path, dtype: ServedDtype, log: Path) -> Iterator[str]:
    """The address of a server with this folder, while the context lasts.

    Args:
        python: the interpreter of vLLM's environment.
        folder: what it serves.
        dtype: what it computes in.
        log: takes what it prints.
    """
    port = free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", dtype]
    command += [*_OPTIONS, "--host", "127.0.0.1", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | _SETTINGS
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        wait_until_ready(process, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + STARTING_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if is_ready(port):
            return
        time.sleep(_POLL_SECONDS)
    raise AssertionError(f"vLLM serves nothing: {log.read_text(errors='replace')[-4000:]}")


def is_ready(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == OK
    except OSError:
        return False
    finally:
        connection.close()
