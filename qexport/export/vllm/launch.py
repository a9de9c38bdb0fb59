"""Files that start vLLM: a script, compose, KServe and a Triton repository."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from qexport.export.launch import Launch, render_launch_files

_LENGTHS: Final = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
_FILES: Final = ("README.md", "vllm-serve.sh", "compose.yaml", "kserve.yaml")


class VllmLaunch(Launch):
    """The values in the launch files."""

    image: str
    """The container image of vLLM."""

    triton_image: str
    """That of Triton with its vLLM backend."""

    model: ClassVar[str] = "/model"
    """The folder in the container."""

    port: ClassVar[int] = 8000

    max_model_len: int | None
    """Tokens of prompt and answer; None if the config does not limit them."""

    dtype: str
    """What vLLM computes in."""

    degrees: list[int]
    """Tensor-parallel degrees that work."""

    rounded_by_amx: bool
    """vLLM would round the inputs of layers to int8 on CPUs with AMX, see `vllm-serve.sh`."""

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
    triton = f"triton/{figures.label}"
    templates = {name: f"{name}.jinja" for name in _FILES}
    templates |= {f"{triton}/config.pbtxt": "config.pbtxt.jinja", f"{triton}/1/model.json": "model.json.jinja"}
    return render_launch_files("qexport.export.vllm", templates, figures)
