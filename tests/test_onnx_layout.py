"""The layout onnx, family by family and method by method, against transformers with the safetensors artifact's weights.

The weights are compared bit for bit, logits in float32 within 1e-4 of the largest, tokens one by one.
"""

from __future__ import annotations

from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import factories
from onnx_exports import (
    FAMILIES,
    METHODS,
    Export,
    Method,
    act_order,
    assert_same_model,
    assert_same_weights,
    deviation,
    export,
    exported,
    gptq,
    greedy,
    passed_once,
    prompts,
    run_pass,
    steps,
)
from qexport.artifact.packages import installed_packages
from qexport.errors import CompatibilityError
from qexport.reading.onnx.weights import OnnxWeights
from qexport.tensors import GroupQuantized, RowQuantized

ROUNDED_BY_OPERATORS = "nf4 bf16"
"""bitsandbytes rounds its products to the dtype that was merged; MatMulBnb4 keeps them in float32."""

PAIRS = sorted(
    {
        *product(FAMILIES, ("none bf16", "gptq")),
        *product(("llama", "falcon 7b"), METHODS),
        *product(("falcon 40b", "falcon h1", "gpt-2"), ("fp4", "int8", "gptq act-order asymmetric")),
    }
    - {("llama", "w8a8"), ("falcon 7b", "w8a8")}
)
"""Every family with codes and without, every method with two families. W8A8 rounds activations: see below."""

HALF = 0.01
"""Of the largest logit, in float16. A rounding adds up to 2**-11, some ten lie on the way through each of the one or
two blocks, and the differences of attention's and the norms' inputs come on top of these."""


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_weights_in_the_graph_are_those_of_the_safetensors_artifact(family: str, method: str) -> None:
    made = exported(family, method)
    assert list(made.weights()) == list(made.passed.structure.parameters)
    assert_same_weights(made, METHODS[method].merged)
    if method != ROUNDED_BY_OPERATORS:
        assert_same_weights(made, torch.float32)


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_prefill_and_decoding_are_those_of_transformers(family: str, method: str) -> None:
    assert_same_model(exported(family, method))


@pytest.mark.parametrize("name", ["onnx", "onnx-ir", "onnxscript", "onnxruntime"])
def test_the_manifests_packages_are_also_those_that_make_graphs(name: str) -> None:
    assert installed_packages()[name] == version(name)


@pytest.mark.parametrize("method", ["gptq 8 bits", "int8"])
def test_8_bits_are_two_nodes_at_level_0_with_the_very_codes(method: str, tmp_path: Path) -> None:
    done = passed_once("llama", method)
    whole = export(done, tmp_path, accuracy_level=4)
    pairs = exported("llama", method)
    found = [OnnxWeights(made.onnx, dtype=torch.float32) for made in (pairs, whole)]
    assert ["as 4 and 4" in weights.method for weights in found] == [True, False]
    assert found[0].layers.keys() == found[1].layers.keys()
    assert {layer.method for weights in found for layer in weights.layers.values()} == {method.partition(" ")[0]}
    for record in done.records:
        if not isinstance(record.value, GroupQuantized | RowQuantized):
            continue
        shift = 128 if isinstance(record.value, RowQuantized) else 0
        for weights in found:
            stored = weights.stored(record.name)
            assert isinstance(stored, GroupQuantized)
            assert np.array_equal(stored.codes.numpy(), record.value.codes.numpy().astype(np.int16) + shift)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_attention_is_exact_too(family: str) -> None:
    made = exported(family, "gptq", attention="fused")
    assert_same_model(made)
    names = {node.op_type for node in made.graph().nodes}
    assert "GroupQueryAttention" in names
    assert "Softmax" not in names


