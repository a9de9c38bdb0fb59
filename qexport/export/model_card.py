"""The README.md of an artifact."""

from __future__ import annotations

from collections.abc import Sequence

from qexport.tensors import W8A8, Dense, FourBit, Gptq, LlmInt8, Method, Origin


def model_card(origin: Origin, method: Method, notes: Sequence[str] = (), loading: str = "") -> str:
    """A short model card. Only a hub id can be named as the base model in the front matter.

    Args:
        origin: the base.
        method: how the weights are quantized.
        notes: what a server's user should know.
        loading: a section of its own, see `qexport.export.loaders`.
    """
    listed = "".join(f"- {note}\n" for note in notes)
    relation = "finetune" if isinstance(method, Dense) else "quantized"
    base = f"base_model: {origin.name}\nbase_model_relation: {relation}\n" if origin.kind == "hub" else ""
    tag, title, text = _described(method)
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{base}tags:\n- {tag}\n- qexport\n---\n\n"
        f"# {origin.name}, {title}\n\n"
        f"Made with qexport from {origin.name}: {text}.\n\n"
        "`qexport-manifest.json` says what this artifact was made from, how, and how far it is from the 16-bit model.\n"
        + (f"\n{loading}" if loading else "")
        + (f"\n## Serving\n\n{listed}" if notes else "")
    )


def _described(method: Method) -> tuple[str, str, str]:
    """A tag, a title, and what was done."""
    match method:
        case Gptq():
            groups = "one group per row" if method.group_size == -1 else f"groups of {method.group_size}"
            kind = "symmetric" if method.sym else "asymmetric"
            return "gptq", f"GPTQ {method.bits}-bit", f"{method.bits}-bit GPTQ codes in {groups}, {kind}"
        case FourBit():
            name = method.quant_type.upper()
            double = ", double quantization" if method.double_quant else ""
            return "bitsandbytes", name, f"{name} codes in blocks of {method.block_size}{double}"
        case LlmInt8():
            return "bitsandbytes", "LLM.int8", "int8 codes with one scale an output, for LLM.int8"
        case W8A8():
            return "compressed-tensors", "W8A8", "int8 weights with one scale an output, int8 activations when served"
        case Dense():
            return "merged", "16-bit", "the merged weights, not quantized"
