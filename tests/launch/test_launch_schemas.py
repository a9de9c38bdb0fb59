"""`make test-launch`: launch files fit the schemas of Kubernetes, KServe and compose; planted faults do not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from qexport.export.launch import Launch
from qexport.export.tgi.launch import TgiLaunch
from qexport.export.vllm.launch import VllmLaunch
from qexport.release.launching import render

PYTHON = os.environ.get("QEXPORT_LAUNCH_PYTHON", "")
IMAGE = f"registry.example.com:5000/a/b:1.0@sha256:{64 * '0'}"
LAUNCHES: dict[str, Launch] = {
    "vllm": VllmLaunch(
        name="a-1.4.0+gptq-4bit.vllm", image=IMAGE, triton_image=IMAGE, max_model_len=None, dtype="bfloat16",
        degrees=[1, 2], rounded_by_amx=True,
    ),
    "vllm with a length": VllmLaunch(
        name="12", image=IMAGE, triton_image=IMAGE, max_model_len=64, dtype="float16", degrees=[1], rounded_by_amx=False
    ),
    "tgi": TgiLaunch(
        name="on", image=IMAGE, context=4096, kv_bytes=1000, weight_bytes=10**9, degrees=[1], quantize="gptq",
        dtype=None,
    ),
    "tgi sharded": TgiLaunch(
        name="no: 1.0", image=IMAGE, context=9999, kv_bytes=10**5, weight_bytes=10**12, degrees=[8], quantize=None,
        dtype="float16",
    ),
}  # fmt: skip

pytestmark = pytest.mark.skipif(not PYTHON, reason="QEXPORT_LAUNCH_PYTHON names no interpreter")


def written(name: str, folder: Path) -> Path:
    for path, content in render(LAUNCHES[name]).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder / "launch"


def problems(folder: Path) -> str:
    program = Path(__file__).with_name("schemas.py")
    done = subprocess.run([PYTHON, str(program), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", LAUNCHES)
def test_every_file_is_valid(name: str, tmp_path: Path) -> None:
    assert problems(written(name, tmp_path)) == ""


@pytest.mark.parametrize(
    ("name", "file", "old", "new"),
    [
        ("tgi", "kubernetes.yaml", "readinessProbe", "readynessProbe"),
        ("tgi", "kubernetes.yaml", "containerPort: 80", "containerPort: http"),
        ("vllm", "kserve.yaml", "  predictor:", "  predictors:"),
        ("vllm", "kserve.yaml", "    containers:", "    container:"),
        ("vllm", "kserve.yaml", "mountPath", "mountpath"),
        ("vllm", "compose.yaml", "healthcheck", "healthchecks"),
        ("tgi", "compose.yaml", "shm_size: 1g", "shm_size: [1]"),
    ],
)
def test_planted_faults_are_found(name: str, file: str, old: str, new: str, tmp_path: Path) -> None:
    path = written(name, tmp_path) / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert file in problems(path.parent)
