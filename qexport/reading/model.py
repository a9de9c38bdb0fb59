"""`qexport.load`: a finished artifact as a model of transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from qexport.architectures.devices import find_device
from qexport.hidden_packages import hidden
from qexport.reading.stored_model import model_folder, open_stored


@hidden("kernels")
def load(path: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in a finished folder, ready for `generate`.

    Quantized layers keep the tensors of the file, so the model takes the memory of the artifact; each forward
    dequantizes one weight after the other. The experts of a mixture are the exception: transformers holds them in one
    parameter, so they are dequantized here and take the memory of a dense model. Neither bitsandbytes nor gptqmodel is
    needed, and nothing from the folder is executed.

    Args:
        path: an artifact of qexport (of several layouts, the folder of one of them), or a folder of another maker in
            one of the formats: dense, AutoGPTQ v1, bitsandbytes, compressed-tensors; or an ONNX graph, which ONNX
            Runtime computes.
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:1`.
        dtype: to compute in; the dtype of the artifact's dense weights where None. A graph has its own.

    Raises:
        RecipeError: the device is not there, the extra `onnx` is not installed, or a graph computes in another dtype.
        InputError: a file is missing or malformed, or the tensors are not those of the model.
        CompatibilityError: transformers does not know the family.
    """
    folder, where = model_folder(Path(path)), find_device(device)
    with open_stored(folder, dtype=torch.float32) as artifact:
        artifact.check_complete()
        return artifact.model(device=where, dtype=dtype)
