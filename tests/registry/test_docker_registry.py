"""Releases in a real registry: pushed, killed, pushed again, pulled, mounted, listed, promoted, damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from packages import REPORT, SIGNATURE, contents, make_release
from qexport.errors import InputError, RecipeError
from qexport.registries import OciDestination, Package, fetch, parse_destination, promote, publish, tags
from qexport.registries.oci import uploads
from running_registry import NAME, PASSWORD, RunningRegistry, log_in, make_certificate, running_registry

PUSH = Path(__file__).parent / "push.py"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def registry(tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningRegistry]:
    """The registry, with its authority trusted and its password in docker's config.json."""
    with running_registry(tmp_path, certificate) as found:
        log_in(tmp_path / "docker", found.host, PASSWORD)
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield found


@pytest.fixture
def release(tmp_path: Path) -> Package:
    return make_release(tmp_path / "release")


@pytest.fixture
def place(registry: RunningRegistry, monkeypatch: pytest.MonkeyPatch) -> OciDestination:
    monkeypatch.setattr(uploads, "CHUNK", 1 << 20)
    return oci(registry, "1.4.0")


def oci(registry: RunningRegistry, tag: str) -> OciDestination:
    found = parse_destination(f"oci://{registry.host}/models/notes:{tag}")
    assert isinstance(found, OciDestination)
    return found


def get(registry: RunningRegistry, path: str) -> requests.Response:
    """What any client would read, without our code."""
    accept = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json"
    return requests.get(
        f"https://{registry.host}/v2/models/notes/{path}",
        auth=(NAME, PASSWORD), headers={"Accept": accept}, verify=str(registry.certificate), timeout=30,
    )  # fmt: skip


def document(registry: RunningRegistry, reference: str) -> dict[str, Any]:
    response = get(registry, f"manifests/{reference}")
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


def layers(registry: RunningRegistry, reference: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = document(registry, reference)["layers"]
    return found


def test_a_release_comes_back_byte_for_byte(
    registry: RunningRegistry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    published = publish(release, place)
    assert published.digest == f"sha256:{hashlib.sha256(get(registry, 'manifests/1.4.0').content).hexdigest()}"
    for number, reference in enumerate((published.reference, str(place), f"{place}-modelpack")):
        fetch(parse_destination(reference), tmp_path / f"pulled-{number}")
        assert contents(tmp_path / f"pulled-{number}") == contents(release.folder)


def test_both_forms_have_the_same_layers_which_are_stored_once(
    registry: RunningRegistry, place: OciDestination, release: Package
) -> None:
    publish(release, place)
    manifests = document(registry, "1.4.0")["manifests"]
    digests = [[layer["digest"] for layer in layers(registry, each["digest"])] for each in manifests]
    assert digests[0] == digests[1] == digests[2]
    assert digests[0] == [layer["digest"] for layer in layers(registry, "1.4.0-modelpack")]
    weights = sum(path.stat().st_size for path in release.folder.glob("*.safetensors"))
    assert weights < sum(registry.blobs().values()) < weights + 80_000


def test_the_artifact_is_what_modelpack_specifies(
    registry: RunningRegistry, place: OciDestination, release: Package
) -> None:
    publish(release, place)
    manifest = document(registry, "1.4.0-modelpack")
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    config = get(registry, f"blobs/{manifest['config']['digest']}").json()
    assert config["descriptor"] == {"name": "notes", "version": "1.4.0", "family": "llama", "licenses": ["Apache-2.0"]}
    assert config["config"] == {
        "architecture": "transformer", "format": "safetensors", "paramSize": "134.5M", "precision": "float16",
        "quantization": "gptq",
    }  # fmt: skip
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in manifest["layers"]]}
    weights = manifest["layers"][0]
    assert weights["mediaType"] == "application/vnd.cncf.model.weight.v1.tar"
    assert weights["annotations"]["org.cncf.model.filepath"] == "models/model-00001-of-00002.safetensors"


