"""The solver against a plain transcription of the paper's algorithm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qexport.errors import NumericalError
from qexport.quantizing import solver
from qexport.quantizing.layer import Hessian, output_energy, output_error, solve_together
from qexport.quantizing.solver import Options, factorize, fit, round_to_nearest, solve
from qexport.tensors import GroupQuantized

CPU = torch.device("cpu")
OPTIONS = Options(bits=4, group_size=32, order="original", sym=True, damp_percent=0.01, search=False)


def problem(out_features: int = 24, in_features: int = 320, tokens: int = 640, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [out, in] and the Hessian [in, in] of correlated inputs of uneven size, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_features, in_features, generator=generator, dtype=torch.float64) / math.sqrt(in_features)
    size = torch.exp(torch.randn(in_features, generator=generator, dtype=torch.float64))
    inputs = torch.randn(tokens, in_features, generator=generator, dtype=torch.float64) @ mix * size
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64) * 0.1
    return weight, inputs.t() @ inputs / tokens


def plain_gptq(weight: Tensor, hessian: Tensor, options: Options) -> Tensor:
    """Dequantized weights by the paper's steps: an explicit inverse, its Cholesky factor, one column after the other.

    Written from the paper (section 3.3), in float64, without blocks, without the transposed layout and without any
    function of qexport.
    """
    rows, columns = weight.shape
    order = list(range(columns))
    if options.order != "original":
        order.sort(key=lambda index: -float(hessian[index, index]))
    importance = hessian.diagonal() if options.order == "static" else hessian.diagonal()[order]
    work = weight[:, order].clone()
    damped = hessian[order][:, order].clone()
    damped += torch.eye(columns, dtype=torch.float64) * options.damp_percent * hessian.diagonal().mean()
    factor = torch.linalg.cholesky(torch.linalg.inv(damped)).t()
    result = torch.zeros_like(work)
    fixed: dict[tuple[int, int], tuple[float, int]] = {}
    for position in range(columns):
        group = (order[position] if options.order == "static" else position) // options.group_size
        for row in range(rows):
            if (group, row) not in fixed:
                source = weight[row] if options.order == "static" else work[row]
                part = slice(group * options.group_size, (group + 1) * options.group_size)
                fixed[group, row] = plain_grid(source[part], importance[part], options)
            scale, zero = fixed[group, row]
            code = min(max(round(float(work[row, position]) / scale) + zero, 0), 2**options.bits - 1)
            result[row, position] = (code - zero) * scale
        error = (work[:, position] - result[:, position]) / factor[position, position]
        work[:, position + 1 :] -= torch.outer(error, factor[position, position + 1 :])
    return result[:, torch.argsort(torch.tensor(order))]


def plain_grid(values: Tensor, importance: Tensor, options: Options) -> tuple[float, int]:
    """The scale and zero point of a group; with a search those of the least error, weighted by the inputs' squares."""
    if not options.search:
        return plain_range(values, options, 1.0, 2 ** (options.bits - 1) - 1)
    divisors = (2 ** (options.bits - 1) - 1, 2 ** (options.bits - 1)) if options.sym else (0,)
    tried = [plain_range(values, options, 1 - step / 40, divisor) for divisor in divisors for step in range(20)]
    return min(tried, key=lambda grid: plain_error(values, importance, options, *grid))


def plain_range(values: Tensor, options: Options, shrink: float, divisor: int) -> tuple[float, int]:
    low, high = min(0.0, float(values.min())) * shrink, max(0.0, float(values.max())) * shrink
    top = 2**options.bits - 1
    if options.sym:
        return half(max(-low, high) / divisor), 2 ** (options.bits - 1)
    low = min(low, -high / (top - 1))
    scale = half((high - low) / top)
    return scale, min(max(round(-low / scale), 1), top)


def plain_error(values: Tensor, importance: Tensor, options: Options, scale: float, zero: int) -> float:
    codes = (torch.round(values / scale) + zero).clamp(0, 2**options.bits - 1)
    return float((((codes - zero) * scale - values) ** 2 * importance).sum())


def half(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).to(torch.float16))


def solved(weight: Tensor, hessian: Tensor, options: Options) -> Tensor:
    return solve(weight, hessian, factorize(hessian, options), options).dequantize(torch.float64)


