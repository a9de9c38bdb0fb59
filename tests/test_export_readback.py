from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import factories
from qexport.errors import QexportError
from qexport.export.tensor_writer import WrittenWeights
from qexport.export.weight_files import check_written
from qexport.tensors.safetensors_index import INDEX_NAME
from quantized_models import QuantizedModel

QWEIGHT = "model.layers.1.mlp.up_proj.qweight"


@pytest.fixture(scope="module")
def model() -> QuantizedModel:
    return QuantizedModel(factories.build(factories.llama_config()))


@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
def test_what_was_written_is_found_again(tmp_path: Path, model: QuantizedModel, max_shard_size: str) -> None:
    written = model.write(tmp_path, max_shard_size=max_shard_size)
    check_written(tmp_path, written)
    assert sum(name.endswith(".qweight") for name in written.specs) == 14


def shard_with(folder: Path, name: str) -> Path:
    index = json.loads((folder / INDEX_NAME).read_text())
    shard: str = index["weight_map"][name]
    return folder / shard


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def flip_a_bit(folder: Path) -> None:
    path = shard_with(folder, QWEIGHT)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def drop_a_tensor(folder: Path) -> None:
    change(shard_with(folder, QWEIGHT), lambda tensors: tensors.pop(QWEIGHT))


def add_a_tensor(folder: Path) -> None:
    change(shard_with(folder, QWEIGHT), lambda tensors: tensors.update(extra=torch.ones(1)))


def change_a_dtype(folder: Path) -> None:
    change(shard_with(folder, QWEIGHT), lambda tensors: tensors.update({QWEIGHT: tensors[QWEIGHT].view(torch.float32)}))


def change_a_shape(folder: Path) -> None:
    change(shard_with(folder, QWEIGHT), lambda tensors: tensors.update({QWEIGHT: tensors[QWEIGHT].view(-1)}))


def repeat_a_tensor(folder: Path) -> None:
    save_file({QWEIGHT: load_file(shard_with(folder, QWEIGHT))[QWEIGHT]}, folder / "z.safetensors")


def drop_a_shard(folder: Path) -> None:
    shard_with(folder, QWEIGHT).unlink()


def cut_a_shard(folder: Path) -> None:
    path = shard_with(folder, QWEIGHT)
    path.write_bytes(path.read_bytes()[:-1])


def misplace_a_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"][QWEIGHT] = "model-00001-of-00002.safetensors"
    (folder / INDEX_NAME).write_text(json.dumps(index))


def drop_the_index(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()


def change_one_config(folder: Path) -> None:
    path = folder / "quantize_config.json"
    path.write_text(path.read_text().replace('"bits": 4', '"bits": 8'))


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (flip_a_bit, "not those written"),
        (drop_a_tensor, "1 tensors are missing"),
        (add_a_tensor, "not planned"),
        (change_a_dtype, "was planned"),
        (change_a_shape, "was planned"),
        (repeat_a_tensor, "twice"),
        (drop_a_shard, "tensors are missing"),
        (cut_a_shard, "file"),
        (misplace_a_tensor, "index"),
        (drop_the_index, "index"),
        (change_one_config, "differ"),
    ],
)
def test_a_planted_fault_is_found(
    tmp_path: Path, model: QuantizedModel, plant: Callable[[Path], None], words: str
) -> None:
    written = write_in_shards(tmp_path, model)
    plant(tmp_path)
    with pytest.raises(QexportError, match=words):
        check_written(tmp_path, written)


def write_in_shards(folder: Path, model: QuantizedModel) -> WrittenWeights:
    return model.write(folder, max_shard_size="50KB")


def test_a_folder_that_claims_codes_and_holds_none_is_refused(tmp_path: Path, model: QuantizedModel) -> None:
    linears = [linear.name for block in model.structure.linears.values() for linear in block]
    written = replace(model, special=dict.fromkeys(linears)).write(tmp_path)
    with pytest.raises(QexportError, match="claims gptq codes"):
        check_written(tmp_path, written)


def test_links_to_a_checked_folder_are_not_hashed_again_and_copies_are(
    tmp_path: Path, model: QuantizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, linked, copied = (tmp_path / name for name in ("first", "linked", "copied"))
    written = write_in_shards(first, model)
    shutil.copytree(first, linked, copy_function=os.link)
    shutil.copytree(first, copied)
    flip_a_bit(copied)
    with pytest.raises(QexportError, match="not those written"):
        check_written(copied, written, checked=first)
    monkeypatch.setattr("qexport.export.weight_files.sha256_chunks", lambda chunks: "hashed")
    check_written(linked, written, checked=first)
    with pytest.raises(QexportError, match="not those written"):
        check_written(linked, written)
