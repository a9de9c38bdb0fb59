"""Families that differ in more than tests/factories.py shows: in frequencies, in dtypes, in a forward of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, GPTJConfig, Mamba2Config, OlmoConfig, Phi3Config, PretrainedConfig

import factories
import onnx_served
from onnx_exports import open_graph
from qexport.architectures.architecture import Architecture
from qexport.architectures.structure import parse_config
from qexport.errors import CompatibilityError
from qexport.export.onnx.attention import refuse_unfused
from qexport.export.onnx.interception import switching_length
from qexport.export.onnx.tracing import layer_caches, trace
from qexport.reading.onnx.model import OnnxCausalLM

VOCABULARY = factories.VOCABULARY
SIZES: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCABULARY, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
SHORT_TEXT = 16
LONG_AND_SHORT: dict[str, Any] = dict(
    rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=SHORT_TEXT,
    short_factor=[1.0] * 8, long_factor=[2.0 + step for step in range(8)],
)  # fmt: skip
LONGROPE = Phi3Config(**SIZES, original_max_position_embeddings=SHORT_TEXT, rope_parameters=LONG_AND_SHORT)
DYNAMIC = factories.llama_config(rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0))


def as_json(config: PretrainedConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(config.to_json_string())
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("attention", ["plain", "fused"])
def test_longrope_takes_its_long_factors_where_the_text_is_long(
    tmp_path: Path, attention: onnx_served.Attention
) -> None:
    folder = onnx_served.write(tmp_path / "tiny", LONGROPE, attention)
    graph = open_graph(folder.path)
    ids = torch.randint(1, VOCABULARY, (1, 2 * SHORT_TEXT), generator=torch.Generator().manual_seed(0))
    for length in (1, SHORT_TEXT, SHORT_TEXT + 1, 2 * SHORT_TEXT):
        expected, found = (model(input_ids=ids[:, :length]).logits for model in (folder.model, graph))
        assert relative(found, expected) < 1e-4, length
    assert relative(_decoded(graph, ids), _decoded(folder.model, ids)) < 1e-4
    assert switching_length(parse_config(as_json(LONGROPE))) == SHORT_TEXT


@torch.no_grad()
def _decoded(model: Any, ids: Tensor) -> Tensor:
    """The logits of a text that grows past the short factors, whose cache stays as it was made."""
    past, logits = None, list[Tensor]()
    for part in (ids[:, : SHORT_TEXT - 2], *ids[:, SHORT_TEXT - 2 :].split(1, 1)):
        output = model(input_ids=part, past_key_values=past, use_cache=True)
        past, logits = output.past_key_values, [*logits, output.logits]
    return torch.cat(logits, 1)


def test_frequencies_that_grow_with_the_text_are_refused_before_anything_is_traced() -> None:
    with pytest.raises(CompatibilityError, match="rotary frequencies of the kind dynamic"):
        layer_caches(Architecture(as_json(DYNAMIC)), torch.float32)
    several = factories.FAMILIES["gemma 3"].to_dict()
    several["rope_parameters"]["full_attention"] = LONG_AND_SHORT
    with pytest.raises(CompatibilityError, match="default, longrope"):
        layer_caches(Architecture(several), torch.float32)


def test_heads_that_fused_attention_cannot_take_are_refused_before_anything_is_traced() -> None:
    narrow, wide = (
        layer_caches(Architecture(as_json(factories.llama_config(head_dim=size))), torch.float32) for size in (12, 24)
    )
    refuse_unfused(wide)
    with pytest.raises(CompatibilityError, match="a multiple of 8, not 12"):
        refuse_unfused([*wide, *narrow])
    with pytest.raises(CompatibilityError, match="not 12 and 24"):
        refuse_unfused([(narrow[0][0], wide[0][1])])


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(hidden_size=64, n_layer=1, n_head=4, vocab_size=VOCABULARY),
        GPTJConfig(n_embd=64, n_layer=1, n_head=4, n_positions=64, rotary_dim=8, vocab_size=VOCABULARY),
        Mamba2Config(hidden_size=64, num_hidden_layers=1, num_heads=8, head_dim=16, vocab_size=VOCABULARY),
    ],
    ids=lambda config: config.model_type,
)
def test_a_family_with_a_forward_of_its_own_is_refused_in_one_line(config: PretrainedConfig) -> None:
    with pytest.raises(CompatibilityError) as refused:
        trace(Architecture(as_json(config)), torch.float32)
    assert config.model_type in str(refused.value.where)
    assert refused.value.mend
    assert "\n" not in refused.value.what


def test_far_positions_are_as_exact_in_float16_as_near_ones(tmp_path: Path) -> None:
    folder = onnx_served.write(tmp_path / "tiny", factories.llama_config(), activations=torch.float16)
    graph = open_graph(folder.path)
    ids = torch.randint(1, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
    near, far = (_at_distance(folder.model, graph, ids, distance) for distance in (1, 200))
    assert near < 5e-3
    assert far < 2 * near


@torch.no_grad()
def _at_distance(reference: Any, graph: OnnxCausalLM, ids: Tensor, distance: int) -> float:
    """Relative error with so many positions from each token to the next."""
    positions = torch.arange(ids.shape[1])[None] * distance
    expected, found = (model(input_ids=ids, position_ids=positions).logits for model in (reference, graph))
    return relative(found, expected)


def test_angles_that_a_family_leaves_in_float32_turn_float16_states(tmp_path: Path) -> None:
    folder = onnx_served.write(tmp_path / "tiny", OlmoConfig(**SIZES), "fused", activations=torch.float16)
    ids = torch.randint(1, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
    graph = open_graph(folder.path)
    assert _at_distance(folder.model, graph, ids, 1) < 5e-3
