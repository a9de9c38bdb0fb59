"""Rows of int8 codes for W8A8, held against the definition in float64."""

from __future__ import annotations

import torch

from qexport.quantize.row_int8 import w8a8


def test_codes_are_the_nearest_steps_of_each_rows_absmax() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(65, 48, generator=generator) * torch.rand(65, 1, generator=generator)).bfloat16()
    rows = w8a8(weight)
    steps = weight.double().abs().amax(1, keepdim=True) / 127
    assert torch.equal(rows.absmax, weight.float().abs().amax(1))
    assert int(rows.codes.abs().max()) == 127
    off = (rows.codes.double() - weight.double() / steps).abs()
    assert float(off.max()) <= 0.5 + 1e-5


def test_a_row_of_zeros_has_scale_0_and_codes_0() -> None:
    rows = w8a8(torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
    assert rows.codes.tolist() == [[0, 0], [127, -127]]
    assert rows.scales.tolist()[0] == 0.0


def test_a_matrix_of_several_pieces_has_the_codes_of_its_rows() -> None:
    weight = torch.randn(5, 1 << 20, generator=torch.Generator().manual_seed(1))
    whole = w8a8(weight)
    for index in range(5):
        alone = w8a8(weight[index : index + 1])
        assert torch.equal(whole.codes[index], alone.codes[0])
        assert torch.equal(whole.absmax[index], alone.absmax[0])
