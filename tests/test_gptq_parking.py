"""Forwards that are stopped: what they hold is on the disk, and comes back when an operation uses it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage, nn

from qexport.quantizing.activations import OffloadFile, Restore
from qexport.quantizing.parking import Parking
from qexport.quantizing.pauses import PausedForward, pausing_at

WIDTH, TOKENS = 96, 512


class Block(nn.Module):
    """Holds while it is stopped: its input, a tensor that it uses again, a view, and one that it changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        view, unused = first.view(-1, WIDTH)[1:], first * 3
        second = self.second(first + 1)
        first.mul_(2)
        last = self.first(second)
        del unused
        result: Tensor = last + first + x + view.sum()
        return result


@pytest.fixture
def file(tmp_path: Path) -> Iterator[OffloadFile]:
    with OffloadFile(tmp_path) as found:
        yield found


def resident() -> int:
    """Bytes of all tensors of a forward's size."""
    storages = {
        each.untyped_storage()._cdata: each.untyped_storage().nbytes()
        for each in gc.get_objects()
        if type(each) is Tensor and each.shape[-1:] == (WIDTH,) and len(each) >= TOKENS - 1
    }
    return sum(storages.values())


@torch.no_grad()
def test_a_stopped_forward_holds_nothing_and_ends_with_the_same_bits(file: OffloadFile) -> None:
    block, inputs = Block(), [torch.randn(TOKENS, WIDTH) for _ in range(3)]
    expected = [block(x) for x in inputs]
    kept = [x.clone() for x in inputs]
    parking = Parking(file)
    found: list[Tensor] = []

    def forward(x: Tensor) -> PausedForward:
        return PausedForward(lambda: found.append(block(x)), parking)

    before = resident()
    forwards = [forward(x) for x in inputs]
    for x in inputs:
        parking.hold(x, file.offload(x.untyped_storage()))
    with pausing_at([block.first, block.second]):
        for stop in range(3):
            for paused in forwards:
                (given,) = paused.advance()
                assert given.untyped_storage().nbytes() == given.nbytes
                assert stop or torch.equal(given, kept[forwards.index(paused)])
                del given
                parking.park()
            assert resident() == before - sum(x.nbytes for x in kept)
        for paused in forwards:
            paused.finish()
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


@torch.no_grad()
def test_a_tensor_is_written_once_unless_it_is_changed(file: OffloadFile, monkeypatch: pytest.MonkeyPatch) -> None:
    parking, written = Parking(file), list[int]()
    offload = OffloadFile.offload

    def noted(self: OffloadFile, storage: UntypedStorage) -> Restore:
        written.append(storage.nbytes())
        return offload(self, storage)

    monkeypatch.setattr(OffloadFile, "offload", noted)
    with parking:
        x = torch.ones(TOKENS, WIDTH)
    for changes, expected in ((False, 1), (False, 1), (True, 1), (False, 2)):
        parking.park()
        assert x.untyped_storage().nbytes() == 0
        with parking:
            total = (x.mul_(2) if changes else x).sum()
        assert len(written) == expected
    assert float(total) == 2 * TOKENS * WIDTH


@torch.no_grad()
def test_arguments_in_lists_come_back(file: OffloadFile) -> None:
    parking = Parking(file)
    with parking:
        parts: list[Any] = [torch.full((TOKENS, WIDTH), float(number)) for number in range(3)]
    parking.park()
    with parking:
        assert torch.cat(parts).mean() == 1
