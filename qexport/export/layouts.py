"""From the recipe's `export` to layouts."""

from __future__ import annotations

from qexport.architectures.structure import Structure
from qexport.errors import RecipeError
from qexport.export.layout import Layout
from qexport.export.safetensors_layout import SafetensorsLayout
from qexport.export.settings import ExportSettings, OnnxSettings, SafetensorsSettings, TgiSettings, VllmSettings
from qexport.export.tgi.layout import TgiLayout
from qexport.export.vllm.layout import VllmLayout
from qexport.tensors import Checkpoint, Outputs


def make_layout(settings: ExportSettings, outputs: Outputs, structure: Structure, checkpoint: Checkpoint) -> Layout:
    """The layout that a recipe asks for.

    Args:
        settings: one entry of the recipe's `export`.
        outputs: what the pass will yield.
        structure: the model's.
        checkpoint: the merged model.

    Raises:
        RecipeError: packages that the layout needs are not installed.
        CompatibilityError: the layout cannot carry the method or the model, with the reason.
        InputError: a file beside the weights, which the layout rewrites, is malformed.
    """
    match settings:
        case SafetensorsSettings():
            return SafetensorsLayout(settings, outputs, structure)
        case TgiSettings():
            return TgiLayout(settings, outputs, structure, checkpoint)
        case VllmSettings():
            return VllmLayout(settings, outputs, structure, checkpoint)
        case OnnxSettings():
            return _onnx_layout(settings, outputs, structure, checkpoint)


def _onnx_layout(settings: OnnxSettings, outputs: Outputs, structure: Structure, checkpoint: Checkpoint) -> Layout:
    """Its packages are an extra, so it is imported only where it is asked for."""
    try:
        from qexport.export.onnx.layout import OnnxLayout
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"the layout onnx needs the package {error.name}", where="export", mend="pip install 'qexport[onnx]'"
        ) from error
    return OnnxLayout(settings, outputs, structure, checkpoint)
