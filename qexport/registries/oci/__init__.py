"""Releases in OCI registries: what is put there, in an order in which no tag stands for something incomplete."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from qexport.artifact.digests import sha256_bytes
from qexport.artifact.disk import ensure_space
from qexport.artifact.names import MODELPACK_SUFFIX
from qexport.errors import InputError, RecipeError
from qexport.progress import Notice, Progress, ProgressCallback
from qexport.registries.destinations import OCI_FORM, OciDestination, is_tag
from qexport.registries.oci.client import Client
from qexport.registries.oci.documents import (
    INDEX,
    PLATFORMS,
    TAG,
    Descriptor,
    Document,
    attachment_digests,
    image_config,
    image_manifest,
    index,
    model_config,
    model_manifest,
)
from qexport.registries.oci.downloads import digest_of, parsed, read_answer, read_document
from qexport.registries.oci.heads import WriteHead, extract_heads
from qexport.registries.oci.layers import Layer, layers_of
from qexport.registries.oci.pulling import pull
from qexport.registries.oci.referrers import attach, fallback_tag, put_document, read_attachments, upload_bytes
from qexport.registries.oci.release_index import model_of
from qexport.registries.oci.uploads import upload
from qexport.registries.package import Package, Published, Tag

_LISTING: Final = re.compile(fallback_tag("sha256:[0-9a-f]{64}"), re.ASCII)
_MOST_PAGES: Final = 200
_PER_PAGE: Final = 500
_MOST_UNREADABLE: Final = 5
"""Tags that are left out of a list. With more, the registry itself fails, and each takes half a minute of attempts."""


def publish(package: Package, destination: OciDestination, progress: ProgressCallback) -> Published:
    """Uploads a release and tags it when all of it is there. See `qexport.registries.publish`."""
    tag = _new_tag(destination)
    files = package.files()
    client = Client(destination)
    _refuse_taken(client, tag)
    layers = layers_of(package.folder, files, progress)
    _upload_layers(client, layers, progress)
    index_, model = _put_manifests(client, package, tag, [layer.descriptor for layer in layers])
    _refuse_taken(client, tag)
    put_document(client, model, tag + MODELPACK_SUFFIX)
    put_document(client, index_, tag)
    digest = index_.descriptor.digest
    return Published(f"{destination}@{digest}", digest)


def refuse_taken(destination: OciDestination) -> None:
    """Refuses a tag that exists. See `qexport.registries.refuse_taken`."""
    tag = _new_tag(destination)
    _refuse_taken(Client(destination), tag)


def fetch(reference: OciDestination, folder: Path, progress: ProgressCallback) -> None:
    """Downloads a release into an empty folder. See `qexport.registries.fetch`."""
    client = _client_of(reference)
    layers = pull(client, *_found(client, reference))
    total = sum(layer.blob.size for layer in layers)
    ensure_space(folder, total)
    done = 0
    for layer in layers:

        def told(there: int, before: int = done) -> None:
            progress(Progress("fetch", before + there, total, "byte"))

        layer.extract(client, folder, told)
        done += layer.blob.size


def fetch_heads(reference: OciDestination, folder: Path, write_head: WriteHead, progress: ProgressCallback) -> None:
    """Downloads all but the weights into an empty folder. See `qexport.registries.fetch_heads`."""
    client = _client_of(reference)
    progress(Notice(f"fetching the headers of {reference}"))
    for layer in pull(client, *_found(client, reference)):
        if layer.may_hold_weights:
            extract_heads(client, layer.blob, folder, write_head)
        else:
            layer.extract(client, folder, lambda _: None)


def tags(reference: OciDestination) -> list[Tag]:
    """The tags of a repository without those that only help clients. See `qexport.registries.tags`."""
    client = Client(reference)
    names = _tag_names(client)
    shown = [name for name in sorted(names) if not _is_helper(name, names)]
    found: list[Tag] = []
    unreadable = 0
    for name in shown:
        try:
            digest = digest_of(client, name)
        except InputError:
            unreadable += 1
            if unreadable >= min(_MOST_UNREADABLE, len(shown)):
                raise
            continue
        if digest:  # it may be removed meanwhile
            found.append(Tag(name, digest))
    return found


def exactly(reference: OciDestination) -> OciDestination:
    """A release by its digest. See `qexport.registries.exactly`."""
    descriptor, _ = _found(_client_of(reference), reference)
    return replace(reference, digest=descriptor.digest)


def promote(reference: OciDestination, to: str) -> None:
    """Moves a tag, and the one of the ModelPack artifact with it. See `qexport.registries.promote`."""
    _refuse_helper(to, str(reference))
    client = _client_of(reference)
    descriptor, content = _found(client, reference)
    if descriptor.media_type != INDEX:
        mend = "name the release's own tag or its digest, see qexport release --list"
        raise client.failure("only a release is promoted, and this is one manifest or something else", mend)
    model, _ = model_of(client, parsed(client, content))
    _refuse_release(client, to)
    put_document(client, model, to + MODELPACK_SUFFIX)
    put_document(client, Document(descriptor.media_type, content), to)


def _new_tag(destination: OciDestination) -> str:
    if destination.tag is None or destination.digest is not None:
        what = "a release is published under a tag, which gives it its digest"
        raise RecipeError(what, where=str(destination), mend="write oci://HOST/NAME:TAG")
    _refuse_helper(destination.tag, str(destination))
    return destination.tag


def _refuse_helper(tag: str, where: str) -> None:
    """Refuses tags that stand for something else than a release, or leave no room for the ModelPack artifact's."""
    if not is_tag(tag + MODELPACK_SUFFIX) or tag.endswith(MODELPACK_SUFFIX) or _LISTING.fullmatch(tag):
        what = f"the tag {tag} is too long, ends in {MODELPACK_SUFFIX}, or is one that lists referrers"
        raise RecipeError(what, where=where, mend="choose another tag")


