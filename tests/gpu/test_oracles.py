"""What is computed on a GPU against the CPU, or against float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import factories
import trained_models
from qexport.architectures.architecture import Checkpoint
from qexport.architectures.runner import BlockRunner
from qexport.progress import Steps
from qexport.quantizing import rounding
from qexport.quantizing.asymmetry import Asymmetry, changes
from qexport.quantizing.factorization import factorize_inverse
from qexport.quantizing.gptq import Gptq
from qexport.quantizing.int8 import Int8
from qexport.quantizing.layer import Hessian
from qexport.quantizing.method import PassInputs, RoundingMethod
from qexport.quantizing.nf4 import Nf4
from qexport.quantizing.solver import Options, factorize, solve
from qexport.tensors import GroupQuantized, GroupQuantizedSpec, TensorRecord
from qexport.verifying.divergence import compare_two
from qexport.verifying.lockstep import run_in_lockstep
from qexport.verifying.reference import noise_floor
from quantized_models import QuantizedModel
from test_block_runner import token_windows
from test_gptq import assert_same_bytes, calibration, checkpoint, settings
from test_gptq_solver import problem

CPU = torch.device("cpu")
WIDE = factories.llama_config(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2)
"""Products of several tiles of tensor cores."""


def inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed)).bfloat16()


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.cpu().double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("features", [200, 2048, 2500])
def test_a_hessian_has_16_bit_factors_and_a_sum_in_float32(features: int, gpu: torch.device) -> None:
    batches = [inputs(1500, features, seed) for seed in range(3)]
    hessian = Hessian(features, gpu)
    for batch in batches:
        hessian.add(batch.to(gpu))
    exact = sum((batch.double().t() @ batch.double() for batch in batches), torch.zeros(())) / 4500
    assert error(hessian.matrix(), exact) < 1e-6  # a sum in bfloat16 is off by 1e-3
    assert torch.equal(hessian.matrix(), hessian.matrix().t())


def test_an_asymmetry_has_a_sum_in_float32(gpu: torch.device) -> None:
    full, quantized = inputs(3000, 2500), inputs(3000, 2500, 1)
    asymmetry = Asymmetry(2500, gpu)
    asymmetry.add(changes(full.to(gpu), quantized.to(gpu)))
    exact = (full - quantized).double().t() @ quantized.double()
    assert error(asymmetry.total, exact) < 1e-6


@pytest.mark.parametrize("size", [300, 2048, 4500])
def test_a_factor_is_that_of_the_inverse(size: int, gpu: torch.device) -> None:
    rows = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    hessian = rows.t() @ rows / len(rows) + 0.01 * torch.eye(size, dtype=torch.float64)
    found = hessian.float().to(gpu)
    assert factorize_inverse(found)
    upper = found.cpu().double()
    assert torch.equal(upper, upper.triu())
    assert error(upper @ hessian @ upper.t(), torch.eye(size)) < 1e-3


def test_a_matrix_that_is_not_positive_definite_is_told(gpu: torch.device) -> None:
    matrix = torch.eye(2500)
    matrix[100, 100] = -1.0
    assert not factorize_inverse(matrix.to(gpu))


@pytest.mark.parametrize("order", ["static", "original", "dynamic"])
def test_a_matrix_has_nearly_the_codes_of_the_cpu(order: str, gpu: torch.device) -> None:
    weight, hessian = (each.float() for each in problem(out_features=200, in_features=640))
    options = Options(bits=4, group_size=64, order=order, sym=True, damp_percent=0.01, search=True)
    found = []
    for device in (gpu, CPU):
        matrix = hessian.to(device)
        found.append(solve(weight.to(device), matrix, factorize(matrix, options), options).cpu())
    assert (found[0].codes == found[1].codes).float().mean() > 0.99
    errors = [codes.dequantize(torch.float32) - weight for codes in found]
    losses = [float((each @ hessian).mul(each).sum()) for each in errors]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def passed(
    method: Gptq | RoundingMethod, dtype: torch.dtype, device: torch.device, folder: Path
) -> dict[str, TensorRecord]:
    source = checkpoint(WIDE, factories.build(WIDE, dtype=dtype))
    inputs = PassInputs(
        source, method.plan(source), calibration(token_windows(8, 256)), dtype=dtype, device=device, scratch=folder
    )
    return {record.name: record for record in method.quantize(inputs)}


def share_of_equal_codes(ours: TensorRecord, theirs: TensorRecord) -> float:
    assert isinstance(ours.value, GroupQuantized)
    assert isinstance(theirs.value, GroupQuantized)
    return float((ours.value.codes == theirs.value.codes).float().mean())


def losses(records: Mapping[str, TensorRecord]) -> list[float]:
    return [record.layer.loss for record in records.values() if record.layer and record.layer.loss is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_loses_no_more_than_on_the_cpu(dtype: torch.dtype, gpu: torch.device, tmp_path: Path) -> None:
    """A code that differs changes the codes after it in its row, and the inputs of all later layers: so codes are
    compared where both have the same inputs.
    """
    ours, theirs = (passed(settings(), dtype, device, tmp_path) for device in (gpu, CPU))
    for name in ("q_proj", "k_proj", "v_proj"):
        first = f"model.layers.0.self_attn.{name}.weight"
        assert share_of_equal_codes(ours[first], theirs[first]) > 0.98
    assert losses(ours) == pytest.approx(losses(theirs), rel=0.03)


@pytest.mark.parametrize("effort", ["standard", "high"])
def test_a_pass_has_the_same_bytes_twice(effort: str, gpu: torch.device, tmp_path: Path) -> None:
    first, second = (passed(settings(effort=effort), torch.bfloat16, gpu, tmp_path) for _ in range(2))
    assert_same_bytes(first, second)


@pytest.mark.parametrize("method", [Nf4(), Nf4(quant_type="fp4"), Int8()], ids=["nf4", "fp4", "int8"])
def test_codes_without_a_forward_are_the_bytes_of_the_cpu(
    method: RoundingMethod, gpu: torch.device, tmp_path: Path
) -> None:
    ours, theirs = (passed(method, torch.bfloat16, device, tmp_path) for device in (gpu, CPU))
    for name, record in ours.items():
        value, other = record.value, theirs[name].value
        if isinstance(value, Tensor):
            assert isinstance(other, Tensor)
            assert torch.equal(value, other)
        else:
            assert torch.equal(getattr(value, "codes"), getattr(other, "codes"))  # noqa: B009 - of the same class
            assert torch.equal(getattr(value, "absmax"), getattr(other, "absmax"))  # noqa: B009


def compared(source: Checkpoint, device: torch.device, windows: Tensor) -> float:
    """The divergence in nats a token between a model in bfloat16 and the same rounded to nearest at 4 bits."""
    grids = {
        linear.name: GroupQuantizedSpec(linear.out_features, linear.in_features, 4, 32, True, False)
        for linear in source.architecture.structure.block_linears
    }
    weights = [source.weights, rounding.NearestSource(source.weights, grids, frozenset())]
    first, second = (
        BlockRunner(source.architecture.in_dtype(torch.bfloat16), each, dtype=torch.bfloat16, device=device)
        for each in weights
    )
    batches, _ = run_in_lockstep([first, second], windows, lambda _: None, drift=False)
    return float(compare_two((first, second), (batches[0], batches[1]), windows).kl.mean())


def test_figures_of_a_verification_differ_by_less_than_the_noise_floor(gpu: torch.device) -> None:
    source, windows = QuantizedModel(trained_models.trained()).checkpoint, trained_models.held_out_ids(64)
    floor = noise_floor(source, windows, dtype=torch.bfloat16, device=CPU, steps=Steps(lambda _: None))["mean_kl"]
    here, there = compared(source, gpu, windows), compared(source, CPU, windows)
    assert there > 10 * floor
    assert abs(here - there) < 2 * math.sqrt(floor * there)  # what noise of that size does to a divergence of this one


def test_a_pass_keeps_to_the_memory_of_a_block(tmp_path: Path) -> None:
    """Not of the calibration text: eight times as many windows take no more where there is no room for them."""
    device, peaks = torch.device("cuda"), []
    torch.cuda.set_per_process_memory_fraction(1.0)
    source = checkpoint(WIDE, factories.build(WIDE))
    for windows in (16, 128):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        method = settings()
        given = PassInputs(
            source, method.plan(source), calibration(token_windows(windows, 256)), dtype=torch.bfloat16, device=device,
            scratch=tmp_path,
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qexport.quantizing.offloading.free_on_device", lambda device: 0.0)
            for _ in method.quantize(given):
                pass
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] - peaks[0] < 8 << 20
