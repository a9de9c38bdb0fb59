"""Runs in the environment of vLLM: serves a folder, writes what came out as JSON.

    python serve_with_vllm.py FOLDER REQUEST RESPONSE

REQUEST holds `prompts` (lists of token ids), `max_tokens` and `dtype`. RESPONSE holds one entry a prompt: the greedy
tokens, the two best log-probabilities of each, and the log-probability of each prompt token but the first; and
`replaced`, the kernels that vLLM has not for this CPU, or has wrong, whose products were computed in plain torch. All
else (config, loading, joining, repacking, scales) is vLLM's own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

LARGEST_INT8_ERROR = 0.01


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """The eight codes of each int32, the first in the lowest bits: [..., n] to [..., 8 * n]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).flatten(-2)


def cpu_gemm_wna16(
    activations: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> None:
    """What vLLM's operator of this name computes from its weights, which are stored in blocks of 16 outputs."""
    assert pack_factor == 8, isa_hint
    inputs, outputs = activations.shape[1], scales.shape[1]
    words = weight.view(outputs // 16, inputs, 2).permute(1, 0, 2).reshape(inputs, outputs // 8)
    points = torch.tensor(8) if zeros is None else unpacked(zeros).repeat_interleave(inputs // len(scales), 0)
    values = (unpacked(words) - points).float() * scales.float().repeat_interleave(inputs // len(scales), 0)
    result = activations.float() @ values
    out.copy_(result if bias is None else result + bias.float())


def replace_missing_kernel() -> bool:
    """vLLM builds its 4-bit operator for AVX-512 only. Elsewhere the one above takes its place."""
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return False
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(
        "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a!) output, Tensor scales, Tensor? zeros, Tensor? bias, "
        "int pack_factor, str isa_hint) -> ()"
    )
    library.impl("cpu_gemm_wna16", cpu_gemm_wna16, "CPU")
    globals()["library"] = library  # its operators last as long as it does
    return True


def replace_wrong_kernel() -> bool:
    """oneDNN's product of int8 matrices saturates on x86 CPUs without VNNI. There an exact one takes its place."""
    from vllm import _custom_ops as operators

    if int8_error(operators) < LARGEST_INT8_ERROR:
        return False

    def create(weight: torch.Tensor, scales: torch.Tensor, *_: Any) -> Any:
        inputs, outputs = weight.shape
        return SimpleNamespace(k=inputs, n=outputs, values=weight.double() * scales.view(1, -1).double())

    def multiply(handler: Any, codes: torch.Tensor, out: torch.Tensor, scales: torch.Tensor, *rest: Any) -> None:
        bias = rest[-1]
        result = codes.double() @ handler.values * scales.double()
        out.copy_(result if bias is None else result + bias.double())

    operators.create_onednn_scaled_mm, operators.onednn_scaled_mm = create, multiply
    return True


def int8_error(operators: Any) -> float:
    """How far vLLM's product of full-range int8 matrices is off, relative to its norm."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (64, 256), generator=generator, dtype=torch.int8)
    codes = torch.randint(-127, 128, (4, 256), generator=generator, dtype=torch.int8)
    scales, out = torch.ones(64, 1), torch.empty(4, 64)  # the handler points to the scales, and does not keep them
    handler = operators.create_onednn_scaled_mm(weight.t(), scales, out.dtype, True, False, 32)
    operators.onednn_scaled_mm(handler, codes, out, torch.ones(4, 1), None, None, None)
    exact = codes.double() @ weight.t().double()
    return float((out.double() - exact).norm() / exact.norm())


def serve(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """Greedy continuations of every prompt."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    replaced = {"4-bit": replace_missing_kernel(), "int8": replace_wrong_kernel()}
    from vllm import LLM, SamplingParams

    model = LLM(
        model=folder,
        dtype=request["dtype"],
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        seed=0,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=request["max_tokens"], prompt_logprobs=0, logprobs=2, ignore_eos=True
    )
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], sampling)
    return {
        "replaced": [name for name, was in replaced.items() if was],
        "answers": [described(output) for output in outputs],
    }


def described(output: Any) -> dict[str, Any]:
    """One answer as JSON values."""
    [completion] = output.outputs
    best = [sorted((entry.logprob for entry in step.values()), reverse=True)[:2] for step in completion.logprobs]
    known = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return {
        "tokens": list(completion.token_ids),
        "best": best,
        "prompt_logprobs": [entry[token].logprob for token, entry in known],
    }


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    Path(sys.argv[3]).write_text(json.dumps(serve(sys.argv[1], given)), encoding="utf-8")
