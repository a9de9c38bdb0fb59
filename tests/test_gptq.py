"""The method over whole models: the pass against plain forwards, its memory, and the same bytes every time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import factories
from memory_growth import LAYER, growth, wide_model
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.errors import CompatibilityError, NumericalError
from qexport.progress import Notice, Progress
from qexport.quantizing import gptq_pass
from qexport.quantizing.asymmetry import Asymmetry, changes
from qexport.quantizing.gptq import Gptq
from qexport.quantizing.layer import Hessian, solve_together
from qexport.quantizing.method import PassInputs
from qexport.quantizing.products import ROWS
from qexport.quantizing.selection import select
from qexport.tensors import CalibrationSet, GroupQuantized, GroupQuantizedSpec, Origin, TensorRecord
from test_block_runner import StateDict, token_windows

CPU = torch.device("cpu")
CONFIGS = {
    "llama": factories.llama_config(),
    "qwen2": factories.qwen2_config(),
    "mistral": factories.mistral_config(),
    "falcon 7b": factories.falcon_config(),
    "falcon 40b": factories.falcon_40b_config(),
}


BATCH = 5


def settings(**changes: Any) -> Gptq:
    return Gptq.model_validate({"method": "gptq", "group_size": 32, "calibration": {"source": "unused"}} | changes)


def checkpoint(config: PretrainedConfig, model: PreTrainedModel) -> Checkpoint:
    return Checkpoint(Architecture(config.to_dict()), StateDict(model), {}, Origin("folder", "tiny"))


def calibration(windows: Tensor | None = None) -> CalibrationSet:
    return CalibrationSet(token_windows(12, 48) if windows is None else windows, "0" * 64, "test")


def run(source: Checkpoint, options: Gptq, calibration: CalibrationSet, **arguments: Any) -> Iterator[TensorRecord]:
    """Plans and quantizes."""
    outputs = options.plan(source)
    return options.quantize(PassInputs(source, outputs, calibration, **arguments))


def quantized(config: PretrainedConfig, options: Gptq, **changes: Any) -> dict[str, TensorRecord]:
    model = factories.build(config, dtype=changes.pop("dtype", torch.float32))
    source = checkpoint(config, model)
    arguments: dict[str, Any] = {
        "dtype": torch.float32,
        "device": CPU,
        "scratch": Path(tempfile.gettempdir()),
    } | changes
    records = list(run(source, options, arguments.pop("calibration", calibration()), **arguments))
    names = [record.name for record in records]
    assert sorted(names) == sorted(source.weights.specs()), "every tensor must come exactly once"
    return {record.name: record for record in records}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_linear_of_every_block_is_quantized_and_nothing_else(name: str) -> None:
    config = CONFIGS[name]
    structure = Architecture(config.to_dict()).structure
    records = quantized(config, settings())
    linears = {f"{linear.name}.weight" for block in structure.blocks for linear in structure.linears[block]}
    assert {name for name, record in records.items() if isinstance(record.value, GroupQuantized)} == linears
    assert {record.layer.name for record in records.values() if record.layer} == {n[: -len(".weight")] for n in linears}
    for record in records.values():
        if record.layer:
            assert record.layer.method == "gptq"
            assert record.layer.loss is not None
            assert record.layer.rtn_loss is not None
            assert record.layer.loss < record.layer.rtn_loss
            assert record.layer.tokens == 12 * 48


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_tensors_pass_unchanged(name: str) -> None:
    config = CONFIGS[name]
    model = factories.build(config, dtype=torch.float32).state_dict()
    for record in quantized(config, settings()).values():
        if isinstance(record.value, Tensor):
            assert torch.equal(record.value, model[record.name])


@pytest.fixture
def two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `BATCH` windows each, of ten: with one, nothing is made up for."""
    monkeypatch.setattr(gptq_pass, "BATCH_TOKENS", BATCH * 48)


