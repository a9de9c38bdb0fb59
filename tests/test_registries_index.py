"""What an index lists besides the model: every client follows another entry, and all must be what was checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from oci_server import Registry, serving
from packages import make_release
from qexport.errors import InputError, RecipeError
from qexport.registries import OciDestination, fetch, parse_destination, promote, publish, tags
from qexport.registries.oci import client, downloads, uploads

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER = "application/vnd.docker.distribution.manifest"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    for module in (client, downloads, uploads):
        monkeypatch.setattr(module, "backoff", lambda attempt: 0.0)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving(Registry()) as found:
        yield found


@pytest.fixture
def place(registry: Registry, tmp_path: Path) -> OciDestination:
    """A published release without attachments."""
    found = oci(registry, "1.4.0")
    publish(make_release(tmp_path / "release", weights=3000), found)
    return found


def oci(registry: Registry, tag: str) -> OciDestination:
    found = parse_destination(f"oci://{registry.host}/models/notes:{tag}")
    assert isinstance(found, OciDestination)
    return found


def put(registry: Registry, value: dict[str, Any], kind: str = INDEX) -> str:
    content = json.dumps(value).encode()
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    registry.manifests[digest] = (kind, content)
    return digest


def read(registry: Registry, reference: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(registry.manifests[registry.tags.get(reference, reference)][1])
    return found


def change_index(registry: Registry, change: Callable[[dict[str, Any]], object]) -> None:
    """Puts a changed index under the release's tag, as somebody with the right to push may."""
    index = read(registry, "1.4.0")
    del index["annotations"]
    change(index)
    registry.tags["1.4.0"] = put(registry, index)


def other_layers(registry: Registry, number: int, change: Callable[[list[Any]], object]) -> None:
    def with_image(index: dict[str, Any]) -> None:
        image = read(registry, index["manifests"][number]["digest"])
        change(image["layers"])
        index["manifests"][number]["digest"] = put(registry, image, MANIFEST)

    change_index(registry, with_image)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layers: layers.pop(), "other layers than the model"),
        (lambda layers: layers.reverse(), "other layers than the model"),
        (lambda layers: layers.append(layers[0]), "other layers than the model"),
        (lambda layers: layers[0].update(digest="sha256:" + "0" * 64), "other layers than the model"),
        (lambda layers: layers[0].update(mediaType="application/vnd.cncf.model.doc.v1.tar"), "of a kind"),
    ],
    ids=["fewer", "order", "more", "other", "kind"],
)
def test_an_image_with_other_layers_is_refused(
    registry: Registry,
    place: OciDestination,
    tmp_path: Path,
    number: int,
    change: Callable[[list[Any]], object],
    message: str,
) -> None:
    other_layers(registry, number, change)
    before = dict(registry.tags)
    with pytest.raises(InputError, match=message):
        fetch(place, tmp_path / "pulled")
    with pytest.raises(InputError, match=message):
        promote(place, "stable")
    assert registry.tags == before


ENTRY = {"mediaType": MANIFEST, "digest": "sha256:" + "0" * 64, "size": 1}


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries.append({**ENTRY, "platform": {"architecture": "riscv64", "os": "linux"}}),
        lambda entries: entries.append({**ENTRY, "artifactType": "application/vnd.other"}),
        lambda entries: entries.append(dict(entries[2])),
        lambda entries: entries.append(dict(entries[0])),
        lambda entries: entries.append("text"),
        lambda entries: entries[0].update(mediaType=INDEX),
        lambda entries: entries[0]["platform"].update(os="windows"),
        lambda entries: entries.pop(0),
        lambda entries: entries.pop(2),
        lambda entries: entries[2].update(digest="../../etc"),
        lambda entries: entries[2].update(digest=None),
        lambda entries: entries[2].update(digest="sha256:" + "0" * 64),
    ],
    ids=[
        "platform", "artifact", "second model", "second image", "text", "nested", "system", "no image", "no model",
        "path", "no digest", "missing",
    ],
)  # fmt: skip
def test_another_entry_is_refused(
    registry: Registry, place: OciDestination, tmp_path: Path, change: Callable[[list[Any]], object]
) -> None:
    change_index(registry, lambda index: change(index["manifests"]))
    before = dict(registry.tags)
    refused = r"this is no release|malformed|is missing in the registry"
    with pytest.raises(InputError, match=refused):
        fetch(place, tmp_path / "pulled")
    with pytest.raises(InputError, match=refused):
        promote(place, "stable")
    assert registry.tags == before


@pytest.mark.parametrize(
    "tag", ["stable-modelpack", "sha256-" + "a" * 64, "s" * 119], ids=["helper", "listing", "long"]
)
def test_tags_that_help_clients_are_not_taken(
    registry: Registry, place: OciDestination, tmp_path: Path, tag: str
) -> None:
    before = dict(registry.tags)
    with pytest.raises(RecipeError, match="choose another tag"):
        promote(place, tag)
    with pytest.raises(RecipeError, match="choose another tag"):
        publish(make_release(tmp_path / "again", weights=3000), oci(registry, tag))
    assert registry.tags == before


