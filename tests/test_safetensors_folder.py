"""Shards and their index: every way in which they can contradict each other or leave the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qexport.errors import InputError
from qexport.tensors.safetensors_folder import SafetensorsFolder
from qexport.tensors.safetensors_index import INDEX_NAME, SINGLE_NAME


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards, a and b in the first, c in the second."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, folder / "one.safetensors")
    save_file({"c": torch.full((4,), 2.0)}, folder / "two.safetensors")
    write_index(folder, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return folder


def refusal(folder: Path, *, trusted_root: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        SafetensorsFolder(folder, trusted_root=trusted_root)
    return str(caught.value)


def test_shards_are_read_through_their_index(sharded: Path) -> None:
    with SafetensorsFolder(sharded) as folder:
        assert list(folder.specs()) == ["a", "b", "c"]
        assert torch.equal(folder.read("c"), torch.full((4,), 2.0))
        assert folder.place("c").endswith("two.safetensors: c")
        assert folder.files() == ("one.safetensors", "two.safetensors", INDEX_NAME)


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / SINGLE_NAME)
    with SafetensorsFolder(tmp_path) as folder:
        assert folder.files() == (SINGLE_NAME,)
        assert torch.equal(folder.read("a"), torch.zeros(2))


@pytest.mark.parametrize("name", ["../outside.safetensors", "sub/../../outside.safetensors", "..\\outside", ""])
def test_a_shard_name_that_climbs_out_of_the_folder_is_refused(sharded: Path, name: str) -> None:
    save_file({"c": torch.zeros(1)}, sharded.parent / "outside.safetensors")
    write_index(sharded, {"a": "one.safetensors", "b": "one.safetensors", "c": name})
    assert "leaves the model's folder" in refusal(sharded)


def test_an_absolute_shard_name_is_refused(sharded: Path) -> None:
    outside = sharded.parent / "outside.safetensors"
    save_file({"c": torch.zeros(1)}, outside)
    write_index(sharded, {"a": "one.safetensors", "b": "one.safetensors", "c": str(outside)})
    assert "leaves the model's folder" in refusal(sharded)


def test_a_symbolic_link_that_leaves_the_folder_is_refused_unless_its_root_is_trusted(sharded: Path) -> None:
    target = sharded.parent / "blob"
    (sharded / "two.safetensors").rename(target)
    (sharded / "two.safetensors").symlink_to("../blob")
    assert "a symbolic link leads out of the model's folder" in refusal(sharded)
    with SafetensorsFolder(sharded, trusted_root=sharded.parent) as folder:
        assert torch.equal(folder.read("c"), torch.full((4,), 2.0))
    assert "leads out" in refusal(sharded, trusted_root=sharded.parent / "elsewhere")


def test_a_linked_folder_inside_the_model_is_refused(sharded: Path) -> None:
    outside = sharded.parent / "outside"
    outside.mkdir()
    (sharded / "two.safetensors").rename(outside / "two.safetensors")
    (sharded / "sub").symlink_to(outside)
    write_index(sharded, {"a": "one.safetensors", "b": "one.safetensors", "c": "sub/two.safetensors"})
    assert "leads out" in refusal(sharded)


def test_a_symbolic_link_to_itself_is_refused(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    (sharded / "two.safetensors").symlink_to("two.safetensors")
    assert "two.safetensors" in refusal(sharded)


def test_a_single_file_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "blob")
    (folder / SINGLE_NAME).symlink_to(tmp_path / "blob")
    assert "leads out" in refusal(folder)


def test_a_missing_shard_is_refused(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    assert "two.safetensors: the file does not exist" in refusal(sharded)


def test_a_tensor_that_only_the_index_has_is_refused(sharded: Path) -> None:
    write_index(
        sharded, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", "d": "two.safetensors"}
    )
    assert "d is missing in two.safetensors" in refusal(sharded)


def test_a_tensor_under_the_wrong_shard_is_refused(sharded: Path) -> None:
    write_index(sharded, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    assert "b is missing in two.safetensors" in refusal(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"c": torch.zeros(4), "a": torch.zeros(2)}, sharded / "two.safetensors")
    assert "a is in one.safetensors and in two.safetensors" in refusal(sharded)


def test_a_tensor_that_the_index_does_not_name_is_refused(sharded: Path) -> None:
    write_index(sharded, {"a": "one.safetensors", "c": "two.safetensors"})
    assert "b is in one.safetensors, but not in the index" in refusal(sharded)


def test_all_problems_are_told_at_once(sharded: Path) -> None:
    (sharded / "two.safetensors").write_bytes(b"nonsense nonsense")
    write_index(
        sharded, {"a": "one.safetensors", "x": "one.safetensors", "c": "two.safetensors", "d": "three.safetensors"}
    )
    message = refusal(sharded)
    for expected in (
        "two.safetensors: the header's length",
        "three.safetensors: the file does not exist",
        "x is missing",
        "b is in",
    ):
        assert expected in message


def test_a_long_list_of_problems_is_capped_with_a_count(sharded: Path) -> None:
    absent = {f"x{index}": "one.safetensors" for index in range(100)}
    write_index(sharded, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"} | absent)
    message = refusal(sharded)
    assert message.count("is missing") == 12
    assert "and 88 more" in message


def test_both_a_single_file_and_an_index_are_refused(sharded: Path) -> None:
    save_file({"a": torch.zeros(2)}, sharded / SINGLE_NAME)
    assert "both model.safetensors and" in refusal(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {}])
def test_an_index_without_a_proper_weight_map_is_refused(sharded: Path, weight_map: object) -> None:
    write_index(sharded, weight_map)
    assert "weight_map" in refusal(sharded)


def test_an_index_with_a_duplicate_key_is_refused(sharded: Path) -> None:
    (sharded / INDEX_NAME).write_text('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
    assert "'a' appears twice" in refusal(sharded)


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    message = refusal(tmp_path)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert "holds no weights" in refusal(tmp_path)
