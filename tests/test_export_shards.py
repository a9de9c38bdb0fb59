from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from qexport.amounts import parse_size
from qexport.errors import QexportError
from qexport.export import tensor_writer
from qexport.export.tensor_writer import ShardWriter, plan_shards
from qexport.tensors import LargestSpec, TensorSpec
from qexport.tensors.safetensors_index import INDEX_NAME

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], max_shard_size: int = 10**9) -> dict[str, bytes]:
    writer = ShardWriter(folder, specs_of(tensors), max_shard_size)
    for name, tensor in reversed(tensors.items()):
        writer.write(name, tensor)
    writer.finish()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def small(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{index}.weight": torch.randn(index + 2, 3, generator=generator).to(dtype)
        for index, dtype in enumerate(DTYPES)
    } | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), 'größe "q"\n': torch.ones(1, dtype=torch.bfloat16)}


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=6))
def test_the_bytes_are_those_of_safetensors(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in content.items()}
    written = write(tmp_path_factory.mktemp("shards"), tensors)
    assert written == {"model.safetensors": save(tensors, {"format": "pt"})}


def test_the_bytes_are_those_of_save_file(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    save_file(small(), tmp_path / "theirs", {"format": "pt"})
    assert write(tmp_path / "ours", small())["model.safetensors"] == (tmp_path / "theirs").read_bytes()


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), st.integers(0, 40), st.integers(0, 2000)), min_size=1),
    st.randoms(use_true_random=False),
)
def test_vectors_that_came_shorter_than_they_might_leave_no_gap(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, tuple[torch.dtype, int, int]], random: Random
) -> None:
    """Hypothesis gives dtype, length, and by how much the largest length is above it; 0 is a fixed shape."""
    folder = tmp_path_factory.mktemp("shards")
    tensors = {name: torch.randint(0, 2, (length,)).to(dtype) for name, (dtype, length, _) in content.items()}
    specs = {
        name: LargestSpec((length + room,), dtype) if room else TensorSpec((length,), dtype)
        for name, (dtype, length, room) in content.items()
    }
    writer = ShardWriter(folder, specs, 10**9)
    order = list(tensors)
    random.shuffle(order)
    for name in order:
        writer.write(name, tensors[name])
    assert writer.finish() == ("model.safetensors",)
    assert (folder / "model.safetensors").read_bytes() == save(tensors, {"format": "pt"})
    assert writer.written == specs_of(tensors)


def test_a_long_tensor_is_moved_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_writer, "_CHUNK_BYTES", 5)
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.arange(100, dtype=torch.uint8)}
    writer = ShardWriter(tmp_path, {"a": LargestSpec((9,), torch.uint8), "b": specs_of(tensors)["b"]}, 10**9)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    assert (tmp_path / "model.safetensors").read_bytes() == save(tensors, {"format": "pt"})


def test_shards_with_shorter_vectors_have_the_true_sizes_in_their_index(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {name: LargestSpec((60,), torch.uint8) for name in "abc"}, 64)
    for name in "abc":
        writer.write(name, torch.ones(7, dtype=torch.uint8))
    writer.finish()
    assert json.loads((tmp_path / INDEX_NAME).read_text())["metadata"]["total_size"] == 21
    assert all(
        load_file(path)[name].numel() == 7
        for name, path in zip("abc", sorted(tmp_path.glob("*.safetensors")), strict=True)
    )


@pytest.mark.parametrize(
    "tensor", [torch.ones(4, dtype=torch.uint8), torch.ones(1, 2, dtype=torch.uint8), torch.ones(2)]
)
def test_a_vector_that_is_longer_or_of_another_kind_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    writer = ShardWriter(tmp_path, {"a": LargestSpec((3,), torch.uint8)}, 100)
    with pytest.raises(QexportError, match="was planned"):
        writer.write("a", tensor)


def test_the_bytes_are_the_golden_ones(tmp_path: Path) -> None:
    tensors = {"b": torch.tensor([1, -1], dtype=torch.int32), "a": torch.tensor([1.0], dtype=torch.float16)}
    header = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F16","shape":[1],"data_offsets":[8,10]}}'
    )
    header += b" " * 5
    assert len(header) % 8 == 0
    content = len(header).to_bytes(8, "little") + header + b"\1\0\0\0\xff\xff\xff\xff" + b"\x00\x3c"
    assert write(tmp_path, tensors) == {"model.safetensors": content}


def test_several_shards_load_with_their_index(tmp_path: Path) -> None:
    written = write(tmp_path, small(), max_shard_size=64)
    shards = sorted(name for name in written if name != INDEX_NAME)
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 3
    index = json.loads(written[INDEX_NAME])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in small().values())
    for shard in shards:
        tensors = load_file(tmp_path / shard)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 64 or len(tensors) == 1
        for name, tensor in tensors.items():
            assert index["weight_map"].pop(name) == shard
            assert torch.equal(tensor, small()[name])
    assert not index["weight_map"]


def sizes(*counts: int) -> dict[str, TensorSpec]:
    return {str(index): TensorSpec((count,), torch.uint8) for index, count in enumerate(counts)}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((4, 4, 4), [["0", "1"], ["2"]]),
        ((8, 1), [["0"], ["1"]]),
        ((1, 20, 1), [["0"], ["1"], ["2"]]),
        ((20,), [["0"]]),
        ((), [[]]),
    ],
)
def test_files_are_filled_in_order(counts: tuple[int, ...], expected: list[list[str]]) -> None:
    assert [list(shard.specs) for shard in plan_shards(sizes(*counts), 8)] == expected


def test_the_digests_are_those_of_the_bytes(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, specs_of({"a": torch.ones(3)}), 100)
    writer.write("a", torch.ones(3))
    assert writer.digests == {"a": hashlib.sha256(b"\x00\x00\x80\x3f" * 3).hexdigest()}


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("c", torch.ones(2), "not planned"),
        ("a", torch.ones(3), "was planned"),
        ("a", torch.ones(2, dtype=torch.float16), "was planned"),
        ("b", torch.ones(2), "twice"),
    ],
)
def test_a_tensor_that_was_not_planned_so_is_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor, words: str
) -> None:
    writer = ShardWriter(tmp_path, specs_of({"a": torch.ones(2), "b": torch.ones(2)}), 100)
    writer.write("b", torch.ones(2))
    with pytest.raises(QexportError, match=words) as caught:
        writer.write(name, tensor)
    assert caught.value.where == name


def test_a_missing_tensor_is_told_and_its_file_cannot_be_read(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, specs_of({"a": torch.ones(2), "b": torch.ones(2)}), 100)
    writer.write("b", torch.ones(2))
    with pytest.raises(QexportError, match="1 tensors never") as caught:
        writer.finish()
    assert caught.value.where == "a"
    with pytest.raises(Exception, match="header"):
        load_file(tmp_path / "model.safetensors")


def test_a_dtype_that_has_no_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QexportError, match="complex64"):
        ShardWriter(tmp_path, {"a": TensorSpec((1,), torch.complex64)}, 100)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: whole(descriptor, data[:7], offset))
    assert write(tmp_path, small())["model.safetensors"] == save(small(), {"format": "pt"})


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        write(tmp_path, small(), max_shard_size=64)
    finally:
        os.umask(previous)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 GB", 15 * 10**8), ("5GiB", 5 * 2**30), ("1KB", 1000), ("7B", 7)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "5gb", "5Gb", "-5GB", "5 G B", "0GB", "0.1B", "1e3MB", "٥GB", "5GB "])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)
