"""Gates that the held-out text can never decide are refused, and no others."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from qexport.errors import RecipeError
from qexport.pipeline.decidable import refuse_undecidable
from qexport.statistics.means import confidence_sequence
from qexport.statistics.samples import Sample
from qexport.text.windows import HeldOut
from qexport.verifying import VerifySettings


def text(documents: list[int], domains: list[str | None] | None = None) -> HeldOut:
    """Windows of nine tokens, each from the document of this number."""
    rows = torch.tensor(documents)[:, None].expand(-1, 9).contiguous()
    return HeldOut(rows, tuple(domains or [None] * len(documents)), "", "held-out.jsonl", documents=rows)


def settings(windows: int, gates: Mapping[str, object] | None = None, profile: str = "auto") -> VerifySettings:
    return VerifySettings.model_validate(
        {"text": "t.jsonl", "max_windows": windows, "gates": gates or {}, "profile": profile}
    )


def refused(held_out: HeldOut, chosen: VerifySettings) -> str | None:
    try:
        refuse_undecidable(chosen, held_out)
    except RecipeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("strata", [1, 2, 3])
def test_what_is_refused_is_what_no_values_give_an_interval_for(strata: int) -> None:
    random = np.random.default_rng(strata)
    for count in range(1, 16):
        domains: list[str | None] = [f"domain {index % strata}" for index in range(count)]
        samples = [Sample(random.normal(size=count) ** 2, [str(each) for each in domains]) for _ in range(40)]
        some_bounded = any(confidence_sequence(sample).low is not None for sample in samples)
        assert (refused(text(list(range(count)), domains), settings(count)) is None) == some_bounded, count


def test_the_error_names_the_number_of_windows_that_would_do() -> None:
    error = refused(text(list(range(4))), settings(4))
    assert error is not None
    assert "4 gates can never be decided" in error
    assert "4 windows with 4 documents" in error
    assert "set verify.max_windows to 6 or more" in error
    assert refused(text(list(range(6))), settings(6)) is None
    assert refused(text(list(range(5))), settings(5)) is not None
    assert "set verify.max_windows to 6" in (refused(text([0]), settings(1)) or "")


def test_documents_of_many_windows_need_more_windows() -> None:
    error = refused(text([0, 0, 0, 0, 1, 1, 1, 1]), settings(8))
    assert error is not None
    assert "8 windows with 2 documents" in error
    assert "set verify.max_windows to 24 or more" in error


def test_a_text_without_more_documents_is_told_how_many_it_needs() -> None:
    error = refused(text([0] * 30), settings(40))
    assert error is not None
    assert "give more text, as lines of a .jsonl file: at least 6 documents" in error
    first = refused(text([0] * 40), settings(40))
    assert first is not None
    assert "set verify.max_windows to 240 or more, if other documents follow in the text" in first


def test_one_document_that_holds_nearly_all_text_is_refused() -> None:
    assert refused(text([0] * 30 + [1, 2, 3, 4, 5, 6]), settings(36)) is not None
    assert refused(text([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]), settings(14)) is None


def test_a_domain_that_is_too_small_is_named_and_one_that_is_missing_too() -> None:
    domains: list[str | None] = [*["code"] * 2, *["law"] * 20]
    held_out = text(list(range(22)), domains)
    limits = {"mean_kl": {"domains": {"code": {"at_most": 0.5}}}}
    error = refused(held_out, settings(22, limits))
    assert error is not None
    assert "gates: mean_kl[code]" in error
    assert "2 windows of the domain code with 2 documents" in error
    assert "set verify.max_windows to 66 or more" in error
    assert refused(held_out, settings(22, {"mean_kl": {"domains": {"law": {"at_most": 0.5}}}})) is None
    missing = refused(held_out, settings(22, {"mean_kl": {"domains": {"chess": {"at_most": 0.5}}}}))
    assert missing is not None
    assert "no such domain" in missing
    assert "code, law" in missing


def test_limits_on_prompts_and_no_limits_need_no_text() -> None:
    prompts = {"edit_distance": {"at_most": 0.5, "domains": {"chat": {"at_most": 0.5}}}}
    assert refused(text([0]), settings(1, prompts, "off")) is None
    assert refused(text([0]), settings(1, {}, "off")) is None
    assert refused(text([0]), settings(1, {"mean_kl": {"at_most": 0.1}}, "off")) is not None
