"""The launch files: a script, compose, a Triton repository and KServe; made from the artifact's figures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qexport.export.yaml_text import yaml_text

IMAGE: Final = "vllm/vllm-openai:v0.32.0"
FOLDER: Final = "launch"
SCRIPT: Final = "vllm-serve.sh"

_MODEL: Final = "/model"
_MOUNTED_BY_KSERVE: Final = "/mnt/models"
_PORT: Final = 8000
_LENGTHS: Final = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
_NAME_LIMIT: Final = 63 - len("-predictor")  # which KServe adds
_TRITON_CONFIG: Final = """backend: "vllm"

instance_group [
  {
    count: 1
    kind: KIND_MODEL
  }
]
"""


@dataclass(frozen=True)
class Figures:
    """What the launch files are made from.

    Attributes:
        name: of the model, as requests say it.
        max_model_len: tokens of prompt and answer; None where the config does not say it.
        dtype: what vLLM computes in.
        degrees: tensor-parallel degrees that work.
    """

    name: str
    max_model_len: int | None
    dtype: str
    degrees: list[int]

    @property
    def arguments(self) -> dict[str, str]:
        """Flags of `vllm serve`."""
        length = {} if self.max_model_len is None else {"--max-model-len": str(self.max_model_len)}
        return {"--served-model-name": self.name, "--dtype": self.dtype, **length}


def served_name(origin: str) -> str:
    """A name that requests, Triton and KServe all take: small letters, digits and dashes, a letter first."""
    words = re.sub(r"[^a-z0-9]+", "-", origin.rpartition("/")[2].lower().removesuffix(".gguf")).strip("-")
    name = words if words[:1].isalpha() else f"model-{words}"
    return name[:_NAME_LIMIT].strip("-")


def max_model_len(config: Mapping[str, Any]) -> int | None:
    """The longest sequence, as vLLM derives it (`vllm/transformers_utils/model_arch_config_convertor.py`)."""
    lengths = [config[key] for key in _LENGTHS if isinstance(config.get(key), int)]
    return min(lengths, default=None)


def launch_files(figures: Figures) -> dict[str, bytes]:
    """The content of the folder `launch`, by the name inside the artifact."""
    triton = f"triton/{figures.name}"
    files = {
        "README.md": _readme(figures),
        SCRIPT: _script(figures),
        "compose.yaml": yaml_text(_compose(figures)),
        "kserve.yaml": yaml_text(_inference_service(figures)),
        f"{triton}/config.pbtxt": _TRITON_CONFIG,
        f"{triton}/1/model.json": json.dumps(_engine_arguments(figures), indent=2) + "\n",
    }
    return {f"{FOLDER}/{name}": text.encode("utf-8") for name, text in files.items()}


def _script(figures: Figures) -> str:
    arguments = "".join(f"    {flag} {value} \\\n" for flag, value in figures.arguments.items())
    return (
        "#!/bin/sh\n"
        "# MODEL_FOLDER is the artifact; without it, the folder above this script. Further flags are passed on.\n"
        "set -eu\n"
        'here=$(cd "$(dirname "$0")" && pwd)\n'
        'exec vllm serve "${MODEL_FOLDER:-$here/..}" \\\n'
        f'{arguments}    --tensor-parallel-size "${{TENSOR_PARALLEL_SIZE:-1}}" --port "${{PORT:-{_PORT}}}" "$@"\n'
    )


def _flags(figures: Figures) -> list[str]:
    return [word for flag, value in figures.arguments.items() for word in (flag, value)]


def _compose(figures: Figures) -> dict[str, Any]:
    device = {"driver": "nvidia", "count": "${TENSOR_PARALLEL_SIZE:-1}", "capabilities": ["gpu"]}
    health = f"import urllib.request; urllib.request.urlopen('http://localhost:{_PORT}/health')"
    parallel = ["--tensor-parallel-size", "${TENSOR_PARALLEL_SIZE:-1}"]
    service = {
        "image": IMAGE,
        "command": ["--model", _MODEL, *_flags(figures), *parallel],
        "ports": [f"${{PORT:-{_PORT}}}:{_PORT}"],
        "volumes": [f"${{MODEL_FOLDER:-..}}:{_MODEL}:ro"],
        "ipc": "host",
        "healthcheck": {
            "test": ["CMD", "python3", "-c", health],
            "interval": "10s",
            "start_period": "30m",
        },
        "deploy": {"resources": {"reservations": {"devices": [device]}}},
    }
    return {"services": {"vllm": service}}


def _inference_service(figures: Figures) -> dict[str, Any]:
    probe = {"httpGet": {"path": "/health", "port": _PORT}, "periodSeconds": 10}
    container = {
        "name": "kserve-container",
        "image": IMAGE,
        "args": ["--model", _MOUNTED_BY_KSERVE, *_flags(figures)],
        "env": [{"name": "STORAGE_URI", "value": f"pvc://vllm-model/{figures.name}"}],
        "ports": [{"containerPort": _PORT, "protocol": "TCP"}],
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "startupProbe": {**probe, "failureThreshold": 180},
        "readinessProbe": dict(probe),
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    volumes = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}]
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": figures.name},
        "spec": {"predictor": {"containers": [container], "volumes": volumes}},
    }


def _engine_arguments(figures: Figures) -> dict[str, Any]:
    """Of vLLM's engine, as Triton's backend passes them on."""
    length = {} if figures.max_model_len is None else {"max_model_len": figures.max_model_len}
    return {"model": _MODEL, "dtype": figures.dtype, **length, "tensor_parallel_size": 1}


def _readme(figures: Figures) -> str:
    working = ", ".join(map(str, figures.degrees))
    return (
        "# Serving this folder with vLLM\n\n"
        f"Made for vLLM 0.32 (image `{IMAGE}`). Requests name the model `{figures.name}`.\n\n"
        f"    sh launch/{SCRIPT}\n"
        "    docker compose -f launch/compose.yaml up\n"
        "    kubectl apply -f launch/kserve.yaml\n\n"
        "The first two serve the folder above this one, or the one that the variable `MODEL_FOLDER` names, at the\n"
        f"port `PORT` ({_PORT}) with `TENSOR_PARALLEL_SIZE` (1) GPUs, which may be: {working}. KServe copies the\n"
        f"folder `{figures.name}` of the volume claim `vllm-model`: put the artifact's files there, or name another\n"
        "place in `STORAGE_URI` (`oci://`, `s3://`, `hf://`).\n\n"
        "Triton serves the repository `launch/triton` with its vLLM backend, in an image that holds a vLLM that\n"
        f"reads the artifact, and finds the artifact at `{_MODEL}`:\n\n"
        f'    docker run --rm --gpus all --shm-size 1g -p 8000:8000 -v "$PWD:{_MODEL}:ro" \\\n'
        '        -v "$PWD/launch/triton:/models:ro" nvcr.io/nvidia/tritonserver:VERSION-vllm-python-py3 \\\n'
        "        tritonserver --model-repository /models\n"
    )
