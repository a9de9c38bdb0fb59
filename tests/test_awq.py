"""AWQ: its bits against a plain unpacker, its search against a plain loop, its folds against the model's own bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PretrainedConfig

import factories
from qexport.architectures.architecture import Architecture
from qexport.architectures.folds import (
    MOST,
    Fold,
    Gains,
    agreed,
    folded_inputs,
    folded_outputs,
    folds,
    room,
    shown_by_vector,
)
from qexport.errors import CompatibilityError, InputError
from qexport.formats import awq, reader_of
from qexport.quantizing.awq import Awq
from qexport.quantizing.awq_pass import candidates, search, solve_scaled
from qexport.quantizing.layer import Hessian
from qexport.quantizing.method import PassInputs
from qexport.quantizing.solver import Options
from qexport.tensors import GroupQuantized, TensorRecord, TensorSpec
from test_gptq import calibration, checkpoint

MHA = factories.llama_config(num_key_value_heads=4)
FOLDED = {
    "llama": (MHA, 8),
    "llama, shared heads": (factories.llama_config(), 6),
    "mistral": (factories.mistral_config(), 6),
    "qwen2": (factories.qwen2_config(num_key_value_heads=4), 8),
    "qwen3": (factories.FAMILIES["qwen3"], 6),
    "falcon 7b": (factories.falcon_config(), 2),
    "falcon 40b": (factories.falcon_40b_config(), 4),
    "falcon rw": (factories.falcon_rw_config(), 4),
    "gemma 2": (factories.FAMILIES["gemma 2"], 2),
    "gemma 3": (factories.FAMILIES["gemma 3"], 2),
}
"""Each with the folds of its two blocks."""


def oracle(tensors: dict[str, np.ndarray], group_size: int) -> np.ndarray:
    """The matrix [out, in] that a file means, with a loop over its nibbles: AutoAWQ's order of eight outputs."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    qweight, qzeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
    inputs, outputs = qweight.shape[0], scales.shape[1]
    matrix = np.zeros((outputs, inputs), np.float32)
    for i in range(inputs):
        for word in range(outputs // 8):
            code_word, zero_word = int(qweight[i, word]) % 2**32, int(qzeros[i // group_size, word]) % 2**32
            for nibble in range(8):
                o = 8 * word + order[nibble]
                code, zero = code_word >> 4 * nibble & 15, zero_word >> 4 * nibble & 15
                matrix[o, i] = (code - zero) * np.float32(scales[i // group_size, o])
    return matrix


def codes_of(outputs: int, inputs: int, group_size: int, seed: int) -> GroupQuantized:
    generator = torch.Generator().manual_seed(seed)
    groups = inputs // group_size
    return GroupQuantized(
        codes=torch.randint(16, (outputs, inputs), generator=generator).to(torch.uint8),
        scales=(torch.rand(groups, outputs, generator=generator) + 0.1).half(),
        zeros=torch.randint(16, (groups, outputs), generator=generator).to(torch.uint8),
        g_idx=(torch.arange(inputs) // group_size).to(torch.int32),
        bits=4,
        group_size=group_size,
        sym=False,
        desc_act=False,
    )


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([8, 32]), st.integers(0, 99))
def test_the_bits_mean_what_a_plain_unpacker_reads(words: int, groups: int, group_size: int, seed: int) -> None:
    codes = codes_of(8 * words, groups * group_size, group_size, seed)
    packed = awq.pack(codes)
    assert {name: (tuple(each.shape), each.dtype) for name, each in packed.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in awq.packed_specs(codes.spec).items()
    }
    expected = oracle({name: each.numpy() for name, each in packed.items()}, group_size)
    assert np.array_equal(codes.dequantize().numpy(), expected)
    read = awq.unpack(packed, group_size)
    assert all(torch.equal(getattr(read, name), getattr(codes, name)) for name in ("codes", "scales", "zeros", "g_idx"))


def test_another_order_of_the_nibbles_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = codes_of(8, 8, 8, 0)
    monkeypatch.setattr(awq, "_ORDER", (0, 1, 2, 3, 4, 5, 6, 7))
    expected = oracle({name: each.numpy() for name, each in awq.pack(codes).items()}, 8)
    assert not np.array_equal(codes.dequantize().numpy(), expected)


CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 3}, {"bits": None}, {"version": "gemv"}, {"version": None}, {"zero_point": False}, {"group_size": 0},
        {"group_size": "64"}, {"modules_to_not_convert": "lm_head"}, {"modules_to_not_convert": ["(a+)+"]},
    ],
    ids=str,
)  # fmt: skip
def test_other_configs_are_refused(change: dict[str, Any]) -> None:
    reader_of(CONFIG)
    with pytest.raises(InputError):
        reader_of(CONFIG | change)


def structure(config: PretrainedConfig) -> Any:
    return Architecture(config.to_dict()).structure


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FOLDED)
def test_folding_changes_no_bit_of_what_the_model_computes(family: str, dtype: torch.dtype) -> None:
    config, count = FOLDED[family]
    found = folds(structure(config))
    assert len(found) == count
    model = factories.build(config, dtype=dtype).eval()
    ids = torch.randint(factories.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        fold_model(model.state_dict(), found)
        after = model(input_ids=ids).logits
        assert torch.equal(before, after)
        weight = model.state_dict()[f"{found[0].consumers[0]}.weight"]
        weight[:, 0] *= 2
        assert not torch.equal(after, model(input_ids=ids).logits)


def fold_model(state: dict[str, Tensor], found: tuple[Fold, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    for fold in found:
        channels = len(state[fold.parameters[0]])
        exponents = torch.randint(-3, 4, (channels,), generator=generator)
        for name in fold.parameters:
            if name in state:
                state[name].copy_(folded_outputs(state[name], exponents))
        for name in fold.consumers:
            state[f"{name}.weight"].copy_(folded_inputs(state[f"{name}.weight"], exponents))


@pytest.mark.parametrize("family", sorted(set(factories.FAMILIES) - set(FOLDED) - {"falcon 3"}))
def test_other_families_have_no_folds(family: str) -> None:
    assert folds(structure(factories.FAMILIES[family])) == ()


@given(st.integers(-MOST, MOST), st.sampled_from([torch.float16, torch.bfloat16]), st.integers(0, 99))
def test_there_is_room_for_exact_division(exponent: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(3, 20, generator=generator) * 10.0 ** torch.randint(-7, 5, (20,), generator=generator)).to(
        dtype
    )
    low, high = room(values)
    exponents = torch.full((20,), exponent).clamp(low, high)
    divided = values * (-exponents).exp2().to(dtype)
    assert torch.equal(divided * exponents.exp2().to(dtype), values)
    assert bool(divided.isfinite().all() | ~values.isfinite().all())


def test_a_search_finds_what_a_plain_loop_finds() -> None:
    weight, inputs = layer()
    hessian, options = hessian_of(inputs), Options(4, 16, "original", False, 0.01, search=True)
    least, most = torch.full((32,), -MOST), torch.full((32,), MOST)
    best, chosen = plain_error(weight, inputs, torch.zeros(32)), None
    sizes = inputs.square().mean(0).sqrt().log2()
    for step in range(1, 10):
        for offset in (0, 0.25, 0.5, 0.75):
            scales = sizes * step / 10
            exponents = (scales - (scales.max() + scales.min()) / 2 + offset).round().clamp(-MOST, MOST)
            if (error := plain_error(weight, inputs, exponents)) < best:
                best, chosen = error, exponents
    found = search(weight, hessian.matrix(), options, least, most)
    assert chosen is not None
    assert found is not None
    assert torch.equal(found.float(), chosen)
    assert best < 0.7 * plain_error(weight, inputs, torch.zeros(32))


def layer() -> tuple[Tensor, Tensor]:
    """A weight [24, 32], and inputs [200, 32] of which a few are large."""
    generator = torch.Generator().manual_seed(3)
    weight, inputs = torch.randn(24, 32, generator=generator), torch.randn(200, 32, generator=generator)
    inputs[:, [3, 17, 20]] *= 30
    return weight, inputs


def hessian_of(inputs: Tensor) -> Hessian:
    hessian = Hessian(inputs.shape[1], torch.device("cpu"))
    hessian.add(inputs)
    return hessian


def plain_error(weight: Tensor, inputs: Tensor, exponents: Tensor) -> float:
    """The squared error of the outputs, with a loop over outputs and groups."""
    factors, rounded = 2.0**exponents, torch.empty_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], 16):
            part = slice(start, start + 16)
            values = weight[row, part] * factors[part]
            high = max(float(values.max()), 0.0)
            low = min(float(values.min()), -high / 14)
            scale = float(torch.tensor((high - low) / 15).half())
            zero = min(max(round(-low / scale), 1), 15)
            rounded[row, part] = (((values / scale).round() + zero).clamp(0, 15) - zero) * scale / factors[part]
    return float(((rounded - weight) @ inputs.t()).square().sum())


def test_exponents_stay_in_their_bounds_and_are_tried_once() -> None:
    squares = torch.tensor([1.0, 1e6, 1e-6, 4.0])
    least, most = torch.tensor([-1, 0, -2, 0]), torch.tensor([1, 0, 2, 0])
    tried = list(candidates(squares, least, most))
    assert len({tuple(each.tolist()) for each in tried}) == len(tried) > 2
    assert all(bool(((least <= each) & (each <= most)).all()) for each in tried)


def test_codes_show_every_exponent_that_they_have() -> None:
    """A column that is lost in rounding has none: nobody could check it."""
    weight, inputs = layer()
    weight[:, 20] = 1e-4
    bounds = torch.full((32,), -MOST), torch.full((32,), MOST)
    options = {"a": Options(4, 16, "original", False, 0.01, search=True)}
    found = solve_scaled({"a": weight}, hessian_of(inputs), options, "error", bounds)["a"]
    assert found.exponents is not None
    assert int(found.exponents[20]) == 0
    assert int(found.exponents[3]) > 0
    shown = Gains.of(found.quantized.dequantize(), weight, 0).shown()
    assert torch.equal(agreed(found.exponents, [shown]), found.exponents)


def records(config: PretrainedConfig, **changes: Any) -> tuple[dict[str, Tensor], dict[str, TensorRecord]]:
    """A model some of whose channels are large, and what AWQ makes of it."""
    model = factories.build(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("norm" in name or ".ln_" in name) and name.endswith("weight"):
                parameter[::7] *= 12
            if name.endswith(("up_proj.weight", "v_proj.weight")):
                parameter[::9] *= 8
    method = Awq.model_validate({"method": "awq", "group_size": 32, "calibration": {"source": "unused"}} | changes)
    source = checkpoint(config, model)
    outputs = method.plan(source)
    inputs = PassInputs(source, outputs, calibration(), torch.bfloat16, torch.device("cpu"), Path("/tmp"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, {record.name: record for record in method.quantize(inputs)}


@pytest.mark.parametrize("family", ["llama", "falcon 40b", "gemma 3"])
def test_what_sources_are_divided_by_is_in_the_columns_of_their_consumers(family: str) -> None:
    config, _ = FOLDED[family]
    state, made = records(config)
    divided = 0
    for fold in folds(structure(config)):
        record, wanted = made[fold.parameters[0]].value, state[fold.parameters[0]]
        if isinstance(record, Tensor):
            exponents = shown_by_vector(record, wanted).divided
            assert torch.equal(folded_outputs(wanted, exponents), record)
        else:
            continue
        divided += int(exponents.count_nonzero())
        for name in fold.consumers:
            layer = made[f"{name}.weight"]
            assert isinstance(layer.value, GroupQuantized)
            assert layer.layer is not None
            assert layer.layer.method == "awq"
            shown = Gains.of(layer.value.dequantize(), state[f"{name}.weight"].float(), 0).shown()
            assert torch.equal(agreed(exponents, [shown]), exponents) or len(fold.consumers) > 1
    assert divided or family == "gemma 3"


def test_scales_lower_the_error_of_the_outputs() -> None:
    losses = []
    for scale in (True, False):
        _, made = records(MHA, scale=scale, clip=False)
        losses.append([record.layer.loss for record in made.values() if record.layer and record.layer.loss is not None])
    assert sum(losses[0]) < 0.8 * sum(losses[1])


def test_a_module_that_is_skipped_takes_its_fold_with_it() -> None:
    state, made = records(MHA, skip_modules=["*.k_proj"])
    for block in (0, 1):
        name = f"model.layers.{block}.input_layernorm.weight"
        assert torch.equal(made[name].value, state[name])  # type: ignore[arg-type]
    config = awq.AwqFormat(32).quantization_config(
        {name: _spec(record) for name, record in made.items()}, structure(MHA)
    )
    assert config["modules_to_not_convert"] == [f"model.layers.{block}.self_attn.k_proj" for block in (0, 1)]
    assert reader_of(config).claimed(structure(MHA)) == {record.layer.name for record in made.values() if record.layer}


def _spec(record: TensorRecord) -> Any:
    value = record.value
    return TensorSpec(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value.spec  # type: ignore[union-attr]


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(CompatibilityError, match=r"skip_modules: '\*\.x' matches no linear layer"):
        records(MHA, skip_modules=["*.x"])


@pytest.mark.parametrize(("width", "fitting"), [(192, "32, 64"), (48, "none; leave these layers out")])
def test_a_group_size_that_does_not_divide_names_those_that_awq_takes(width: int, fitting: str) -> None:
    config = factories.llama_config(hidden_size=width, intermediate_size=192)
    with pytest.raises(CompatibilityError) as caught:
        Awq(group_size=128).plan(checkpoint(config, factories.build(config)))
    assert str(caught.value).partition("\n")[0].endswith(f"sizes that fit them all: {fitting}")


def test_a_family_without_folds_says_so() -> None:
    config = factories.gpt2_config()
    plan = Awq(group_size=32).plan(checkpoint(config, factories.build(config)))
    assert any("no weights are scaled" in note for note in plan.notes)
