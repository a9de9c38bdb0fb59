"""The launch files: docker run, an environment file, docker compose, Kubernetes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qexport.export.model_files import render_launch_files
from qexport.export.tgi.config import num_kv_heads

IMAGE: Final = "ghcr.io/huggingface/text-generation-inference:3.3.5"
ENVIRONMENT: Final = "tgi.env"

_MODEL: Final = "/model"
_KV_BYTES: Final = 2
_RESERVE: Final = 2 * 2**30
_GPU_BYTES: Final = 80 * 10**9
_LONGEST: Final = 8192
_UNKNOWN_CONTEXT: Final = 2048
_ANSWER: Final = 1024
_FILES: Final = ("README.md", ENVIRONMENT, "docker-run.sh", "compose.yaml", "kubernetes.yaml")


@dataclass(frozen=True)
class TgiLaunch:
    """The values in the launch files.

    Attributes:
        config: the result of `tgi_config`.
        weight_bytes: size of the weights in the server's memory, over all shards.
        degrees: tensor-parallel degrees that work.
        quantize: the value of `--quantize`; None to omit it.
        dtype: the value of `--dtype`; None if the method decides it.
        image: the server's container image.
        model: the folder in the container.
        environment_file: the name of the file with the settings.
    """

    config: Mapping[str, Any]
    weight_bytes: int
    degrees: list[int]
    quantize: str | None
    dtype: str | None
    image: str = IMAGE
    model: str = _MODEL
    environment_file: str = ENVIRONMENT

    @property
    def context(self) -> int:
        """Tokens of prompt and answer that the model was made for."""
        return self._count("max_position_embeddings", "n_positions", "max_seq_len") or _UNKNOWN_CONTEXT

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
        layers = self._count("num_hidden_layers", "n_layer", "n_layers")
        heads = self._count("num_attention_heads", "n_head", "n_heads")
        head_dim = self._count("head_dim") or self._count("hidden_size", "n_embd", "d_model") // max(1, heads)
        return 2 * layers * num_kv_heads(self.config) * head_dim * _KV_BYTES

    def gpu_bytes(self, degree: int) -> int:
        """Bytes that each of `degree` GPUs needs: its weights, one request of full length, and a reserve."""
        return (self.weight_bytes + self.kv_bytes * self.total_tokens) // degree + _RESERVE

    @property
    def num_shard(self) -> int:
        """The smallest degree that fits GPUs of 80 GB, or the largest degree if none does."""
        return next((degree for degree in self.degrees if self.gpu_bytes(degree) <= _GPU_BYTES), self.degrees[-1])

    @property
    def environment(self) -> dict[str, str]:
        """The server's settings: each flag of the launcher is an environment variable."""
        values = {
            "MODEL_ID": self.model,
            "QUANTIZE": self.quantize,
            "DTYPE": self.dtype,
            "NUM_SHARD": str(self.num_shard),
            "MAX_INPUT_TOKENS": str(self.input_tokens),
            "MAX_TOTAL_TOKENS": str(self.total_tokens),
            "MAX_BATCH_PREFILL_TOKENS": str(self.input_tokens),
        }
        return {key: value for key, value in values.items() if value is not None}

    def _count(self, *keys: str) -> int:
        return next((int(self.config[key]) for key in keys if self.config.get(key)), 0)


def launch_files(figures: TgiLaunch) -> dict[str, bytes]:
    """The files of the folder `launch`, by their name inside the artifact."""
    return render_launch_files("qexport.export.tgi", {name: f"{name}.jinja" for name in _FILES}, figures)
