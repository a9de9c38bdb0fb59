"""Token windows against a plain tokenization of the whole text."""

from __future__ import annotations

from functools import cache
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import factories
from qexport.errors import InputError
from qexport.text.documents import Document, Documents
from qexport.text.tokenizers import text_of, tokenize
from qexport.text.windows import Windows, make_windows, shuffled

END = 0
CONVERSATION = ({"role": "user", "content": "Is the mill open?"}, {"role": "assistant", "content": "From six."})


@cache
def shared_tokenizer() -> PreTrainedTokenizerFast:
    return factories.tokenizer()


def windows_of(*items: Document, tokenizer: PreTrainedTokenizerFast | None = None, **options: Any) -> Windows:
    values = dict(samples=2, sequence_length=16, vocab_size=factories.VOCABULARY) | options
    return make_windows(Documents(items, "texts.jsonl"), tokenizer or shared_tokenizer(), **values)


def tokens_of(*texts: str) -> list[int]:
    """The oracle: every text tokenized whole, the end-of-text token behind each."""
    return list(chain.from_iterable([*shared_tokenizer()(text)["input_ids"], END] for text in texts))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("the mill 12\n.éT-"), min_size=1, max_size=60), min_size=1, max_size=8),
    st.integers(2, 9),
)
def test_packed_windows_are_the_joined_tokens_without_gap_or_overlap(texts: list[str], length: int) -> None:
    expected = tokens_of(*texts)
    count = len(expected) // length
    if count == 0:
        return
    windows = windows_of(*texts, samples=count, sequence_length=length)
    assert windows.input_ids.dtype == torch.int64
    assert windows.input_ids.shape == (count, length)
    assert windows.input_ids.flatten().tolist() == expected[: count * length]
    with pytest.raises(InputError, match=f"{count} windows of {length} tokens where {count + 1} are required"):
        windows_of(*texts, samples=count + 1, sequence_length=length)


