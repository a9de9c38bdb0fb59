"""How users write where a release goes, and that nothing a text may hold leads elsewhere."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.errors import RecipeError
from qexport.registries import (
    FolderDestination,
    HubDestination,
    OciDestination,
    TarDestination,
    parse_destination,
)

DIGEST = "sha256:" + "0123456789abcdef" * 4
LOWER = string.ascii_lowercase + string.digits
WORD = st.text(LOWER, min_size=1, max_size=6)
PART = st.tuples(WORD, st.sampled_from(["", ".a", "_b", "__c", "-d", "---e"])).map("".join)
HOST = st.tuples(WORD, st.sampled_from(["", "-x", ".example.com", ":1", ".local:5000", ":65535"])).map("".join)
TAG = st.tuples(st.sampled_from(string.ascii_letters + "_9"), st.text(string.ascii_letters + "0._-", max_size=127)).map(
    "".join
)


@given(HOST, st.lists(PART, min_size=1, max_size=4).map("/".join), st.none() | TAG, st.none() | st.just(DIGEST))
def test_a_reference_to_a_registry_is_read_as_it_is_written(
    host: str, name: str, tag: str | None, digest: str | None
) -> None:
    destination = OciDestination(host, name, tag, digest)
    assert parse_destination(str(destination)) == destination


@given(st.text(alphabet=string.printable + "é/:@.", max_size=80))
def test_any_text_is_a_destination_or_an_error(text: str) -> None:
    """What is accepted is written again as it was, and no part of it can leave its place in an address."""
    try:
        found = parse_destination(f"oci://{text}")
    except RecipeError:
        return
    assert isinstance(found, OciDestination)
    assert str(found) == f"oci://{text}"
    for part in (found.host, found.name, found.tag or "", found.digest or ""):
        assert not set(part) & set("@?#\\%\n\r\t ")
        assert ".." not in found.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("oci://", "host"),
        ("oci://host", "repository's name"),
        ("oci://host/", "repository's name"),
        ("oci://host/Upper:1", "repository's name"),
        ("oci://host/a//b:1", "repository's name"),
        ("oci://host/a/../b:1", "repository's name"),
        ("oci://host/a:1.4.0+gptq", r"no \+"),
        ("oci://host/a:" + "x" * 129, "128"),
        ("oci://host:0/a:1", "host"),
        ("oci://host:99999/a:1", "host"),
        ("oci://host/a@sha256:0", "digest"),
        ("oci://host/a@sha512:" + "0" * 128, "digest"),
        ("hub:name", "no repository"),
        ("hub:org/../x", "no repository"),
        ("hub:org/name@", "no tag"),
        ("hub:org/name@a b", "no tag"),
        ("hub:org/name@a/../b", "no tag"),
        ("https://host/a", "not known"),
        ("s3://bucket/a", "not known"),
        ("", "no name"),
        ("a\0b", "no name"),
    ],
)
def test_what_names_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_destination(text)


@pytest.mark.parametrize(
    "text", ["oci://user:secret@host/a:1", "oci://secret@host/a:1", "oci://u:secret@[::1]:5000/a:1"]
)
def test_a_password_in_a_reference_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(RecipeError, match="config") as caught:
        parse_destination(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("out/release", FolderDestination),
        ("./oci", FolderDestination),
        ("/srv/release.tar.d", FolderDestination),
        ("release.tar", TarDestination),
        ("/srv/a.b.tar", TarDestination),
        ("hub:org/name", HubDestination),
        ("hub:org/name@1.4.0+gptq", HubDestination),
        ("oci://[::1]:5000/a/b:1", OciDestination),
        (f"oci://registry.example.com:5000/a/b:1@{DIGEST}", OciDestination),
    ],
)
def test_the_form_decides(text: str, kind: type) -> None:
    found = parse_destination(text)
    assert type(found) is kind
    assert str(found) == text


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("localhost:5000", True),
        ("127.0.0.1:5000", True),
        ("127.8.9.1", True),
        ("[::1]:5000", True),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
        ("10.0.0.1", False),
        ("[fe80::1]", False),
    ],
)
def test_plain_http_is_for_this_machine(host: str, expected: bool) -> None:
    assert OciDestination(host, "a", "1", None).is_loopback is expected