@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
def test_a_runtime_mounts_the_image(
    registry: RunningRegistry, place: OciDestination, release: Package, tmp_path: Path, architecture: str
) -> None:
    """skopeo pulls as CRI-O and podman do, umoci unpacks; neither is ours."""
    if not (shutil.which("skopeo") and shutil.which("umoci")):
        pytest.skip("skopeo and umoci are not installed (Debian: apt-get install skopeo umoci)")
    publish(release, place)
    (tmp_path / "certificates").mkdir()
    shutil.copy(registry.certificate, tmp_path / "certificates/ca.crt")
    policy = tmp_path / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    source, target = str(place).replace("oci://", "docker://"), f"oci:{tmp_path}/layout:model"
    options = ["--src-cert-dir", str(tmp_path / "certificates"), "--src-creds", f"{NAME}:{PASSWORD}"]
    skopeo = ["skopeo", "--policy", str(policy), "--override-arch", architecture, "copy", *options, source, target]
    subprocess.run(skopeo, check=True, capture_output=True)
    unpack = ["umoci", "unpack", "--rootless", "--image", f"{tmp_path}/layout:model", str(tmp_path / "bundle")]
    subprocess.run(unpack, check=True, capture_output=True)
    root = tmp_path / "bundle/rootfs"
    assert [path.name for path in root.iterdir()] == ["models"]
    assert contents(root / "models") == contents(release.folder)
    assert (root / "models/config.json").stat().st_mode & 0o777 == 0o644


