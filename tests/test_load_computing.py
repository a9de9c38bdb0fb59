"""`qexport.load` with kept weights and with torch's int4 kernel: the exact reading is the oracle of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import factories
import qexport
import stored_models
from qexport.errors import CompatibilityError, RecipeError
from qexport.reading import int4_kernel
from qexport.reading.int4_kernel import FEW_ROWS, check, int4_weight, largest_error, layer_obstacle
from qexport.reading.quantized_linear import QuantizedLinear
from qexport.tensors import GroupQuantized, RowQuantized
from quantized_models import QuantizedModel, gptq_method

CPU = torch.device("cpu")
IDS = torch.randint(factories.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
FEW = IDS[:1, :6]


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    found = model(input_ids=ids).logits
    assert isinstance(found, Tensor)
    return found


def layers(model: PreTrainedModel) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def kept(model: PreTrainedModel) -> int:
    """Bytes of the weights that are kept."""
    return sum(layer.kept_weight.nbytes for layer in layers(model) if layer.kept_weight is not None)


def grouped(bits: int = 4, group_size: int = 32, *, act_order: bool = False, seed: int = 0) -> GroupQuantized:
    """Random codes, scales and zero points of 48 outputs and 192 inputs."""
    outputs, inputs, generator = 48, 192, torch.Generator().manual_seed(seed)
    groups = inputs // group_size
    g_idx = torch.arange(inputs) // group_size
    return GroupQuantized(
        codes=torch.randint(2**bits, (outputs, inputs), generator=generator, dtype=torch.uint8),
        scales=(torch.rand(groups, outputs, generator=generator) * 0.02 + 0.001).half(),
        zeros=torch.randint(1, 2**bits, (groups, outputs), generator=generator, dtype=torch.uint8),
        g_idx=(g_idx[torch.randperm(inputs, generator=generator)] if act_order else g_idx).int(),
        bits=bits,
        group_size=group_size,
        sym=False,
        desc_act=act_order,
    )


def by_the_formula(weight: GroupQuantized) -> Tensor:
    """One value after another, in float32."""
    values = torch.empty(weight.codes.shape)
    for output, row in enumerate(weight.codes.tolist()):
        for column, code in enumerate(row):
            group = int(weight.g_idx[column])
            steps = torch.tensor(float(code - int(weight.zeros[group, output])))
            values[output, column] = steps * weight.scales[group, output].float()
    return values


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, 32), (4, 64), (8, 192)])
def test_codes_are_dequantized_by_the_formula(bits: int, group_size: int, act_order: bool) -> None:
    weight = grouped(bits, group_size, act_order=act_order)
    assert weight.in_order == (not act_order or group_size == 192)
    assert torch.equal(weight.dequantize(), by_the_formula(weight))
    part = weight.rows(16, 40)
    assert torch.equal(part.dequantize(torch.bfloat16), by_the_formula(weight)[16:40].bfloat16())


def test_one_input_of_another_group_is_seen() -> None:
    weight = grouped()
    g_idx = weight.g_idx.clone()
    g_idx[-1] = 0
    other = replace(weight, g_idx=g_idx)  # says that it has no activation order
    assert not other.in_order
    assert torch.equal(other.dequantize(), by_the_formula(other))


@pytest.mark.parametrize("quantization", stored_models.QUANTIZATIONS.values(), ids=stored_models.QUANTIZATIONS.keys())
@pytest.mark.parametrize(
    "config", [factories.llama_config(attention_bias=True), factories.gpt2_config()], ids=["llama", "gpt-2"]
)
def test_kept_weights_change_no_bit(config: Any, quantization: dict[str, Any], tmp_path: Path) -> None:
    stored_models.write(factories.build(config), tmp_path / "a", quantization)
    plain = qexport.load(tmp_path / "a", device="cpu", cache=None)
    keeping = qexport.load(tmp_path / "a", device="cpu")
    expected = logits(plain)
    for _ in range(2):
        assert torch.equal(logits(keeping), expected)
    assert kept(plain) == 0
    assert all(layer.kept_weight is not None for layer in layers(keeping))
    before = [layer.kept_weight for layer in layers(keeping)]
    logits(keeping)
    assert all(a is b for a, b in zip(before, (layer.kept_weight for layer in layers(keeping)), strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    QuantizedModel(factories.build(factories.llama_config())).write(tmp_path / "a")
    return tmp_path / "a"


def test_no_more_is_kept_than_allowed(folder: Path) -> None:
    whole = qexport.load(folder, device="cpu")
    expected = logits(whole)
    sizes = sorted(layer.kept_weight.nbytes for layer in layers(whole) if layer.kept_weight is not None)
    for allowed in (1, sum(sizes) - 1, sum(sizes)):
        model = qexport.load(folder, device="cpu", cache=f"{allowed} B")
        for _ in range(2):
            assert torch.equal(logits(model), expected)
        assert allowed - max(sizes) < kept(model) <= allowed or (allowed, kept(model)) == (1, 0)
    assert kept(model) == sum(sizes)
    assert model.get_memory_footprint() - qexport.load(folder, device="cpu").get_memory_footprint() == sum(sizes)


def test_another_dtype_gets_weights_of_its_own_and_the_room_of_the_old_ones(folder: Path) -> None:
    exact = qexport.load(folder, device="cpu", dtype=torch.float32)
    expected = logits(exact)
    model = qexport.load(folder, device="cpu", cache=f"{kept(exact)} B")
    logits(model)
    assert kept(model) == kept(exact) // 2
    nn.Module.to(model, dtype=torch.float32)
    assert kept(model) == 0
    assert torch.equal(logits(model), expected)
    assert kept(model) == kept(exact)


def test_a_weight_that_was_kept_in_inference_mode_serves_gradients(folder: Path) -> None:
    model = qexport.load(folder, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        model(input_ids=IDS)
    inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=inputs).logits.sum().backward()
    assert inputs.grad is not None
    assert bool(inputs.grad.abs().sum() > 0)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (4, 192), (3, 32), (2, 96)])
def test_the_kernel_multiplies_with_each_weight_within_the_rounding_of_its_scales(bits: int, group_size: int) -> None:
    """One input at a time is 1, so each output is one weight."""
    weight = grouped(bits, group_size)
    assert layer_obstacle(weight, CPU) is None
    used = int4_weight(weight).product(torch.eye(192, dtype=torch.bfloat16)).t().float()
    error = (used - by_the_formula(weight)).abs()
    assert bool((error <= largest_error(weight)).all())
    steps = weight.scales.t().float().repeat_interleave(group_size, 1)
    assert bool((largest_error(weight) < steps / 4).all()), "a code that is off by one would not be seen"


FAULTS: dict[str, Callable[[GroupQuantized], GroupQuantized]] = {
    "a code": lambda weight: replace(weight, codes=_changed(weight.codes, (5, 9))),
    "a zero point": lambda weight: replace(weight, zeros=_changed(weight.zeros, (1, 7))),
    "a scale": lambda weight: replace(weight, scales=_changed(weight.scales, (1, 7))),
    "order of inputs": lambda weight: replace(weight, codes=weight.codes.flip(1)),
    "groups": lambda weight: replace(weight, scales=weight.scales.roll(1, 0)),
}


def _changed(tensor: Tensor, place: tuple[int, int]) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = tensor[place] ^ 1 if tensor.dtype == torch.uint8 else tensor[place] * 1.1
    return tensor


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_kernel_that_computes_something_else_is_refused(
    fault: Callable[[GroupQuantized], GroupQuantized], monkeypatch: pytest.MonkeyPatch
) -> None:
    check.cache_clear()
    check(CPU, 64)
    check.cache_clear()
    monkeypatch.setattr(int4_kernel, "int4_weight", lambda weight: int4_weight(fault(weight)))
    with pytest.raises(CompatibilityError, match="computes something else"):
        check(CPU, 64)


def test_random_inputs_are_multiplied_within_the_bound() -> None:
    """By the bound of each weight, and one rounding of the output."""
    weight, inputs = grouped(), torch.randn(FEW_ROWS, 192, generator=torch.Generator().manual_seed(3)).bfloat16()
    found, exact = int4_weight(weight).product(inputs).double(), inputs.double() @ by_the_formula(weight).double().t()
    bound = inputs.double().abs() @ largest_error(weight).double().t() + exact.abs() * 2.0**-8
    assert bool(((found - exact).abs() <= bound).all())


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Mean KL divergence in nats a token."""
    own, other = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
    return float(nn.functional.kl_div(own, other, log_target=True, reduction="none").sum(-1).mean())