def test_of_a_long_text_only_the_beginning_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(factories.TEXT) * 200
    seen: list[int] = []
    tokenizer = factories.tokenizer()
    original = type(tokenizer).__call__

    def counting(self: Any, given: str, **options: Any) -> Any:
        seen.append(len(given))
        return original(self, given, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    ids = windows_of(text, tokenizer=tokenizer).input_ids
    assert max(seen) < 600 < len(text)
    assert ids.flatten().tolist() == tokens_of(text)[:32]


def test_a_text_with_few_tokens_for_its_length_is_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qexport.text.windows._CHARACTERS_PER_TOKEN", 1)
    text = " height" * 100
    assert windows_of(text, samples=6).input_ids.flatten().tolist() == tokens_of(text)[:96]


def test_the_tokens_before_a_cut_are_those_of_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qexport.text.windows._CHARACTERS_PER_TOKEN", 5)
    assert tokens_of(" height he")[:2] != tokens_of(" height height")[:2]
    ids = windows_of(" height" * 50, samples=1, sequence_length=2).input_ids
    assert ids.flatten().tolist() == tokens_of(" height height")[:2]


def test_one_document_a_sample_takes_its_beginning_and_skips_the_short_ones() -> None:
    short, first, second = "The", factories.TEXT[0], factories.TEXT[1]
    windows = windows_of(short, first, short, second, packing="document")
    assert windows.input_ids.tolist() == [tokens_of(first)[:16], tokens_of(second)[:16]]


def test_a_document_of_just_enough_tokens_is_taken_and_one_a_token_shorter_is_not() -> None:
    length = len(tokens_of(factories.TEXT[0])) - 1  # without the end of text
    windows = windows_of(factories.TEXT[0], samples=1, sequence_length=length, packing="document")
    assert windows.input_ids.tolist() == [tokens_of(factories.TEXT[0])[:length]]
    with pytest.raises(InputError, match=f"only 0 of 1 documents have {length + 1} tokens, the longest has {length}"):
        windows_of(factories.TEXT[0], samples=1, sequence_length=length + 1, packing="document")


def test_too_few_long_documents_are_told_with_their_number() -> None:
    longest = len(shared_tokenizer()(factories.TEXT[3])["input_ids"])
    with pytest.raises(InputError, match="only 1 of 2 documents have 16 tokens, the longest has 16") as caught:
        windows_of("The", factories.TEXT[0], packing="document")
    assert longest > 16
    assert caught.value.where == "texts.jsonl"


def test_too_little_text_is_told_with_the_missing_tokens() -> None:
    missing = 10 * 16 - len(tokens_of("The miller", "opened"))
    with pytest.raises(InputError, match=f"; {missing} tokens are missing"):
        windows_of("The miller", "opened", samples=10)


def test_fewer_windows_can_be_allowed_but_not_none() -> None:
    text = factories.TEXT[0]
    windows = windows_of(text, samples=1000, allow_fewer=True)
    assert len(windows.input_ids) == len(tokens_of(text)) // 16
    with pytest.raises(InputError, match="0 windows"):
        windows_of("The", samples=1000, allow_fewer=True)


def test_the_seed_alone_decides_the_order() -> None:
    items = tuple("abcdefgh")
    assert shuffled(items, None) == list(items)
    assert "".join(str(item) for item in shuffled(items, 0)) == "dhfcebga"
    assert shuffled(items, 1) != shuffled(items, 0)
    assert sorted(map(str, shuffled(items, 1))) == list(items)


def test_the_digest_and_origin_are_those_of_the_documents() -> None:
    documents = Documents(tuple(factories.TEXT), "texts.jsonl")
    windows = windows_of(*factories.TEXT)
    assert (windows.sha256, windows.origin) == (documents.sha256, "texts.jsonl")


def test_the_tokenizer_is_left_as_it_was_and_its_own_truncation_does_not_hold(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = factories.tokenizer()
    tokenizer.model_max_length = 8
    tokenizer.backend_tokenizer.enable_truncation(max_length=5, stride=1)
    tokenizer.backend_tokenizer.enable_padding(length=7)
    before = tokenizer.backend_tokenizer.to_str()
    windows = windows_of(*factories.TEXT, tokenizer=tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert windows.input_ids.flatten().tolist() == tokens_of(*factories.TEXT)[:32]
    assert not caplog.records


def test_a_tokenizers_own_end_of_text_is_not_doubled_and_its_beginning_is_kept() -> None:
    tokenizer = factories.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", 1), ("<|end|>", 0)]
    )
    expected = list(chain.from_iterable([1, *tokens_of(text)] for text in factories.TEXT))
    windows = windows_of(*factories.TEXT, tokenizer=tokenizer, samples=9)
    assert windows.input_ids.flatten().tolist() == expected[: 9 * 16]


@pytest.mark.parametrize("length", [2, 5, 16])
def test_every_window_begins_as_the_tokenizer_begins_a_text(length: int) -> None:
    tokenizer = factories.tokenizer()
    tokenizer.bos_token = "<|start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 1)]
    )
    windows = windows_of(*factories.TEXT, tokenizer=tokenizer, samples=9, sequence_length=length)
    left = list(chain.from_iterable([1, *tokens_of(text)] for text in factories.TEXT))
    for window, owners in zip(windows.input_ids.tolist(), windows.documents.tolist(), strict=True):
        own = length if left[0] == 1 else length - 1
        assert window == [1, *left[:own]][-length:]
        assert owners[0] == owners[1] or window[1] == 1
        assert tokenize(tokenizer, text_of(tokenizer, window), special_tokens=True) == window
        left = left[own:]


def test_documents_cannot_be_joined_without_an_end_of_text_token() -> None:
    tokenizer = factories.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-text token"):
        windows_of(*factories.TEXT, tokenizer=tokenizer)
    assert len(windows_of(*factories.TEXT, tokenizer=tokenizer, packing="document").input_ids) == 2


def test_a_token_that_the_model_does_not_know_is_refused() -> None:
    largest = int(windows_of(*factories.TEXT).input_ids.max())
    windows_of(*factories.TEXT, vocab_size=largest + 1)
    with pytest.raises(InputError, match=f"the token {largest} .* the model has {largest} tokens"):
        windows_of(*factories.TEXT, vocab_size=largest)


def test_a_chat_template_renders_texts_and_conversations_and_nothing_is_put_between() -> None:
    rendered = (
        "<|start|>user\nThe mill<|end|>\n"
        "<|start|>user\nIs the mill open?<|end|>\n<|start|>assistant\nFrom six.<|end|>\n"
    )
    expected = shared_tokenizer()(rendered)["input_ids"]
    windows = windows_of("The mill", CONVERSATION, chat_template=True, samples=1, sequence_length=len(expected))
    assert windows.input_ids[0].tolist() == expected


def test_a_conversation_without_a_chat_template_is_refused() -> None:
    with pytest.raises(InputError, match="set chat_template: true"):
        windows_of(CONVERSATION)
    tokenizer = factories.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        windows_of(CONVERSATION, tokenizer=tokenizer, chat_template=True)


def test_a_template_that_refuses_a_conversation_is_told() -> None:
    tokenizer = factories.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="roles must alternate"):
        windows_of(CONVERSATION, tokenizer=tokenizer, chat_template=True)


@pytest.mark.parametrize("date", ["{{ strftime_now('%d %b %Y') }}", "{{ date_string }}"])
def test_a_template_that_writes_the_date_gives_the_same_tokens_every_day(date: str) -> None:
    tokenizer = factories.tokenizer()
    tokenizer.chat_template = date + "{% for message in messages %}{{ message.content }}{% endfor %}"
    ids = windows_of("The mill is open.", tokenizer=tokenizer, chat_template=True, samples=1).input_ids
    assert "2024" in tokenizer.decode(ids[0])
