"""The upper Cholesky factor of an inverse matrix, in place, with the same bits for any number of threads.

GPTQ needs U with `H^-1 = U^T U` (section 3.3 of arXiv:2210.17323). Here `H = V V^T` with V upper triangular, so
`U = V^-1`, and both steps are one sweep over tiles of rows, from the last to the first.

torch computes the parts of one product on several threads, and the bits of some elements depend on where the parts
begin (measured with MKL on AVX2: small matrices, and widths that are no multiples of 16). So the work is cut into
products of fixed shapes here, and one thread computes each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from qexport.architectures.devices import single_thread
from qexport.quantizing.tiles import tile

TILE = 192
"""Rows and columns of a tile on the CPU. Larger ones leave less to do side by side, smaller ones multiply slower."""

Task = Callable[[], object]


@contextmanager
def side_by_side(device: torch.device) -> Iterator[Callable[[Iterable[Task]], None]]:
    """Yields a function that runs independent tasks, as many at a time as torch has threads, each on one thread.

    The tasks must not depend on the number of threads; then their bits do not either.
    """
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    if workers == 1:
        with single_thread():
            yield _in_turn
        return
    with single_thread(), ThreadPoolExecutor(workers, initializer=_prepare_worker) as pool:

        def run(tasks: Iterable[Task]) -> None:
            for future in [pool.submit(task) for task in tasks]:
                future.result()

        yield run


@torch.no_grad()
def _in_turn(tasks: Iterable[Task]) -> None:
    for task in tasks:
        task()


def _prepare_worker() -> None:
    """Both settings belong to the thread."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def factorize_inverse(matrix: Tensor) -> bool:
    """Overwrites a symmetric matrix H with U, where `H^-1 = U^T U` and U is upper triangular.

    Each step turns the rows of one tile into their part of U, `W = V_kk^-1 [A_k | I | R_k]`, and subtracts `P^T W` from
    the rows above, where P is A_k after its multiplication. Left of the tile this is the right-looking Cholesky
    factorization; right of it, the right-looking inversion of V.

    Args:
        matrix: [n, n], float32 or float64; only the upper triangle is read.

    Returns:
        Whether H is positive definite, as far as its dtype can tell. If not, `matrix` holds nothing of use.
    """
    size, step = matrix.shape[0], tile(TILE, matrix.device)
    with side_by_side(matrix.device) as run:
        for start in reversed(range(0, size, step)):
            rows = matrix[start : start + step]
            inverse = _inverse_of_tile(rows[:, start : start + step])
            if inverse is None:
                return False
            run(_row_tasks(matrix, start, inverse))
            run(_update_tasks(matrix, start))
    matrix.triu_()
    return True


def _inverse_of_tile(square: Tensor) -> Tensor | None:
    """V^-1 for `square = V V^T`, V upper triangular; None if it is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(square.flip(0, 1))
    if failed or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    eye = torch.eye(len(square), dtype=square.dtype, device=square.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse.flip(0, 1)


def _row_tasks(matrix: Tensor, start: int, inverse: Tensor) -> Iterator[Task]:
    """Multiplies the tile's rows from the left. What is left of the tile comes from above it, which becomes zero."""
    end, step = start + len(inverse), tile(TILE, matrix.device)
    rows = matrix[start:end]

    def left(first: int) -> None:
        above = matrix[first : first + step, start:end]
        torch.mm(inverse, above.t(), out=rows[:, first : first + step])
        above.zero_()

    def right(first: int) -> None:
        part = rows[:, first : first + step]
        part.copy_(inverse @ part)

    rows[:, start:end] = inverse
    yield from (partial(left, first) for first in range(0, start, step))
    yield from (partial(right, first) for first in range(end, len(matrix), step))


def _update_tasks(matrix: Tensor, start: int) -> Iterator[Task]:
    """Subtracts what the tile's rows explain from the rows above, from the diagonal to the right."""
    step = tile(TILE, matrix.device)
    rows = matrix[start : start + step]

    def update(first: int) -> None:
        matrix[first : first + step, first:].addmm_(rows[:, first : first + step].t(), rows[:, first:], alpha=-1)

    return (partial(update, first) for first in range(0, start, step))
