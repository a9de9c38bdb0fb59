"""Rounded activations, against vLLM's int8 linear written out: integer codes, an integer product, then the scales."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import factories
import stored_models
from qexport.architectures.activation_rounding import round_blocks, round_inputs, round_tokens
from qexport.architectures.runner import BlockRunner
from qexport.architectures.sending import ReceivedWeights, SentModel
from qexport.errors import InputError
from qexport.formats.compressed_tensors.reading import CompressedTensorsRules
from qexport.formats.stored_weight import input_roundings
from qexport.reading.safetensors_weights import SafetensorsWeights
from qexport.tensors.input_rounding import InputRounding

CPU = torch.device("cpu")
IDS = torch.arange(48).reshape(2, 24) * 7 % 384


def int8_product(inputs: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """`dynamic_scaled_int8_quant` and `cutlass_scaled_mm`: scale = absmax / 127, `cvt.rni`, int32, two scales."""
    tokens = inputs.reshape(-1, inputs.shape[-1])
    absmax = tokens.abs().amax(1, keepdim=True)
    rounded = torch.round(tokens * (127 / absmax)).to(torch.int64)
    product = (rounded @ codes.to(torch.int64).t()).double()
    return (product * (absmax.double() / 127) * scales.t()).reshape(*inputs.shape[:-1], -1).to(inputs.dtype)


class ServedLinear(nn.Module):
    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.codes, self.scales = codes, scales.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return int8_product(inputs, self.codes, self.scales)


def activations(**changes: Any) -> dict[str, Any]:
    """The `quantization_config` of W8A8, with what llm-compressor and qexport write of activations, changed."""
    [group] = stored_models.W8A8["config_groups"].values()
    token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True, **changes}
    return {**stored_models.W8A8, "config_groups": {"group_0": {**group, "input_activations": token}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = factories.build(factories.llama_config(), dtype=torch.float32)
    return stored_models.write(model, tmp_path_factory.mktemp("w8a8"), activations())


@torch.no_grad()
def test_every_layer_computes_vllms_int8_product(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    unrounded, outputs = dict[str, Tensor](), dict[str, Tensor]()

    def watch(module: str, linear: nn.Module) -> None:
        linear.register_forward_pre_hook(lambda _, inputs: unrounded.update({module: inputs[0]}), prepend=True)
        linear.register_forward_hook(lambda _, __, output: outputs.update({module: output}))

    with SafetensorsWeights(folder, dtype=torch.float32) as source:
        modules = input_roundings(source.layers)
        runner = BlockRunner(source.architecture, source, dtype=torch.float32, device=CPU)
        runner.round_inputs(modules)
        with runner.whole() as model:
            for module in modules:
                watch(module, model.get_submodule(module))
            model(IDS, use_cache=False)
    assert len(modules) == len(outputs) == 14
    for module in modules:
        scales = stored[f"{module}.weight_scale"].double()
        expected = int8_product(unrounded[module], stored[f"{module}.weight"], scales)
        torch.testing.assert_close(outputs[module], expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@torch.no_grad()
def test_blocks_and_whole_model_drift_as_the_served_model_does(folder: Path) -> None:
    """Not to the last bit: where a sum ends beside a tie, another code follows, and later layers amplify it."""
    served = factories.build(factories.llama_config(), dtype=torch.float32)
    stored = load_file(folder / "model.safetensors")
    with SafetensorsWeights(folder, dtype=torch.float32) as source:
        modules = input_roundings(source.layers)
        for module in modules:
            served.set_submodule(module, ServedLinear(stored[f"{module}.weight"], stored[f"{module}.weight_scale"]))
        plain, rounding = (BlockRunner(source.architecture, source, dtype=torch.float32, device=CPU) for _ in range(2))
        assert rounding.round_inputs(modules) == []
        by_blocks, unrounded = (logits(runner) for runner in (rounding, plain))
        with rounding.whole() as model:
            whole = model(IDS, use_cache=False).logits
    expected = served(IDS, use_cache=False).logits
    assert len(modules) == 14
    effect = (unrounded - expected).abs().mean()
    assert (by_blocks - expected).abs().mean() < effect / 4
    assert (whole - expected).abs().mean() < effect / 4


def test_a_runner_that_another_process_makes_rounds_as_this_one(folder: Path) -> None:
    received = ReceivedWeights()
    with SafetensorsWeights(folder, dtype=torch.float32) as source:
        plain, rounding = (BlockRunner(source.architecture, source, dtype=torch.float32, device=CPU) for _ in range(2))
        rounding.round_inputs(input_roundings(source.layers))
        sent: SentModel = pickle.loads(pickle.dumps(SentModel.of(rounding)))
        with received.holding(rounding.unread(rounding.structure.parameters)):
            there = logits(sent.runner(received))
        assert torch.equal(there, logits(rounding))
        assert not torch.equal(there, logits(plain))


@torch.no_grad()
def logits(runner: BlockRunner) -> Tensor:
    (batch,) = runner.embed(IDS, 2)
    for index in range(len(runner.structure.blocks)):
        with runner.block(index) as block:
            runner.forward(index, block, batch)
    with runner.head() as head:
        return head(batch.hidden)


@torch.no_grad()
def test_experts_round_the_inputs_of_both_products() -> None:
    model = factories.build(factories.mixtral_config(), dtype=torch.float32)
    [experts] = [module for path, module in model.named_modules() if path.endswith("layers.0.mlp.experts")]
    hidden = torch.randn(9, experts.get_parameter("gate_up_proj").shape[2], generator=torch.manual_seed(0))
    chosen, weights = torch.tensor([[0, 1]] * 4 + [[3, 2]] * 5), torch.tensor([[0.7, 0.3]] * 9)
    expected = torch.zeros_like(hidden)
    for token in range(9):
        for slot in range(2):
            expert = int(chosen[token, slot])
            both = round_tokens(hidden[token]) @ experts.get_parameter("gate_up_proj")[expert].t()
            gate, up = both.chunk(2)
            inner = round_tokens(nn.functional.silu(gate) * up)
            expected[token] += weights[token, slot] * (inner @ experts.get_parameter("down_proj")[expert].t())
    before = experts(hidden, chosen, weights)
    assert round_inputs(experts, InputRounding())
    torch.testing.assert_close(experts(hidden, chosen, weights), expected)
    assert not torch.allclose(before, expected, atol=1e-5)


def test_a_mixtures_blocks_run_with_rounded_inputs(tmp_path: Path) -> None:
    """The experts of a folder are named one by one, and lie together in memory."""
    model = factories.build(factories.mixtral_config(num_hidden_layers=1), dtype=torch.float32)
    written = stored_models.write(model, tmp_path / "a", activations())
    with SafetensorsWeights(written, dtype=torch.float32) as source:
        rounding, plain = (BlockRunner(source.architecture, source, dtype=torch.float32, device=CPU) for _ in range(2))
        assert (
            rounding.round_inputs({module: InputRounding() for module in source.layers if ".experts." in module}) == []
        )
        change = (logits(rounding) - logits(plain)).abs().max()
    assert 0 < change < 0.5


def test_blocks_have_scales_of_their_own_in_the_order_of_the_columns() -> None:
    values = torch.tensor([[254.0, 1.0, 0.3, 127.0, 100.0]])
    assert round_blocks(values, InputRounding(2)).tolist() == [[254.0, 0.0, 0.0, 127.0, 100.0]]
    ordered = round_blocks(values, InputRounding(2, torch.tensor([1, 2, 0, 3, 4])))
    torch.testing.assert_close(ordered, torch.tensor([[254.0, 1.0, 38 / 127, 128.0, 100.0]]))
    assert torch.equal(round_blocks(values, InputRounding()), round_tokens(values))


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_a_token_in_fp8_has_the_nearest_values_of_e4m3(values: list[float], dtype: torch.dtype) -> None:
    """vLLM's `dynamic_per_token_scaled_fp8_quant_kernel`: absmax / 448, not below 1 / (448 * 512)."""
    token = torch.tensor(values).to(dtype)
    scale = max(float(token.float().abs().max() / 448), 1 / (448 * 512))
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double() * scale
    least = (grid[grid.isfinite()] - token.double()[:, None]).abs().amin(1)
    rounded = round_tokens(token, "float8")
    assert rounded.dtype == dtype
    slack = scale * 1e-3 + token.double().abs() * torch.finfo(dtype).eps
    assert bool(((rounded.double() - token.double()).abs() <= least + slack).all())


