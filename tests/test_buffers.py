"""Buffers that no file holds are computed as transformers computes them, or the family is refused."""

from __future__ import annotations

import pytest
import torch

import factories
from qexport.architectures.lazy_model import compute_buffers
from qexport.architectures.structure import build_on_meta
from qexport.errors import CompatibilityError


@pytest.mark.parametrize("family", factories.FAMILIES)
def test_the_buffers_of_a_family_are_those_of_a_built_model(family: str) -> None:
    config = factories.FAMILIES[family]
    model = build_on_meta(config)
    compute_buffers(model, torch.device("cpu"))
    found, expected = dict(model.named_buffers()), dict(factories.build(config, dtype=torch.float32).named_buffers())
    computed = {name for name, buffer in found.items() if not buffer.is_meta}
    assert computed == expected.keys() - model.state_dict().keys()
    assert all(torch.equal(found[name], expected[name]) for name in computed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_buffer_that_transformers_does_not_compute_is_refused(dtype: torch.dtype) -> None:
    model = build_on_meta(factories.llama_config())
    model.model.norm.register_buffer("places", torch.zeros(3, dtype=dtype, device="meta"), persistent=False)
    with pytest.raises(CompatibilityError, match=r"norm\.places"):
        compute_buffers(model, torch.device("cpu"))
