"""What a text names is decided by its form alone."""

from __future__ import annotations

import pytest

from qexport.references import HubReference, LocalReference, PackageReference, is_explicit_path, parse_reference


@pytest.mark.parametrize("text", ["org/model", "org-1/Model_2.5", "0/0"])
def test_an_id_of_the_hub(text: str) -> None:
    assert parse_reference(text) == HubReference(text)
    assert not is_explicit_path(text)


@pytest.mark.parametrize(
    "text", ["model", "a/b/c", "org/..", "org/a..b", "-org/model", "org/ä", "org/model ", "org/model\n", ""]
)
def test_what_has_not_the_form_of_an_id_is_a_path(text: str) -> None:
    assert parse_reference(text) == LocalReference(text)
    assert not is_explicit_path(text)


@pytest.mark.parametrize("text", ["./org/model", "../model", "/model", "~/model", "~user/model", ".", ".."])
def test_what_says_that_it_is_a_path(text: str) -> None:
    assert parse_reference(text) == LocalReference(text)
    assert is_explicit_path(text)


def test_a_file_in_a_package() -> None:
    assert parse_reference("pkg:some_package/a/b.gguf") == PackageReference("some_package", "a/b.gguf")


@pytest.mark.parametrize(
    "text", ["pkg:", "pkg:a.b/c.gguf", "pkg:a/c.bin", "pkg:a\\b.gguf", "pkg:a/\0.gguf", "pkg:1a/b.gguf"]
)
def test_a_text_that_begins_as_one_and_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="write pkg:package/file"):
        parse_reference(text)