@torch.no_grad()
@pytest.mark.parametrize("name", ["fp8", "fp8 blocks"])
def test_layers_of_fp8_round_their_inputs_to_e4m3(tmp_path: Path, name: str) -> None:
    """Inputs wider than a block of 128 have a scale for each of their blocks, those of a row have one."""
    model = factories.build(factories.llama_config(intermediate_size=320), dtype=torch.float32)
    written = stored_models.write(model, tmp_path / "a", stored_models.QUANTIZATIONS[name])
    with SafetensorsWeights(written, dtype=torch.float32) as source:
        roundings = input_roundings(source.layers)
        runner = BlockRunner(source.architecture, source, dtype=torch.float32, device=CPU)
        assert runner.round_inputs(roundings) == []
        down = "model.layers.0.mlp.down_proj"
        weight = source.read(f"{down}.weight")
        seen = dict[str, Tensor]()
        with runner.whole() as whole:
            linear = whole.get_submodule(down)
            linear.register_forward_pre_hook(lambda _, inputs: seen.update(before=inputs[0]), prepend=True)
            linear.register_forward_hook(lambda _, __, output: seen.update(after=output))
            whole(IDS, use_cache=False)
    parts = seen["before"].split(128 if name == "fp8 blocks" else 320, -1)
    scales = [part.abs().amax(-1, keepdim=True) / 448 for part in parts]
    codes = [(part / scale).to(torch.float8_e4m3fn) for part, scale in zip(parts, scales, strict=True)]
    inputs = torch.cat([code.float() * scale for code, scale in zip(codes, scales, strict=True)], -1)
    torch.testing.assert_close(seen["after"], inputs @ weight.t())
    assert not torch.allclose(seen["after"], seen["before"] @ weight.t(), atol=1e-5)


