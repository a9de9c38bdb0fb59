from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from qexport.artifact.digests import sha256_bytes, sha256_file, sha256_json, tensor_bytes
from qexport.artifact.integrity import digest_files, open_artifact
from qexport.artifact.manifest import MANIFEST_NAME
from qexport.artifact.partial import MARKER_NAME
from qexport.errors import InputError
from test_manifest import manifest


def make(folder: Path) -> Path:
    (folder / "sub").mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "weights").write_bytes(bytes(range(256)))
    (folder / MARKER_NAME).touch()
    manifest(files=digest_files(folder, {})).write(folder)
    (folder / MARKER_NAME).unlink()  # before the folder is moved to its final path
    return folder


def test_every_file_but_the_manifest_is_digested(tmp_path: Path) -> None:
    files = digest_files(make(tmp_path), {})
    assert {name: record.size for name, record in files.items()} == {"config.json": 2, "sub/weights": 256}
    assert files["sub/weights"].sha256 == hashlib.sha256(bytes(range(256))).hexdigest()


def test_an_artifact_that_is_as_written_opens(tmp_path: Path) -> None:
    artifact = open_artifact(make(tmp_path))
    assert artifact.path == tmp_path
    assert artifact.layout == "safetensors"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("sub/weights", None, "is missing"),
        ("sub/weights", bytes(256), "has changed since it was written"),
        ("config.json", b"{} ", "has changed since it was written"),
        ("pickle.bin", b"", "is not listed"),
    ],
)
def test_a_changed_folder_is_refused(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    make(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        open_artifact(tmp_path)
    assert str(caught.value.where).endswith(name)


@pytest.mark.parametrize("change", ["added", "changed", "missing"])
def test_the_report_is_no_part_of_the_manifests_digests(tmp_path: Path, change: str) -> None:
    """It holds timings, and two runs shall write the same manifest."""
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("{}")
    assert "report/report.json" not in digest_files(make(tmp_path), {})
    match change:
        case "added":
            (tmp_path / "report" / "notes.txt").write_text("seen by me")
        case "changed":
            (tmp_path / "report" / "report.json").write_text('{"changed": 1}')
        case _:
            (tmp_path / "report" / "report.json").unlink()
    assert set(open_artifact(tmp_path).manifest.files) == {"config.json", "sub/weights"}


def test_a_file_whose_name_only_begins_like_the_reports_folder_is_digested(tmp_path: Path) -> None:
    (make(tmp_path) / "report.py").write_text("")
    with pytest.raises(InputError, match="is not listed"):
        open_artifact(tmp_path)


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    (make(tmp_path) / MANIFEST_NAME).unlink()
    with pytest.raises(InputError):
        open_artifact(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.bool])
def test_the_digest_of_a_tensor_is_that_of_its_bytes(dtype: torch.dtype) -> None:
    tensor = (torch.arange(12) % 5).reshape(3, 4).to(dtype)
    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert sha256_bytes(tensor_bytes(tensor)) == hashlib.sha256(content).hexdigest()
    assert sha256_bytes(tensor_bytes(tensor.t().contiguous().t())) == sha256_bytes(tensor_bytes(tensor))
    assert sha256_bytes(tensor_bytes(tensor.t())) != sha256_bytes(tensor_bytes(tensor))


def test_scalars_and_empty_tensors_have_digests() -> None:
    assert sha256_bytes(tensor_bytes(torch.tensor(1.5))) == sha256_bytes(tensor_bytes(torch.tensor([1.5])))
    assert sha256_bytes(tensor_bytes(torch.empty(0, 4))) == hashlib.sha256(b"").hexdigest()


def test_a_file_and_a_json_value_have_stable_digests(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    assert sha256_json({"b": 1, "a": "é"}) == hashlib.sha256(b'{"a":"\\u00e9","b":1}').hexdigest()