@pytest.mark.usefixtures("two_batches")
@pytest.mark.parametrize("name", ["llama", "falcon 7b", "falcon 40b"])
@pytest.mark.parametrize(("true_sequential", "alpha"), [(True, 0.5), (False, 0.5), (True, 0.0)])
def test_codes_equal_those_of_whole_model_forwards_with_hooks(name: str, true_sequential: bool, alpha: float) -> None:
    """The plain way: a forward of the whole model for each group of linears, with everything before it quantized, and
    one of the model before quantizing.

    Its products are whole, so there are no more tokens than in a piece of ours: MKL for AVX2 sums more of them in
    another order.
    """
    options = settings(true_sequential=true_sequential, gptaq_alpha=alpha)
    config, windows = CONFIGS[name], token_windows(10, 48)
    assert windows.numel() <= ROWS
    records = quantized(config, options, calibration=calibration(windows))
    model, untouched = (factories.build(config, dtype=torch.float32) for _ in range(2))
    structure = Architecture(config.to_dict()).structure
    chosen = select(structure, options)
    for block in structure.blocks:
        groups = plain_groups(name, block)
        before = [by_batch(model, group[0], windows) for group in groups]
        for group, inputs in zip(groups, before, strict=True):
            width = inputs[0].shape[-1]
            hessian = Hessian(width, CPU)
            after = by_batch(model, group[0], windows) if true_sequential else inputs
            for part in after:
                hessian.add(part)
            weights = {module: model.get_parameter(f"{module}.weight").detach().clone() for module in group}
            found = corrections(weights, by_batch(untouched, group[0], windows), after, alpha) if alpha else None
            for module, solved in solve_together(weights, hessian, chosen, "error", found).items():
                value = records[f"{module}.weight"].value
                assert isinstance(value, GroupQuantized)
                assert torch.equal(value.codes, solved.quantized.codes), module
                assert torch.equal(value.scales, solved.quantized.scales), module
                with torch.no_grad():
                    model.get_parameter(f"{module}.weight").copy_(solved.quantized.dequantize())


def by_batch(model: PreTrainedModel, module: str, windows: Tensor) -> list[Tensor]:
    return [inputs for part in windows.split(BATCH) for inputs in layer_inputs(model, module, part)]


