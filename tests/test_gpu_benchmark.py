"""The script that a GPU is measured with, on tiny models and the CPU: what it writes, whatever happens to its jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent.parent / "benchmarks/gpu.sh"


def ran(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPT), "--device", "cpu", "--tiny", "--scratch", str(folder), *options]
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_every_job_ends_and_is_in_the_table(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    ended = ran(tmp_path, "--output", str(output))
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(output.read_text())
    assert {name: job["ended"] for name, job in found["jobs"].items()} == dict.fromkeys(found["jobs"], "finished")
    assert found["jobs"]["gptq llama-8b"]["measured"]
    assert 0 < found["jobs"]["gptq llama-8b"]["largest_loss"] < 0.1
    assert all(f"| {name} | finished |" in ended.stdout for name in found["jobs"])
    assert "tiny models" in ended.stdout


def test_jobs_without_time_are_stopped_and_said_to_be(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    ended = ran(tmp_path, "--output", str(output), "--budget", "0")
    assert ended.returncode == 0, ended.stderr
    jobs = json.loads(output.read_text())["jobs"]
    assert {job["ended"] for job in jobs.values()} == {"stopped, its time was over"}
