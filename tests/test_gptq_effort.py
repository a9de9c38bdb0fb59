"""`effort: high`: the tokens' importance against whole models, codes and scales against a plain loop, and the pass."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PretrainedConfig

import factories
from qexport.architectures.runner import BlockRunner
from qexport.errors import NumericalError
from qexport.progress import silent
from qexport.quantizing import gptq_pass, importance, refinement
from qexport.quantizing.asymmetry import Asymmetry, changes
from qexport.quantizing.drawn_tokens import gradients_at_head, states_before
from qexport.quantizing.importance import token_importance, token_weights
from qexport.quantizing.layer import Hessian
from qexport.quantizing.method import PassInputs, ResumePoint, Save
from qexport.quantizing.refinement import refine
from qexport.quantizing.solver import Options, factorize, solve
from qexport.tensors import GroupQuantized, TensorRecord
from test_block_runner import token_windows
from test_gptq import CONFIGS, assert_same_bytes, calibration, checkpoint, quantized, settings
from test_mixed import saved

CPU = torch.device("cpu")
FAMILIES = {
    "llama": factories.llama_config(),
    "falcon 7b": factories.falcon_config(),
    "gpt2": factories.gpt2_config(),
    "mixtral": factories.mixtral_config(),
}


def measured(config: PretrainedConfig, windows: Tensor, folder: Path) -> dict[str, Tensor]:
    source = saved(factories.build(config, dtype=torch.float32), folder)
    names = [linear.name for linear in source.architecture.structure.block_linears if not linear.expert]
    return token_importance(source, names, windows, dtype=torch.float32, device=CPU, scratch=folder, progress=silent)


def of_whole_model(config: PretrainedConfig, windows: Tensor, names: list[str]) -> dict[str, Tensor]:
    """By one backward of transformers' model, for the tokens that ours draws: one piece, the same generator."""
    model = factories.build(config, dtype=torch.float32)
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        output.retain_grad()
        outputs[name] = output

    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: keep(name, output))
    predicted = model(input_ids=windows).logits.flatten(0, 1).log_softmax(-1)
    drawn = torch.multinomial(predicted.detach().exp(), 1, generator=torch.Generator().manual_seed(0))
    predicted.gather(1, drawn).sum().backward()
    found = {}
    for name, output in outputs.items():
        assert output.grad is not None
        found[name] = output.grad.square().sum(-1).view_as(windows)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_importance_of_tokens_is_that_of_the_whole_models_gradients(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two windows go through a block together, the third one alone, all of them drawn for in one piece."""
    monkeypatch.setattr(importance, "_BATCH_TOKENS", 48)
    windows = token_windows(3, 24)
    config = FAMILIES[name]
    found = measured(config, windows, tmp_path)
    for layer, expected in of_whole_model(config, windows, list(found)).items():
        torch.testing.assert_close(found[layer].float(), expected, rtol=2e-2, atol=1e-3 * float(expected.mean()))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_windows_that_go_through_the_model_later_are_measured_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "AT_A_TIME", 48)
    windows = token_windows(4, 24)
    found = measured(CONFIGS["llama"], windows, tmp_path)
    first, last = (measured(CONFIGS["llama"], part, tmp_path) for part in windows.split(2))
    for layer, values in found.items():
        assert torch.equal(values, torch.cat([first[layer], last[layer]]))
        assert (values[:, 1:] > 0).all()


def test_draws_from_a_later_piece_on_are_those_of_all_pieces() -> None:
    """Of probabilities, as torch.multinomial draws them; it takes from the generator as much for any of them."""
    sizes = [128, 5, 64, 1]
    pieces = [torch.rand(size, 211, generator=torch.Generator().manual_seed(size)).softmax(-1) for size in sizes]
    generator = torch.Generator().manual_seed(0)
    whole = [torch.multinomial(piece, 1, generator=generator) for piece in pieces]
    for number, state in enumerate(states_before(sizes, 211)):
        later = torch.Generator().manual_seed(1)
        later.set_state(state)
        for piece, expected in list(zip(pieces, whole, strict=True))[number:]:
            assert torch.equal(torch.multinomial(piece, 1, generator=later), expected)


def test_weights_are_the_square_roots_with_a_mean_of_one() -> None:
    weights = token_weights({"q": torch.tensor([[1.0, 4.0]]), "k": torch.tensor([[3.0, 12.0]])}, ["q", "k"])
    torch.testing.assert_close(weights, torch.tensor([[2 / 3, 4 / 3]]))
    assert torch.equal(token_weights({"q": torch.zeros(1, 2)}, ["q"]), torch.ones(1, 2))


def test_a_token_counts_as_often_as_its_weight_says() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 6, 40, generator=generator)
    counts = torch.tensor([1, 4, 9, 1, 16, 4])
    weighted, repeated = Hessian(40, CPU), Hessian(40, CPU)
    weighted.add(after, counts.float())
    repeated.add(after.repeat_interleave(counts, 0))
    torch.testing.assert_close(weighted.matrix() * 6, repeated.matrix() * int(counts.sum()))
    weight = {"layer": torch.randn(3, 40, generator=generator)}
    one, other = Asymmetry(40, CPU), Asymmetry(40, CPU)
    one.add(changes(before, after, counts.float()))
    other.add(changes(before.repeat_interleave(counts, 0), after.repeat_interleave(counts, 0)))
    products = one.take(weight, 6.0)["layer"], other.take(weight, float(counts.sum()))["layer"]
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-3)


def problem(bits: int, *, sym: bool) -> tuple[Tensor, Tensor, Any, GroupQuantized]:
    generator = torch.Generator().manual_seed(bits)
    weight = 0.1 * torch.randn(5, 64, generator=generator)
    inputs = torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    hessian = inputs.t() @ inputs / 300
    options = Options(bits, 16, "static", sym=sym, damp_percent=0.01, search=True)
    factor = factorize(hessian, options)
    return weight, hessian, factor, solve(weight, hessian, factor, options)


def plain(weight: Tensor, hessian: Tensor, quantized: GroupQuantized) -> tuple[Tensor, Tensor]:
    """Codes and scales by trying every code, and by numpy's least squares: float64, row after row."""
    damped = hessian.double() + 0.01 * float(hessian.diagonal().mean()) * torch.eye(len(hessian), dtype=torch.float64)
    root = torch.linalg.cholesky(damped).t()
    codes, scales = quantized.codes.long().clone(), quantized.scales.double().clone()
    zeros, groups = quantized.zeros.double(), quantized.g_idx.long()

    def go_over(row: int) -> None:
        for column in range(weight.shape[1]):
            tried = codes[row].repeat(2**quantized.bits, 1)
            tried[:, column] = torch.arange(2**quantized.bits)
            errors = weight[row].double() - (tried - zeros[groups, row]) * scales[groups, row]
            codes[row, column] = int((errors @ root.t()).square().sum(1).argmin())

    for row in range(len(weight)):
        go_over(row)
        levels = torch.zeros(len(hessian), len(scales), dtype=torch.float64)
        levels[torch.arange(len(hessian)), groups] = codes[row] - zeros[groups, row]
        fitted = torch.linalg.lstsq(root @ levels, (root @ weight[row].double())[:, None]).solution[:, 0]
        scales[:, row] = fitted.to(torch.float16).double()
        go_over(row)
    return codes, scales


def refined(bits: int, *, sym: bool) -> None:
    weight, hessian, factor, quantized = problem(bits, sym=sym)
    found = refine(weight, quantized, hessian, factor)
    codes, scales = plain(weight, hessian, quantized)
    assert torch.equal(found.codes.long(), codes)
    torch.testing.assert_close(found.scales.double(), scales, rtol=1e-3, atol=0)
    assert int((found.codes != quantized.codes).sum()) > 5


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_codes_and_scales_are_those_of_a_plain_loop(bits: int, sym: bool) -> None:
    refined(bits, sym=sym)


@pytest.mark.parametrize("fault", ["block", "scales"])
def test_the_plain_loop_sees_what_is_wrong(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "block":  # products with what has changed in an earlier block are not made again
        whole = refinement._Rows.move_codes

        def stale(self: Any) -> None:
            self._hessian = torch.block_diag(self._hessian[:32, :32], self._hessian[32:, 32:])
            whole(self)

        monkeypatch.setattr(refinement._Rows, "move_codes", stale)
    else:
        monkeypatch.setattr(refinement._Rows, "fit_scales", lambda self: None)
    with pytest.raises(AssertionError):
        refined(4, sym=True)


def test_scales_that_cannot_be_fitted_stay() -> None:
    weight, _, factor, quantized = problem(4, sym=True)
    quantized.codes[0, :16] = 8  # the zero point: the group's values are zero whatever its scale
    weight[0, :16] = 0
    found = refine(weight, quantized, torch.eye(64), factor)
    assert found.scales[0, 0] == quantized.scales[0, 0]
    assert torch.isfinite(found.scales).all()


@pytest.fixture
def two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_pass, "BATCH_TOKENS", 6 * 48)


@pytest.mark.usefixtures("two_batches")
def test_the_pass_has_the_same_bytes_with_two_threads_and_others_than_without() -> None:
    once = quantized(CONFIGS["llama"], settings(effort="high"), dtype=torch.bfloat16)
    torch.set_num_threads(2)
    try:
        again = quantized(CONFIGS["llama"], settings(effort="high"), dtype=torch.bfloat16)
    finally:
        torch.set_num_threads(1)
    assert_same_bytes(once, again)
    with pytest.raises(AssertionError):
        assert_same_bytes(once, quantized(CONFIGS["llama"], settings(), dtype=torch.bfloat16))


@pytest.mark.usefixtures("two_batches")
@pytest.mark.parametrize("part", ["weights", "refine"])
def test_each_part_changes_the_codes(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = settings(effort="high")
    both = quantized(CONFIGS["llama"], options)
    if part == "weights":
        monkeypatch.setattr(gptq_pass, "_importance", lambda *_: None)
    else:
        monkeypatch.setattr("qexport.quantizing.layer.refine", lambda _, quantized, *__: quantized)
    with pytest.raises(AssertionError):
        assert_same_bytes(both, quantized(CONFIGS["llama"], options))


@pytest.mark.usefixtures("two_batches")
@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_families_with_experts_and_with_transposed_weights_go_through(name: str, tmp_path: Path) -> None:
    source, options = saved(factories.build(FAMILIES[name], dtype=torch.float32), tmp_path), settings(effort="high")
    inputs = PassInputs(source, options.plan(source), calibration(), dtype=torch.float32, device=CPU, scratch=tmp_path)
    losses = [record.layer.loss for record in options.quantize(inputs) if record.layer]
    assert losses
    assert all(loss is not None and 0 < loss < 0.2 for loss in losses)


class StoppedError(Exception):
    """Ends a pass after its first block."""


@pytest.mark.usefixtures("two_batches")
def test_a_pass_that_goes_on_takes_the_importance_that_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, options = CONFIGS["llama"], settings(effort="high")
    source = checkpoint(config, factories.build(config, dtype=torch.float32))

    def passed(units: int) -> dict[str, TensorRecord]:
        def finished(save: Save) -> None:
            save()
            if units == 0:
                raise StoppedError

        resume = ResumePoint(units, tmp_path, finished)
        inputs = PassInputs(
            source,
            options.plan(source),
            calibration(),
            dtype=torch.float32,
            device=CPU,
            scratch=tmp_path,
            resume=resume,
        )
        found: dict[str, TensorRecord] = {}
        with suppress(StoppedError):
            found |= {record.name: record for record in options.quantize(inputs)}
        return found

    whole = quantized(config, options)
    passed(0)

    def unasked(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(importance, "token_importance", unasked)
    rest = passed(1)
    assert any(record.layer for record in rest.values())
    assert_same_bytes(rest, {name: whole[name] for name in rest})


def test_predictions_that_are_not_finite_are_an_error() -> None:
    config = CONFIGS["llama"]
    model = factories.build(config, dtype=torch.float32)
    model.get_parameter("model.norm.weight").data.fill_(torch.nan)
    source = checkpoint(config, model)
    runner = BlockRunner(source.architecture, source.weights, dtype=torch.float32, device=CPU)
    with pytest.raises(NumericalError, match="predictions are not finite"):
        gradients_at_head(runner, [batch.hidden for batch in runner.embed(token_windows(1, 4), 1)])


def test_dynamic_groups_are_refused() -> None:
    with pytest.raises(ValidationError, match="leave desc_act out"):
        settings(effort="high", desc_act=True, static_groups=False)
