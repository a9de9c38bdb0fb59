"""llama.cpp: logits of every position of a GGUF file, through llama-cpp-python."""

from __future__ import annotations

import collections
import ctypes
import re
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

_FLOAT32 = "float32"
_LEAST_TOKENS = 32
"""That the BLAS backend takes at once."""

_FILE_TYPES = {"0": "float32", "1": "float16", "32": "bfloat16"}
"""What a file's matrices are multiplied in, by its `general.file_type`. All others round the inputs to Q8_0."""

_TENSORS = re.compile(r"- type +(\S+): +(\d+) tensors")
_REPACKED = re.compile(r"(REPACK|AMX) model buffer size = +([\d.]+) MiB")
"""Matrices in an order of their own, for kernels that take several rows at once, or for the CPU's matrix unit."""


class Model:
    """See `answering`.

    As it is served, llama.cpp rounds the inputs of quantized matrices to 8 bits. In float32 it keeps them: its BLAS
    backend dequantizes the matrices for 32 tokens and more at a time, so shorter texts are filled up behind their end.

    Args:
        folder: of the artifact.
        dtype: `float32`, or anything else for the way it is served.
        longest: the most tokens of a window, or of a prompt with its continuation.
    """

    def __init__(self, folder: str, dtype: str, longest: int) -> None:
        self._exact, self._longest, self._lines = dtype == _FLOAT32, longest, []  # type: bool, int, list[str]
        self._logged = llama_cpp.llama_log_callback(self._log)  # kept, since C has only a pointer to it
        llama_cpp.llama_log_set(self._logged, ctypes.c_void_p(0))
        if self._exact and not _has_blas():
            raise RuntimeError("this build has no BLAS and rounds inputs: build it with GGML_BLAS=ON, or omit dtype")
        options: dict[str, Any] = {"flash_attn": not self._exact}
        if self._exact:
            _keep_plain_buffers()
            options |= {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        path, size = _model_file(Path(folder)), max(longest, _LEAST_TOKENS) + 1
        self._model = llama_cpp.Llama(
            str(path), n_ctx=size, n_batch=size, n_ubatch=size, logits_all=True, verbose=True, **options
        )
        llama_cpp.llama_log_set(self._logged, ctypes.c_void_p(0))  # in place of the package's own
        if self._exact and self._rounds_experts():
            raise RuntimeError("llama.cpp rounds the inputs of a mixture's experts, with BLAS too: omit dtype")

    def _log(self, level: int, text: bytes, data: Any) -> None:
        line = text.decode("utf-8", "replace")
        self._lines.append(line)
        sys.stderr.write(line)

    def _rounds_experts(self) -> bool:
        """Whether there are experts that are not in float32: the BLAS backend does not compute their products."""
        metadata = self._model.metadata
        experts = int(metadata.get(f"{metadata.get('general.architecture')}.expert_count", "0"))
        return experts > 0 and _FILE_TYPES.get(metadata.get("general.file_type", "")) != _FLOAT32

    def facts(self) -> dict[str, Any]:
        """The version, how tensors are stored, and what the products are computed in."""
        log = "".join(self._lines)
        kinds = collections.Counter({name: int(count) for name, count in _TENSORS.findall(log)})
        repacked = ", ".join(f"{mebibytes} MiB ({kernels})" for kernels, mebibytes in _REPACKED.findall(log))
        stored = _FILE_TYPES.get(self._model.metadata.get("general.file_type", ""), "q8_0")
        return {
            "version": llama_cpp.__version__,
            "kernels": dict(kinds),
            "dtype": _FLOAT32 if self._exact else stored,
            "arguments": {
                "blas": str(_has_blas()),
                "repacked": repacked or "none",
                "cache": "f32" if self._exact else "f16",
                "system": llama_cpp.llama_print_system_info().decode().strip(" |"),
            },
        }

    def score(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities of what follows each token but the last, float32 [tokens - 1, vocabulary]."""
        logits = self._logits(ids)[:-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.ascontiguousarray(logits.astype(np.float32))

    def continued(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """The greedy continuation of each prompt."""
        return [self._continue(ids, new) for ids in prompts]

    def _continue(self, ids: list[int], new: int) -> list[int]:
        """In float32 the whole text is computed anew for each token, since a single one would be rounded."""
        last, tokens = self._logits(ids)[-1], list[int]()
        while len(tokens) < new:
            tokens.append(int(last.argmax()))
            if len(tokens) == new:
                break  # nothing follows the last one
            if self._exact:
                last = self._logits([*ids, *tokens])[-1]
            else:
                self._model.eval(tokens[-1:])
                last = self._model.scores[self._model.n_tokens - 1]
        return tokens

    def _logits(self, ids: list[int]) -> np.ndarray:
        """float32 [tokens, vocabulary]. No token sees those behind it."""
        filling = ids[-1:] * max(0, _LEAST_TOKENS - len(ids)) if self._exact else []
        self._model.reset()
        self._model.eval([*ids, *filling])
        found: np.ndarray = self._model.scores[: len(ids)]
        return found

    def tokenized(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text, special ones in it and around it included."""
        return [list(self._model.tokenize(text.encode("utf-8"), add_bos=True, special=True)) for text in texts]


def _model_file(folder: Path) -> Path:
    """Of several files the first, by whose name llama.cpp finds the others."""
    path = folder / "model.gguf"
    return path if path.is_file() else next(iter(sorted(folder.glob("model-00001-of-*.gguf"))), path)


def _has_blas() -> bool:
    """Whether ggml was built with its BLAS backend."""
    folder = Path(llama_cpp.__file__).with_name("lib")
    found = next((path for path in folder.iterdir() if re.fullmatch(r"(lib)?ggml\.(so|dylib|dll)", path.name)), None)
    if found is None:
        return False
    library = ctypes.CDLL(str(found))
    library.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    return library.ggml_backend_reg_by_name(b"BLAS") is not None


def _keep_plain_buffers() -> None:
    """Matrices in buffers of other kernels are computed by those, which round. `Llama` has no argument for that."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def plain() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = plain
