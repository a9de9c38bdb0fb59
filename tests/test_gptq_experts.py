"""GPTQ of a mixture's experts: the stops, the codes against plain forwards, and experts that no token reaches."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig

import factories
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.architectures.families import can_stage, staged
from qexport.architectures.structure import build_on_meta
from qexport.errors import NumericalError
from qexport.progress import Notice
from qexport.quantizing import gptq_pass
from qexport.quantizing.layer import Hessian, solve_together
from qexport.quantizing.selection import select
from qexport.tensors import GroupQuantized, Origin, TensorRecord
from test_block_runner import StateDict
from test_gptq import CPU, calibration, run, settings

CONFIG = factories.mixtral_config()
BLOCK = "model.layers.0.block_sparse_moe.experts"


class Files(StateDict):
    """The model's tensors as in files."""

    def __init__(self, folder: Path) -> None:
        self.tensors, self.reads = load_file(folder / "model.safetensors"), []


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("mixtral")
    factories.build(CONFIG, dtype=torch.float32).save_pretrained(folder)
    return Files(folder)


def quantized(
    source: Files, *, config: PretrainedConfig = CONFIG, progress: Any = lambda _: None, **options: Any
) -> dict[str, TensorRecord]:
    checkpoint = Checkpoint(Architecture(config.to_dict()), source, {}, Origin("folder", "tiny"))
    found = run(
        checkpoint, settings(**options), calibration(),
        dtype=torch.float32, device=CPU, scratch=Path(tempfile.gettempdir()), progress=progress,
    )  # fmt: skip
    return {record.name: record for record in found}


def codes(record: TensorRecord) -> Tensor:
    assert isinstance(record.value, GroupQuantized)
    return record.value.codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("square_bytes", [0, 1 << 20])
def test_staged_experts_compute_what_eager_experts_compute(dtype: torch.dtype, square_bytes: int) -> None:
    model = factories.build(CONFIG, dtype=dtype)
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(30, 64, generator=generator).to(dtype)
    weights, index = torch.rand(30, 4, generator=generator).topk(2)
    with torch.no_grad():
        expected = experts(hidden, index, weights)
        with staged(experts, square_bytes) as stops:
            assert len(stops) == (8 if square_bytes == 0 else 2)
            assert torch.equal(experts(hidden, index, weights), expected)
        assert torch.equal(experts(hidden, index, weights), expected)


def test_experts_with_biases_or_transposed_weights_are_not_staged() -> None:
    experts: Any = build_on_meta(CONFIG).get_submodule("model.layers.0.mlp.experts")
    assert can_stage(experts)
    for name, value in [("has_bias", True), ("is_transposed", True), ("is_concatenated", False), ("has_gate", False)]:
        before = getattr(experts, name)
        setattr(experts, name, value)
        assert not can_stage(experts)
        setattr(experts, name, before)
    assert not can_stage(nn.Linear(2, 2))


