"""Checkpoints with the shapes of Falcon-7B, or of another model, and random weights, each with a LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import FalconConfig, PretrainedConfig

from qexport.architectures.architecture import Architecture
from qexport.architectures.structure import Structure

RANK = 16
_POOL = 1 << 24


def write_checkpoint(work: Path, blocks: int, *, end: int = 11) -> Structure:
    """Falcon-7B's shapes, with a LoRA on every `query_key_value`; see `write_shapes`.

    Args:
        work: where to write the folders.
        blocks: Falcon-7B has 32.
        end: the token that ends a text.
    """
    config = FalconConfig(
        hidden_size=4544, num_attention_heads=71, num_hidden_layers=blocks, vocab_size=65024, multi_query=True,
        parallel_attn=True, bias=False, alibi=False, new_decoder_architecture=False, bos_token_id=end, eos_token_id=end,
        architectures=["FalconForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    return write_shapes(work, config, "query_key_value")


def write_shapes(work: Path, config: PretrainedConfig, adapted: str) -> Structure:
    """The folders `base`, in shards and without a tokenizer, and `adapter`.

    Args:
        work: where to write them.
        config: of the model.
        adapted: the last part of the names of the layers that the LoRA changes.
    """
    base = work / "base"
    config.save_pretrained(base)
    structure = Architecture(json.loads((base / "config.json").read_text())).structure
    _write_base(base, structure)
    _write_adapter(work / "adapter", structure, adapted)
    return structure


def _write_base(base: Path, structure: Structure) -> None:
    """One shard for each block and one for the rest. All weights are cut from one pool of random values; those of norms
    are around one.
    """
    pool = torch.empty(_POOL, dtype=torch.bfloat16).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in structure.parameters.items():
        block = next((index for index, block in enumerate(structure.blocks, 1) if name.startswith(f"{block}.")), 0)
        shards.setdefault(f"model-{block:05d}.safetensors", {})[name] = shape
    for number, (shard, shapes) in enumerate(shards.items()):
        save_file({name: _cut(pool, shape, number) for name, shape in shapes.items()}, base / shard, {"format": "pt"})
    weight_map = {name: shard for shard, shapes in shards.items() for name in shapes}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _cut(pool: torch.Tensor, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Values from the pool over and over, from another start for each seed."""
    result = torch.empty(shape, dtype=pool.dtype)
    flat, start = result.view(-1), seed * 1_000_003 % _POOL
    for position in range(0, flat.numel(), _POOL):
        piece = flat[position : position + _POOL]
        piece.copy_(pool.roll(start)[: len(piece)])
    return result if len(shape) > 1 else result.add_(1)


def _write_adapter(folder: Path, structure: Structure, adapted: str) -> None:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": [adapted]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for linears in structure.linears.values():
        for linear in linears:
            if linear.name.endswith(f".{adapted}"):
                prefix = f"base_model.model.{linear.name}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, linear.in_features, generator=generator) * 0.01
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(linear.out_features, RANK, generator=generator) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
