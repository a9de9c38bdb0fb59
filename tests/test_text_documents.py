"""Documents from files and datasets: what is read, how it is told apart, and how faults are told."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qexport.errors import InputError
from qexport.text.documents import Documents, read_documents, refuse_shared

CONVERSATION = [{"role": "user", "content": "Is the mill open?"}, {"role": "assistant", "content": "From six."}]


def write_lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_each_json_line_is_a_document_and_a_text_file_is_one(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", {"id": 1, "text": "one"}, {"text": "two\n"}, {"messages": CONVERSATION})
    (tmp_path / "b.txt").write_text("three\n\nstill three\n", encoding="utf-8")
    documents = read_documents([lines, str(tmp_path / "b.txt")])
    assert documents.items == ("one", "two\n", tuple(CONVERSATION), "three\n\nstill three\n")
    assert documents.origin == "a.jsonl, b.txt"


def test_blank_documents_and_blank_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "  "}\n{"text": "one"}\n\n', encoding="utf-8")
    assert read_documents([str(path)]).items == ("one",)


def test_another_field_can_hold_the_text_or_the_messages(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "no", "body": "yes"}, {"body": CONVERSATION, "messages": []})
    assert read_documents([path], field="body").items == ("yes", tuple(CONVERSATION))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1, max_size=4))
def test_any_texts_are_read_back_as_they_were_written(tmp_path: Path, texts: list[str]) -> None:
    path = write_lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    assert read_documents([path]).items == tuple(texts)


def test_the_digest_depends_on_the_text_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n", encoding="utf-8")
    from_text = read_documents([str(tmp_path / "a.txt")])
    from_lines = read_documents([write_lines(tmp_path / "b.jsonl", {"id": "7", "text": "one\n"})])
    assert from_text.sha256 == from_lines.sha256
    assert Documents(("one", "two"), "").sha256 != Documents(("two", "one"), "").sha256
    assert Documents(("one", "two"), "").sha256 != Documents(("onetwo",), "").sha256
    assert from_text.sha256 != Documents(("one",), "").sha256


def test_domains_are_those_of_the_lines_and_there_are_none_where_no_line_has_one(tmp_path: Path) -> None:
    rows = [{"text": "one", "domain": "law"}, {"text": "two", "domain": ""}, {"text": "three"}]
    with_one = read_documents([write_lines(tmp_path / "a.jsonl", *rows)])
    assert with_one.domains == ("law", None, None)
    assert {domain: found.items for domain, found in with_one.by_domain().items()} == {
        "law": ("one",),
        None: ("two", "three"),
    }
    without = read_documents([write_lines(tmp_path / "b.jsonl", *rows[1:])])
    assert without.domains == ()
    assert without.by_domain() == {None: without}


def test_the_digest_of_a_text_stays_what_it_is() -> None:
    assert Documents(("The miller.",), "").sha256 == "661908f9b7f9c52056f1674bc718ab6375d4d7a8413558efee3d0d5035114877"


def test_a_held_out_document_that_was_calibrated_on_is_refused_wherever_it_lies(tmp_path: Path) -> None:
    calibration = read_documents([write_lines(tmp_path / "a.jsonl", {"text": "one  passage\n"}, {"text": "two"})])
    held_out = read_documents([write_lines(tmp_path / "b.jsonl", {"text": "three"}, {"text": " one passage"})])
    with pytest.raises(InputError, match="1 of the 2 held-out documents are calibration documents"):
        refuse_shared(calibration, held_out)
    refuse_shared(calibration, read_documents([write_lines(tmp_path / "c.jsonl", {"text": "three"})]))


def test_a_conversation_is_known_again_by_its_words_and_roles_whatever_its_white_space() -> None:
    def said(role: str, content: str) -> Documents:
        return Documents((({"role": role, "content": content},),), "")

    with pytest.raises(InputError, match="1 of the 1 held-out documents"):
        refuse_shared(said("user", "Is it  open?"), said("user", " Is it\nopen?"))
    refuse_shared(said("user", "Is it open?"), said("assistant", "Is it open?"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "one"', "not valid JSON"),
        ('{"text": "one", "text": "two"}', "appears twice"),
        ('["one"]', "must hold a JSON object, not list"),
        ('{"tekst": "one"}', "did you mean 'tekst'"),
        ('{"body": "one", "n": 1}', "set field to one of: body, n"),
        ('{"text": 5}', "must be a text or a list of messages, not int"),
        ('{"messages": [{"role": "user", "content": "a"}, "b"]}', "must be a text or a list of messages, not list"),
        ('{"text": "one", "domain": 5}', "domain must be a text, not int"),
        ('{"text": []}', "must be a text or a list of messages"),
        ('{"messages": [{"role": "user"}]}', "needs role and content"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "needs role and content"),
        ('{"text": "half \\ud83d"}', "lone surrogate"),
    ],
)
def test_a_malformed_line_is_told_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_documents([str(path)])
    assert message in str(caught.value)
    assert f"{path}:3" in str(caught.value)


def test_text_that_is_not_utf8_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff\n")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"a\.txt:2"):
        read_documents([str(tmp_path / "a.txt")])
    with pytest.raises(InputError, match=r"a\.jsonl:1"):
        read_documents([str(tmp_path / "a.jsonl")])


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}')
    assert read_documents([str(tmp_path / "a.txt"), str(tmp_path / "a.jsonl")]).items == ("one", "one")


@pytest.mark.parametrize(
    ("name", "message"), [("a.md", r"\.jsonl and \.txt"), ("none.txt", "No such file"), ("none.jsonl", "No such file")]
)
def test_a_source_that_cannot_be_read_is_told(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_documents([str(tmp_path / name)])


def test_a_file_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(InputError, match="contains no text"):
        read_documents([str(tmp_path / "a.txt")])


def test_a_hub_dataset_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install qexport\[datasets\]"):
        read_documents(["hub:org/dataset"])


class Hub(types.ModuleType):
    """Stands for the package `datasets`."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.asked: list[Any] = []

    def load_dataset(self, name: str, **options: Any) -> list[dict[str, Any]]:
        self.asked.append((name, options))
        if name == "org/none":
            raise ConnectionError("offline mode is enabled")
        return [{"text": "one"}, {"text": ""}, {"text": "two"}]


def test_a_hub_dataset_is_asked_for_by_id_split_and_revision_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    documents = read_documents(["hub:org/dataset"], split="test", revision="v1")
    assert documents.items == ("one", "two")
    assert documents.origin == "hub:org/dataset@v1 [test]"
    assert hub.asked == [("org/dataset", {"split": "test", "revision": "v1"})]


def test_what_the_hub_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Hub())
    with pytest.raises(InputError, match="offline mode is enabled"):
        read_documents(["hub:org/none"])