def test_an_independent_reader_finds_the_files_in_the_layers(
    registry: RunningRegistry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    publish(release, place)
    for number, layer in enumerate(layers(registry, "1.4.0-modelpack")):
        blob = get(registry, f"blobs/{layer['digest']}").content
        (tmp_path / f"{number}.tar").write_bytes(blob)
        with tarfile.open(tmp_path / f"{number}.tar", "r:") as archive:
            archive.extractall(tmp_path / "root", filter="data")
    assert contents(tmp_path / "root/models") == contents(release.folder)


def test_attachments_are_referrers(registry: RunningRegistry, place: OciDestination, release: Package) -> None:
    """This registry keeps no list of referrers, so the fallback tag of the specification lists them."""
    published = publish(release, place)
    assert published.digest
    listed = document(registry, published.digest.replace(":", "-"))["manifests"]
    assert {each["artifactType"] for each in listed} == {REPORT.artifact_type, SIGNATURE.artifact_type}
    for each in listed:
        manifest = document(registry, each["digest"])
        assert manifest["subject"]["digest"] == published.digest
        (layer,) = manifest["layers"]
        attachment = REPORT if each["artifactType"] == REPORT.artifact_type else SIGNATURE
        content = get(registry, f"blobs/{layer['digest']}").content
        assert content == (release.folder / attachment.path).read_bytes()


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_a_killed_push_goes_on(
    registry: RunningRegistry, place: OciDestination, release: Package, tmp_path: Path, chunks: int
) -> None:
    """Killed between two chunks: what is there is not sent again, not even within a layer."""
    killed = subprocess.run([sys.executable, str(PUSH), str(release.folder), str(place), str(chunks)], **quiet())
    assert killed.returncode == -signal.SIGKILL
    assert get(registry, "tags/list").status_code == 404 or "1.4.0" not in get(registry, "tags/list").json()["tags"]
    sent = sum(method == "PATCH" for method, _, _ in registry.requests())
    assert sent == chunks if chunks < 4 else sent >= 3
    registry.forget()
    subprocess.run([sys.executable, str(PUSH), str(release.folder), str(place)], check=True, **quiet())
    again = sum(method == "PATCH" and "uploads" in path for method, path, _ in registry.requests())
    assert sent + again == 3 + 1 + len(SMALL)
    fetch(place, tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(release.folder)


SMALL = ("weight.config", "code", "doc", "model", "amd64", "arm64", "{}", "report", "signature")
"""What has a blob of less than a chunk, beside the second file of weights."""


def test_a_push_killed_anywhere_goes_on(registry: RunningRegistry, place: OciDestination, tmp_path: Path) -> None:
    """Killed in the middle of whatever it does; this registry gives up an upload whose chunk was cut."""
    release = make_release(tmp_path / "large", weights=40_000_000)
    for part in (0.2, 0.7, 0.4):
        process = subprocess.Popen(
            [sys.executable, str(PUSH), str(release.folder), str(place)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert process.stdout is not None
        while float(process.stdout.readline() or 1e18) < (1 + part) * 53_000_000:
            pass
        time.sleep(0.003)
        process.kill()
        process.communicate()
        assert get(registry, "manifests/1.4.0").status_code == 404
    publish(release, place)
    fetch(place, tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(release.folder)


def test_a_second_release_sends_only_what_has_changed(
    registry: RunningRegistry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    publish(release, place)
    registry.forget()
    changed = make_release(tmp_path / "changed", also={"README.md": b"# Another card\n"})
    publish(changed, oci(registry, "1.4.1"))
    before = sum(path.stat().st_size for path in release.folder.glob("*.safetensors"))
    assert sum(registry.blobs().values()) < before + 160_000
    assert sum(method == "PATCH" for method, _, _ in registry.requests()) < 8


def test_tags_are_listed_and_moved(
    registry: RunningRegistry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    first = publish(release, place)
    second = publish(make_release(tmp_path / "second", seed=1), oci(registry, "1.5.0"))
    promote(place, "stable")
    assert {tag.name: tag.digest for tag in tags(place)} == {
        "1.4.0": first.digest, "1.5.0": second.digest, "stable": first.digest,
    }  # fmt: skip
    promote(oci(registry, "1.5.0"), "stable")
    assert {tag.name: tag.digest for tag in tags(place)}["stable"] == second.digest
    fetch(oci(registry, "stable"), tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(tmp_path / "second")
    assert layers(registry, "stable-modelpack") == layers(registry, "1.5.0-modelpack")
    promote(place, "stable")  # the stack rolls back
    assert {tag.name: tag.digest for tag in tags(place)}["stable"] == first.digest


def test_an_existing_tag_is_refused(registry: RunningRegistry, place: OciDestination, release: Package) -> None:
    publish(release, place)
    with pytest.raises(RecipeError, match="the tag exists already"):
        publish(release, place)
    promote(place, "stable")
    with pytest.raises(RecipeError, match="the tag exists already"):
        publish(release, oci(registry, "stable"))
    with pytest.raises(RecipeError, match="is a release's own"):
        promote(oci(registry, "stable"), "1.4.0")


def test_a_flipped_byte_in_the_storage_is_noticed(
    registry: RunningRegistry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    published = publish(release, place)
    digests = [layer["digest"] for layer in layers(registry, "1.4.0-modelpack")]
    documents = [published.digest, document(registry, "1.4.0")["manifests"][2]["digest"]]
    for digest in [*digests, *documents]:
        path = registry.blob_path(str(digest))
        content = path.read_bytes()
        place_in_file = len(content) // 2
        path.write_bytes(content[:place_in_file] + bytes([content[place_in_file] ^ 1]) + content[place_in_file + 1 :])
        with pytest.raises(InputError) as caught:
            fetch(place, tmp_path / "pulled")
        is_header = "malformed" in str(caught.value) and len(content) < 10_000
        assert digest in documents or is_header or "a layer is damaged" in str(caught.value)
        assert not (tmp_path / "pulled").exists()
        path.write_bytes(content)
    fetch(place, tmp_path / "pulled")


def test_a_missing_referrer_is_noticed(
    registry: RunningRegistry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    published = publish(release, place)
    assert published.digest
    tag = published.digest.replace(":", "-")
    listing = document(registry, tag)
    listing["manifests"] = [each for each in listing["manifests"] if each["artifactType"] == REPORT.artifact_type]
    put = requests.put(
        f"https://{registry.host}/v2/models/notes/manifests/{tag}", data=json.dumps(listing), auth=(NAME, PASSWORD),
        headers={"Content-Type": listing["mediaType"]}, verify=str(registry.certificate), timeout=30,
    )  # fmt: skip
    assert put.status_code == 201
    with pytest.raises(InputError, match=r"a referrer of the release is missing: model\.sig"):
        fetch(place, tmp_path / "pulled")


def test_a_wrong_password_is_refused_at_once(
    registry: RunningRegistry, place: OciDestination, release: Package, tmp_path: Path
) -> None:
    log_in(tmp_path / "docker", registry.host, "battery staple")
    began = time.monotonic()
    with pytest.raises(InputError, match="refuses the name or the password") as caught:
        publish(release, place)
    assert time.monotonic() - began < 5
    assert "battery" not in str(caught.value)
    (tmp_path / "docker/config.json").unlink()
    with pytest.raises(InputError, match="wants a name and a password"):
        publish(release, place)


def test_an_untrusted_certificate_is_refused(
    registry: RunningRegistry, place: OciDestination, release: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on loopback, where a registry without TLS would do: a password must not go to whoever answers."""
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(InputError, match="certificate is not trusted"):
        publish(release, place)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def quiet() -> dict[str, Any]:
    return {"stdout": subprocess.DEVNULL, "env": environment()}