def corrections(
    weights: dict[str, Tensor], full: list[Tensor], inputs: list[Tensor], alpha: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each weight, from the first batch and from the second."""
    halves = []
    for before, after in zip(full, inputs, strict=True):
        asymmetry = Asymmetry(after.shape[-1], CPU)
        asymmetry.add(changes(before, after))
        halves.append(asymmetry.take(weights, alpha))
    return {name: (halves[0][name], halves[1][name]) for name in weights}


def plain_groups(name: str, block: str) -> list[list[str]]:
    groups = {
        "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
        "falcon 7b": [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]],
        "falcon 40b": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    }[name]
    linears = {linear.name.rpartition(".")[2]: linear.name for linear in describe_linears(name, block)}
    return [[linears[leaf] for leaf in group] for group in groups]


def describe_linears(name: str, block: str) -> Any:
    return Architecture(CONFIGS[name].to_dict()).structure.linears[block]


@torch.no_grad()
def layer_inputs(model: PreTrainedModel, module: str, windows: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    handle = model.get_submodule(module).register_forward_pre_hook(hook)
    model(windows, use_cache=False)
    handle.remove()
    return seen


@pytest.mark.usefixtures("two_batches")
@pytest.mark.parametrize("name", ["llama", "falcon 7b"])
def test_codes_are_the_same_with_one_and_two_threads(name: str) -> None:
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            runs.append(quantized(CONFIGS[name], settings(), dtype=torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert_same_bytes(runs[0], other)


def assert_same_bytes(ours: dict[str, TensorRecord], theirs: dict[str, TensorRecord]) -> None:
    assert ours.keys() == theirs.keys()
    for name, record in ours.items():
        other = theirs[name]
        assert record.layer == other.layer
        if isinstance(record.value, GroupQuantized):
            assert isinstance(other.value, GroupQuantized)
            for part in ("codes", "scales", "zeros", "g_idx"):
                assert torch.equal(getattr(record.value, part), getattr(other.value, part)), f"{name}: {part}"
        else:
            assert isinstance(record.value, Tensor)
            assert isinstance(other.value, Tensor)
            assert torch.equal(record.value, other.value), name


def test_overrides_change_bits_and_groups_or_leave_layers_dense() -> None:
    options = settings(
        overrides=[
            {"modules": "*.mlp.*", "bits": 8, "group_size": -1},
            {"modules": "model.layers.1.mlp.down_proj", "dense": True},
        ]
    )
    config = factories.llama_config()
    records = quantized(config, options)
    specs = options.plan(checkpoint(config, factories.build(config))).specs
    up, attention = (
        records["model.layers.0.mlp.up_proj.weight"].value,
        records["model.layers.0.self_attn.q_proj.weight"].value,
    )
    assert isinstance(up, GroupQuantized)
    assert isinstance(attention, GroupQuantized)
    assert (up.bits, up.group_size, attention.bits, attention.group_size) == (8, 64, 4, 32)
    assert isinstance(records["model.layers.1.mlp.down_proj.weight"].value, Tensor)
    for name, record in records.items():
        spec = specs[name]
        if isinstance(record.value, GroupQuantized):
            assert isinstance(spec, GroupQuantizedSpec)
            assert record.value.codes.shape == (spec.out_features, spec.in_features)
            assert record.value.scales.shape == (spec.groups, spec.out_features)
            assert (record.value.bits, record.value.sym, record.value.desc_act) == (spec.bits, spec.sym, spec.desc_act)
        else:
            assert tuple(record.value.shape) == spec.shape  # type: ignore[union-attr]


def test_the_head_is_quantized_when_asked_for() -> None:
    config = factories.llama_config()
    records = quantized(config, settings(lm_head=True))
    head = records["lm_head.weight"]
    assert isinstance(head.value, GroupQuantized)
    assert head.layer is not None
    assert head.layer.tokens == 12 * 48


def refusal(config: PretrainedConfig, **changes: Any) -> str:
    with pytest.raises(CompatibilityError) as caught:
        select(Architecture(config.to_dict()).structure, settings(**changes))
    return str(caught.value)


def test_a_tied_head_is_not_quantized() -> None:
    assert "tied" in refusal(factories.llama_config(tie_word_embeddings=True), lm_head=True)


def test_a_group_size_that_does_not_divide_names_the_layers_and_the_sizes_that_fit() -> None:
    config = factories.falcon_config(hidden_size=71 * 8, num_attention_heads=71)
    text = refusal(config, group_size=64)
    assert "group_size 64 does not divide the inputs of 8 layers" in text
    assert "transformer.h.0.self_attention.query_key_value (568 inputs)" in text
    assert "sizes that fit them all: 71, 142, 284, 568, -1" in text
    assert "fit them all: 16, 32, 64, 128, -1" in refusal(factories.llama_config(hidden_size=128), group_size=96)


def test_all_problems_of_a_selection_are_told_at_once() -> None:
    text = refusal(
        factories.llama_config(tie_word_embeddings=True),
        group_size=48,
        lm_head=True,
        overrides=[{"modules": "*.experts.*", "dense": True}],
    )
    assert "overrides: '*.experts.*' matches no linear layer, for example model.layers.0." in text
    assert "tied" in text
    assert "group_size 48" in text


def test_nothing_left_to_quantize_is_an_error() -> None:
    assert "no layer is left" in refusal(factories.llama_config(), overrides=[{"modules": "*", "dense": True}])


def test_a_fallback_to_rounding_is_recorded_and_told(tmp_path: Path) -> None:
    model = factories.build(factories.llama_config(), dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter("model.layers.1.input_layernorm.weight").fill_(float("inf"))
    source = checkpoint(factories.llama_config(), model)
    with pytest.raises(NumericalError, match="not finite") as caught:
        list(run(source, settings(), calibration(), dtype=torch.float32, device=CPU, scratch=tmp_path))
    assert "model.layers.1.self_attn.q_proj" in str(caught.value)
    events: list[Progress | Notice] = []
    options = settings(on_failure="round_to_nearest")
    records = list(
        run(source, options, calibration(), dtype=torch.float32, device=CPU, scratch=tmp_path, progress=events.append)
    )
    fallen = {record.layer.name for record in records if record.layer and record.layer.method != "gptq"}
    assert "model.layers.1.self_attn.q_proj" in fallen
    assert not any(name.startswith("model.layers.0.") for name in fallen)
    assert {notice.text.split()[0] for notice in events if isinstance(notice, Notice)} == fallen


def test_a_layer_that_the_forward_never_calls_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    source = checkpoint(CONFIGS["llama"], factories.build(CONFIGS["llama"], dtype=torch.float32))
    with pytest.raises(CompatibilityError, match="does not call") as caught:
        list(run(source, settings(), calibration(), dtype=torch.float32, device=CPU, scratch=tmp_path))
    assert caught.value.where == "model.layers.0.mlp.gate_proj"


def test_progress_counts_blocks_and_tokens() -> None:
    events: list[Progress | Notice] = []
    quantized(factories.llama_config(), settings(), progress=events.append)
    steps = [(event.done, event.total, event.tokens) for event in events if isinstance(event, Progress)]
    assert steps == [(0, 2, 0), (1, 2, 576), (2, 2, 1152)]


def quantize_wide_layers(layers: int, scratch: Path) -> None:
    source = wide_model(layers, lambda shape: torch.empty(shape).normal_(0, 0.05))
    narrow = {"modules": "*.down_proj", "dense": True}  # its 3072 columns would only take time
    options = settings(group_size=64, mse=False, overrides=[narrow])
    given = calibration(torch.randint(factories.VOCABULARY, (8, 64)))
    records = run(source, options, given, dtype=torch.bfloat16, device=CPU, scratch=scratch)
    assert sum(record.layer is not None for record in records) == 6 * layers


def test_the_peak_of_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """The larger model's peak counts from the smaller one's on, which varies less the second time. Its other weights
    take twice as much as is allowed.
    """
    _, small, large = growth(*[partial(quantize_wide_layers, layers, tmp_path) for layers in (2, 2, 16)])
    assert large - small < 14 * LAYER * torch.bfloat16.itemsize / 2
