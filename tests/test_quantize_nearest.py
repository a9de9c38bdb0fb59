"""The round-to-nearest rival against plain rounding in numpy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import factories
from qexport.quantizing.rounding import NearestSource
from qexport.tensors import GroupQuantizedSpec
from quantized_models import QuantizedModel, Tensors


def plain(weight: NDArray[np.float32], grid: GroupQuantizedSpec) -> NDArray[np.float32]:
    """Each value to the nearest step of its group's grid, one group after the other."""
    rounded = np.empty_like(weight)
    top = 2**grid.bits - 1
    for row, start in np.ndindex(weight.shape[0], weight.shape[1] // grid.group_size):
        group = slice(start * grid.group_size, (start + 1) * grid.group_size)
        values = weight[row, group]
        if grid.sym:
            scale, zero = np.abs(values).max() / (2 ** (grid.bits - 1) - 1), 2.0 ** (grid.bits - 1)
        else:
            high = max(values.max(), 0.0)
            low = min(values.min(), -high / (top - 1), 0.0)  # at least one step below zero
            scale, zero = (high - low) / top, np.nan
        scale = np.float32(np.float16(scale))
        if not grid.sym:
            zero = np.clip(np.round(-low / scale), 1, top)
        rounded[row, group] = (np.clip(np.round(values / scale) + zero, 0, top) - zero) * scale
    return rounded


def source(
    weights: Mapping[str, torch.Tensor], grids: Mapping[str, GroupQuantizedSpec], *transposed: str
) -> NearestSource:
    return NearestSource(Tensors(weights), grids, frozenset(transposed))


def spec(weight: torch.Tensor, *, bits: int = 4, group_size: int = 32, sym: bool = True) -> GroupQuantizedSpec:
    return GroupQuantizedSpec(weight.shape[0], weight.shape[1], bits, group_size, sym=sym, desc_act=False)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.sampled_from([2, 3, 4, 8]), st.sampled_from([16, 32, 64]), st.booleans(), st.booleans())
def test_layers_are_rounded_to_the_nearest_step(
    seed: int, bits: int, group_size: int, sym: bool, shifted: bool
) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed)) + 0.8 * shifted
    grid = spec(weight, bits=bits, group_size=group_size, sym=sym)
    found = source({"up.weight": weight}, {"up": grid}).read("up.weight")
    np.testing.assert_allclose(found.numpy(), plain(weight.numpy(), grid), rtol=1e-6, atol=1e-7)
    step = (found - weight).abs().amax()
    assert step > 0


def test_transposed_layers_are_rounded_along_their_inputs() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))  # [in, out], as in GPT-2
    grid = spec(weight.t(), sym=False)
    found = source({"c_attn.weight": weight}, {"c_attn": grid}, "c_attn").read("c_attn.weight")
    expected = plain(weight.t().contiguous().numpy(), grid).T
    assert found.shape == weight.shape
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_everything_else_is_read_as_it_is() -> None:
    tensors = {"up.weight": torch.randn(4, 32), "up.bias": torch.randn(4), "norm.weight": torch.randn(32)}
    found = source(tensors, {"up": spec(tensors["up.weight"])})
    assert found.specs() == Tensors(tensors).specs()
    assert torch.equal(found.read("up.bias"), tensors["up.bias"])
    assert torch.equal(found.read("norm.weight"), tensors["norm.weight"])
    assert not torch.equal(found.read("up.weight"), tensors["up.weight"])


@pytest.mark.parametrize("name", ["llama", "gpt-2"])
def test_a_whole_model_keeps_its_dtype_and_shapes_and_is_near_its_weights(name: str) -> None:
    model = QuantizedModel(factories.build(factories.FAMILIES[name]))
    linears = [linear for block in model.structure.linears.values() for linear in block]
    weights = model.checkpoint.weights
    transposed = frozenset(linear.name for linear in linears if linear.transposed)
    grids = {}
    for linear in linears:
        weight = weights.read(f"{linear.name}.weight")
        grids[linear.name] = spec(weight.t() if linear.transposed else weight)
    found = NearestSource(weights, grids, transposed)
    assert bool(transposed) == (name == "gpt-2")
    assert found.specs() == weights.specs()
    for parameter, own in weights.specs().items():
        read, exact = found.read(parameter), weights.read(parameter)
        assert (read.dtype, tuple(read.shape)) == (own.dtype, own.shape)
        error = float((read.float() - exact.float()).norm() / exact.float().norm())
        assert (0.03 < error < 0.2) if parameter.removesuffix(".weight") in grids else error == 0.0