@pytest.mark.parametrize("true_sequential", [True, False])
def test_codes_equal_those_of_plain_forwards(
    source: Files, true_sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager experts of the whole model, whose tokens are gathered expert by expert from the router's choice. In several
    batches, so that the attention's layers make up for what quantizing has done to their inputs; experts do not.
    """
    monkeypatch.setattr(gptq_pass, "BATCH_TOKENS", 4 * 48)
    options = settings(true_sequential=true_sequential)
    found = quantized(source, true_sequential=true_sequential)
    model: Any = factories.build(CONFIG, dtype=torch.float32)
    model.set_experts_implementation("eager")
    attention = [name for name in found if name.startswith("model.layers.0.self_attn.") and found[name].layer]
    mixture = model.get_submodule("model.layers.0.mlp.experts")
    if true_sequential:  # before the experts are solved, the attention is
        for name in attention:
            value = found[name].value
            assert isinstance(value, GroupQuantized)
            model.get_parameter(name).data = value.dequantize()
    seen: list[tuple[Tensor, ...]] = []
    hook = mixture.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        for part in calibration().input_ids.split(gptq_pass.BATCH_TOKENS // 48):
            model(part)
    hook.remove()
    chosen = select(Architecture(CONFIG.to_dict()).structure, options)
    for expert in range(4):
        up, down = Hessian(64, CPU), Hessian(96, CPU)
        states = [hidden[(index == expert).any(1)] for hidden, index, _ in seen]
        for part in states:
            up.add(part)
        names = [f"{BLOCK}.{expert}.{leaf}" for leaf in ("w1", "w3")]
        solved = solve_together({name: source.read(f"{name}.weight") for name in names}, up, chosen, "error")
        for name in names:
            assert torch.equal(codes(found[f"{name}.weight"]), solved[name].quantized.codes), name
        w1, w3 = (
            solved[name].quantized.dequantize() if true_sequential else source.read(f"{name}.weight") for name in names
        )
        for part in states:
            down.add(nn.functional.silu(part @ w1.t()) * (part @ w3.t()))
        name = f"{BLOCK}.{expert}.w2"
        codes_of = solve_together({name: source.read(f"{name}.weight")}, down, chosen, "error")[name].quantized.codes
        assert (codes(found[f"{name}.weight"]) == codes_of).float().mean() > 0.99
        report = found[f"{name}.weight"].layer
        assert report is not None
        assert report.tokens == down.tokens > 0


def test_one_expert_at_a_time_gives_the_same_bytes(source: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    together = quantized(source)
    monkeypatch.setattr(gptq_pass, "HESSIAN_BYTES", 0)
    alone = quantized(source)
    assert all(torch.equal(codes(alone[name]), codes(record)) for name, record in together.items() if record.layer)


@pytest.fixture
def idle(source: Files) -> Files:
    """The first block's router gives expert 2 always 0, and of experts 0 and 1 one more than that."""
    starved = Files.__new__(Files)
    starved.tensors, starved.reads = dict(source.tensors), []
    name = "model.layers.0.block_sparse_moe.gate.weight"
    gate = starved.tensors[name].clone()
    gate[1], gate[2] = -gate[0], 0
    starved.tensors[name] = gate
    return starved


ONE_EXPERT = factories.mixtral_config(num_experts_per_tok=1)


def test_an_expert_that_no_token_reaches_is_an_error_that_names_it(idle: Files) -> None:
    with pytest.raises(NumericalError, match="no calibration token reached this layer") as caught:
        quantized(idle, config=ONE_EXPERT)
    assert f"{BLOCK}.2.w1, {BLOCK}.2.w3" in str(caught.value)
    assert "round_to_nearest" in str(caught.value)


def test_an_expert_that_no_token_reaches_is_rounded_where_the_recipe_allows_it(idle: Files) -> None:
    told: list[Any] = []
    found = quantized(idle, config=ONE_EXPERT, progress=told.append, on_failure="round_to_nearest")
    reports = [record.layer for record in found.values() if record.layer]
    rounded = [report for report in reports if report.method == "round_to_nearest"]
    assert [report.name for report in rounded] == [f"{BLOCK}.2.{leaf}" for leaf in ("w1", "w3", "w2")]
    assert all((report.tokens, report.loss) == (0, None) for report in rounded)
    assert sum(isinstance(event, Notice) for event in told) == len(rounded)


def test_experts_that_the_recipe_leaves_dense_pass_unchanged(source: Files) -> None:
    found = quantized(source, overrides=[{"modules": "*.experts.*", "dense": True}])
    assert len([record for record in found.values() if record.layer]) == 8
    for name, record in found.items():
        if ".experts." in name:
            assert isinstance(record.value, Tensor)
            assert torch.equal(record.value, source.tensors[name])


def test_single_experts_can_be_left_dense(source: Files) -> None:
    found = quantized(source, overrides=[{"modules": "*.experts.1.w1", "dense": True}])
    assert len([record for record in found.values() if record.layer]) == 2 * 16 - 2
    dense = found[f"{BLOCK}.1.w1.weight"].value
    assert isinstance(dense, Tensor)
    assert torch.equal(dense, source.tensors[f"{BLOCK}.1.w1.weight"])
    assert isinstance(found[f"{BLOCK}.1.w3.weight"].value, GroupQuantized)
