"""Layers that make up for what quantizing has done to their inputs: against plain least squares, and in the pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import factories
from qexport.architectures.architecture import Architecture
from qexport.quantizing import asymmetry, gptq_pass
from qexport.quantizing.activations import Restore, StateFiles
from qexport.quantizing.asymmetry import Asymmetry, agreed, changes, made_up
from qexport.quantizing.full_precision import FullPrecisionStream
from qexport.quantizing.layer import Hessian, solve_together
from qexport.quantizing.method import PassInputs, ResumePoint, Save
from qexport.quantizing.selection import select
from qexport.quantizing.solver import Options, factorize, solve
from qexport.tensors import GroupQuantized, TensorRecord
from test_block_runner import token_windows
from test_gptq import (
    BATCH,
    CONFIGS,
    assert_same_bytes,
    by_batch,
    calibration,
    checkpoint,
    corrections,
    quantized,
    settings,
)

CPU = torch.device("cpu")
OPTIONS = Options(bits=4, group_size=32, order="static", sym=True, damp_percent=0.01, search=False)


def problem(outputs: int = 6, inputs: int = 96, tokens: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [out, in], and its inputs before and after quantizing [tokens, in], in float64."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    before = normal(tokens, inputs) @ normal(inputs, inputs) / math.sqrt(inputs) * torch.exp(normal(inputs))
    after = before + 0.2 * before @ normal(inputs, inputs) / math.sqrt(inputs) + 0.1 * normal(tokens, inputs)
    return 0.1 * normal(outputs, inputs), before, after


def plain(weight: Tensor, before: Tensor, after: Tensor, share: float, options: Options) -> Tensor:
    """Dequantized weights: after each column, all columns that are left are fitted anew to the outputs.

    The outputs to be met are a share of those before quantizing, and the weight's own for the rest; damping is a row of
    tokens more for each input, which the weight itself meets. Least squares in float64, and no function of qexport.
    """
    tokens, columns = after.shape
    hessian = after.t() @ after / tokens
    damping = torch.eye(columns, dtype=torch.float64) * math.sqrt(
        tokens * options.damp_percent * float(hessian.diagonal().mean())
    )
    rows = torch.cat([after, damping])
    share *= plain_agreement(weight, before, after, rows)
    wanted = torch.cat([share * before @ weight.t() + (1 - share) * after @ weight.t(), damping @ weight.t()])
    order = sorted(range(columns), key=lambda index: -float(hessian[index, index]))
    current = torch.linalg.lstsq(rows, wanted).solution.t().clone()
    scales = current.reshape(len(weight), -1, options.group_size).abs().amax(2) / (2 ** (options.bits - 1) - 1)
    scales = scales.to(torch.float16).to(torch.float64)
    for place, column in enumerate(order):
        scale = scales[:, column // options.group_size]
        low, high = -(2 ** (options.bits - 1)), 2 ** (options.bits - 1) - 1
        current[:, column] = (current[:, column] / scale).round().clamp(low, high) * scale
        if left := order[place + 1 :]:
            done = order[: place + 1]
            rest = wanted - rows[:, done] @ current[:, done].t()
            current[:, left] = torch.linalg.lstsq(rows[:, left], rest).solution.t()
    found: Tensor = current
    return found


def plain_agreement(weight: Tensor, before: Tensor, after: Tensor, rows: Tensor) -> float:
    """How much two least-squares corrections, each of half of the tokens, have in common in the outputs."""
    half = len(after) // 2
    outputs = []
    for part in (slice(0, half), slice(half, None)):
        error = 2 * after[part].t() @ (before[part] - after[part]) @ weight.t()
        outputs.append(rows @ torch.linalg.solve(rows.t() @ rows, error))
    one, other = outputs
    return float((one * other).sum() / ((one + other) / 2).square().sum())


def ours(weight: Tensor, before: Tensor, after: Tensor, share: float, options: Options) -> Tensor:
    hessian = after.t() @ after / len(after)
    found = Asymmetry(weight.shape[1], CPU)
    halves = []
    for start in (0, 200):
        found._sum = found.total.to(torch.float64)
        for part in (slice(start, start + 150), slice(start + 150, start + 200)):
            found.add(changes(before[part], after[part]))
        halves.append(found.take({"layer": weight}, share)["layer"])
    factor = factorize(hessian, options)
    wanted = made_up(weight, agreed((halves[0], halves[1]), factor), factor)
    return solve(wanted, hessian, factor, options).dequantize(torch.float64)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("bits", [3, 4])
def test_codes_are_those_of_plain_least_squares(share: float, bits: int) -> None:
    options = Options(bits, 32, "static", True, 0.01, search=False)
    expected = plain(*problem(), share, options)
    assert torch.allclose(ours(*problem(), share, options), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fault", ["difference", "transposed", "inverse", "share"])
def test_the_oracle_sees_each_part_that_is_wrong(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Asymmetry._add_tokens
    faults: dict[str, tuple[Any, str, Any]] = {
        "difference": (Asymmetry, "_add_tokens", lambda self, change, after: rows(self, -change, after)),
        "transposed": (Asymmetry, "_add_tokens", lambda self, change, after: rows(self, after.t(), change.t())),
        "inverse": (asymmetry, "_times_transposed", lambda each, upper: each @ upper),
        "share": (asymmetry, "_agreement", lambda *_: 1.0),
    }
    monkeypatch.setattr(*faults[fault])
    assert not torch.allclose(ours(*problem(), 0.5, OPTIONS), plain(*problem(), 0.5, OPTIONS), rtol=0, atol=1e-12)


def test_the_outputs_come_nearer_to_those_before_quantizing() -> None:
    weight, before, after = problem()
    wanted = before @ weight.t()

    def error(share: float) -> float:
        return float((after @ ours(weight, before, after, share, OPTIONS).t() - wanted).square().sum())

    assert error(1.0) < error(0.5) < error(0.0)


def test_inputs_that_quantizing_did_not_change_change_nothing() -> None:
    weight, before, _ = problem()
    assert torch.equal(ours(weight, before, before, 1.0, OPTIONS), ours(weight, before, before, 0.0, OPTIONS))


def test_tiles_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    upper, rows = torch.randn(96, 96, dtype=torch.float64).triu(), torch.randn(7, 96, dtype=torch.float64)
    monkeypatch.setattr(asymmetry, "_TILE", 40)
    assert torch.allclose(asymmetry._times_transposed(rows, upper), rows @ upper.t())
    assert torch.allclose(asymmetry._times_upper(rows, upper), rows @ upper)


def test_what_the_halves_do_not_have_in_common_is_left_out() -> None:
    common, *noise = torch.randn(3, 400, 300, dtype=torch.float64)
    assert asymmetry._agreement(common, common.clone()) == pytest.approx(1)
    assert asymmetry._agreement(*noise) == pytest.approx(0, abs=0.02)
    assert asymmetry._agreement(common, -common) == 0
    assert asymmetry._agreement(torch.zeros(3, 4), torch.zeros(3, 4)) == 0
    halves = [common + 2 * each for each in noise]
    mean = (halves[0] + halves[1]) / 2

    def error(share: float) -> float:
        return float((share * mean - common).square().sum())

    share = asymmetry._agreement(halves[0].clone(), halves[1].clone())
    assert share == pytest.approx(1 / 3, abs=0.02)
    assert error(share) < min(error(share - 0.05), error(share + 0.05))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    before, after = torch.randn(2, 1500, 300).to(dtype)
    weight, found = torch.randn(600, 300), []
    hessian = Hessian(300, CPU)
    hessian.add(after)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        each = Asymmetry(300, CPU)
        halves = []
        for part in (slice(0, 800), slice(800, None)):
            each.add(changes(before[part], after[part]))
            halves.append(each.take({"layer": weight}, 0.5)["layer"])
        factor = factorize(hessian.matrix(), OPTIONS)
        found.append(made_up(weight, agreed((halves[0], halves[1]), factor), factor))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_products_of_bfloat16_lose_next_to_nothing() -> None:
    before, after = torch.randn(2, 3000, 200).to(torch.bfloat16)
    rounded, exact = Asymmetry(200, CPU), Asymmetry(200, CPU)
    rounded.add(changes(before, after))
    exact.add(changes(before.to(torch.float32), after.to(torch.float32)))
    assert float((rounded.total - exact.total).norm() / exact.total.norm()) < 0.005


@pytest.fixture
def two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or more, of a few windows: with one batch, nothing is made up for."""
    monkeypatch.setattr(gptq_pass, "BATCH_TOKENS", BATCH * 48)


