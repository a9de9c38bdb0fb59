"""Runs in the environment of llama.cpp: its own quantizer.

    python quantize_with_llama.py INPUT OUTPUT TYPE

TYPE is a name of `llama_ftype` without its prefix, such as Q4_K_M; F32 dequantizes.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp


def main(source: str, target: str, kind: str) -> int:
    """Quantizes one file."""
    settings = llama_cpp.llama_model_quantize_default_params()
    prefix = "LLAMA_FTYPE_ALL" if kind == "F32" else "LLAMA_FTYPE_MOSTLY"
    settings.nthread, settings.ftype, settings.allow_requantize = 1, getattr(llama_cpp, f"{prefix}_{kind}"), True
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
