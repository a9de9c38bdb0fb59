"""The launch files: a script, docker compose, a Triton repository and KServe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qexport.export.model_files import render_launch_files

IMAGE: Final = "vllm/vllm-openai:v0.32.0"

_MODEL: Final = "/model"
_PORT: Final = 8000
_LENGTHS: Final = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
_FILES: Final = ("README.md", "vllm-serve.sh", "compose.yaml", "kserve.yaml")


@dataclass(frozen=True)
class VllmLaunch:
    """The values in the launch files.

    Attributes:
        name: of the model in requests.
        max_model_len: tokens of prompt and answer; None if the config does not limit them.
        dtype: what vLLM computes in.
        degrees: tensor-parallel degrees that work.
        image: the server's container image.
        model: the folder in the container.
        port: of the server.
    """

    name: str
    max_model_len: int | None
    dtype: str
    degrees: list[int]
    image: str = IMAGE
    model: str = _MODEL
    port: int = _PORT

    @property
    def arguments(self) -> dict[str, str]:
        """Flags of `vllm serve`."""
        length = {} if self.max_model_len is None else {"--max-model-len": str(self.max_model_len)}
        return {"--served-model-name": self.name, "--dtype": self.dtype, **length}


def max_model_len(config: Mapping[str, Any]) -> int | None:
    """The longest sequence, as vLLM derives it (`vllm/transformers_utils/model_arch_config_convertor.py`)."""
    lengths = [config[key] for key in _LENGTHS if isinstance(config.get(key), int)]
    return min(lengths, default=None)


def launch_files(figures: VllmLaunch) -> dict[str, bytes]:
    """The files of the folder `launch`, by their name inside the artifact."""
    triton = f"triton/{figures.name}"
    templates = {name: f"{name}.jinja" for name in _FILES}
    templates |= {f"{triton}/config.pbtxt": "config.pbtxt.jinja", f"{triton}/1/model.json": "model.json.jinja"}
    return render_launch_files("qexport.export.vllm", templates, figures)
