"""What a run reached, for the reader at the terminal: every figure comes from the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qexport.reporting.units import counted, size

if TYPE_CHECKING:
    from qexport.artifact.manifest import Comparison, Generations, LayerRecord, Manifest, Verification

MAX_LAYERS_LISTED = 5
MAX_GENERATIONS_SHOWN = 2
_BYTES_PER_VALUE = {"float32": 4}


def summary(manifests: Mapping[str, Manifest], path: Path) -> RenderableType:
    """Figures, remarks, the first generations that differ, and how to load each layout.

    To be printed with `crop=False`: the last lines are there to be copied and are never broken.

    Args:
        manifests: of each layout, by its name; the figures shown are those of the first.
        path: the run's output.
    """
    return Group(*_parts(manifests, path))


def _parts(manifests: Mapping[str, Manifest], path: Path) -> Iterator[RenderableType]:
    manifest = next(iter(manifests.values()))
    yield Text("")
    yield _headline(manifest, manifests)
    yield Padding(_figures(manifest), (1, 0))
    yield from _remarks(manifest)
    yield from _notes(manifests)
    if manifest.verification and manifest.verification.generations:
        yield from _differences(manifest.verification.generations)
    yield from _how_to_load(manifests, path)


def _headline(manifest: Manifest, layouts: Iterable[str]) -> Text:
    quantize = manifest.recipe["quantize"]
    names = [source.name.rpartition("/")[2] for source in (manifest.base, manifest.adapter) if source]
    how = f"{_method(quantize)}, {' + '.join(layouts)}"
    return Text.assemble((" + ".join(names), "bold"), f"  →  {how}")


def _method(quantize: dict[str, Any]) -> str:
    match quantize["method"]:
        case "gptq":
            group = "one group a row" if quantize["group_size"] == -1 else f"group {quantize['group_size']}"
            return f"GPTQ {quantize['bits']}-bit, {group}"
        case "nf4":
            return f"{quantize['quant_type'].upper()}{', double quantization' if quantize['double_quant'] else ''}"
        case "int8":
            return "LLM.int8"
        case "none":
            return "16 bits"
        case name:
            return str(name).upper()


def _figures(manifest: Manifest) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", style="bold")
    table.add_column("reference", justify="right")
    table.add_column("artifact", justify="right")
    table.add_column("")
    if manifest.verification:
        _add_verification(table, manifest.verification)
    else:
        table.add_row("not verified", "", "", "the recipe has no verify")
    _add_size(table, manifest)
    return table


def _add_verification(table: Table, figures: Verification) -> None:
    drift = figures.artifact_perplexity / figures.reference_perplexity - 1
    table.add_row(
        "perplexity",
        f"{figures.reference_perplexity:.2f}",
        f"{figures.artifact_perplexity:.2f}",
        f"{drift:+.1%} on {figures.tokens:,} tokens, windows of {figures.sequence_length}",
    )
    table.add_row("mean KL divergence", "", f"{figures.mean_kl:.4f}", "nats a token")
    table.add_row("same likeliest token", "", f"{figures.top1_agreement:.1%}", "")
    if generations := figures.generations:
        table.add_row("equal generations", "", f"{generations.identical} of {generations.prompts}", "greedy")
    for gate in figures.gates:
        verdict = ("passed", "green") if gate.passed else ("failed", "bold red")
        table.add_row(f"gate {gate.name}", "", f"{gate.value:.4f}", Text.assemble(verdict, f", limit {gate.limit:g}"))


def _add_size(table: Table, manifest: Manifest) -> None:
    sizes = manifest.sizes
    reference = sizes.parameters * _BYTES_PER_VALUE.get(manifest.recipe["merge"]["dtype"], 2)
    share = f"{sizes.total_bytes / reference:.0%}, {sizes.bits_per_weight:.2f} bits a weight"
    table.add_row("weights", size(reference), size(sizes.total_bytes), share)


def _remarks(manifest: Manifest) -> Iterator[RenderableType]:
    layers = manifest.layers
    fallen = [layer for layer in layers if layer.method == "round_to_nearest"]
    losses = [(layer, layer.loss, layer.rtn_loss) for layer in layers if layer not in fallen]
    compared = [(layer, loss, rtn) for layer, loss, rtn in losses if loss is not None and rtn is not None]
    no_better = [layer for layer, loss, rtn in compared if loss >= rtn]
    if total_rtn := sum(rtn for _, _, rtn in compared):
        share = sum(loss for _, loss, _ in compared) / total_rtn
        yield Text(f"{counted(len(layers), 'layer')} quantized; their loss is {share:.0%} of round-to-nearest's.")
    yield from _layer_list(fallen, "fell back to round-to-nearest")
    yield from _layer_list(no_better, "not better than round-to-nearest")
    if manifest.verification:
        yield from _readers(manifest.verification)


def _notes(manifests: Mapping[str, Manifest]) -> Iterator[Text]:
    """What several layouts say is said once."""
    speakers: dict[str, list[str]] = {}
    for layout, manifest in manifests.items():
        for note in manifest.notes:
            speakers.setdefault(note, []).append(layout)
    for note, layouts in speakers.items():
        of = f"{', '.join(layouts)}: " if len(layouts) < len(manifests) else ""
        yield Text.assemble(("note: ", "yellow"), of, note)


def _layer_list(layers: list[LayerRecord], verdict: str) -> Iterator[Text]:
    if layers:
        names = ", ".join(layer.name for layer in layers[:MAX_LAYERS_LISTED])
        rest = f" and {len(layers) - MAX_LAYERS_LISTED} more" if len(layers) > MAX_LAYERS_LISTED else ""
        yield Text.assemble((f"{counted(len(layers), 'layer')} {verdict}: ", "yellow"), names, rest)


def _readers(figures: Verification) -> Iterator[Text]:
    if figures.readers:
        yield Text(f"Read back from disk by {', '.join(figures.readers)}.")
    if figures.unconfirmed:
        yield Text.assemble(("Unconfirmed: ", "yellow"), ", ".join(figures.unconfirmed))


def _differences(generations: Generations) -> Iterator[RenderableType]:
    different = [each for each in generations.comparisons if each.first_difference is not None]
    if not different:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_lines=True, expand=True)
    table.add_column("prompt", ratio=1, style="bold")
    table.add_column("reference goes on", ratio=2)
    table.add_column("artifact goes on", ratio=2)
    for each in different[:MAX_GENERATIONS_SHOWN]:
        table.add_row(_shortened(each.prompt), *_side_by_side(each))
    yield Padding(table, (1, 0, 0, 0))


def _side_by_side(each: Comparison) -> tuple[Text, Text]:
    """Both texts, with what they share dimmed."""
    pairs = zip(each.reference, each.artifact, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    reference, artifact = (
        Text.assemble((text[:shared], "dim"), (text[shared:], "yellow")) for text in (each.reference, each.artifact)
    )
    return reference, artifact


def _shortened(prompt: str) -> Text:
    text = " ".join(prompt.split())
    return Text(text if len(text) <= 120 else text[:119] + "…")


def _how_to_load(manifests: Mapping[str, Manifest], path: Path) -> Iterator[RenderableType]:
    passed = all(
        gate.passed for manifest in manifests.values() if manifest.verification for gate in manifest.verification.gates
    )
    style = "bold green" if passed else "bold red"
    files = sum(len(manifest.files) for manifest in manifests.values())
    where = "its manifest" if len(manifests) == 1 else "a manifest each"
    content = f"{counted(files, 'file')}, {size(_bytes_on_disk(manifests))}, checksums in {where}"
    yield Text("")
    yield _line("Artifact" if passed else "Set aside", f"{path}  ({content})", style)
    if passed:
        for layout, manifest in manifests.items():
            folder = path / layout if len(manifests) > 1 else path
            for label, command in _commands(manifest, folder):
                yield _line(label, command, style)


def _line(label: str, text: str, style: str) -> Text:
    return Text.assemble((f"{label:<13}", style), text, no_wrap=True, overflow="ignore")


def _bytes_on_disk(manifests: Mapping[str, Manifest]) -> int:
    """Shards that layouts share are links to the same file, and count once."""
    records = [item for manifest in manifests.values() for item in manifest.files.items()]
    shards = {record.sha256: record.size for name, record in records if name.endswith(".safetensors")}
    return sum(shards.values()) + sum(record.size for name, record in records if not name.endswith(".safetensors"))


def _commands(manifest: Manifest, folder: Path) -> list[tuple[str, str]]:
    match manifest.layout:
        case "tgi":
            return [("TGI", f"sh {quote(str(folder / 'launch' / 'docker-run.sh'))}")]
        case "vllm":
            return [("vLLM", f"vllm serve {quote(str(folder))}")]
        case _:
            return [("Python", f"import qexport; model = qexport.load({json.dumps(str(folder))})")]
