"""The layout gguf in several files: those of the gguf package's writer, read back as one model, and every refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import factories
import gguf_folders
import qexport
from gguf_faults import rows_of, value_of
from qexport.artifact.names import GGUF_NAME, gguf_names, gguf_of
from qexport.cli.app import main
from qexport.errors import InputError, QexportError
from qexport.export.gguf.files import GgufFiles
from qexport.export.gguf.launch import GgufLaunch, launch_files
from qexport.formats.gguf.header import padded
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.pipeline.inspection import inspect_artifact
from qexport.reading.stored_model import open_stored
from qexport.tensors.gguf_file import GgufFile
from qexport.tensors.gguf_parts import open_gguf

SIZE, LIMIT = "40KB", 40_000
SPLIT = {"split.no", "split.count", "split.tensors.count"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> gguf_folders.Made:
    """The folder `gguf` with one file, and beside it `parts` with several."""
    found = gguf_folders.make(factories.llama_config(), tmp_path_factory.mktemp("made"))
    layout = gguf_folders.layout("gguf", gguf_folders.load(found.base), split_max_size=SIZE)
    gguf_folders.write(layout, parts_of(found), list(found.records.values()), gguf_folders.load(found.base))
    return found


def parts_of(made: gguf_folders.Made) -> Path:
    return made.gguf.with_name("parts")


def first_of(folder: Path) -> Path:
    return folder / str(gguf_of(folder))


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.gguf"))


def test_the_files_are_those_that_the_gguf_package_writes(made: gguf_folders.Made, tmp_path: Path) -> None:
    """Its writer splits as llama.cpp's `llama-gguf-split` does, and none of these tensors needs to be padded."""
    layout = gguf_folders.layout("gguf", gguf_folders.load(made.base), split_max_size=SIZE)
    assert isinstance(layout.weights, GgufFiles)
    writer = gguf.GGUFWriter(tmp_path / "model", "llama", split_max_size=LIMIT)
    for key, value in list(layout.weights.values.items())[1:]:
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    with closing(GgufFile(made.gguf / GGUF_NAME)) as file:
        for name, tensor in file.tensors.items():
            assert padded(tensor.nbytes) == tensor.nbytes
            rows = file.read_rows(name, 0, tensor.rows).reshape(*tensor.shape[:-1], tensor.row_bytes)
            writer.add_tensor(name, rows, raw_dtype=tensor.kind)
    writer.write_header_to_file(tmp_path / "model.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    own = files_of(parts_of(made))
    assert [path.name for path in own] == gguf_names(len(own))
    assert len(own) > 2
    assert [path.name for path in files_of(tmp_path)] == [path.name for path in own]
    for path in own:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert {path.name: path.stat().st_size for path in own} == dict(layout.weights.files)


def test_each_file_has_the_keys_and_the_tensors_that_llama_gguf_split_gives_it(made: gguf_folders.Made) -> None:
    with closing(GgufFile(made.gguf / GGUF_NAME)) as file:
        sizes, values = (
            {name: each.nbytes for name, each in file.tensors.items()},
            {*file.metadata, *file.array_lengths},
        )
    tables, total = list[list[str]](), LIMIT
    for name, nbytes in sizes.items():
        total += -(-nbytes // 32) * 32
        if total > LIMIT:
            tables.append([])
            total = -(-nbytes // 32) * 32
        tables[-1].append(name)
    for number, (path, table) in enumerate(zip(files_of(parts_of(made)), tables, strict=True)):
        reader = gguf.GGUFReader(path)
        assert [tensor.name for tensor in reader.tensors] == table
        own = {name for name in reader.fields if not name.startswith("GGUF.")}
        assert own == (values | SPLIT if number == 0 else SPLIT)
        kinds = {name: reader.fields[name].types[0].name for name in SPLIT}
        assert kinds == {"split.no": "UINT16", "split.count": "UINT16", "split.tensors.count": "INT32"}
        found = {name: int(reader.fields[name].parts[-1][0]) for name in SPLIT}
        assert found == {"split.no": number, "split.count": len(tables), "split.tensors.count": len(sizes)}


def test_every_value_is_that_of_the_one_file(made: gguf_folders.Made) -> None:
    with (
        open_stored(parts_of(made), dtype=torch.float32) as parts,
        open_stored(made.gguf, dtype=torch.float32) as whole,
    ):
        assert list(parts.specs().items()) == list(whole.specs().items())
        for name in whole.specs():
            assert torch.equal(parts.read(name), whole.read(name)), name
        assert (parts.layers, parts.grids, parts.stored_bytes) == (whole.layers, whole.grids, whole.stored_bytes)
        assert parts.files == [path.name for path in files_of(parts_of(made))]
        parts.check_complete()


def test_the_order_in_which_tensors_come_changes_no_byte(made: gguf_folders.Made, tmp_path: Path) -> None:
    base = gguf_folders.load(made.base)
    layout = gguf_folders.layout("gguf", base, split_max_size=SIZE)
    gguf_folders.write(layout, tmp_path / "again", list(made.records.values())[::-1], base)
    for path in parts_of(made).rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(parts_of(made))).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("limit", "count"), [("1B", 21), ("1GB", 1)])
def test_a_larger_tensor_has_its_own_file_and_what_fits_into_one_is_one(
    limit: str, count: int, made: gguf_folders.Made, tmp_path: Path
) -> None:
    base = gguf_folders.load(made.base)
    layout = gguf_folders.layout("gguf", base, split_max_size=limit)
    assert list(layout.weights.files) == gguf_names(count)
    gguf_folders.write(layout, tmp_path / "out", list(made.records.values()), base)
    if count == 1:
        assert (tmp_path / "out" / GGUF_NAME).read_bytes() == (made.gguf / GGUF_NAME).read_bytes()


def test_the_model_is_loaded_and_is_a_base(made: gguf_folders.Made) -> None:
    ids = torch.arange(20)[None]
    parts, whole = (qexport.load(folder, device="cpu", check=False) for folder in (parts_of(made), made.gguf))
    with torch.no_grad():
        assert torch.equal(parts(input_ids=ids).logits, whole(input_ids=ids).logits)
    first, one = (load_checkpoint(LoadSettings(base=str(first_of(each)))) for each in (parts_of(made), made.gguf))
    assert first.files == one.files
    for name in one.weights.specs():
        assert torch.equal(first.weights.read(name), one.weights.read(name))
    assert set(first.origin.sha256) == {path.name for path in files_of(parts_of(made))}


def test_folder_and_first_file_are_verified_and_inspected(
    made: gguf_folders.Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = factories.write_text(tmp_path / "held.jsonl", passages=12, seed=3)
    settings = qexport.VerifySettings(text=str(text), windows=4, max_windows=4, sequence_length=32, profile="off")
    for place in (parts_of(made), first_of(parts_of(made))):
        report = qexport.verify(place, qexport.LoadSettings(base=str(made.base)), settings)
        assert [check for check in report.checks if not check.passed] == []
    assert inspect_artifact(parts_of(made)).method == "GGUF, Q4_0"
    for place in (parts_of(made), first_of(parts_of(made))):
        assert main(["inspect", str(place), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert set(found["files"]) == {path.name for path in files_of(parts_of(made))}
        assert found["tensors"] == len(made.records)


def test_launch_files_name_the_first_file(made: gguf_folders.Made) -> None:
    first = first_of(parts_of(made)).name
    texts = {path.name: path.read_text() for path in (parts_of(made) / "launch").iterdir()}
    assert set(texts) == {"README.md", "llama-server.sh", "generate.py"}  # Ollama takes one file
    assert all(first in text for text in texts.values())
    assert f"llama-gguf-split --merge {first} model.gguf" in texts["README.md"]
    assert f'"{{path}}/{first}"'.replace("{path}", "FOLDER") in layout_of(made).card.loading


def layout_of(made: gguf_folders.Made) -> Any:
    return gguf_folders.layout("gguf", gguf_folders.load(made.base), split_max_size=SIZE)


def test_a_record_of_one_file_has_the_bytes_that_it_always_had() -> None:
    record = GgufLaunch(name="x", longest=8, chat=False)
    assert record.model_dump() == {"name": "x", "longest": 8, "chat": False}
    assert "launch/Modelfile" in launch_files(record)


# Files that do not belong together.


def changed(number: int, key: str, old: int, new: int) -> Callable[[Path], None]:
    """Another value of a key of the splitting in one of the files."""
    kind, size = (b"\5\0\0\0", 4) if key == "split.tensors.count" else (b"\2\0\0\0", 2)
    before, after = (kind + value.to_bytes(size, "little") for value in (old, new))
    return lambda folder: value_of(files_of(folder)[number], key, before, after)


def doubled(folder: Path) -> None:
    """The second file is the first one again, with its number."""
    one, two = files_of(folder)[:2]
    shutil.copy(one, two)
    changed(1, "split.no", 0, 1)(folder)


def with_a_name_of_another(folder: Path) -> None:
    """A tensor of the third file gets the name of one in the second."""
    with closing(GgufFile(files_of(folder)[1])) as one, closing(GgufFile(files_of(folder)[2])) as two:
        taken, own = next((a, b) for a in one.tensors for b in two.tensors if len(a) == len(b))
    value_of(files_of(folder)[2], "", own.encode(), taken.encode())


def renamed(folder: Path) -> None:
    for path in files_of(folder):
        path.rename(path.with_name(path.name.replace("-of-0000", "-of-0001")))


FAULTS: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "a file is missing": (lambda folder: files_of(folder)[1].unlink(), "cannot be read: No such file"),
    "a file is another": (lambda folder: files_of(folder)[2].replace(files_of(folder)[1]), "No such file|is meant"),
    "a file is there twice": (doubled, "is meant"),
    "a tensor is there twice": (with_a_name_of_another, "a tensor is in two of the files"),
    "a number": (changed(1, "split.no", 1, 2), r"are 2, \d, 21, where 1, \d, 21 is meant"),
    "the number of tensors": (changed(1, "split.tensors.count", 21, 20), r"\d, 20, where 1, \d, 21 is meant"),
    "the first is a later one": (changed(0, "split.no", 0, 1), "not the first of the model's"),
    "other names": (renamed, "does not say where the others are"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_belong_together_are_refused(fault: str, made: gguf_folders.Made, tmp_path: Path) -> None:
    change, words = FAULTS[fault]
    change(shutil.copytree(parts_of(made), tmp_path / "changed"))
    with pytest.raises(InputError, match=words), open_stored(tmp_path / "changed", dtype=torch.float32):
        pass


def test_a_later_file_is_not_the_model(made: gguf_folders.Made, capsys: pytest.CaptureFixture[str]) -> None:
    second = files_of(parts_of(made))[1]
    with pytest.raises(InputError, match="not the first of the model's") as caught:
        open_gguf(second)
    assert first_of(parts_of(made)).name in str(caught.value.mend)
    assert main(["inspect", str(second)]) == 3
    assert "name the first" in capsys.readouterr().err


def test_a_file_left_from_another_splitting_is_refused(made: gguf_folders.Made, tmp_path: Path) -> None:
    folder = shutil.copytree(parts_of(made), tmp_path / "changed")
    shutil.copy(files_of(folder)[-1], folder / "model-00009-of-00009.gguf")
    with pytest.raises(InputError, match=r"weights that are not the artifact's"):
        inspect_artifact(folder)


def test_a_link_out_of_the_folder_is_refused(made: gguf_folders.Made, tmp_path: Path) -> None:
    folder = shutil.copytree(parts_of(made), tmp_path / "changed")
    second = files_of(folder)[1]
    second.rename(tmp_path / "elsewhere.gguf")
    second.symlink_to(tmp_path / "elsewhere.gguf")
    with pytest.raises(InputError, match="leads out of the model's folder"), open_stored(folder, dtype=torch.float32):
        pass


def test_what_is_not_as_written_is_found_when_it_is_read_back(made: gguf_folders.Made, tmp_path: Path) -> None:
    layout, target = layout_of(made), tmp_path / "out"
    target.mkdir()
    with layout.weights.writer(target) as writer:
        for record in made.records.values():
            writer.write(record)
        written = writer.finish()
    layout.weights.read_back(target, written)
    with closing(open_gguf(first_of(target))) as file:
        last = next(iter(GgufFile(file.paths[-1]).tensors))
    rows_of(files_of(target)[-1], last, np.zeros_like)
    with pytest.raises(QexportError, match="not those written"):
        layout.weights.read_back(target, written)
