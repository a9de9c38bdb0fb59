"""Bits by layer against the same bits everywhere: KL divergence on held-out text at equal size.

The layers are measured once. Then each point, uniform or chosen for a size, is quantized with GPTQ and compared with
the merged model as in `gptq_quality.py`. What was measured is kept in the work folder and not measured again, so a
further call adds points. Sizes are bits per weight of the quantized layers, scales included.

    python benchmarks/mixed.py --work /a/folder --group-sizes 32 64 192 --uniform 3:64 4:64 --like 3:64 4:64 --sizes 5
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from cost import ROOT
from gptq_quality import add_job, compare, held_out_windows, make_recipe, merged_states, quantized_weights
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qexport.pipeline import plan
from qexport.pipeline.choice_space import ChoiceSpace, Option
from qexport.pipeline.made_choice import Choice
from qexport.pipeline.mixing import choose, measure_units
from qexport.pipeline.planning import Plan
from qexport.pipeline.texts import read_texts
from qexport.progress import silent
from qexport.quantizing.mixed import MixedTarget
from qexport.reporting.svg import WIDTH, Axis, chart, line, linear_axis, tag, text, tick_text
from qexport.tensors import CalibrationSet


def main() -> None:
    """Measures the points that are not in the work folder, and prints all that are."""
    arguments = _arguments()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    offered = {"method": "mixed", "target": {"bits_per_weight": 16}, "bits": arguments.bits}
    recipe = make_recipe(arguments, {**offered, "group_sizes": arguments.group_sizes, "windows": arguments.measured})
    planned = plan(recipe)
    space = planned.space
    assert space is not None
    checkpoint = planned.merged.checkpoint
    calibration = read_texts(recipe, checkpoint, planned.structure).calibration
    assert calibration is not None
    job = _Job(arguments, planned, space, calibration)
    for option in arguments.uniform:
        job.uniform(option)
    for option in arguments.like:
        job.chosen(f"by layer, the size of {option}", job.bytes_of([option] * len(space.units)))
    for bits in arguments.sizes:
        job.chosen(f"by layer, {bits:g}", int(bits * job.weights / 8))
    _show(_points(work))
    if arguments.plot:
        arguments.plot.write_text(_plot(_points(work)) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_job(parser)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 8, 16], help="that are offered")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[64], help="that are offered")
    parser.add_argument("--measured", type=int, default=32, help="windows on which the layers are measured")
    parser.add_argument("--uniform", nargs="*", type=_option, default=[], help="points of BITS:GROUP_SIZE everywhere")
    parser.add_argument("--like", nargs="*", type=_option, default=[], help="points chosen by layer, of their sizes")
    parser.add_argument("--sizes", nargs="*", type=float, default=[], help="points chosen by layer, of these sizes")
    parser.add_argument("--plot", type=Path, help="an SVG file of size and KL divergence to write")
    arguments = parser.parse_args()
    arguments.held_out = arguments.held_out or [str(ROOT / "calibration/heldout.jsonl")]
    return arguments


def _option(text: str) -> Option:
    bits, _, group_size = text.partition(":")
    return Option(int(bits), int(group_size))


@dataclass
class _Job:
    """One model and its texts."""

    arguments: argparse.Namespace
    planned: Plan
    space: ChoiceSpace
    calibration: CalibrationSet

    def uniform(self, option: Option) -> None:
        """Every unit with this option."""
        losses = self.measured()
        indices = [options.index(option) for options in self.space.options]
        expected = sum(own[index] for own, index in zip(losses, indices, strict=True))
        self._point(f"uniform {option}", [option] * len(indices), Choice(losses, indices, expected))

    def chosen(self, name: str, allowed: int) -> None:
        """The best choice of so many bytes."""
        layout = self.planned.layouts[0]
        total = layout.weights.total_bytes - self.bytes_of([own[0] for own in self.space.options]) + allowed
        target = MixedTarget(bits_per_weight=8 * total / layout.weights.parameters)
        space = replace(self.space, method=self.space.method.model_copy(update={"target": target}))
        choice = choose(space, layout, self.measured())
        self._point(name, [own[index] for own, index in zip(space.options, choice.chosen, strict=True)], choice)

    @property
    def weights(self) -> int:
        """How many there are in the layers."""
        return sum(linear.out_features * linear.in_features for unit in self.space.units for linear in unit)

    def bytes_of(self, options: Sequence[Option]) -> int:
        """The bytes of the layers, each unit with an option."""
        stored = self.space.stored(self.planned.layouts[0])
        indices = [own.index(option) for own, option in zip(self.space.options, options, strict=True)]
        return sum(sizes[index] for sizes, index in zip(stored, indices, strict=True))

    def measured(self) -> list[list[float]]:
        """Of all units, from the disk if it is there."""
        path: Path = self.arguments.work / "measured.losses"
        if not path.exists():
            started = time.process_time()
            measured = measure_units(self.space, self.calibration, device=torch.device("cpu"), progress=silent)
            print(f"measured in {time.process_time() - started:.0f} CPU s")
            path.write_text(json.dumps(measured))
        found: list[list[float]] = json.loads(path.read_text())
        assert [len(own) for own in found] == [len(own) for own in self.space.options], "of another space"
        return found

    def _point(self, name: str, options: Sequence[Option], choice: Choice) -> None:
        path: Path = self.arguments.work / f"{name}.json"
        alike: Path = self.arguments.work / f"uniform {options[0]}.json"
        if len(set(options)) == 1 and alike.exists():
            path.write_text(alike.read_text())  # the same bytes
        if path.exists():
            return
        print(f"{name} ...")
        outputs, checkpoint = self.space.outputs(options), self.planned.merged.checkpoint
        weights: dict[str, Tensor] = {each: checkpoint.weights.read(each) for each in checkpoint.weights.specs()}
        texts = [held_out_windows(self.planned, text, self.arguments.windows) for text in self.arguments.held_out]
        states = merged_states(self.arguments.work, dict(checkpoint.config), weights, texts)
        started = time.process_time()
        weights |= quantized_weights(self.space.method, checkpoint, outputs, self.calibration)
        seconds = time.process_time() - started
        counts = Counter[str]()
        for unit, option in zip(self.space.units, options, strict=True):
            counts[str(option)] += sum(linear.out_features * linear.in_features for linear in unit)
        texts_found = compare(dict(checkpoint.config), weights, texts, states, self.arguments.every)
        found = {
            "bits": 8 * self.bytes_of(options) / self.weights,
            "expected": choice.expected,
            "seconds": seconds,
            "shares": {option: count / self.weights for option, count in counts.items()},
            "texts": texts_found,
        }
        path.write_text(json.dumps(found))


def _points(work: Path) -> dict[str, dict[str, Any]]:
    """What is in the work folder, by size."""
    found = {path.stem: json.loads(path.read_text()) for path in work.glob("*.json")}
    return dict(sorted(found.items(), key=lambda each: each[1]["bits"]))


def _divergence(point: Mapping[str, Any], text: int) -> float:
    values: list[float] = point["texts"][text]["kl"]
    return sum(values) / len(values)


def _show(points: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("", "bits per weight", "expected", "KL", "stored as", "CPU s")
    for name, point in points.items():
        shares = ", ".join(f"{share:.0%} {option}" for option, share in sorted(point["shares"].items()))
        divergences = ", ".join(f"{_divergence(point, text):.4f}" for text in range(len(point["texts"])))
        sizes = f"{point['bits']:.3f}", f"{point['expected']:.4f}"
        table.add_row(name, *sizes, divergences, shares, f"{point['seconds']:.0f}")
    Console(width=160).print(table)


_STYLE = (
    "text{font:12px sans-serif;fill:#444}.grid{stroke:#ddd}.axis{stroke:#444}.alike{fill:#888}.chosen{fill:#1764ab}"
    ".front{fill:none;stroke:#1764ab}"
)
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, WIDTH - 16, 26.0, 260.0


def _plot(points: Mapping[str, Mapping[str, Any]]) -> str:
    """Size and KL divergence of the first text; a line joins the points that were chosen by layer."""
    places = [(name.startswith("by layer"), point["bits"], _divergence(point, 0)) for name, point in points.items()]
    values = [value for *_, value in places]
    across = linear_axis([bits for _, bits, _ in places], _LEFT, _RIGHT)
    up = Axis(min(values) / 1.2, max(values) * 1.2, _BOTTOM, _TOP, logarithmic=True)
    lines = [value for value in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if up.low <= value <= up.high]
    chosen = " ".join(f"{across.place(bits):.1f},{up.place(value):.1f}" for by_layer, bits, value in places if by_layer)
    drawn = chart(
        "mixed",
        "KL divergence against size",
        "Blue: bits by layer. Grey: the same bits everywhere.",
        310,
        tag("style", _STYLE),
        *(line(_LEFT, up.place(value), _RIGHT, up.place(value), "grid") for value in lines),
        *(text(_LEFT - 8, up.place(value) + 4, tick_text(value), anchor="end") for value in lines),
        line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "axis"),
        *(text(across.place(tick), _BOTTOM + 18, tick_text(tick), anchor="middle") for tick in across.ticks(6)),
        text((_LEFT + _RIGHT) / 2, 300, "bits per weight of the quantized layers", anchor="middle"),
        text(_LEFT, 14, "mean KL divergence, nats; blue: by layer, grey: the same everywhere"),
        tag("polyline", points=chosen, class_="front"),
        *(
            tag("circle", cx=across.place(bits), cy=up.place(value), r=4.5, class_="chosen" if by_layer else "alike")
            for by_layer, bits, value in places
        ),
    )
    return str(drawn).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


if __name__ == "__main__":
    main()
