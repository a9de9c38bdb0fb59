"""Activations that are offloaded to the disk."""

from __future__ import annotations

from pathlib import Path

import torch

from qexport.quantizing.activations import OffloadFile


def test_offloaded_tensors_are_restored_in_place_and_cost_no_memory_before(tmp_path: Path) -> None:
    file = OffloadFile(tmp_path)
    tensors = [torch.randn(3, 1000), torch.randn(77).bfloat16(), torch.arange(10)]
    copies = [tensor.clone() for tensor in tensors]
    restores = [file.offload(tensor.untyped_storage()) for tensor in tensors]
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0, 0, 0]
    for tensor, restore in zip(tensors, restores, strict=True):
        restore(tensor.untyped_storage())
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def test_views_of_an_offloaded_tensor_see_their_values_again(tmp_path: Path) -> None:
    whole = torch.arange(100.0)
    part, copy = whole[10:20], torch.arange(10.0, 20.0)
    OffloadFile(tmp_path).offload(part.untyped_storage())(part.untyped_storage())
    assert torch.equal(part, copy)
    assert torch.equal(whole, torch.arange(100.0))


def test_the_file_has_no_name_and_is_used_again(tmp_path: Path) -> None:
    file = OffloadFile(tmp_path)
    for _ in range(3):
        storage = torch.ones(1000).untyped_storage()
        file.offload(storage)(storage)
        file.empty()
    assert list(tmp_path.iterdir()) == []
    assert file._file.seek(0, 2) == 4000