def relative_error(weight: Tensor, quantized: GroupQuantized, hessian: Tensor) -> float | None:
    return output_error(weight, quantized, hessian, output_energy(weight, hessian))


@pytest.mark.parametrize("order", ["original", "static", "dynamic"])
@pytest.mark.parametrize(
    ("bits", "sym", "group_size"), [(4, True, 32), (3, False, 64), (2, True, 160), (8, False, 320)]
)
def test_codes_equal_the_plain_algorithms(order: str, bits: int, sym: bool, group_size: int) -> None:
    weight, hessian = problem()
    options = Options(bits, group_size, order, sym, 0.01, search=False)
    assert torch.equal(solved(weight, hessian, options), plain_gptq(weight, hessian, options).float().double())


@pytest.mark.parametrize("order", ["original", "static", "dynamic"])
@pytest.mark.parametrize(("bits", "sym"), [(4, True), (3, False), (2, True)])
def test_searched_grids_are_those_of_the_plain_search_weighted_by_the_inputs(order: str, bits: int, sym: bool) -> None:
    """With act-order the inputs' weights must be in the order of the columns, where groups are cut from them."""
    weight, hessian = problem(out_features=4, in_features=128, tokens=256)
    options = Options(bits, 32, order, sym, 0.01, search=True)
    assert torch.equal(solved(weight, hessian, options), plain_gptq(weight, hessian, options).float().double())


@pytest.mark.parametrize("divisor", [7, 8])
def test_every_clipping_range_is_tried_and_a_value_that_no_input_reaches_does_not_count(divisor: int) -> None:
    """All values but the largest lie on the grid of one range, and the largest is of no importance."""
    for step in range(20):
        scale = half((1 - step / 40) / divisor)
        values = torch.tensor([1.0, *(scale * code for code in (-8, -5, -1, 1, 2, 3, 7))])
        importance = torch.tensor([0.0, *[1.0] * 7])
        found = fit(values[None, :, None], bits=4, sym=True, search=True, importance=importance[None])
        assert float(found.scales) == scale, step


def test_where_no_input_is_of_importance_the_widest_range_is_kept() -> None:
    weights = torch.randn(2, 32, 5)
    searched = fit(weights, bits=4, sym=True, search=True, importance=torch.zeros(2, 32))
    assert torch.equal(searched.scales, fit(weights, bits=4, sym=True, search=False).scales)


