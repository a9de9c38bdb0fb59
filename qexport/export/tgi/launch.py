"""The launch files: docker run, an environment file, docker compose, Kubernetes; all from the artifact's figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qexport.export.tgi.config import num_kv_heads
from qexport.export.yaml_text import yaml_text

IMAGE: Final = "ghcr.io/huggingface/text-generation-inference:3.3.5"
FOLDER: Final = "launch"
ENVIRONMENT: Final = "tgi.env"

_MODEL: Final = "/model"
_KV_BYTES: Final = 2
_RESERVE: Final = 2 * 2**30
_GPU_BYTES: Final = 80 * 10**9
_LONGEST: Final = 8192
_UNKNOWN_CONTEXT: Final = 2048
_ANSWER: Final = 1024


@dataclass(frozen=True)
class Figures:
    """What the launch files are made from.

    Attributes:
        config: as `tgi_config` has made it.
        weight_bytes: of the weights in the server's memory, all shards together.
        degrees: tensor-parallel degrees that work.
        quantize: the value of `--quantize`, None where there is none.
        dtype: the value of `--dtype`, None where the method decides it.
    """

    config: Mapping[str, Any]
    weight_bytes: int
    degrees: list[int]
    quantize: str | None
    dtype: str | None

    @property
    def context(self) -> int:
        """Tokens of prompt and answer that the model was made for."""
        keys = ("max_position_embeddings", "n_positions", "max_seq_len")
        return next((int(self.config[key]) for key in keys if self.config.get(key)), _UNKNOWN_CONTEXT)

    @property
    def total_tokens(self) -> int:
        """Tokens of prompt and answer that the server allows."""
        return min(self.context, _LONGEST)

    @property
    def input_tokens(self) -> int:
        """Tokens of the prompt that the server allows."""
        return self.total_tokens - max(1, min(_ANSWER, self.total_tokens // 4))

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values for one token, in 16 bits."""
        config = self.config
        layers = config.get("num_hidden_layers") or config["n_layer"]
        heads = config.get("num_attention_heads") or config["n_head"]
        head_dim = config.get("head_dim") or (config.get("hidden_size") or config["n_embd"]) // heads
        return int(2 * layers * num_kv_heads(config) * head_dim * _KV_BYTES)

    def gpu_bytes(self, degree: int) -> int:
        """Memory that each of `degree` GPUs needs: its weights, one request of full length, and a reserve."""
        return (self.weight_bytes + self.kv_bytes * self.total_tokens) // degree + _RESERVE

    @property
    def num_shard(self) -> int:
        """The smallest degree that fits GPUs of 80 GB; the largest there is where none does."""
        return next((degree for degree in self.degrees if self.gpu_bytes(degree) <= _GPU_BYTES), self.degrees[-1])

    @property
    def environment(self) -> dict[str, str]:
        """The server's settings: each flag of the launcher is an environment variable."""
        values = {
            "MODEL_ID": _MODEL,
            "QUANTIZE": self.quantize,
            "DTYPE": self.dtype,
            "NUM_SHARD": str(self.num_shard),
            "MAX_INPUT_TOKENS": str(self.input_tokens),
            "MAX_TOTAL_TOKENS": str(self.total_tokens),
            "MAX_BATCH_PREFILL_TOKENS": str(self.input_tokens),
        }
        return {key: value for key, value in values.items() if value is not None}


def launch_files(figures: Figures) -> dict[str, bytes]:
    """The content of the folder `launch`, by the name inside the artifact."""
    files = {
        "README.md": _readme(figures),
        ENVIRONMENT: "".join(f"{key}={value}\n" for key, value in figures.environment.items()),
        "docker-run.sh": _docker_run(figures),
        "compose.yaml": yaml_text(_compose(figures)),
        "kubernetes.yaml": yaml_text(_deployment(figures), _service()),
    }
    return {f"{FOLDER}/{name}": text.encode("utf-8") for name, text in files.items()}


def _docker_run(figures: Figures) -> str:
    devices = "all" if figures.num_shard == 1 else str(figures.num_shard)
    return (
        "#!/bin/sh\n"
        "# MODEL_FOLDER is the artifact; without it, the folder above this script. PORT is the port of this machine.\n"
        "set -eu\n"
        'here=$(cd "$(dirname "$0")" && pwd)\n'
        'folder=$(cd "${MODEL_FOLDER:-$here/..}" && pwd)\n'
        f'exec docker run --rm --gpus {devices} --shm-size 1g -p "${{PORT:-8080}}:80" \\\n'
        f'    -v "$folder:{_MODEL}:ro" --env-file "$here/{ENVIRONMENT}" \\\n'
        f"    {IMAGE}\n"
    )


def _compose(figures: Figures) -> dict[str, Any]:
    device = {"driver": "nvidia", "count": figures.num_shard, "capabilities": ["gpu"]}
    service = {
        "image": IMAGE,
        "env_file": [ENVIRONMENT],
        "ports": ["${PORT:-8080}:80"],
        "volumes": [f"${{MODEL_FOLDER:-..}}:{_MODEL}:ro"],
        "shm_size": "1g",
        "deploy": {"resources": {"reservations": {"devices": [device]}}},
    }
    return {"services": {"tgi": service}}


def _deployment(figures: Figures) -> dict[str, Any]:
    health = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10}
    container = {
        "name": "tgi",
        "image": IMAGE,
        "env": [{"name": key, "value": value} for key, value in figures.environment.items()],
        "ports": [{"name": "http", "containerPort": 80}],
        "resources": {"limits": {"nvidia.com/gpu": figures.num_shard}},
        "startupProbe": {**health, "failureThreshold": 180},
        "readinessProbe": dict(health),
        "livenessProbe": {**health, "timeoutSeconds": 10, "failureThreshold": 6},
        "volumeMounts": [
            {"name": "model", "mountPath": _MODEL, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    volumes = [
        {"name": "model", "persistentVolumeClaim": {"claimName": "tgi-model", "readOnly": True}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
    ]
    labels = {"app": "tgi"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "tgi", "labels": dict(labels)},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": dict(labels)},
            "template": {
                "metadata": {"labels": dict(labels)},
                "spec": {"containers": [container], "volumes": volumes},
            },
        },
    }


def _service() -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "tgi"},
        "spec": {"selector": {"app": "tgi"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
    }


def _readme(figures: Figures) -> str:
    working = ", ".join(map(str, figures.degrees))
    memory = "\n".join(f"| {degree} | {figures.gpu_bytes(degree) / 1e9:.1f} GB |" for degree in figures.degrees)
    return (
        "# Serving this folder with Text Generation Inference\n\n"
        f"Image: `{IMAGE}`. Settings: `{ENVIRONMENT}`; each is a flag of the launcher.\n\n"
        "    sh launch/docker-run.sh\n"
        "    docker compose -f launch/compose.yaml up\n"
        "    kubectl apply -f launch/kubernetes.yaml\n\n"
        "The first two mount the folder above this one, or the one that the variable `MODEL_FOLDER` names, and answer\n"
        "at the port `PORT` (8080). Kubernetes mounts the volume claim `tgi-model`, which must hold the artifact.\n\n"
        f"`NUM_SHARD` may be: {working}. Memory of each GPU, for the weights, one request of full length and 2 GiB\n"
        "besides (what is left serves more requests at a time):\n\n"
        f"| NUM_SHARD | memory |\n|---|---|\n{memory}\n\n"
        f"A token of context takes {figures.kv_bytes:,} bytes of keys and values. The model was made for\n"
        f"{figures.context} tokens; the settings allow {figures.total_tokens}.\n"
    )
