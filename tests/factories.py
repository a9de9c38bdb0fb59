"""Tiny models, tokenizers and adapters for the tests. Everything is made from a seed, nothing is downloaded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from qexport.artifact.manifest import LISTING_NAME, MANIFEST_NAME
from qexport.artifact.roots import roots_path
from qexport.quantizing.gptq import Gptq
from qexport.quantizing.method import CalibrationSettings
from qexport.recipe import Recipe

VOCABULARY = 384

TEXT = [
    "The miller opened the sluice before dawn, and the wheel began to turn in the grey light.",
    "A release engineer compares every artifact with the reference before it is shipped.",
    "def area(width, height):\n    return width * height\n",
    "Le boulanger ferme sa boutique à midi ; la rue sent encore le pain chaud.",
    "Total: 12 boxes, 340 kg, delivered on 3 March to the warehouse in the harbour.",
]


def llama_config(**changes: Any) -> LlamaConfig:
    values: dict[str, Any] = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaConfig(**(values | changes))


def mistral_config(**changes: Any) -> MistralConfig:
    values: dict[str, Any] = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=256, sliding_window=16, head_dim=16,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return MistralConfig(**(values | changes))


def qwen2_config(**changes: Any) -> Qwen2Config:
    values: dict[str, Any] = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return Qwen2Config(**(values | changes))


def falcon_config(**changes: Any) -> FalconConfig:
    """Falcon 7B style: multi-query attention, parallel attention and MLP, rotary embeddings, no biases."""
    values: dict[str, Any] = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY,
        multi_query=True, parallel_attn=True, new_decoder_architecture=False, bias=False, alibi=False,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return FalconConfig(**(values | changes))


def falcon_40b_config(**changes: Any) -> FalconConfig:
    """Falcon 40B style: grouped keys and values, two layer norms in parallel."""
    return falcon_config(**(dict(new_decoder_architecture=True, num_kv_heads=2) | changes))


def falcon_rw_config(**changes: Any) -> FalconConfig:
    """Falcon RW style: ALiBi, attention and MLP one after the other, biases."""
    style: dict[str, Any] = dict(alibi=True, multi_query=False, parallel_attn=False, bias=True)
    return falcon_config(**(style | changes))


def falcon_h1_config(**changes: Any) -> FalconH1Config:
    """Attention and mamba side by side, with chunks shorter than the tests' windows and a multiplier for each part."""
    values: dict[str, Any] = GROUPED | dict(
        mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=16,
        ssm_multipliers=[0.9, 1.1, 0.8, 1.2, 0.7], mlp_multipliers=[0.9, 1.1], key_multiplier=0.9,
    )  # fmt: skip
    return FalconH1Config(**(values | changes))


def mixtral_config(**changes: Any) -> MixtralConfig:
    return MixtralConfig(**(GROUPED | dict(num_local_experts=4, num_experts_per_tok=2) | changes))


def qwen3_moe_config(**changes: Any) -> Qwen3MoeConfig:
    """The first block has no experts, the second has."""
    values: dict[str, Any] = GROUPED | dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=2
    )
    return Qwen3MoeConfig(**(values | changes))


def gpt2_config(**changes: Any) -> GPT2Config:
    values: dict[str, Any] = dict(
        n_embd=64, n_layer=2, n_head=4, n_positions=256, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0
    )
    return GPT2Config(**(values | changes))


_PLAIN: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY,
    max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
GROUPED = _PLAIN | dict(num_key_value_heads=2, head_dim=16)

FAMILIES: dict[str, PretrainedConfig] = {
    "falcon 7b": falcon_config(),
    "falcon 40b": falcon_40b_config(),
    "falcon rw": falcon_rw_config(),
    "falcon h1": falcon_h1_config(),
    "falcon 3": llama_config(head_dim=32),
    "llama": llama_config(),
    "mistral": mistral_config(),
    "qwen2": qwen2_config(),
    "qwen3": Qwen3Config(**GROUPED),
    "gemma 2": Gemma2Config(**GROUPED, sliding_window=16, query_pre_attn_scalar=16),
    "gemma 3": Gemma3TextConfig(
        **GROUPED, sliding_window=16, query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi 3": Phi3Config(**_PLAIN, num_key_value_heads=2),
    "gpt-neox": GPTNeoXConfig(**_PLAIN),
    "gpt-2": gpt2_config(),
    "mixtral": mixtral_config(),
    "qwen3 moe": qwen3_moe_config(),
}
"""A tiny model of each family that is supported by name."""


def with_blocks(config: PretrainedConfig, blocks: int) -> PretrainedConfig:
    """The first blocks of a model whose blocks are alike."""
    found = copy.deepcopy(config)
    found.num_hidden_layers = blocks
    kinds = getattr(found, "layer_types", None)
    if kinds is not None:
        assert len(set(kinds)) == 1
        found.layer_types = kinds[:blocks]
    return found


def build(config: PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model with random weights that are large enough for its logits to differ between tokens.

    The config is copied: saving a model writes its dtype into it, and a second model would then have other weights.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    assert isinstance(model, PreTrainedModel)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.08)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    torch.nn.Module.to(model, dtype=dtype)
    model.eval()
    return model


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """Writes the model with a tokenizer, a chat template and a generation config."""
    model.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, the same every time."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = (
        "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    return fast


def write_text(path: Path, *, passages: int = 40, seed: int = 0) -> Path:
    """A JSONL file of passages that differ with the seed."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for index in range(passages):
        picks = torch.randint(len(TEXT), (4,), generator=generator).tolist()
        text = f"Passage {seed}-{index}. " + " ".join(TEXT[pick] for pick in picks)
        lines.append(json.dumps({"id": f"{seed}-{index}", "text": text}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def gptq(recipe: Recipe) -> Gptq:
    """The recipe's settings of GPTQ."""
    assert isinstance(recipe.quantize, Gptq)
    return recipe.quantize


def calibration_of(recipe: Recipe) -> CalibrationSettings:
    """The recipe's calibration text."""
    found = gptq(recipe).calibration
    assert found is not None
    return found


def without_digests(artifact: str | Path) -> Path:
    """Removes what an artifact would be compared with, so that it is like a folder of another tool."""
    folder = Path(artifact)
    for path in (folder / MANIFEST_NAME, folder / LISTING_NAME, roots_path(folder)):
        path.unlink(missing_ok=True)
    return folder
