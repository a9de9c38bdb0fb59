"""Files that start Text Generation Inference: settings, a script, compose and Kubernetes."""

from __future__ import annotations

from typing import ClassVar, Final

from qexport.export.launch import Launch, render_launch_files

ENVIRONMENT: Final = "tgi.env"
UNKNOWN_CONTEXT: Final = 2048

_RESERVE: Final = 2 * 2**30
_GPU_BYTES: Final = 80 * 10**9
_LONGEST: Final = 8192
_ANSWER: Final = 1024
_FILES: Final = ("README.md", ENVIRONMENT, "docker-run.sh", "compose.yaml", "kubernetes.yaml")


class TgiLaunch(Launch):
    """The values in the launch files."""

    image: str
    """The server's container image."""

    environment_file: ClassVar[str] = ENVIRONMENT

    context: int
    """Tokens of prompt and answer that the model was made for."""

    kv_bytes: int
    """Bytes of keys and values for one token, in 16 bits."""

    weight_bytes: int
    """Size of the weights in the server's memory, over all shards."""

    degrees: list[int]
    """Tensor-parallel degrees that work."""

    quantize: str | None
    """The value of `--quantize`; None to omit it."""

    dtype: str | None
    """The value of `--dtype`; None if the method decides it."""

    @property
    def model(self) -> str:
        """The folder in the container, which the server gives for the model's name."""
        return f"/models/{self.label}"

    @property
    def total_tokens(self) -> int:
        """Tokens of prompt and answer that the server allows."""
        return min(self.context, _LONGEST)

    @property
    def input_tokens(self) -> int:
        """Tokens of the prompt that the server allows."""
        return self.total_tokens - max(1, min(_ANSWER, self.total_tokens // 4))

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


def launch_files(figures: TgiLaunch) -> dict[str, bytes]:
    """The files of the folder `launch`, by their name inside the artifact."""
    return render_launch_files("qexport.export.tgi", {name: f"{name}.jinja" for name in _FILES}, figures)