@pytest.mark.parametrize("chunk", [1, 16 * 4, 2 * 16 * 10])  # one output; 4, 4 and 2 outputs; 2 groups and 1
def test_the_search_takes_groups_and_outputs_in_parts_and_leaves_none_out(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, importance = torch.randn(3, 16, 10), torch.rand(3, 16)
    whole = fit(weights, bits=4, sym=False, search=True, importance=importance)
    monkeypatch.setattr(solver, "_CHUNK", chunk)
    parts = fit(weights, bits=4, sym=False, search=True, importance=importance)
    assert torch.equal(parts.scales, whole.scales)
    assert torch.equal(parts.zeros, whole.zeros)


@settings(max_examples=15, deadline=None)
@given(
    out_features=st.integers(1, 5),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([16, 48, 80, 144]),
    order=st.sampled_from(["original", "static", "dynamic"]),
    seed=st.integers(0, 1000),
)
def test_codes_equal_the_plain_algorithms_for_any_shape(
    out_features: int, groups: int, group_size: int, order: str, seed: int
) -> None:
    weight, hessian = problem(out_features, groups * group_size, 2 * groups * group_size, seed)
    options = Options(4, group_size, order, True, 0.01, search=False)
    assert torch.equal(solved(weight, hessian, options), plain_gptq(weight, hessian, options).float().double())


def test_the_oracle_catches_an_update_that_skips_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem()
    factor = factorize(hessian, OPTIONS)
    slipped = solver.Factor(factor.upper.clone(), factor.order, factor.damp_percent)
    ends = [end for _, end in solver._column_blocks(weight.shape[1], OPTIONS.group_size)]
    for start, end in zip([0, *ends], ends, strict=False):
        slipped.upper[start:end, end : end + 1] = 0
    wrong = solve(weight, hessian, slipped, OPTIONS).dequantize(torch.float64)
    assert not torch.equal(wrong, plain_gptq(weight, hessian, OPTIONS).float().double())


def test_float32_loses_next_to_nothing() -> None:
    weight, hessian = problem()
    exact = solve(weight, hessian, factorize(hessian, OPTIONS), OPTIONS)
    single = solve(weight.float(), hessian.float(), factorize(hessian.float(), OPTIONS), OPTIONS)
    assert (exact.codes == single.codes).float().mean() > 0.99
    losses = [relative_error(weight.float(), quantized, hessian.float()) for quantized in (exact, single)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("order", ["original", "static", "dynamic"])
def test_gptq_is_better_than_round_to_nearest_and_the_search_helps(order: str) -> None:
    weight, hessian = (tensor.float() for tensor in problem(out_features=64))
    losses = {}
    for search in (False, True):
        options = Options(3, 32, order, True, 0.01, search)
        losses[search] = relative_error(weight, solve(weight, hessian, factorize(hessian, options), options), hessian)
    nearest = relative_error(
        weight, round_to_nearest(weight, OPTIONS.__class__(3, 32, order, True, 0.01, False)), hessian
    )
    assert losses[True] < losses[False] < nearest  # type: ignore[operator]


def test_static_act_order_keeps_the_groups_in_the_original_order() -> None:
    weight, hessian = (tensor.float() for tensor in problem())
    for order, sequential in (("static", True), ("dynamic", False)):
        options = Options(4, 32, order, True, 0.01, False)
        quantized = solve(weight, hessian, factorize(hessian, options), options)
        plain = torch.arange(weight.shape[1], dtype=torch.int32) // 32
        assert torch.equal(quantized.g_idx, plain) == sequential
        assert quantized.desc_act is not sequential


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sign", [-1, 1])
def test_zero_points_of_one_sided_groups_are_at_least_one_and_lose_no_range(bits: int, sign: int) -> None:
    weight = sign * torch.rand(16, 64)
    quantized = round_to_nearest(weight, Options(bits, 32, "original", False, 0.01, False))
    assert int(quantized.zeros.min()) >= 1
    step = quantized.scales.float().t().repeat_interleave(32, 1)
    assert ((quantized.dequantize() - weight).abs() <= step * 0.52).all()


def test_an_indefinite_hessian_is_damped_in_recorded_steps_and_then_refused() -> None:
    _, hessian = problem()
    lowest = torch.linalg.eigvalsh(hessian)[0]
    mean = hessian.diagonal().mean()
    shifted = hessian - torch.eye(len(hessian), dtype=torch.float64) * (lowest + 0.05 * mean)
    shifted.diagonal().clamp_(min=1e-6)
    factor = factorize(shifted, OPTIONS)
    assert factor.damp_percent > OPTIONS.damp_percent
    hopeless = -torch.eye(32)
    with pytest.raises(NumericalError, match="not positive definite"):
        factorize(hopeless - 1, OPTIONS)


@pytest.mark.parametrize("sym", [True, False])
def test_scales_are_positive_in_float16_where_weights_are_zero_or_next_to_it(sym: bool) -> None:
    """A scale of 0 would divide by it; 1 is written for zeros, and the least that float16 has for smaller weights."""
    weight = torch.stack([torch.zeros(32), torch.full((32,), 1e-9), torch.linspace(1e-9, 2e-9, 32)])
    quantized = round_to_nearest(weight, Options(4, 32, "original", sym, 0.01, False))
    assert quantized.scales.flatten().tolist() == [1.0, 2.0**-24, 2.0**-24]
    assert int(quantized.zeros.min()) >= 1
    assert torch.equal(quantized.dequantize(), torch.zeros(3, 32))


@pytest.mark.parametrize("multiple", [1, 3, 10, 30])
def test_damping_is_raised_as_far_as_it_must_be(multiple: int) -> None:
    """Two inputs whose matrix has the eigenvalues 2 + x and -x, x a little below the damping that helps."""
    off_diagonal = 1 + 0.9 * OPTIONS.damp_percent * multiple
    factor = factorize(torch.tensor([[1.0, off_diagonal], [off_diagonal, 1.0]]), OPTIONS)
    assert factor.damp_percent == pytest.approx(OPTIONS.damp_percent * multiple)


def test_a_hessian_that_needs_more_than_thirty_times_the_damping_is_refused_and_told_what_was_tried() -> None:
    off_diagonal = 1 + 1.01 * OPTIONS.damp_percent * 30
    with pytest.raises(NumericalError, match=r"even with a damping of 0\.3"):
        factorize(torch.tensor([[1.0, off_diagonal], [off_diagonal, 1.0]]), OPTIONS)


def layer_hessian(inputs: Tensor) -> Hessian:
    hessian = Hessian(inputs.shape[-1], CPU)
    hessian.add(inputs)
    return hessian


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_an_error_that_names_the_layer(value: float) -> None:
    inputs = torch.randn(64, 64)
    inputs[3, 5] = value
    weights = {"model.layers.0.mlp.up_proj": torch.randn(32, 64)}
    options = dict.fromkeys(weights, OPTIONS)
    with pytest.raises(NumericalError, match="not finite") as caught:
        solve_together(weights, layer_hessian(inputs), options, "error")
    assert caught.value.where == "model.layers.0.mlp.up_proj"
    rounded = solve_together(weights, layer_hessian(inputs), options, "round_to_nearest")
    assert rounded["model.layers.0.mlp.up_proj"].record.method == "round_to_nearest"


def test_a_layer_that_no_token_reached_is_an_error() -> None:
    hessian = Hessian(64, CPU)
    with pytest.raises(NumericalError, match="no calibration token"):
        solve_together({"a": torch.randn(8, 64)}, hessian, {"a": OPTIONS}, "error")


def test_a_layer_that_no_token_reached_is_rounded_to_nearest_where_that_is_asked_for() -> None:
    weight = torch.randn(8, 64)
    layer = solve_together({"a": weight}, Hessian(64, CPU), {"a": OPTIONS}, "round_to_nearest")["a"]
    assert torch.equal(layer.quantized.codes, round_to_nearest(weight, OPTIONS).codes)
    assert (layer.record.method, layer.record.tokens, layer.record.loss) == ("round_to_nearest", 0, None)
    assert layer.record.dead_columns == 64


def test_dead_inputs_are_counted_and_keep_their_weights() -> None:
    inputs = torch.randn(512, 64)
    inputs[:, [3, 40]] = 0
    weight = torch.randn(16, 64)
    layer = solve_together({"a": weight}, layer_hessian(inputs), {"a": OPTIONS}, "error")["a"]
    assert layer.record.dead_columns == 2
    assert torch.allclose(layer.quantized.dequantize()[:, [3, 40]], weight[:, [3, 40]], atol=0.3)


def test_dead_inputs_do_not_count_by_the_size_of_the_others() -> None:
    """Twice the inputs, four times the Hessian: whatever stands in for dead inputs has to grow along."""
    inputs, weight = torch.randn(512, 64), torch.randn(16, 64)
    inputs[:, [3, 40]] = 0
    found = [
        solve_together({"a": weight}, layer_hessian(inputs * size), {"a": OPTIONS}, "error")["a"].quantized.codes
        for size in (2.0**-10, 1.0)
    ]
    assert torch.equal(*found)


def test_a_layer_whose_inputs_are_all_zero_is_rounded_to_nearest() -> None:
    weight = torch.randn(16, 64)
    layer = solve_together({"a": weight}, layer_hessian(torch.zeros(512, 64)), {"a": OPTIONS}, "error")["a"]
    assert layer.record.dead_columns == 64
    assert torch.equal(layer.quantized.codes, round_to_nearest(weight, OPTIONS).codes)


def test_dead_inputs_are_counted_where_the_factorization_fails_too(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(512, 64)
    inputs[:, [3, 40]] = 0
    monkeypatch.setattr(solver, "DAMPING_STEPS", (-1e6,))
    layer = solve_together({"a": torch.randn(16, 64)}, layer_hessian(inputs), {"a": OPTIONS}, "round_to_nearest")["a"]
    assert layer.record.method == "round_to_nearest"
    assert layer.record.dead_columns == 2


def test_too_few_tokens_raise_the_damping_and_say_so() -> None:
    solved_layer = solve_together(
        {"a": torch.randn(16, 64)}, layer_hessian(torch.randn(32, 64)), {"a": OPTIONS}, "error"
    )
    assert solved_layer["a"].record.tokens == 32
    assert solved_layer["a"].record.damp_percent == pytest.approx(OPTIONS.damp_percent * solver.DAMPING_STEPS[1])


def test_as_many_tokens_as_inputs_need_no_more_damping() -> None:
    solved_layer = solve_together(
        {"a": torch.randn(16, 64)}, layer_hessian(torch.randn(64, 64)), {"a": OPTIONS}, "error"
    )
    assert solved_layer["a"].record.damp_percent == pytest.approx(OPTIONS.damp_percent)


def test_a_layer_is_reported_beside_plain_rounding_with_its_own_options() -> None:
    weight, hessian = torch.randn(16, 64), layer_hessian(torch.randn(512, 64))
    options = Options(3, 32, "original", True, 0.01, True)
    report = solve_together({"a": weight}, hessian, {"a": options}, "error")["a"].record
    assert report.rtn_loss == relative_error(weight, round_to_nearest(weight, options), hessian.matrix())
    assert report.loss is not None
    assert report.rtn_loss is not None
    assert report.loss < report.rtn_loss


def test_layers_solved_together_equal_layers_solved_alone() -> None:
    inputs = torch.randn(512, 64)
    weights = {"q": torch.randn(32, 64), "k": torch.randn(16, 64), "v": torch.randn(16, 64)}
    options = {"q": OPTIONS, "k": OPTIONS, "v": Options(8, 64, "original", True, 0.01, True)}
    together = solve_together(weights, layer_hessian(inputs), options, "error")
    for name, weight in weights.items():
        alone = solve_together({name: weight}, layer_hessian(inputs), options, "error")[name]
        assert torch.equal(together[name].quantized.codes, alone.quantized.codes)
        assert together[name].record.loss == pytest.approx(alone.record.loss, rel=1e-5)


@pytest.mark.parametrize("width", [576, 1536])
def test_the_hessian_has_the_same_bits_with_any_number_of_threads(width: int) -> None:
    inputs = torch.randn(4, 2048, width).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            hessian = Hessian(width, CPU)
            for batch in inputs:
                hessian.add(batch)
            found.append(hessian.matrix())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(matrix, found[0]) for matrix in found[1:])


def test_the_hessian_is_the_mean_of_the_outer_products() -> None:
    first, second = torch.randn(3, 50, 600), torch.randn(2, 50, 600)
    hessian = Hessian(600, CPU)
    hessian.add(first)
    hessian.add(second)
    rows = torch.cat([first.reshape(-1, 600), second.reshape(-1, 600)]).double()
    assert hessian.tokens == 250
    for _ in range(2):  # reading it changes nothing
        assert torch.allclose(hessian.matrix().double(), rows.t() @ rows / 250, atol=1e-5)
    assert torch.equal(hessian.matrix(), hessian.matrix().t())


@pytest.fixture
def products() -> Iterator[Any]:
    """The setting of torch that lets float32 products round their factors; as it was, afterwards."""
    matmul = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - unknown to torch's own types
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    yield matmul
    matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float32, "ieee"), (torch.float16, "ieee"), (torch.bfloat16, "bf16")]
)
def test_factors_are_rounded_to_bfloat16_only_where_they_are_bfloat16_values(
    dtype: torch.dtype, expected: str, products: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs with bfloat16 instructions the setting decides the bits of the sum; others do not show it."""
    during: list[str] = []
    monkeypatch.setattr(Hessian, "_add_tokens", lambda *_: during.append(products.fp32_precision))
    Hessian(4, CPU).add(torch.ones(3, 4, dtype=dtype))
    assert during == [expected]
    assert products.fp32_precision == "ieee"


def test_the_precision_of_products_is_as_before_where_adding_fails(products: Any) -> None:
    with pytest.raises(RuntimeError):
        Hessian(4, CPU).add(torch.ones(3, 5, dtype=torch.bfloat16))
    assert products.fp32_precision == "ieee"
