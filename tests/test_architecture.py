"""One architecture for a checkpoint: what is shared, and that nobody changes what others look at."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import factories
from qexport.architectures.architecture import Architecture


def content(family: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(factories.FAMILIES[family].to_json_string())
    return values


@pytest.mark.parametrize("family", factories.FAMILIES)
def test_what_was_built_is_shared_where_only_the_dtype_differs(family: str) -> None:
    known = Architecture(content(family))
    same = Architecture.of_config(content(family), known)
    other = Architecture.of_config(content(family) | {"dtype": "float16"}, known)
    assert same.skeleton is known.skeleton
    assert other.naming is same.naming is known.naming
    assert other.structure is same.structure is known.structure
    assert (known.skeleton.dtype, other.skeleton.dtype) == (torch.float32, torch.float16)
    assert known.in_dtype(torch.float16).skeleton is other.skeleton


@pytest.mark.parametrize("family", factories.FAMILIES)
@pytest.mark.parametrize("key", ["tie_word_embeddings", "initializer_range"])
def test_nothing_is_shared_where_anything_else_differs(family: str, key: str) -> None:
    values = content(family)
    value = values.get(key, False)
    changed = values | {key: not value if isinstance(value, bool) else 2 * value}
    known = Architecture(values)
    assert Architecture.of_config(changed, known).skeleton is not known.skeleton
    assert Architecture.of_config(changed, None).config == changed


@pytest.mark.parametrize("family", factories.FAMILIES)
def test_a_model_to_fill_is_the_skeleton_and_leaves_it_as_it_is(family: str) -> None:
    architecture = Architecture(content(family))
    model, skeleton = architecture.empty_model(), architecture.skeleton
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert model.all_tied_weights_keys == skeleton.all_tied_weights_keys
    assert not {id(module) for module in model.modules()} & {id(module) for module in skeleton.modules()}
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    head.weight = nn.Parameter(torch.ones(1))
    model.config.use_cache = not model.config.use_cache
    assert {name: tensor.shape for name, tensor in skeleton.state_dict().items()} == shapes
    assert skeleton.config.use_cache != model.config.use_cache
    assert architecture.parsed._attn_implementation is None


def test_the_older_name_of_the_dtype_gives_way() -> None:
    values = content("llama")
    values.pop("dtype", None)
    found = Architecture(values | {"torch_dtype": "float16"}).in_dtype(torch.bfloat16)
    assert found.config == values | {"dtype": "bfloat16"}
    assert found.skeleton.dtype == torch.bfloat16