@pytest.mark.usefixtures("two_batches")
def test_the_head_makes_up_for_the_blocks() -> None:
    """The head is solved last, with both models' hidden states after all blocks and the final norm."""
    config, options = factories.llama_config(tie_word_embeddings=False), settings(lm_head=True)
    windows = token_windows(10, 48)
    records = quantized(config, options, calibration=calibration(windows))
    model, untouched = (factories.build(config, dtype=torch.float32) for _ in range(2))
    for name, record in records.items():
        if isinstance(record.value, GroupQuantized) and name != "lm_head.weight":
            model.get_parameter(name).data = record.value.dequantize()
    width = config.hidden_size
    hessian = Hessian(width, CPU)
    weights = {"lm_head": untouched.get_parameter("lm_head.weight").detach()}
    full, inputs = (by_batch(each, "lm_head", windows) for each in (untouched, model))
    for part in inputs:
        hessian.add(part)
    chosen = select(Architecture(config.to_dict()).structure, options)
    found = corrections(weights, full, inputs, options.gptaq_alpha)
    solved = solve_together(weights, hessian, chosen, "error", found)["lm_head"]
    value = records["lm_head.weight"].value
    assert isinstance(value, GroupQuantized)
    assert torch.equal(value.codes, solved.quantized.codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_of_8_bits_aims_at_its_own_outputs(bits: int) -> None:
    """Among layers of 4 bits it would be moved by many times its own error, for the errors of others."""
    options = {"layer": Options(bits, 32, "static", True, 0.01, search=True)}
    weight, before, after = (each.float() for each in problem())
    found = []
    for correct in (True, False):
        hessian, asymmetry, halves = Hessian(96, CPU), Asymmetry(96, CPU), []
        hessian.add(after)
        for part in (slice(0, 200), slice(200, 400)):
            asymmetry.add(changes(before[part], after[part]))
            halves.append(asymmetry.take({"layer": weight}, 1.0)["layer"])
        corrections = {"layer": (halves[0], halves[1])} if correct else None
        found.append(solve_together({"layer": weight}, hessian, options, "error", corrections)["layer"])
    assert torch.equal(found[0].quantized.codes, found[1].quantized.codes) == (bits == 8)


@pytest.mark.usefixtures("two_batches")
@pytest.mark.parametrize("bits", [4, 8])
def test_text_goes_through_the_unquantized_model_only_for_layers_that_need_it(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = FullPrecisionStream.run, []

    def noting(self: FullPrecisionStream, index: int, *args: Any) -> None:
        seen.append(index)
        run(self, index, *args)

    monkeypatch.setattr(FullPrecisionStream, "run", noting)
    quantized(CONFIGS["llama"], settings(bits=bits))
    assert bool(seen) == (bits < 8)


class StoppedError(Exception):
    """Ends a pass after its first block."""


def passed(folder: Path, units: int, *, stop: bool = False) -> dict[str, TensorRecord]:
    """What a pass that can be continued yields, from a unit on."""
    config, options = CONFIGS["llama"], settings()
    source = checkpoint(config, factories.build(config, dtype=torch.float32))
    found: dict[str, TensorRecord] = {}

    def finished(save: Save) -> None:
        save()
        if stop:
            raise StoppedError

    resume = ResumePoint(units, folder, finished)
    inputs = PassInputs(
        source, options.plan(source), calibration(), dtype=torch.float32, device=CPU, scratch=folder, resume=resume
    )
    with suppress(StoppedError):
        found |= {record.name: record for record in options.quantize(inputs)}
    return found


def resumed(folder: Path) -> tuple[dict[str, TensorRecord], dict[str, TensorRecord]]:
    """The tensors after the first block from a pass that goes on there, and from one that was never stopped."""
    whole = quantized(CONFIGS["llama"], settings())
    passed(folder, 0, stop=True)
    rest = passed(folder, 1)
    return rest, {name: whole[name] for name in rest}


@pytest.mark.usefixtures("two_batches")
def test_a_pass_that_goes_on_has_the_hidden_states_of_both_models(tmp_path: Path) -> None:
    rest, expected = resumed(tmp_path)
    assert any(record.layer for record in rest.values())
    assert_same_bytes(rest, expected)


@pytest.mark.usefixtures("two_batches")
def test_hidden_states_that_are_not_kept_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, batches = StateFiles.read, -(-12 // BATCH)

    def faulty(self: StateFiles, blocks: int, hidden: dict[int, Tensor]) -> list[Restore]:
        return read(self, blocks, {number % batches: tensor for number, tensor in hidden.items()})

    monkeypatch.setattr(StateFiles, "read", faulty)
    with pytest.raises(AssertionError):
        assert_same_bytes(*resumed(tmp_path))


@pytest.mark.usefixtures("two_batches")
def test_a_stream_that_sees_quantized_inputs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault at which the whole-model test of test_gptq.py fails too: the stream keeps its hidden states no longer."""
    sound = quantized(CONFIGS["llama"], settings())
    run = FullPrecisionStream.run

    def faulty(self: Any, index: int, block: Any, groups: Any) -> None:
        before = [self.stream.restore(number).clone() for number in range(len(self.stream.batches))]
        run(self, index, block, groups)
        for number, hidden in enumerate(before):
            self.stream.batches[number].hidden = hidden
            self.stream.offload(index + 1, number)

    monkeypatch.setattr(FullPrecisionStream, "run", faulty)
    with pytest.raises(AssertionError):
        assert_same_bytes(sound, quantized(CONFIGS["llama"], settings()))