def test_a_mixture_that_is_not_known_is_left_as_it_is() -> None:
    assert not round_inputs(nn.ModuleList(), InputRounding())
    model = factories.build(factories.mixtral_config(num_hidden_layers=1), dtype=torch.float32)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert not round_inputs(experts, InputRounding(32))  # only whole tokens are known there


@given(
    st.lists(st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30), min_size=1, max_size=40),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_token_is_rounded_to_127_steps_of_its_absmax(values: list[float], dtype: torch.dtype) -> None:
    token = torch.tensor(values).to(dtype)
    rounded = round_tokens(token)
    assert rounded.dtype == dtype
    step = float(token.abs().max()) / 127
    assert (rounded.double() - token.double()).abs().max() <= step * 0.5001 + float(token.abs().max()) * torch.finfo(
        dtype
    ).eps
    if step > 1e-30:
        codes = rounded.double() / step
        assert (codes - codes.round()).abs().max() <= 127 * torch.finfo(dtype).eps


def test_ties_go_to_even_zeros_stay_and_no_token_depends_on_another() -> None:
    tokens = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0] * 4, [254.0, 1.0, 3.0, -5.0], [1e-40, 0.0, 0.0, 0.0]])
    expected = [[127.0, 0.0, 2.0, -2.0], [0.0] * 4, [254.0, 0.0, 4.0, -4.0], [0.0] * 4]
    assert round_tokens(tokens).tolist() == expected


@pytest.mark.parametrize(
    "changes", [{"dynamic": False}, {"strategy": "tensor"}, {"symmetric": False}, {"num_bits": 4}, {"type": "float"}]
)
def test_activations_that_are_rounded_in_another_way_are_refused(changes: dict[str, Any]) -> None:
    scheme = CompressedTensorsRules(activations()).scheme("model.layers.0.mlp.up_proj")
    assert scheme is not None
    assert scheme.input_rounding == InputRounding()
    with pytest.raises(InputError, match="input_activations other than symmetric int8 with a dynamic scale per token"):
        CompressedTensorsRules(activations(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"dynamic": False},
        {"strategy": "tensor"},
        {"num_bits": 4},
        {"type": "int"},
        {"strategy": "group", "group_size": 0},
    ],
)
def test_activations_in_fp8_that_are_rounded_in_another_way_are_refused(changes: dict[str, Any]) -> None:
    [group] = stored_models.FP8["config_groups"].values()
    other = {**group, "input_activations": {**group["input_activations"], **changes}}
    with pytest.raises(InputError, match="input_activations other than symmetric e4m3"):
        CompressedTensorsRules({**stored_models.FP8, "config_groups": {"group_0": other}})
