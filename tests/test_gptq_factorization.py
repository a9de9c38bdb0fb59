"""The factor of the inverse Hessian against torch's own factorizations in float64, and its bits and memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qexport.architectures.memory import resident, return_freed_memory
from qexport.quantizing import factorization
from qexport.quantizing.factorization import TILE, factorize_inverse, side_by_side
from qexport.quantizing.layer import Hessian, solve_together
from qexport.quantizing.solver import Options, factorize
from qexport.records import LayerRecord

CPU = torch.device("cpu")
SIZES = [1, 7, TILE - 1, TILE, TILE + 1, 2 * TILE, 3 * TILE + 24]
OPTIONS = Options(bits=4, group_size=16, order="static", sym=True, damp_percent=0.01, search=True)


def matrix_of(size: int, condition: float, seed: int = 0) -> Tensor:
    """A symmetric matrix with eigenvalues from 1 down to 1 / condition, float64."""
    generator = torch.Generator().manual_seed(seed)
    vectors, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -1, size, base=condition, dtype=torch.float64)
    product = (vectors * values) @ vectors.t()
    symmetric: Tensor = (product + product.t()) / 2
    return symmetric


def factor(matrix: Tensor) -> Tensor:
    result = matrix.clone()
    assert factorize_inverse(result)
    return result


def oracle(matrix: Tensor) -> Tensor:
    """The reference implementation's way: an explicit inverse, and its upper Cholesky factor."""
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(matrix)), upper=True)
    return upper


@pytest.mark.parametrize("size", SIZES)
def test_the_factor_is_torchs_own(size: int) -> None:
    matrix = matrix_of(size, 100.0)
    assert torch.allclose(factor(matrix), oracle(matrix), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("size", SIZES)
def test_the_lower_triangle_is_not_read_and_is_zero_afterwards(size: int) -> None:
    matrix = matrix_of(size, 100.0)
    result = factor(matrix.masked_fill(torch.ones_like(matrix).tril(-1).bool(), torch.nan))
    assert torch.equal(result, factor(matrix))
    assert torch.equal(result, result.triu())


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_float32_is_as_exact_as_torchs_own_factorization_in_float32(condition: float) -> None:
    matrix = matrix_of(3 * TILE + 24, condition).float()
    exact = oracle(matrix.double())
    lower = torch.linalg.cholesky(matrix.flip(0, 1))
    plain = torch.linalg.solve_triangular(lower, torch.eye(len(matrix)), upper=False).flip(0, 1)
    ours, theirs = ((found.double() - exact).norm() / exact.norm() for found in (factor(matrix), plain))
    assert ours < 1.5 * theirs
    assert ours < 1e-7 * condition


@pytest.mark.parametrize("tile", [0, 1, 3])
def test_the_oracle_sees_a_tile_that_is_not_subtracted(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, tasks = matrix_of(5 * TILE, 100.0), factorization._update_tasks
    monkeypatch.setattr(
        factorization,
        "_update_tasks",
        lambda whole, start: [task for at, task in enumerate(tasks(whole, start)) if at != tile],
    )
    result = matrix.clone()
    assert not factorize_inverse(result) or not torch.allclose(result, oracle(matrix), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("value", [-1.0, 0.0, torch.nan, -torch.inf])
def test_a_matrix_that_is_not_positive_definite_is_told_wherever_it_shows(
    size: int, place: float, value: float
) -> None:
    matrix = torch.eye(size)
    index = int(place * (size - 1))
    matrix[index, index] = value
    assert not factorize_inverse(matrix)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 2 * TILE + 5), (TILE, 3 * TILE)])
def test_it_need_not_show_on_the_diagonal(first: int, second: int) -> None:
    for off_diagonal, positive in ((0.999, True), (1.001, False)):
        matrix = torch.eye(3 * TILE + 24)
        matrix[first, second] = matrix[second, first] = off_diagonal
        assert factorize_inverse(matrix) == positive


def test_a_value_that_is_not_finite_beside_the_diagonal_is_told() -> None:
    for value in (torch.nan, torch.inf):
        matrix = torch.eye(2 * TILE)
        matrix[3, TILE + 3] = matrix[TILE + 3, 3] = value
        assert not factorize_inverse(matrix)


def with_threads(compute: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(compute())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    return found


def equal(results: list[list[Tensor]]) -> bool:
    return all(torch.equal(*pair) for result in results[1:] for pair in zip(result, results[0], strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_do_not_depend_on_the_number_of_threads(size: int, dtype: torch.dtype) -> None:
    matrix = matrix_of(size, 1e4).to(dtype)
    assert equal(with_threads(lambda: [factor(matrix)]))


def test_tiles_that_depend_on_the_number_of_threads_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = matrix_of(3 * TILE, 1e4).float()

    def divided() -> list[Tensor]:
        monkeypatch.setattr(factorization, "TILE", TILE // torch.get_num_threads())
        return [factor(matrix)]

    assert not equal(with_threads(divided))


@pytest.mark.parametrize(("outputs", "inputs"), [(9, 16), (70, 656), (600, 224)])
@pytest.mark.parametrize("order", ["static", "dynamic"])
def test_a_layer_and_its_record_are_the_same_with_any_number_of_threads(outputs: int, inputs: int, order: str) -> None:
    """Also where outputs and inputs are no multiples of any tile."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, inputs, generator=generator)
    weights = {"a": torch.randn(outputs, inputs, generator=generator), "b": torch.randn(5, inputs, generator=generator)}
    options = dict.fromkeys(weights, Options(4, 16, order, True, 0.01, True))
    hessian = Hessian(inputs, CPU)
    hessian.add(hidden)
    records: list[LayerRecord] = []

    def layer() -> list[Tensor]:
        solved = solve_together(weights, hessian, options, "error")
        records.extend(each.record for each in solved.values())
        return [tensor for each in solved.values() for tensor in (each.quantized.codes, each.quantized.scales)]

    assert equal(with_threads(layer))
    assert records == records[:2] * 4


def test_beside_the_hessian_there_is_one_matrix_of_its_size() -> None:
    """67 MB each, which malloc always takes from the system, so the peak of the resident memory shows them."""
    size = 4096
    hessian = torch.full((size, size), 1e-6)
    hessian.diagonal().add_(torch.arange(size) % 7 + 1)
    extra = peak_above_now(lambda: factorize(hessian, OPTIONS))
    assert extra < 1.9 * hessian.nbytes  # the tiles that are computed at the same time, and pages of libraries
    assert peak_above_now(lambda: hessian.flip(0, 1).add_(hessian.flip(0, 1))) > 1.9 * hessian.nbytes


def peak_above_now(compute: Callable[[], object]) -> int:
    """Bytes of resident memory, as far as Linux can reset the peak. What was freed earlier is given back first."""
    return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pytest.skip("the peak of the resident memory cannot be reset")
    before = resident().now
    assert before is not None
    result = compute()
    peak = resident().peak
    del result
    return peak - before


def test_tasks_run_on_one_thread_each_without_gradients_and_their_errors_arrive() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen: list[tuple[int, bool]] = []
            with side_by_side(CPU) as run:
                run(partial(note_state, seen) for _ in range(4))
            assert seen == [(1, False)] * 4
            with pytest.raises(ZeroDivisionError), side_by_side(CPU) as run:
                run([lambda: 1 // 0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def note_state(seen: list[tuple[int, bool]]) -> None:
    seen.append((torch.get_num_threads(), torch.is_grad_enabled()))
