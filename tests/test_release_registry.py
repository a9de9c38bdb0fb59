"""`release`, `check` and `promote` with a registry: what was proven arrives, and tags move only to what checks."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import close_session, constants
from safetensors.torch import save_file

import factories
import packages
import releases
from oci_server import Registry, serving
from qexport.artifact.manifest import Manifest
from qexport.cli import main
from qexport.describing.heads import write_head
from qexport.errors import InputError
from qexport.registries import OciDestination, parse_destination, publish
from qexport.registries.oci.client import Client
from qexport.registries.oci.documents import Descriptor
from qexport.registries.oci.heads import extract_heads
from qexport.registries.oci.layers import WEIGHTS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return releases.proven(tmp_path_factory.mktemp("made"))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving(Registry()) as found:
        yield found


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> Any:
    assert main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_release_is_pushed_listed_checked_and_promoted(
    made: Path, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, public = releases.key(tmp_path)
    repository = f"oci://{registry.host}/models/notes"
    pushed = told(capsys, "release", made, "--to", repository, "--sign", key, "--version", "1.4.0")["releases"]
    tags = {each["name"].replace("+", "_"): each["digest"] for each in pushed}
    assert len(tags) == 2
    assert told(capsys, "release", "--list", repository) == {"tags": tags}
    tag, digest = next(iter(tags.items()))
    found = told(capsys, "check", f"{repository}:{tag}", "--signature", public)
    assert (found["root"], found["signature_checked"]) == (pushed[0]["root"], True)
    kept = tmp_path / "new/kept"
    told(capsys, "check", f"{repository}:{tag}", "--to", kept)
    assert told(capsys, "check", kept)["root"] == found["root"]
    again = told(capsys, "rebuild", kept, "--inputs", made.parent)["predicate"]
    assert again["result"] == "equal"
    assert {"release.json", "README.md", "evidence/bom.cdx.json"} <= again["notCompared"].keys()
    moved = told(capsys, "promote", f"{repository}:{tag}", "--as", "stable", "--signature", public)
    assert (moved["tag"], moved["digest"]) == ("stable", digest)
    assert told(capsys, "release", "--list", repository) == {"tags": {**tags, "stable": digest}}
    assert told(capsys, "diff", f"{repository}:stable", made / "safetensors")["equal"] is False  # of other words
    assert told(capsys, "diff", "--weights", f"{repository}:stable", made / "safetensors")["equal"] is True


def test_nothing_is_pushed_if_one_of_several_tags_is_taken(
    made: Path, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = f"oci://{registry.host}/models/notes"
    tag = "tiny-notes-1.4.0_w8a8.vllm"
    told(capsys, "release", made / "vllm", "--to", f"{repository}:{tag}", "--version", "1.4.0")
    before = dict(registry.tags)
    error = told(capsys, "release", made, "--to", repository, "--version", "1.4.0", code=2)["error"]
    assert error["what"].startswith("the tag exists already")
    assert error["where"] == f"{repository}:{tag}"
    assert registry.tags == before


def test_a_run_looks_for_its_tags_before_its_work(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = f"oci://{registry.host}/models/notes"
    releases.inputs(tmp_path, release={"name": "notes", "version": "1", "to": to})
    publish(packages.make_release(tmp_path / "x", weights=100), parse_destination(f"{to}:notes-1_w8a8.vllm"))
    assert told(capsys, "run", tmp_path / "recipe.yaml", code=2)["error"]["where"] == f"{to}:notes-1_w8a8.vllm"
    assert not list(tmp_path.glob("out*"))


FOLDER = "a folder"


@pytest.mark.parametrize(
    ("variable", "content"),
    [
        *(("SSL_CERT_FILE", None), ("SSL_CERT_FILE", "no certificate"), ("SSL_CERT_FILE", FOLDER)),
        ("REQUESTS_CA_BUNDLE", None),
    ],
    ids=["missing", "another file", "a folder without certificates", "the one of requests"],
)
def test_authorities_that_cannot_be_used_are_named(
    made: Path,
    registry: Registry,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    content: str | None,
) -> None:
    path = tmp_path / "authorities.pem"
    if content == FOLDER:
        path.mkdir()
        (path / "authority.pem").write_text("a name by which OpenSSL finds nothing")
    elif content is not None:
        path.write_text(content)
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(path))
    place, kept = f"oci://{registry.host}/models/notes:1", tmp_path / "kept"
    of_hubs: list[list[str | Path]] = [["check", "hub:org/notes", "--to", kept], ["inspect", "hub:org/notes"]]
    commands: list[list[str | Path]] = [
        ["check", place, "--to", kept],
        ["release", made / "vllm", "--to", place, "--version", "1"],
        *(of_hubs if variable == "SSL_CERT_FILE" else []),
    ]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()  # the next one is made in this environment
    for command in commands:
        error = told(capsys, *command, code=2)["error"]
        kind = "folder" if content == FOLDER else "file"
        assert error["what"].startswith(f"{variable} names a {kind} of certificate authorities that cannot be used")
        assert error["where"] == str(path)
    assert not kept.exists()
    close_session()


def test_tags_move_only_to_what_checks(
    made: Path, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, other = releases.key(tmp_path, "other")
    key, _ = releases.key(tmp_path)
    repository = f"oci://{registry.host}/models/notes"
    arguments: list[str | Path] = ["--to", f"{repository}:1.4.0", "--sign", key, "--version", "1.4.0"]
    told(capsys, "release", made / "safetensors", *arguments)
    error = told(capsys, "promote", f"{repository}:1.4.0", "--as", "stable", "--signature", other, code=3)["error"]
    assert "another key" in error["what"]
    kept = tmp_path / "new/kept"
    told(capsys, "check", f"{repository}:1.4.0", "--signature", other, "--to", kept, code=3)
    assert list(kept.parent.iterdir()) == []
    assert told(capsys, "check", made / "safetensors", "--to", kept, code=2)["error"]["what"].startswith("a folder is")
    publish(packages.make_release(tmp_path / "foreign", weights=1000), parse_destination(f"{repository}:foreign"))
    assert told(capsys, "promote", f"{repository}:foreign", "--as", "stable", code=3)["error"]
    assert told(capsys, "release", "--list", repository)["tags"].keys() == {"1.4.0", "foreign"}
    assert told(capsys, "promote", repository, "--as", "stable", code=2)["error"]["what"].startswith("neither a tag")
    assert told(capsys, "promote", str(made), "--as", "stable", code=2)["error"]["what"] == "only registries have tags"


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_inspect_fetches_the_heads_of_the_weights_alone(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str], ignores_ranges: bool
) -> None:
    """Of safetensors files with a long and a short header, of a GGUF file, and of a file that is neither."""
    model = factories.build(factories.llama_config())
    folder = factories.save(model, tmp_path / "model", max_shard_size="150KB")
    save_file({f"{'long' * 40}.{n}": torch.zeros(9) for n in range(3000)}, folder / "extra.safetensors")
    save_file({"a": torch.zeros(1_000_000)}, folder / "model-x.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {"a": "model-x.safetensors", f"{'long' * 40}.0": "extra.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    also = {path.name: path.read_bytes() for path in folder.iterdir()}
    package = packages.make_release(tmp_path / "release", weights=3, also=also | {"weights.bin": bytes(2_000_000)})
    place = f"oci://{registry.host}/models/notes:1"
    publish(package, parse_destination(place))
    local = told(capsys, "inspect", package.folder)
    assert local["total_bytes"] > 4_000_000
    image = next(digest for digest, (_, content) in registry.manifests.items() if b"image.layer" in content)
    for each in (place, f"oci://{registry.host}/models/notes@{image}"):
        registry.ignores_ranges, registry.bytes_out = ignores_ranges, 0
        found = told(capsys, "inspect", each)
        assert {**found, "place": ""} == {**local, "place": ""}
        assert ignores_ranges or registry.bytes_out < 2_500_000


def test_a_damaged_head_is_refused(registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    also = {"config.json": b"{}", "model.safetensors": b"\xff" * 5000}
    package = packages.make_release(tmp_path / "release", weights=3, also=also)
    place = f"oci://{registry.host}/models/notes:1"
    publish(package, parse_destination(place))
    assert "does not fit a file of 5000 bytes" in told(capsys, "inspect", place, code=3)["error"]["what"]


def test_what_cannot_be_listed_or_released_is_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Manifest.read(made / "safetensors").layout == "safetensors"
    assert told(capsys, "release", made, "--list", "oci://host/name", code=2)["error"]["what"].startswith("--list")
    assert told(capsys, "release", code=2)["error"]["what"] == "no artifact is named"
    two = told(capsys, "release", made, "--to", "oci://127.0.0.1:9/a:1", "--version", "1.0.0", code=2)["error"]
    assert two["what"] == "several artifacts need a place for each"


def test_a_head_is_not_read_beyond_its_layer(registry: Registry, tmp_path: Path) -> None:
    """The archive says that its file is longer than what is left of the layer."""
    member = tarfile.TarInfo("models/a.gguf")
    member.size = (1 << 20) + 50
    content = (member.tobuf() + b"GGUF" + bytes(1 << 20))[: (1 << 20) + 100]
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    registry.blobs[digest] = content
    place = parse_destination(f"oci://{registry.host}/models/notes:1")
    assert isinstance(place, OciDestination)
    registry.ignores_ranges = True
    layer = Descriptor(WEIGHTS, digest, len(content))
    with pytest.raises(InputError, match="the archive ends too early"):
        extract_heads(Client(place, sleep=lambda _: None), layer, tmp_path, write_head)
