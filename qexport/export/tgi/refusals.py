"""What TGI cannot serve, said before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from qexport.errors import CompatibilityError, listed
from qexport.export.tgi.families import OWN_MODELS, Backend, backend
from qexport.export.tgi.kernels import Codes, fault
from qexport.export.tgi.linears import ServedLinear
from qexport.formats import Format, FourBitFormat, GptqFormat, LlmInt8Format, MergedFormat, W8A8Format

CUTLASS_MULTIPLE: Final = 16

_EIGHTY: Final = 80


def refuse_family(config: Mapping[str, Any], method: Format) -> None:
    """Holds the family against TGI's list of models, and the method against what runs the family.

    Raises:
        CompatibilityError: TGI would refuse to load the model, or compute something else.
    """
    model_type, runs = config["model_type"], backend(config)
    if runs is None:
        raise CompatibilityError(
            f"TGI 3.3 has no model for {model_type}, and transformers 4.51, which it falls back on, does not know it",
            where="config.json: model_type",
            mend="serve it with vLLM: choose the layout vllm",
        )
    reason = _method_fault(model_type, runs, method)
    if reason:
        raise CompatibilityError(
            f"TGI 3.3 does not serve {model_type} with this method: {reason}",
            where="quantize: method",
            mend="use method: none for this layout, or serve it with vLLM: choose the layout vllm",
        )
    if faults := falcon_faults(config):
        raise CompatibilityError(
            "TGI 3.3 reads this kind of Falcon wrongly",
            where=listed(faults),
            mend="serve it with vLLM: choose the layout vllm",
        )


def _method_fault(model_type: str, runs: Backend, method: Format) -> str | None:
    if isinstance(method, MergedFormat):
        return None
    if runs is not Backend.OWN:
        return None if isinstance(method, LlmInt8Format) else f"it is run by {runs.value}, which takes 16-bit weights"
    return OWN_MODELS[model_type].prequantized if isinstance(method, GptqFormat | W8A8Format) else None


def falcon_faults(config: Mapping[str, Any]) -> list[str]:
    """Variants of Falcon that flash_rw_modeling.py takes for another one."""
    if config["model_type"] != "falcon" or config["alibi"]:
        return []
    new, layers = config["new_decoder_architecture"], config["num_hidden_layers"]
    faults = []
    if not new and not config["multi_query"]:
        faults.append("multi_query: false: queries, keys and values lie head by head, TGI reads them one after another")
    if new and not config["parallel_attn"]:
        faults.append("parallel_attn: false is not known together with new_decoder_architecture")
    if layers == _EIGHTY and (not new or config["num_ln_in_parallel_attn"] != 2):
        faults.append("80 layers are taken for Falcon-180B, with two layer norms in a layer")
    return faults


def gptq_faults(linears: Sequence[ServedLinear], codes: Codes) -> list[str]:
    """The layers that no kernel of TGI computes."""
    return [f"{linear.name}: {reason}" for linear in linears if (reason := fault(codes, linear))]


def w8a8_faults(linears: Sequence[ServedLinear], dense: Sequence[str]) -> list[str]:
    """The layers that TGI's int8 kernel does not take, and those that are quantized in part.

    Source: `layers/compressed_tensors/loader.py`, which looks up the first of the joined modules for all of them, and
    `w8a8_int.py`; CUTLASS wants rows of 16 bytes.
    """
    faults = []
    for linear in linears:
        left = [module for module in linear.modules if module in dense]
        if left and len(left) < len(linear.modules):
            faults.append(f"{linear.name}: TGI joins these layers, and only {', '.join(left)} is not quantized")
        elif not left and any(count % CUTLASS_MULTIPLE for count in linear.shape):
            faults.append(f"{linear.name}: {linear.shape} are no multiples of {CUTLASS_MULTIPLE}")
    return faults


def refuse_dtype(dtype: torch.dtype) -> None:
    """Refuses weights in float32: the launcher's `--dtype` knows float16 and bfloat16 (`launcher/src/main.rs`).

    Raises:
        CompatibilityError: always for float32.
    """
    if dtype == torch.float32:
        raise CompatibilityError(
            "TGI serves 16-bit weights, not float32", where="merge: dtype", mend="set merge.dtype to bfloat16"
        )


def refuse_quantized(faults: Sequence[str]) -> None:
    """Refuses quantized layers that TGI cannot serve.

    Raises:
        CompatibilityError: there are faults; all are listed.
    """
    if faults:
        raise CompatibilityError(
            f"TGI 3.3 cannot serve {len(faults)} of the quantized layers as the recipe wants them",
            where=listed(faults),
            mend="quantize all linears of the blocks, and only those, with the same bits and a group_size of 64 or 128 "
            "(4 bits fit most shapes), or choose another layout",
        )


def flag(method: Format) -> str | None:
    """The value of `--quantize` that the launch files give; None for 16-bit weights."""
    return f"bitsandbytes-{method.quant_type}" if isinstance(method, FourBitFormat) else method.quant_method
