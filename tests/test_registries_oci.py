"""What an OCI registry may do to a release on its way: cut it, fail, forget, lie. Real registries: tests/registry."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci_server import Registry, serving
from packages import contents, make_release
from qexport.describing.places import local_place
from qexport.errors import InputError, RecipeError
from qexport.progress import silent
from qexport.registries import OciDestination, Package, fetch, parse_destination, promote, publish, tags
from qexport.registries.oci import client, downloads, uploads
from qexport.registries.oci.documents import parameter_size
from qexport.registries.oci.layers import layers_of
from qexport.registries.tar_stream import TarStream

IMAGE_LAYER = "application/vnd.oci.image.layer.v1.tar"
WEIGHTS = 120_000
CHUNK = 32_768


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setattr(uploads, "CHUNK", CHUNK)
    for module in (client, downloads, uploads):
        monkeypatch.setattr(module, "backoff", lambda attempt: 0.0)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving(Registry()) as found:
        yield found


@pytest.fixture
def release(tmp_path: Path) -> Package:
    return make_release(tmp_path / "release", weights=WEIGHTS)


@pytest.fixture
def place(registry: Registry) -> OciDestination:
    return oci(registry, "1.4.0")


def oci(registry: Registry, tag: str) -> OciDestination:
    found = parse_destination(f"oci://{registry.host}/models/notes:{tag}")
    assert isinstance(found, OciDestination)
    return found


def log_in(tmp_path: Path, registry: Registry, password: str) -> None:
    (tmp_path / "docker").mkdir(exist_ok=True)
    auth = base64.b64encode(f"user:{password}".encode()).decode()
    (tmp_path / "docker/config.json").write_text(json.dumps({"auths": {registry.host: {"auth": auth}}}))


def arrives(release: Package, place: OciDestination, folder: Path) -> None:
    publish(release, place)
    fetch(place, folder)
    assert contents(folder) == contents(release.folder)


def test_a_reference_on_the_command_line_is_pulled_for_a_while(place: OciDestination, release: Package) -> None:
    publish(release, place)
    with local_place(str(place), progress=silent) as folder:
        assert contents(folder) == contents(release.folder)
    assert not folder.exists()
    with pytest.raises(RecipeError, match="names no release of a registry"), local_place("oci:notes", progress=silent):
        pass


def size_sent(registry: Registry) -> int:
    return sum(map(len, registry.blobs.values()))


def test_a_cut_chunk_goes_on_where_it_was_cut(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    registry.cut_chunks = [1000, 30_000, 1, 0, 20_000]
    arrives(release, place, tmp_path / "pulled")
    assert sum("PATCH" in each for each in registry.asked) >= 5
    manifests = sum(len(content) for _, content in registry.manifests.values())
    assert registry.bytes_in < size_sent(registry) + 3 * manifests, "some bytes were sent twice"


def test_an_upload_that_is_given_up_begins_anew(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    registry.cut_chunks, registry.forgets_cut = [1000, 30_000], True
    arrives(release, place, tmp_path / "pulled")


def test_an_upload_that_is_given_up_again_and_again_ends(
    registry: Registry, place: OciDestination, release: Package
) -> None:
    registry.cut_chunks, registry.forgets_cut = [1000] * 20, True
    with pytest.raises(InputError, match="has lost the upload 4 times"):
        publish(release, place)
    assert registry.tags == {}


def test_an_upload_without_progress_ends(registry: Registry, place: OciDestination, release: Package) -> None:
    registry.cut_chunks = [0] * 20
    with pytest.raises(InputError, match="the upload broke 6 times"):
        publish(release, place)
    assert registry.tags == {}


def test_a_registry_that_refuses_large_chunks_gets_small_ones(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "SMALL_CHUNK", 5000)
    registry.largest_chunk = 5000
    arrives(release, place, tmp_path / "pulled")


def test_a_registry_that_wants_still_smaller_ones_ends_it(
    registry: Registry, place: OciDestination, release: Package
) -> None:
    registry.largest_chunk = 10
    with pytest.raises(InputError, match=r"HTTP status 416|has lost the upload"):
        publish(release, place)


@pytest.mark.parametrize("cut", [[], [CHUNK, 1000]])
def test_a_registry_that_tells_old_places(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path, cut: list[int]
) -> None:
    registry.old_ranges, registry.cut_chunks = True, cut
    arrives(release, place, tmp_path / "pulled")


def test_the_next_process_goes_on_within_a_layer(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    registry.cut_chunks = [CHUNK - 1] + [0] * 6
    with pytest.raises(InputError, match="run it again"):
        publish(release, place)
    assert registry.blobs == {}
    kept = list((tmp_path / "cache/qexport/uploads").iterdir())
    assert [path.stat().st_mode & 0o777 for path in kept] == [0o600]
    registry.cut_chunks.clear()
    arrives(release, place, tmp_path / "pulled")
    manifests = sum(len(content) for _, content in registry.manifests.values())
    assert registry.bytes_in < size_sent(registry) + 3 * manifests
    assert list((tmp_path / "cache/qexport/uploads").iterdir()) == []


@pytest.mark.parametrize(
    ("status", "request_"),
    [(503, "POST .*uploads"), (500, "PATCH"), (502, "PUT .*blobs"), (429, "HEAD .*blobs"), (504, "PUT .*manifests")],
)
def test_failures_that_pass_are_waited_for(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path, status: int, request_: str
) -> None:
    registry.failures = {request_: [status] * 4}
    arrives(release, place, tmp_path / "pulled")


def test_failures_that_stay_end_it(registry: Registry, place: OciDestination, release: Package) -> None:
    registry.failures = {"PUT .*manifests/1.4.0": [503] * 6}
    with pytest.raises(InputError, match="the registry failed 6 times: HTTP status 503"):
        publish(release, place)
    assert "1.4.0" not in registry.tags


def test_a_blob_is_there_although_the_answer_was_lost(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    registry.loses_answers = 2
    arrives(release, place, tmp_path / "pulled")
    assert registry.loses_answers == 0
    manifests = sum(len(content) for _, content in registry.manifests.values())
    assert registry.bytes_in < size_sent(registry) + 3 * manifests, "some bytes were sent twice"


def test_downloads_go_on_where_they_were_cut(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    publish(release, place)
    for ignores, folder in ((False, "ranges"), (True, "no-ranges")):
        registry.ignores_ranges = ignores
        registry.cut_downloads = [1000, 0, 50_000, 70_000]
        registry.bytes_out = 0
        fetch(place, tmp_path / folder)
        assert contents(tmp_path / folder) == contents(release.folder)
        assert registry.cut_downloads == []
        announced = size_sent(registry) + sum((WEIGHTS - 1000, WEIGHTS - 1000, WEIGHTS - 51_000))
        assert ignores or registry.bytes_out < announced + 20_000


def test_a_long_download_may_be_cut_often(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    publish(release, place)
    registry.cut_downloads = [1000] * 20
    fetch(place, tmp_path / "pulled")
    assert registry.cut_downloads == []


def test_a_download_that_breaks_again_and_again_leaves_nothing(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    publish(release, place)
    registry.cut_downloads = [10] + [0] * 20
    with pytest.raises(InputError, match="the download broke 6 times"):
        fetch(place, tmp_path / "pulled")
    assert {path.name for path in tmp_path.iterdir()} <= {"release", "cache", "docker"}


@pytest.mark.parametrize("password", [None, "secret"])
def test_tokens_run_out_in_the_middle(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path, password: str | None
) -> None:
    registry.tokens, registry.password = 3, password
    if password:
        log_in(tmp_path, registry, password)
    arrives(release, place, tmp_path / "pulled")
    assert registry.asked.count("GET /token") > 5


@pytest.mark.parametrize("tokens", [0, 100])
def test_a_wrong_password_ends_at_once_and_is_not_told(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path, tokens: int
) -> None:
    registry.tokens, registry.password = tokens, "right"
    with pytest.raises(InputError, match=r"name and a password|token service refuses"):
        publish(release, place)
    log_in(tmp_path, registry, "a wrong secret")
    registry.asked.clear()
    with pytest.raises(InputError, match="the name or the password") as caught:
        publish(release, place)
    assert len(registry.asked) <= 4
    told = f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"
    assert "secret" not in told
    assert base64.b64encode(b"user:a wrong secret").decode() not in told


def test_nothing_is_sent_or_read_elsewhere_without_tls(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    publish(release, place)
    registry.redirects = "http://storage.invalid/blob"
    with pytest.raises(InputError, match="without TLS"):
        fetch(place, tmp_path / "pulled")
    registry.tokens, registry.realm, registry.password = 1, "http://tokens.invalid/token", "secret"
    log_in(tmp_path, registry, "secret")
    with pytest.raises(InputError, match="without TLS"):
        tags(place)


def test_no_proxy_sees_what_stays_on_this_machine(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.password = "secret"
    log_in(tmp_path, registry, "secret")
    with serving(Registry()) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://{proxy.host}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        arrives(release, place, tmp_path / "pulled")
        assert [each for each in proxy.asked if not each.startswith("CONNECT")] == []


def test_a_malformed_config_is_told_without_its_content(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    registry.password = "right"
    for text in ("{", '{"auths": []}', '{"auths": {"HOST": {"auth": "c2VjcmV0"}}}', '{"auths": {"HOST": "secret"}}'):
        (tmp_path / "docker").mkdir(exist_ok=True)
        (tmp_path / "docker/config.json").write_text(text.replace("HOST", registry.host))
        with pytest.raises(InputError, match=r"malformed|wants a name") as caught:
            publish(release, place)
        assert "secret" not in str(caught.value)


def test_attachments_are_listed_by_the_registry_where_it_can(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    registry.lists_referrers = True
    arrives(release, place, tmp_path / "pulled")
    assert not any(tag.startswith("sha256-") for tag in registry.tags)


@pytest.mark.parametrize("lists", [False, True])
def test_a_missing_referrer_is_noticed(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path, lists: bool
) -> None:
    registry.lists_referrers = lists
    publish(release, place)
    of_report = [
        name
        for name, (_, content) in registry.manifests.items()
        if b"vnd.example.report" in content and b'"subject"' in content
    ]
    del registry.manifests[of_report[0]]
    with pytest.raises(InputError, match="a referrer"):
        fetch(place, tmp_path / "pulled")


def test_another_releases_referrers_do_not_count(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    publish(release, place)
    publish(release, oci(registry, "1.4.1"))
    first, second = (registry.tags[tag].replace(":", "-") for tag in ("1.4.0", "1.4.1"))
    registry.tags[first] = registry.tags[second]
    with pytest.raises(InputError, match="a referrer is about something else"):
        fetch(place, tmp_path / "pulled")


def test_a_file_that_changes_on_the_way_is_refused(registry: Registry, place: OciDestination, release: Package) -> None:
    """Its layer's digest was computed before; the registry compares it."""
    path = release.folder / "model-00001-of-00002.safetensors"

    def change(event: object) -> None:
        if getattr(event, "detail", "").startswith("layer"):
            path.write_bytes(bytes(path.stat().st_size))

    with pytest.raises(InputError, match="DIGEST_INVALID other bytes"):
        publish(release, place, progress=change)
    assert registry.tags == {}