METHODS = {
    "w4": gptq_method(),
    "w4 asymmetric": gptq_method(sym=False),
    "w3 asymmetric": gptq_method(bits=3, sym=False),
    "w2 rows": gptq_method(bits=2, group_size=-1),
}


@pytest.mark.parametrize(
    "config", [factories.llama_config(attention_bias=True), factories.falcon_40b_config()], ids=["llama", "falcon"]
)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_the_model_is_as_far_from_float32_as_bfloat16_is(config: Any, method: Any, tmp_path: Path) -> None:
    QuantizedModel(factories.build(config), method=method).write(tmp_path / "a")
    model = qexport.load(tmp_path / "a", device="cpu", kernel="int4")
    wide, exact = (qexport.load(tmp_path / "a", device="cpu", dtype=dtype) for dtype in (torch.float32, None))
    floor, found = distance(logits(exact, FEW), logits(wide, FEW)), distance(logits(model, FEW), logits(wide, FEW))
    assert all(layer.int4_codes is not None for layer in layers(model)), "the kernel was not used"
    assert found < 2 * floor
    assert torch.equal(logits(model), logits(exact)), "many inputs at once are computed as with exact"


def test_the_kernel_generates_what_it_predicts(folder: Path) -> None:
    model = qexport.load(folder, device="cpu", kernel="int4")
    text = model.generate(FEW, do_sample=False, max_new_tokens=3, eos_token_id=-1)  # type: ignore[operator]
    assert text.shape == (1, 9)
    assert torch.equal(logits(model, text[:, :-1])[0, -3:].argmax(-1), text[0, -3:])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(method=gptq_method(bits=8)), "its codes have 8 bits"),
        (dict(method=gptq_method(desc_act=True)), "its groups follow activation order"),
        (dict(method=gptq_method(group_size=16)), "groups of 16 inputs are no multiples of 32"),
        (dict(special={"model.layers.0.mlp.up_proj": (8, 32)}), "its codes have 8 bits: model.layers.0.mlp.up_proj"),
    ],
    ids=["bits", "act-order", "groups", "one layer"],
)
def test_a_layer_that_the_kernel_cannot_serve_is_named(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    QuantizedModel(factories.build(factories.llama_config()), **options).write(tmp_path / "a")
    with pytest.raises(CompatibilityError, match="the kernel int4 cannot serve") as caught:
        qexport.load(tmp_path / "a", device="cpu", kernel="int4")
    assert why in str(caught.value)


def test_other_codes_and_shapes_are_obstacles() -> None:
    rows = RowQuantized(torch.zeros(16, 32, dtype=torch.int8), torch.ones(16))
    assert layer_obstacle(rows, CPU) == "its codes are not steps of a scale in groups of inputs"
    assert layer_obstacle(grouped().rows(0, 40), CPU) == "40 outputs are no multiple of 16"


def test_what_has_no_codes_or_another_dtype_is_refused(folder: Path, tmp_path: Path) -> None:
    factories.save(factories.build(factories.llama_config()), tmp_path / "dense")
    with pytest.raises(CompatibilityError, match="nothing to do: no layer has codes"):
        qexport.load(tmp_path / "dense", device="cpu", kernel="int4")
    with pytest.raises(CompatibilityError, match="multiplies bfloat16, and the model computes in float16"):
        qexport.load(folder, device="cpu", kernel="int4", dtype=torch.float16)
    model = qexport.load(folder, device="cpu", kernel="int4")
    nn.Module.to(model, dtype=torch.float32)
    with pytest.raises(CompatibilityError, match="the layer's inputs are float32"):
        logits(model, FEW)


def test_a_processor_without_the_kernel_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(CompatibilityError, match="torch has it for AVX2 and AVX512, this CPU has DEFAULT"):
        qexport.load(folder, device="cpu", kernel="int4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cache="2"), "'2' is not a size"),
        (dict(cache="0 GB"), "'0 GB' is not a size"),
        (dict(kernel="int8"), "the kernel 'int8' is not known"),
    ],
)
def test_settings_that_are_not_understood_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        qexport.load(tmp_path, device="cpu", **options)