MANY_HEADS = factories.falcon_config(
    hidden_size=71 * 8, num_attention_heads=71, ffn_hidden_size=288, num_hidden_layers=1
)
WIDTH_96 = factories.llama_config(hidden_size=96, intermediate_size=192, num_hidden_layers=1)
ODD: dict[str, tuple[Any, Any]] = {
    "71 heads, act-order rows": (MANY_HEADS, act_order(group_size=-1, sym=False)),
    "71 heads, 8-bit rows": (MANY_HEADS, gptq(group_size=-1, bits=8)),
    "groups of 48, act-order": (WIDTH_96, act_order(group_size=48, sym=False)),
    "groups of 48, 2 bits": (WIDTH_96, gptq(group_size=48, bits=2, sym=False)),
    "groups of 512 and other bits": (
        factories.llama_config(intermediate_size=1024, tie_word_embeddings=True),
        gptq(overrides=[
            {"modules": "*.down_proj", "group_size": 512}, {"modules": "*.1.*.q_proj", "bits": 8},
            {"modules": "*.0.*.o_proj", "dense": True},
        ]),
    ),
    "a head with codes": (factories.llama_config(), gptq(lm_head=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes_and_groups(name: str, tmp_path: Path) -> None:
    made = export(run_pass(*ODD[name]), tmp_path)
    assert_same_weights(made)
    assert_same_model(made)


HALF_CONFIGS = {
    "llama": factories.llama_config(),
    "falcon 7b": factories.falcon_config(num_hidden_layers=1),
    "falcon rw": factories.falcon_rw_config(num_hidden_layers=1),
    "falcon h1": factories.falcon_h1_config(num_hidden_layers=1),
}


@pytest.mark.parametrize(
    ("family", "method"),
    [*product(("llama", "falcon 7b"), ("none fp16", "gptq", "gptq act-order asymmetric", "nf4", "int8")),
     ("falcon rw", "gptq"), ("falcon h1", "gptq")],
)  # fmt: skip
def test_float16_activations(family: str, method: str, tmp_path: Path) -> None:
    made = export(run_pass(HALF_CONFIGS[family], METHODS[method]), tmp_path, activations="float16")
    model, reference = made.model(), made.reference()
    assert model.dtype == torch.float16
    assert_same_weights(made, METHODS[method].merged)
    ids, mask = prompts()
    tokens = greedy(reference, ids, mask)[:, :8]
    difference = deviation(steps(model, ids, mask, tokens), steps(reference, ids, mask, tokens))
    assert 1e-6 < difference < HALF


@pytest.mark.parametrize("attention", ["plain", "fused"])
@pytest.mark.parametrize("family", ["llama", "falcon 7b", "falcon h1"])
def test_w8a8_rounds_each_tokens_inputs(family: str, attention: str) -> None:
    """An input that lies between two codes may fall to either side, and its token, with those after it, differs then.
    That is rare: most tokens are as near as in the other methods.
    """
    made = exported(family, "w8a8", attention=attention)
    assert_same_weights(made)
    ids, mask = prompts()
    exact, model = made.reference(), made.model()
    unrounded_logits = steps(exact, ids, mask, ids[:, :8])
    round_inputs(exact, made)
    wanted = torch.cat(steps(exact, ids, mask, ids[:, :8]))
    distances = (torch.cat(steps(model, ids, mask, ids[:, :8])) - wanted).abs().amax(1) / wanted.abs().amax()
    rounding = (torch.cat(unrounded_logits) - wanted).abs().amax(1) / wanted.abs().amax()
    assert float(distances.median()) < 1e-5 < 1e-3 < float(rounding.median())
    assert float((distances < 1e-4).float().mean()) > 0.8
    assert float(distances.max()) < float(rounding.max())


def round_inputs(model: nn.Module, made: Export) -> None:
    """Linears with codes as compressed-tensors computes them: one scale a token, sums of integers."""
    for record in made.passed.records:
        if isinstance(record.value, RowQuantized):
            linear = cast(nn.Linear, model.get_submodule(record.name.removesuffix(".weight")))
            linear.forward = integer_forward(record.value, linear.bias)  # type: ignore[method-assign]


def integer_forward(value: RowQuantized, bias: Tensor | None) -> Any:
    codes = value.codes.double().t()

    def forward(inputs: Tensor) -> Tensor:
        scales = inputs.abs().amax(-1, keepdim=True) / 127
        rounded = (inputs / scales.clamp(min=torch.finfo(torch.float32).tiny)).round()
        product = (rounded.double() @ codes).float() * scales * value.scales
        return product if bias is None else product + bias

    return forward


@pytest.mark.parametrize("family", ["mixtral", "qwen3 moe"])
def test_mixtures_of_experts_are_refused_before_anything_is_traced(family: str, tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match="mixtures of experts"):
        export(run_pass(factories.FAMILIES[family], METHODS["none bf16"]), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "config", "words"),
    [
        (
            METHODS["nf4"],
            factories.falcon_config(hidden_size=71 * 8, num_attention_heads=71),
            "does not divide 568 inputs",
        ),
        (gptq(bits=3), factories.llama_config(), "2, 4 and 8 bits"),
        (gptq(group_size=24), factories.llama_config(hidden_size=96, intermediate_size=96), "multiple of 16"),
    ],
)
def test_what_no_operator_can_hold_is_refused(method: Method, config: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match=words):
        export(run_pass(config, method), tmp_path)
