"""Windows of the held-out text: no domain is missing at any look, and no window holds two."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import factories
from qexport.errors import InputError
from qexport.text.documents import Documents
from qexport.text.windows import HeldOut, make_held_out, make_windows

LENGTH = 16


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return factories.tokenizer()


def documents(**passages: int) -> Documents:
    """So many passages of each domain, in turns; `none` stands for no domain."""
    rounds = itertools.zip_longest(*([domain] * count for domain, count in passages.items()))
    order = [domain for names in rounds for domain in names if domain]
    items = tuple(f"{domain} {index}: {factories.TEXT[0]}" for index, domain in enumerate(order))
    return Documents(items, "held-out.jsonl", tuple(None if domain == "none" else domain for domain in order))


def windows_of(text: Documents, windows: int = 1000) -> HeldOut:
    return make_held_out(text, tokenizer(), windows=windows, sequence_length=LENGTH, vocab_size=factories.VOCABULARY)


def windows_alone(text: Documents) -> torch.Tensor:
    return make_windows(
        text, tokenizer(), samples=1000, sequence_length=LENGTH, vocab_size=factories.VOCABULARY, allow_fewer=True
    ).input_ids


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=5))
def test_every_beginning_holds_the_domains_in_their_shares(passages: list[int]) -> None:
    text = documents(**{f"domain{index}": count for index, count in enumerate(passages)})
    found = windows_of(text)
    total = len(found.domains)
    for domain in set(found.domains):
        share = found.domains.count(domain) / total
        for taken in range(1, total + 1):
            due = share * taken
            assert abs(found.domains[:taken].count(domain) - due) <= 1.5 + share * len(passages) / 2


def test_each_window_stands_in_the_middle_of_its_share() -> None:
    """Of 7 windows and of 2, those stand at 1/14, 3/14, 5/14 and so on, these at 1/4 and 3/4 of the whole."""
    found = windows_of(joined(documents(code=3), documents(law=1)))
    assert found.domains == ("code", "code", "law", "code", "code", "code", "law", "code", "code")


def test_windows_are_those_of_each_domain_by_itself_in_its_order() -> None:
    text = documents(code=9, news=4, law=2)
    found = windows_of(text)
    for domain, own in text.by_domain().items():
        rows = [index for index, name in enumerate(found.domains) if name == domain]
        assert torch.equal(found.input_ids[rows], windows_alone(own))
    assert found.left_out == ()
    assert found.sha256 == Documents(text.items, "elsewhere").sha256


def test_fewer_windows_are_the_first_of_more() -> None:
    text = documents(code=12, news=12)
    few, many = windows_of(text, 6), windows_of(text, 12)
    assert len(few.domains) == 6
    assert set(few.domains) == {"code", "news"}
    assert few.domains == ("code", "news") * 3, "of windows that stand alike, the first domain of the text comes first"
    assert set(map(tuple, few.input_ids.tolist())) <= set(map(tuple, many.input_ids.tolist()))


def short(domain: str, tokens: int = 10) -> Documents:
    """One document of so many tokens, fewer than a window."""
    ids = tokenizer()(f"{domain}. {factories.TEXT[1]}")["input_ids"]
    return Documents((str(tokenizer().decode(ids[:tokens])),), "held-out.jsonl", (domain,))


def joined(*parts: Documents) -> Documents:
    return Documents(
        tuple(item for part in parts for item in part.items),
        "held-out.jsonl",
        tuple(domain for part in parts for domain in part.domains),
    )


def test_domains_that_are_too_short_are_joined_as_other() -> None:
    tiny = joined(short("law"), short("chess"))
    found = windows_of(joined(documents(code=5), tiny))
    assert set(found.domains) == {"code", "other"}
    assert torch.equal(found.input_ids[[found.domains.index("other")]], windows_alone(tiny)[:1])
    assert found.left_out == ()


def test_what_is_too_short_even_then_is_left_out_and_named() -> None:
    nameless = Documents(("And so",), "held-out.jsonl", (None,))
    found = windows_of(joined(documents(code=5, news=5), short("law", 3), nameless))
    assert set(found.domains) == {"code", "news"}
    assert found.left_out == ("law", "text without a domain")


def test_a_domain_that_is_called_other_keeps_its_windows() -> None:
    text = joined(documents(code=5, other=5), short("law"), short("chess"))
    own, found = windows_alone(text.by_domain()["other"]), windows_of(text)
    rows = [index for index, name in enumerate(found.domains) if name == "other"]
    assert torch.equal(found.input_ids[rows[:-1]], own)
    assert torch.equal(found.input_ids[rows[-1:]], windows_alone(joined(short("law"), short("chess"))))


def test_text_without_domains_is_cut_as_before() -> None:
    text = Documents(tuple(factories.TEXT), "held-out.jsonl")
    found = windows_of(text)
    assert torch.equal(found.input_ids, windows_alone(text))
    assert set(found.domains) == {None}


@pytest.mark.parametrize(
    "text",
    [short("law", 3), joined(short("law", 3), short("chess", 3)), Documents(("A will",), "x.jsonl")],
    ids=["one domain", "two domains", "no domains"],
)
def test_too_little_text_for_any_window_is_an_error(text: Documents) -> None:
    with pytest.raises(InputError, match="too little text"):
        windows_of(text)