def test_every_damaged_document_and_blob_is_noticed(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    publish(release, place)
    damaged = 0
    needed = [name for name, content in registry.blobs.items() if len(content) >= 1024]
    for name in needed:
        content = registry.blobs[name]
        middle = len(content) // 2
        registry.blobs[name] = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        with pytest.raises(InputError, match=r"a layer is damaged|malformed|outside") as caught:
            fetch(place, tmp_path / "pulled")
        damaged += "layer is damaged" in str(caught.value)
        registry.blobs[name] = content
    assert damaged >= 2, "files of weights, whose middle is no header"
    index = registry.tags["1.4.0"]
    for name in (index, registry.tags["1.4.0-modelpack"]):
        kind, content = registry.manifests[name]
        registry.manifests[name] = (kind, content.replace(b"notes", b"motes"))
        with pytest.raises(InputError, match="the manifest is damaged"):
            fetch(parse_destination(f"{place}@{index}"), tmp_path / "pulled")
        registry.manifests[name] = (kind, content)
    fetch(place, tmp_path / "pulled")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "it has no layers"),
        ({"layers": "x"}, "it has no layers"),
        ({"layers": [{"mediaType": "application/vnd.cncf.model.weight.v1.raw"}]}, "malformed"),
        ({"layers": [{"digest": "sha256:" + "0" * 64, "size": -1}]}, "malformed"),
        ({"layers": [{"digest": "sha256:" + "0" * 64, "size": 10, "mediaType": "x/raw"}]}, "of a kind that releases"),
        (
            {
                "layers": [
                    {"digest": "sha256:" + "0" * 64, "size": 10, "mediaType": "application/vnd.oci.image.layer.v1.tar"}
                ]
            },
            "a layer is missing",
        ),
        ({"layers": [{"digest": "../../etc", "size": 10}]}, "malformed"),
    ],
    ids=["no layers", "text", "no digest", "negative", "raw", "missing", "path"],
)
def test_a_strangers_manifest_is_refused(
    registry: Registry, place: OciDestination, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    content = json.dumps({"schemaVersion": 2, **change}).encode()
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    registry.manifests[digest] = ("application/vnd.oci.image.manifest.v1+json", content)
    registry.tags["1.4.0"] = digest
    with pytest.raises(InputError, match=message):
        fetch(place, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_registry_that_lies_about_digests_is_refused(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    publish(release, place)
    registry.headers = {"Docker-Content-Digest": "sha256:" + "0" * 64}
    with pytest.raises(InputError, match="the manifest is damaged"):
        fetch(place, tmp_path / "pulled")


def test_all_pages_of_tags_are_read(registry: Registry, place: OciDestination, release: Package) -> None:
    publish(release, place)
    for number in range(4):
        promote(place, f"stable-{number}")
    assert [tag.name for tag in tags(place)] == ["1.4.0", *(f"stable-{number}" for number in range(4))]


def test_what_the_registry_has_is_not_sent(
    registry: Registry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    publish(release, place)
    before = registry.bytes_in
    changed = make_release(tmp_path / "changed", weights=WEIGHTS, also={"README.md": b"# Another card\n"})
    publish(changed, oci(registry, "1.4.1"))
    assert registry.bytes_in < before + 30_000


def test_an_existing_tag_is_refused(registry: Registry, place: OciDestination, release: Package) -> None:
    publish(release, place)
    promote(place, "stable")
    before = dict(registry.tags)
    for tag in ("1.4.0", "stable"):
        with pytest.raises(RecipeError, match="the tag exists already"):
            publish(release, oci(registry, tag))
    with pytest.raises(RecipeError, match="is a release's own"):
        promote(oci(registry, "stable"), "1.4.0")
    assert registry.tags == before
    assert before["stable"] == before["1.4.0"]
    assert before["stable-modelpack"] == before["1.4.0-modelpack"]


def test_a_tag_that_appears_meanwhile_is_not_taken(registry: Registry, place: OciDestination, release: Package) -> None:
    def appear(event: object) -> None:
        digest = "sha256:" + hashlib.sha256(b"{}").hexdigest()
        registry.manifests[digest] = ("application/vnd.oci.image.index.v1+json", b"{}")
        registry.tags["1.4.0"] = digest

    with pytest.raises(RecipeError, match="the tag exists already"):
        publish(release, place, progress=appear)


def test_the_forms_have_the_types_that_their_readers_want(
    registry: Registry, place: OciDestination, release: Package
) -> None:
    publish(release, place)
    index = json.loads(registry.manifests[registry.tags["1.4.0"]][1])
    platforms = [entry["platform"]["architecture"] for entry in index["manifests"]]
    assert platforms == ["amd64", "arm64", "unknown"]
    amd64, arm64, model = (json.loads(registry.manifests[entry["digest"]][1]) for entry in index["manifests"])
    assert "artifactType" not in amd64
    assert {layer["mediaType"] for layer in amd64["layers"] + arm64["layers"]} == {IMAGE_LAYER}
    kinds = [layer["mediaType"].removeprefix("application/vnd.cncf.model.") for layer in model["layers"]]
    assert kinds == ["weight.v1.tar", "weight.v1.tar", "weight.config.v1.tar", "code.v1.tar", "doc.v1.tar"]
    digests = [[layer["digest"] for layer in manifest["layers"]] for manifest in (amd64, arm64, model)]
    assert digests[0] == digests[1] == digests[2]
    for manifest, architecture in ((amd64, "amd64"), (arm64, "arm64")):
        config = json.loads(registry.blobs[manifest["config"]["digest"]])
        assert config["rootfs"] == {"type": "layers", "diff_ids": digests[0]}
        assert (config["architecture"], config["os"]) == (architecture, "linux")


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (134_515_008, "134.5M"),
        (7_000_000_000, "7B"),
        (7_241_732_096, "7.2B"),
        (1_040_000_000_000, "1T"),
        (5_040, "5K"),
        (120, "0.1K"),
    ],
)
def test_numbers_of_parameters_have_modelpacks_form(count: int, expected: str) -> None:
    assert parameter_size(count) == expected


def test_many_files_of_weights_share_layers(tmp_path: Path) -> None:
    """Container runtimes mount some 120 layers."""
    files = {f"model-{number:05}.safetensors": 1 for number in range(250)}
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    layers = layers_of(tmp_path, files, silent)
    assert len(layers) <= 100
    assert sum(len(layer.blob.content.names) for layer in layers if isinstance(layer.blob.content, TarStream)) == 250


def test_what_is_not_there_is_said(registry: Registry, place: OciDestination, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such release"):
        fetch(place, tmp_path / "pulled")
    with pytest.raises(InputError, match="there is no such release"):
        promote(place, "stable")
    with pytest.raises(RecipeError, match="the tag to move is not valid"):
        promote(place, "not/valid")


def test_publishing_wants_a_tag_and_no_digest(registry: Registry, place: OciDestination, release: Package) -> None:
    for text in (
        f"{place}@sha256:{'0' * 64}",
        f"{str(place).removesuffix(':1.4.0')}@sha256:{'0' * 64}",
        f"{place}-modelpack",
    ):
        with pytest.raises(RecipeError):
            publish(release, parse_destination(text))
    assert registry.asked == []


def test_nobody_answers(registry: Registry, release: Package) -> None:
    with pytest.raises(InputError, match="the registry failed 6 times: no connection") as caught:
        publish(release, parse_destination("oci://127.0.0.1:9/models/notes:1.4.0"))
    assert "/v2/" not in str(caught.value), "addresses of uploads hold what registries sign"
