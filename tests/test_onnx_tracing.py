"""Tracing: without weights, with every size that may change left open, and leaving nothing changed behind."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import factories
from onnx_exports import CONFIGS, FAMILIES, exported
from qexport.architectures.architecture import Architecture
from qexport.export.onnx.tracing import trace
from test_gptq_factorization import peak_above_now

LARGE = factories.falcon_config(num_hidden_layers=1, hidden_size=9216, num_attention_heads=144, vocab_size=24576)


def replaceable() -> tuple[object, ...]:
    return (
        functional.scaled_dot_product_attention, modeling_llama.apply_rotary_pos_emb,
        set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS),
    )  # fmt: skip


@pytest.fixture(scope="module")
def around_a_trace() -> tuple[object, object]:
    """What tracing replaces, before and after; the trace imports the exporter's own modules and makes its tables."""
    before = replaceable()
    trace(Architecture(factories.llama_config(num_hidden_layers=1).to_dict()), torch.float32)
    return before, replaceable()


@pytest.mark.usefixtures("around_a_trace")
def test_memory_does_not_grow_with_the_weights() -> None:
    parameters = sum(torch.Size(shape).numel() for shape in Architecture(LARGE.to_dict()).structure.parameters.values())
    assert 4 * parameters > 4e9
    assert peak_above_now(lambda: trace(Architecture(LARGE.to_dict()), torch.float32)) < 200e6
    assert peak_above_now(lambda: torch.ones(60_000_000)) > 200e6


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_and_outputs_are_those_of_the_contract(family: str) -> None:
    session = exported(family, "gptq").model().session
    layers, mamba = range(CONFIGS[family].num_hidden_layers), family == "falcon h1"
    kinds = ("key", "value", "conv_state", "recurrent_state") if mamba else ("key", "value")
    tokens = ("input_ids", "attention_mask", "position_ids")
    given = [name for name in session.inputs if name in tokens]
    assert tuple(given) == tuple(name for name in tokens if name in given)
    assert {"input_ids", "attention_mask"} <= set(given)
    states = [f"{layer}.{kind}" for layer in layers for kind in kinds]
    assert list(session.inputs) == [*given, *(f"past_key_values.{state}" for state in states)]
    assert list(session.outputs) == ["logits", *(f"present.{state}" for state in states)]
    assert session.outputs["logits"].shape == (None, None, factories.VOCABULARY)
    for name, value in session.inputs.items():
        grows = name.endswith((".key", ".value"))
        assert [size is None for size in value.shape] == (
            [True, True] if name in tokens else [True, False, grows, False][: len(value.shape)]
        ), name


@pytest.mark.parametrize("family", ["falcon 7b", "falcon 40b"])
def test_falcons_heads_are_taken_apart_by_one_node(family: str) -> None:
    nodes = exported(family, "gptq").graph().nodes
    gathers = [node for node in nodes if node.op_type == "GatherND"]
    assert len(gathers) == 1, "that of the mask"
    thirds = [node for node in nodes if node.op_type == "Split" and len(node.outputs) == 3]
    assert len(thirds) == CONFIGS[family].num_hidden_layers


def test_transformers_is_left_as_it_was(around_a_trace: tuple[object, object]) -> None:
    before, after = around_a_trace
    assert before == after