def _refuse_taken(client: Client, tag: str) -> None:
    if digest := digest_of(client, tag):
        what = f"the tag exists already and stands for {digest}; a release keeps its tag"
        raise RecipeError(what, where=str(client.destination), mend="publish under another tag, and promote that")


def _refuse_release(client: Client, tag: str) -> None:
    read = read_document(client, tag)
    if read and _annotations(client, read[1]).get(TAG) == tag:
        what = f"the tag {tag} is a release's own, which stays"
        raise RecipeError(what, where=str(client.destination), mend="move a tag such as stable")


def _annotations(client: Client, content: bytes) -> dict[str, Any]:
    found = parsed(client, content).get("annotations")
    return found if isinstance(found, dict) else {}


def _upload_layers(client: Client, layers: list[Layer], progress: ProgressCallback) -> None:
    total = sum(layer.blob.size for layer in layers)
    before = 0
    for number, layer in enumerate(layers, 1):
        detail = f"layer {number} of {len(layers)}"

        def told(there: int, before: int = before, detail: str = detail) -> None:
            progress(Progress("publish", total + before + there, 2 * total, "byte", detail))

        upload(client, layer.blob, told)
        before += layer.blob.size


def _put_manifests(client: Client, package: Package, tag: str, layers: list[Descriptor]) -> tuple[Document, Document]:
    """Puts all documents and what is attached by their digests; returns the index and the ModelPack manifest."""
    attachments = read_attachments(package.folder, package.attachments)
    config = model_config(package, layers)
    model = model_manifest(package, config.descriptor, layers)
    configs = [image_config(each, layers) for each in PLATFORMS]
    images = [image_manifest(package, each.descriptor, layers) for each in configs]
    for each in (config, *configs):
        upload_bytes(client, each.content)
    digests = {each.path: f"sha256:{sha256_bytes(content)}" for each, content in attachments.items()}
    whole = index(package, tag, [each.descriptor for each in images], model.descriptor, attachment_digests(digests))
    for document in (model, *images, whole):
        put_document(client, document, document.descriptor.digest)
    attach(client, whole.descriptor, attachments)
    return whole, model


def _client_of(reference: OciDestination) -> Client:
    """For a reference that names a release, not a repository alone."""
    if reference.tag is None and reference.digest is None:
        raise RecipeError("neither a tag nor a digest is named", where=str(reference), mend=f"write {OCI_FORM}")
    return Client(reference)


def _found(client: Client, reference: OciDestination) -> tuple[Descriptor, bytes]:
    read = read_document(client, reference.digest or str(reference.tag))
    if read is None:
        raise client.failure(
            "there is no such release in the registry", "see the tags that qexport release --list shows"
        )
    return read


def _tag_names(client: Client) -> set[str]:
    names: set[str] = set()
    last = ""
    for _ in range(_MOST_PAGES):
        read = read_answer(client, f"tags/list?n={_PER_PAGE}{f'&last={last}' if last else ''}")
        if read is None:
            raise client.failure("there is no such repository in the registry")
        page = parsed(client, read[1]).get("tags")
        listed = page if isinstance(page, list) else []
        new = {name for name in listed if isinstance(name, str) and is_tag(name)} - names
        names |= new
        if not new or "next" not in read[0].links:
            return names
        last = max(new)
    raise client.failure(f"the repository has more than {_MOST_PAGES * _PER_PAGE} tags")


def _is_helper(name: str, names: set[str]) -> bool:
    return bool(_LISTING.fullmatch(name)) or (
        name.endswith(MODELPACK_SUFFIX) and name.removesuffix(MODELPACK_SUFFIX) in names
    )
