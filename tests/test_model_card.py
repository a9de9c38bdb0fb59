"""The model card: which model it names, what it says of licenses, and that a stranger's text stays text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

import reports
from qexport.artifact.manifest import CardText, SourceRecord, TermsRecord
from qexport.artifact.names import label, model_name, oci_tag, release_name
from qexport.release import checked_name
from qexport.reporting.card import CardFacts, license_problems, model_card

TEXT = CardText(tag="gptq", title="GPTQ 4-bit", text="4-bit GPTQ codes")


def source(name: str = "org/tiny", kind: Any = "hub", license_: str | None = None, **terms: Any) -> SourceRecord:
    values: dict[str, Any] = {"license_name": None, "license_link": None, "languages": [], "files": []} | terms
    told = TermsRecord(license=license_, **values) if license_ or terms else None
    return SourceRecord(kind=kind, name=name, revision="c" * 40, sha256={}, terms=told)


def card(base: SourceRecord, adapter: SourceRecord | None = None, **changes: Any) -> tuple[dict[str, Any], str]:
    values: dict[str, Any] = {"layout": "safetensors", "text": TEXT, "quantized": True, "notes": []} | changes
    text = model_card(CardFacts(base=base, adapter=adapter, **values))
    _, front, body = text.split("---\n", 2)
    return YAML(typ="safe").load(front), body


def test_two_adapters_of_one_base_have_cards_and_names_of_their_own() -> None:
    base, names = source(), ("a/notes", "b/titles")
    heads = [card(base, source(name))[1].splitlines()[1] for name in names]
    assert heads == ["# tiny + notes, GPTQ 4-bit", "# tiny + titles, GPTQ 4-bit"]
    assert [model_name(base.name, name) for name in names] == ["tiny-notes", "tiny-titles"]


def test_only_what_is_on_the_hub_is_a_base_model() -> None:
    data, body = card(source(), source("notes", kind="folder"))
    assert data["base_model"] == ["org/tiny"]
    assert data["base_model_relation"] == "quantized"
    assert f"org/tiny (commit {'c' * 40}) and notes" in body
    data, _ = card(source("tiny", kind="folder"), quantized=False)
    assert not {"base_model", "base_model_relation", "quantized_by"} & data.keys()


@pytest.mark.parametrize(("layout", "library"), [("onnx", "onnx"), ("vllm", "vllm"), ("tgi", "transformers")])
def test_layouts_have_the_hubs_libraries(layout: str, library: str) -> None:
    assert card(source(), layout=layout)[0]["library_name"] == library


@pytest.mark.parametrize(
    ("base", "adapter", "expected"),
    [
        (source(license_="mit"), source(license_="mit"), {"license": "mit"}),
        (source(license_="mit"), source("a/b"), {"license": "mit"}),
        (source(license_="mit"), source(license_="gemma"), {"license": "other", "license_name": "mit and gemma"}),
        (source(), source(license_="mit"), {}),
    ],
    ids=["same", "the base's", "both", "unknown base"],
)
def test_the_license_is_carried_over(base: SourceRecord, adapter: SourceRecord, expected: dict[str, str]) -> None:
    data, _ = card(base, adapter)
    assert {key: value for key, value in data.items() if key.startswith("license")} == expected


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (source(), ["names no license"]),
        (source(license_="apache-2.0"), []),
        (source(license_="cc-by-nd-4.0"), ["forbids to pass on what is derived"]),
        (source(license_="cc-by-nc-nd-4.0"), ["forbids to pass on what is derived", "forbids commercial use"]),
        (source(license_="cc-by-nc-4.0"), ["forbids commercial use"]),
        (
            source(license_="other", license_name="llama3", files=["licenses/base/LICENSE"]),
            ["(llama3): read licenses/"],
        ),
        (source(files=["licenses/base/LICENSE"]), ["(without a name): read licenses/base/LICENSE"]),
    ],
)
def test_a_license_that_forbids_or_is_missing_is_said(told: SourceRecord, words: list[str]) -> None:
    found = license_problems([told])
    assert len(found) == len(words)
    assert all(word in problem for word, problem in zip(words, found, strict=True))


def test_figures_that_depend_on_the_machines_speed_are_left_out() -> None:
    report = reports.report()
    assert report.timings.figures
    _, body = card(source(), report=report)
    assert "| mean KL divergence |" in body
    assert "speed" not in body


@given(st.text(max_size=60))
def test_a_strangers_name_stays_text(name: str) -> None:
    data, body = card(source(name or "x", kind="folder"))
    assert data["library_name"] == "transformers"
    assert body.splitlines()[1].startswith("# ")
    assert "\n## Limits and known risks\n" in body


@given(st.text(min_size=1, max_size=100), st.text(max_size=100))
def test_names_are_what_registries_and_servers_accept(base: str, adapter: str) -> None:
    name = model_name(base, adapter)
    if len(name) <= 64:
        assert checked_name(name) == name
    whole = release_name(name, "1.4.0", "gptq-4bit", "vllm")
    assert label(whole)[0].isalpha()
    assert label(whole)[-1] != "-"
    assert len(label(whole)) <= 53
    assert label(whole).replace("-", "").isalnum()
    assert label(whole).isascii()
    assert set(oci_tag(whole)) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def test_long_names_that_begin_alike_stay_apart() -> None:
    assert label("a" * 80 + "-1.0") != label("a" * 80 + "-1.1")
