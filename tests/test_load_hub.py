"""Models of the hub: from a cache as the client lays it out, and from a local server that speaks the protocol."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from pydantic import ValidationError

import factories
from qexport.architectures.architecture import Checkpoint
from qexport.cli import main
from qexport.errors import InputError
from qexport.loading import LoadSettings
from qexport.loading.adapter_folder import AdapterFolder, combined_origin, locate_adapter, locate_adapters
from qexport.loading.checkpoint import load_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded tiny Llama with a pickle and a Python file beside it."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    factories.save(factories.build(factories.llama_config()), folder, max_shard_size="60KB")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    (folder / "training.safetensors").write_bytes(b"not part of the model")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the client is offline, and would find no hub."""
    path = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return path


def fill_cache(cache: Path, repo: str, files: dict[str, bytes], *, revision: str = "main") -> Path:
    """models--org--name/{blobs,refs,snapshots} with links from the snapshot to the blobs."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(COMMIT)
    for name, content in files.items():
        blob = hashlib.sha256(content).hexdigest()
        (root / "blobs" / blob).write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(root / "blobs" / blob)
    return snapshot


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load(repo: str = "org/tiny", revision: str | None = None) -> Checkpoint:
    return load_checkpoint(LoadSettings(base=repo, revision=revision))


def assert_equal_to_saved(checkpoint: Checkpoint) -> None:
    state = factories.build(factories.llama_config()).state_dict()
    assert list(checkpoint.weights.specs()) == list(state)
    for name, tensor in state.items():
        assert torch.equal(checkpoint.weights.read(name), tensor)


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_cached_snapshot_is_read_offline_and_its_commit_recorded(
    cache: Path, saved: Path, revision: str | None
) -> None:
    fill_cache(cache, "org/tiny", contents(saved))
    checkpoint = load(revision=revision)
    assert_equal_to_saved(checkpoint)
    assert (checkpoint.origin.kind, checkpoint.origin.name, checkpoint.origin.revision) == ("hub", "org/tiny", COMMIT)
    assert str(cache) not in repr(checkpoint.origin)


def test_a_model_that_is_not_cached_offline_is_refused_with_the_way_to_fetch_it(cache: Path) -> None:
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE is set(.|\n)*hf download org/tiny --revision v2"):
        load(revision="v2")


def test_a_link_that_leaves_the_cache_is_refused(cache: Path, saved: Path) -> None:
    snapshot = fill_cache(cache, "org/tiny", contents(saved))
    (cache.parent / "outside").write_bytes((saved / "tokenizer.json").read_bytes())
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(cache.parent / "outside")
    with pytest.raises(InputError, match="leads out of the model's folder"):
        load()


def test_a_snapshot_given_as_a_folder_is_refused_with_the_way_out(cache: Path, saved: Path) -> None:
    snapshot = fill_cache(cache, "org/tiny", contents(saved))
    with pytest.raises(InputError, match="by its hub id"):
        load_checkpoint(LoadSettings(base=str(snapshot)))


def test_an_adapter_is_found_in_the_cache(cache: Path) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
    snapshot = fill_cache(cache, "org/adapter", files)
    found = locate_adapter(LoadSettings(base="org/tiny", adapter="org/adapter"))
    assert found is not None
    assert found.path == snapshot
    assert (found.origin.kind, found.origin.name, found.origin.revision) == ("hub", "org/adapter", COMMIT)
    assert found.origin.sha256 == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "LICENSE": b"of the adapter"}


def placed(*folders: str) -> dict[str, bytes]:
    """The files of an adapter in each of these folders of a repository; each has other weights."""
    return {
        f"{folder}/{name}": content + folder.encode() * (name == "adapter_model.safetensors")
        for folder in folders
        for name, content in ADAPTER.items()
    }


def located(repo: str, **values: Any) -> tuple[AdapterFolder, list[str]]:
    """An adapter, and what is said."""
    told = list[Any]()
    settings = LoadSettings.model_validate({"base": "org/tiny", "adapter": repo} | values)
    found = locate_adapter(settings, progress=told.append)
    assert found is not None
    return found, [event.text for event in told]


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("folder", ["style", "adapters/style"])
def test_an_adapter_in_the_only_folder_of_a_repository_is_found_and_said(
    request: pytest.FixtureRequest, cache: Path, online: bool, folder: str
) -> None:
    files = placed(folder) | {"README.md": b"of the repository"}
    if online:
        request.getfixturevalue("hub").files = files
    else:
        fill_cache(cache, "org/tiny", files)
    found, said = located("org/tiny")
    assert (found.path / "adapter_model.safetensors").read_bytes() == b"weights" + folder.encode()
    assert f"the adapter is in the subfolder {folder}" in said
    assert (found.origin.kind, found.origin.name, found.origin.revision) == ("hub", "org/tiny", COMMIT)
    assert list(found.origin.sha256) == [f"{folder}/adapter_config.json", f"{folder}/adapter_model.safetensors"]
    assert found.origin.terms.files == {"LICENSE": b"of the adapter"}


@pytest.mark.parametrize("folders", [("checkpoint-500",), ("checkpoint-500", "checkpoint-900"), ("one", "two/three")])
def test_adapters_of_a_repository_are_named_where_it_is_not_clear_which_is_meant(
    hub: type[Hub], folders: tuple[str, ...]
) -> None:
    hub.files = placed(*folders)
    with pytest.raises(InputError, match=f"its folders do: {', '.join(folders)}") as caught:
        located("org/tiny")
    assert f"load.adapter_subfolder: {folders[-1]}" in str(caught.value)
    assert not any("weights" in name for name in hub.requested)
    for folder in folders:
        hub.requested.clear()
        found, said = located("org/tiny", adapter_subfolder=folder)
        assert (found.path / "adapter_model.safetensors").read_bytes() == b"weights" + folder.encode()
        assert not any("in the subfolder" in text for text in said)


def test_several_adapters_of_one_repository(hub: type[Hub]) -> None:
    hub.files = placed("one", "two")
    parts = [{"path": "org/tiny", "subfolder": name} for name in ("one", "two")]
    found = locate_adapters(LoadSettings.model_validate({"base": "org/tiny", "adapters": parts}))
    assert combined_origin(found).name == "one+two"
    with pytest.raises(InputError, match=r"load\.adapters\.0\.subfolder: two"):
        locate_adapters(LoadSettings.model_validate({"base": "org/tiny", "adapters": [{"path": "org/tiny"}]}))


def test_a_folder_that_the_repository_does_not_have_is_named(hub: type[Hub]) -> None:
    hub.files = placed("one")
    with pytest.raises(InputError, match=r"holds no adapter_config\.json\nwhere: org/tiny/two"):
        located("org/tiny", adapter_subfolder="two")


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"adapter": "./a", "adapter_subfolder": "b"}, "write adapter: ./a/b"),
        ({"adapter_subfolder": "b"}, "adapter is not"),
        ({"adapters": [{"path": "./a/", "subfolder": "b"}]}, "write path: ./a/b"),
        ({"adapter": "org/tiny", "adapter_subfolder": "../b"}, "no folder inside a repository"),
        ({"adapter": "org/tiny", "adapter_subfolder": "/b"}, "no folder inside a repository"),
        ({"adapter": "org/tiny", "adapter_subfolder": ""}, "no folder inside a repository"),
    ],
)
def test_subfolders_that_mean_nothing_are_refused(values: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(word)):
        LoadSettings.model_validate({"base": "./base"} | values)


def test_a_path_that_leads_into_a_repository_is_refused_with_the_way_to_write_it(cache: Path) -> None:
    with pytest.raises(InputError, match="there is no folder") as caught:
        located("org/tiny/style")
    assert "load.adapter_subfolder" in str(caught.value)


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download needs."""

    files: dict[str, bytes] = {}
    requested: set[str] = set()
    whole: set[str] = set()
    ranges = True
    """Whether a part of a file is sent where one is asked for."""

    sent = 0
    """Bytes of files without ranges that a client has taken."""

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/gated"):
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"}, with_body)
        elif path.startswith("/api/models/org/broken"):
            self.reply(400, b"{}", {}, with_body)
        elif path == "/api/models/org/tiny/revision/absent":
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
        elif path.startswith("/api/models/org/tiny/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
            self.reply(200, json.dumps(entries).encode(), {}, with_body)
        elif path.startswith("/api/models/org/tiny"):
            self.reply(200, json.dumps({"id": "org/tiny", "sha": COMMIT}).encode(), {}, with_body)
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
            self.requested.add(name)
            etag = {"ETag": f'"{hashlib.sha1(self.files[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if not self.ranges and "Range" in self.headers:
                self.endless(self.files[name])
            elif wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                self.reply(206, self.files[name][int(wanted[1]) : int(wanted[2]) + 1], etag, with_body)
            else:
                self.whole.update([name] if with_body else [])
                self.reply(200, self.files[name], etag, with_body)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)

    def endless(self, content: bytes) -> None:
        """A file that begins as it should, and seems to have 100 GB."""
        self.send_response(200)
        self.send_header("Content-Length", str(10**11))
        self.end_headers()
        with suppress(OSError):  # the client has enough
            self.wfile.write(content)
            while True:
                type(self).sent += self.wfile.write(bytes(1 << 16))

    def reply(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keeps the tests' output clean."""


@pytest.fixture
def hub(cache: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine that has org/tiny; the client is online and its cache is empty."""
    Hub.files, Hub.requested, Hub.whole = contents(saved), set(), set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_takes_the_models_files_only_and_records_the_commit(hub: type[Hub], saved: Path) -> None:
    checkpoint = load()
    assert_equal_to_saved(checkpoint)
    assert checkpoint.origin.revision == COMMIT
    assert {path.name for path in saved.glob("model-*.safetensors")} <= hub.requested
    assert not {"pytorch_model.bin", "modeling_tiny.py", "training.safetensors"} & hub.requested
    assert set(checkpoint.origin.sha256) == hub.requested


def test_an_index_whose_names_leave_the_folder_is_refused_after_the_download(hub: type[Hub]) -> None:
    hub.files["model.safetensors.index.json"] = b'{"weight_map": {"lm_head.weight": "../../../secret"}}'
    with pytest.raises(InputError, match="leaves the model's folder"):
        load()


@pytest.mark.parametrize(
    ("repo", "revision", "message"),
    [
        ("org/absent", None, "nor a public model on the hub"),
        ("org/gated", None, "the model is gated"),
        ("org/tiny", "absent", "no revision 'absent'"),
        ("org/broken", None, "could not be reached"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_error(hub: type[Hub], repo: str, revision: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(repo, revision)
    assert caught.value.mend is not None
    assert len(str(caught.value).splitlines()) == 3


def test_no_network_is_one_clear_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match="the hub could not be reached"):
        load()


def test_inspect_fetches_the_headers_of_the_weights_alone(
    hub: type[Hub], saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "hub:org/tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(saved), "--json"]) == 0
    local = json.loads(capsys.readouterr().out)
    assert found["tensors"] == local["tensors"]
    assert [found[key] for key in ("architecture", "quantization", "tokenizer", "template", "bytes_by_dtype")] == [
        local[key] for key in ("architecture", "quantization", "tokenizer", "template", "bytes_by_dtype")
    ]
    shards = {path.name for path in saved.glob("model-*.safetensors")}
    assert shards <= hub.requested
    assert not shards & hub.whole


def test_a_hub_without_ranges_is_not_read_to_its_end(
    hub: type[Hub], saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "ranges", False)
    assert main(["inspect", "hub:org/tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(saved), "--json"]) == 0
    assert found["tensors"] == json.loads(capsys.readouterr().out)["tensors"]
    assert hub.sent < 100_000_000


def test_inspect_finds_a_model_in_the_cache_offline(
    cache: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_cache(cache, "org/tiny", contents(saved))
    assert main(["inspect", f"hub:org/tiny@{COMMIT}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == ["pytorch_model.bin is a pickle, which is never read"]


def gguf_file(path: Path, tokens: int) -> bytes:
    """With a vocabulary, which makes the header long, and two tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token number {number} of some length" for number in range(tokens)])
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, np.zeros((64, 512), dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path.read_bytes()


@pytest.mark.parametrize("tokens", [10, 60_000], ids=["a short header", "a header of several ranges"])
def test_inspect_of_a_repository_of_gguf_files(
    hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: int
) -> None:
    content = gguf_file(tmp_path / "Tiny-F32.gguf", tokens)
    assert main(["inspect", str(tmp_path / "Tiny-F32.gguf"), "--json"]) == 0
    local = json.loads(capsys.readouterr().out)
    for files, place in (
        ({"Tiny-F32.gguf": content, "README.md": b"# Tiny"}, "hub:org/tiny"),
        ({"Tiny-F32.gguf": content, "config.json": b'{"model_type": "llama"}'}, "hub:org/tiny"),
        ({"Tiny-F32.gguf": content, "Tiny-Q4_0.gguf": b""}, f"hub:org/tiny/Tiny-F32.gguf@{COMMIT}"),
        ({"model.safetensors": b"x", "Tiny-F32.gguf": content}, "hub:org/tiny/Tiny-F32.gguf"),
    ):
        hub.files, hub.whole = files, set()
        assert main(["inspect", place, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert {**found, "place": ""} == {**local, "place": ""}
        assert "Tiny-F32.gguf" not in hub.whole
    assert main(["diff", "hub:org/tiny/Tiny-F32.gguf", str(tmp_path), "--weights"]) == 3
    assert "Tiny-F32.gguf" in hub.whole


def test_inspect_of_a_repository_with_a_model_in_several_gguf_files(
    hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "Tiny", "llama", split_max_tensors=1)
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, np.zeros((64, 512), dtype=np.float32))
    writer.write_header_to_file(tmp_path / "Tiny.gguf")
    for step in (writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    hub.files = {path.name: path.read_bytes() for path in tmp_path.glob("*.gguf")}
    first, second = sorted(hub.files)
    assert main(["inspect", str(tmp_path / first), "--json"]) == 0
    local = json.loads(capsys.readouterr().out)
    assert (local["tensors"], sorted(local["files"])) == (2, [first, second])
    for place in ("hub:org/tiny", f"hub:org/tiny/{first}"):
        hub.whole = set()
        assert main(["inspect", place, "--json"]) == 0
        assert {**json.loads(capsys.readouterr().out), "place": ""} == {**local, "place": ""}
        assert hub.whole & {first, second} == set()
    assert main(["inspect", f"hub:org/tiny/{second}"]) == 3
    assert "not the first of the model's 2 files" in capsys.readouterr().err


def test_one_of_several_gguf_files_must_be_named(hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    hub.files = {"a-Q4_0.gguf": b"", "a-Q8_0.gguf": b"", "README.md": b""}
    assert main(["inspect", "hub:org/tiny"]) == 3
    error = capsys.readouterr().err
    assert "the repository holds several GGUF files" in error
    assert "hub:org/tiny/a-Q4_0.gguf, hub:org/tiny/a-Q8_0.gguf" in error
    assert main(["inspect", "hub:org/tiny/b.gguf"]) == 3
    assert "the repository has no such file" in capsys.readouterr().err
    assert main(["inspect", "hub:org/tiny/a.bin"]) == 2
    hub.files = {"a.gguf": b"GGUF" + bytes(3_000_000)}
    assert main(["inspect", "hub:org/tiny"]) == 3
    assert "not a valid GGUF file" in capsys.readouterr().err


def test_inspect_of_an_index_that_leaves_the_folder_is_refused(hub: type[Hub]) -> None:
    hub.files["model.safetensors.index.json"] = b'{"weight_map": {"lm_head.weight": "../../../secret"}}'
    assert main(["inspect", "hub:org/tiny"]) == 3
