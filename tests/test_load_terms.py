"""Licenses and languages as the cards of bases and adapters name them, and the files beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.loading.terms import read_terms
from qexport.tensors import Terms


def of(folder: Path, card: str) -> Terms:
    (folder / "README.md").write_text(card, encoding="utf-8")
    return read_terms(folder)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n", Terms(license="apache-2.0", languages=("en",))),
        ("---\r\nlicense: mit\r\n---\r\ntext", Terms(license="mit")),
        ("---\nlicense: [mit]\nlanguage: [en, fr, 3]\n---\n", Terms(license="mit", languages=("en", "fr"))),
        (
            "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n",
            Terms(license="other", license_name="llama3", license_link="LICENSE"),
        ),
        ("no front matter\n---\nlicense: mit\n---\n", Terms()),
        ("---\nlicense: mit\n", Terms()),
        ("---\n: [\n---\n", Terms()),
        ("---\n- a\n---\n", Terms()),
        ('---\nlicense: "a\\nb: c"\n---\n', Terms()),
        ("---\nlicense: !!python/object:os.system x\n---\n", Terms()),
        ("---\nlicense: 1\nlanguage: null\n---\n", Terms()),
    ],
)
def test_a_card_names_license_and_languages(tmp_path: Path, card: str, expected: Terms) -> None:
    assert of(tmp_path, card) == expected


def test_licenses_and_notices_travel_byte_for_byte(tmp_path: Path) -> None:
    for name in ("LICENSE", "NOTICE.md", "USE_POLICY.md"):
        (tmp_path / name).write_bytes(b"\xff" + name.encode())
    (tmp_path / "license_checker.py").write_text("x")
    (tmp_path / "LICENSES").mkdir()
    found = read_terms(tmp_path).files
    assert found == {name: b"\xff" + name.encode() for name in ("LICENSE", "NOTICE.md", "USE_POLICY.md")}


def test_what_leads_out_of_the_folder_or_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "LICENSE").symlink_to("../secret")
    (folder / "NOTICE").write_bytes(b"x" * (2 << 20))
    assert read_terms(folder) == Terms()


@given(st.text(max_size=200))
def test_any_text_may_stand_in_a_card(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("card")
    (folder / "README.md").write_bytes(f"---\nlicense: {text}\n---\n".encode("utf-8", errors="surrogatepass"))
    found = read_terms(folder).license
    assert found is None or "\n" not in found