def test_only_a_release_is_promoted(registry: Registry, place: OciDestination) -> None:
    before = dict(registry.tags)
    with pytest.raises(InputError, match="only a release is promoted"):
        promote(oci(registry, "1.4.0-modelpack"), "stable")
    assert registry.tags == before


@pytest.mark.parametrize("kind", [f"{DOCKER}.list.v2+json", f"{DOCKER}.v2+json"])
def test_a_tag_of_docker_is_not_overwritten(registry: Registry, tmp_path: Path, kind: str) -> None:
    registry.only_accepted = True
    registry.tags["1.4.0"] = digest = put(registry, {"schemaVersion": 2}, kind)
    with pytest.raises(RecipeError, match=f"exists already and stands for {digest}"):
        publish(make_release(tmp_path / "release", weights=3000), oci(registry, "1.4.0"))
    assert registry.tags == {"1.4.0": digest}
    assert [(tag.name, tag.digest) for tag in tags(oci(registry, "1.4.0"))] == [("1.4.0", digest)]


def test_a_tag_that_cannot_be_read_is_left_out(registry: Registry, place: OciDestination) -> None:
    registry.tags["broken"] = registry.tags["1.4.0"]
    registry.failures = {"manifests/broken": [400]}
    assert [tag.name for tag in tags(place)] == ["1.4.0"]
    registry.failures = {"manifests/": [400, 400]}
    with pytest.raises(InputError, match="HTTP status 400"):
        tags(place)


@pytest.mark.parametrize("entries", [None, 7, "text", {"a": 1}, [1], [[]], [None, None, None]], ids=repr)
def test_malformed_entries_are_refused(
    registry: Registry, place: OciDestination, tmp_path: Path, entries: object
) -> None:
    change_index(registry, lambda index: index.update(manifests=entries))
    with pytest.raises(InputError, match="this is no release"):
        fetch(place, tmp_path / "pulled")
    with pytest.raises(InputError, match="this is no release"):
        promote(place, "stable")


@pytest.mark.parametrize(
    "attached", [7, ["a"], {}, "[]", "7", "{", '{"a": []}', '{"a": 7}', '{"a": {}}', '[["a", []]]', "1" * 5000],
    ids=lambda value: str(value)[:12],
)  # fmt: skip
def test_a_malformed_list_of_attachments_is_refused(
    registry: Registry, place: OciDestination, tmp_path: Path, attached: object
) -> None:
    noted = {"annotations": {"io.github.qexport.attachments": attached}}
    change_index(registry, lambda index: index.update(noted))
    with pytest.raises(InputError, match="list of attachments is malformed"):
        fetch(place, tmp_path / "pulled")


@pytest.mark.parametrize("layers", [7, "text", {"a": 1}, [1], [None], None], ids=repr)
def test_a_malformed_referrer_is_refused(
    registry: Registry, place: OciDestination, tmp_path: Path, layers: object
) -> None:
    listing = registry.tags["1.4.0"].replace(":", "-")
    entry = read(registry, listing)["manifests"][0]
    changed = {**read(registry, entry["digest"]), "layers": layers}
    registry.tags[listing] = put(registry, {"manifests": [{**entry, "digest": put(registry, changed, MANIFEST)}]})
    with pytest.raises(InputError, match="a referrer is malformed"):
        fetch(place, tmp_path / "pulled")
    registry.tags[listing] = put(registry, {"manifests": [{**entry, "digest": "../../etc"}]})
    with pytest.raises(InputError, match="a digest in the list of referrers is malformed"):
        fetch(place, tmp_path / "pulled")


LONG = "9" * 5000


@pytest.mark.parametrize(
    "headers",
    [
        {"Location": f"http://127.0.0.1:{LONG}/"},
        {"Location": "http://127.0.0.1:99999/"},
        {"Location": "http://[/"},
        {"Location": "http:///x"},
    ],
    ids=["digits", "port", "bracket", "no host"],
)
def test_a_malformed_address_is_refused(registry: Registry, tmp_path: Path, headers: dict[str, str]) -> None:
    registry.upload_headers = headers
    with pytest.raises(InputError, match=r"malformed|without TLS"):
        publish(make_release(tmp_path / "release", weights=3000), oci(registry, "1.4.0"))


@pytest.mark.parametrize("name", ["OCI-Chunk-Min-Length", "Range", "Retry-After"])
def test_a_number_of_thousands_of_digits_is_no_number(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(uploads, "CHUNK", 2000)
    registry.upload_headers = {name: f"0-{LONG}" if name == "Range" else LONG}
    registry.cut_chunks = [0]
    place = oci(registry, "1.4.0")
    publish(make_release(tmp_path / "release", weights=3000), place)
    assert [tag.name for tag in tags(place)] == ["1.4.0"]


@pytest.mark.parametrize("address", ["http://[/", f"https://127.0.0.1:{LONG}/", "https://127.0.0.1:99999/"])
def test_a_malformed_redirection_is_refused(
    registry: Registry, place: OciDestination, tmp_path: Path, address: str
) -> None:
    registry.redirects = address
    with pytest.raises(InputError, match="malformed"):
        fetch(place, tmp_path / "pulled")
