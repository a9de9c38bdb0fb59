"""The summary of a run for the terminal. Every figure comes from the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qexport.amounts import counted, size
from qexport.artifact.manifest import REPORT_FOLDER
from qexport.artifact.names import title
from qexport.quantizing import recorded_method
from qexport.reporting.baseline import baseline_view
from qexport.reporting.selection import confirmation, fallen_back
from qexport.reporting.terminal import baseline_table, few_equal_line, gate_table, prompt_table, verdict_lines
from qexport.reporting.values import visible
from qexport.reporting.view import figure_row, size_view, summarize
from qexport.reporting.writing import PAGE_NAME

if TYPE_CHECKING:
    from qexport.artifact.manifest import Manifest, Verification
    from qexport.artifact.report import Report
    from qexport.pipeline import Result
    from qexport.records import LayerRecord

MAX_LAYERS_LISTED = 5
_SHOWN: Final = ("mean_kl", "top1_agreement", "decisive_flips", "identical_generations")
_BYTES_PER_VALUE = {"float32": 4}


def summary(result: Result, path: Path) -> RenderableType:
    """Figures, gates, remarks, the prompt whose continuations differ most, and how to load each layout.

    Print it with `crop=False`: the last lines are commands to copy, and must not be broken.

    Args:
        result: the run's; layouts with the same figures and gates are shown once.
        path: the run's output, as it is shown to the user.
    """
    return Group(*_parts(result, path))


def _parts(result: Result, path: Path) -> Iterator[RenderableType]:
    manifest, report = result.manifest, next(iter(result.reports.values()), None)
    yield Text("")
    yield _headline(manifest, result.manifests)
    measured = _groups_by_measurement(result)
    for layouts in measured:
        if len(measured) > 1:
            yield Text.assemble("\n", (" + ".join(layouts), "bold"), _readers_of(result.manifests, layouts))
        yield Padding(_figures(result.manifests[layouts[0]]), (1, 0))
        own = result.reports.get(layouts[0])
        shown = None if own is None else summarize(own)
        if shown is not None:
            if shown.few_equal:
                yield Padding(few_equal_line(), (0, 0, 1, 0))
            yield from verdict_lines(shown)
            yield from _confirmations(result.reports, layouts)
            yield Padding(gate_table(shown.gates), (1, 0))
        if own is not None and (baseline := baseline_view(own)) is not None:
            yield Padding(baseline_table(baseline), (0, 0, 1, 0))
    yield from _remarks(manifest)
    yield from _notes(result.manifests)
    if report is not None and (prompts := summarize(report).prompts):
        yield Padding(prompt_table(prompts), (1, 0, 0, 0))
    yield from _how_to_load(result, path)


def _groups_by_measurement(result: Result) -> list[list[str]]:
    """The layouts, grouped by figures and gates. These differ where another program runs the layout."""
    groups: list[tuple[Verification | None, list[str]]] = []
    for layout, manifest in result.manifests.items():
        found = manifest.verification
        own = next((names for other, names in groups if _same(found, other)), None)
        if own is None:
            groups.append((found, [layout]))
        else:
            own.append(layout)
    return [names for _, names in groups]


def _same(one: Verification | None, other: Verification | None) -> bool:
    if one is None or other is None:
        return one is other
    return (one.figures, one.gates) == (other.figures, other.gates)


def _confirmations(reports: Mapping[str, Report], layouts: Sequence[str]) -> Iterator[Text]:
    """What has computed these layouts and what has not. Their figures may be equal where their programs are not."""
    layouts_of: dict[str, list[str]] = {}
    for layout in layouts:
        layouts_of.setdefault(confirmation(reports[layout]), []).append(layout)
    for words, names in layouts_of.items():
        yield Text(visible(f"{' + '.join(names)}: {words}" if len(layouts_of) > 1 else words))


def _readers_of(manifests: Mapping[str, Manifest], layouts: Sequence[str]) -> str:
    """Where all of these layouts have the same."""
    found = [verification for each in layouts if (verification := manifests[each].verification)]
    readers = {", ".join(each.readers) for each in found}
    return f", measured by {readers.pop()}" if len(readers) == 1 else ""


def _headline(manifest: Manifest, layouts: Iterable[str]) -> Text:
    name = title(manifest.base.name, manifest.adapter.name if manifest.adapter else None)
    how = f"{recorded_method(manifest.recipe['quantize']).title}, {' + '.join(layouts)}"
    return Text.assemble((name, "bold"), f"  →  {how}")


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


def _add_verification(table: Table, found: Verification) -> None:
    values = {figure.name: figure for figure in found.figures}
    ratio, tokens = values["perplexity_ratio"], found.protocol.tokens
    table.add_row(
        "perplexity",
        f"{values['reference_perplexity'].value:.2f}",
        f"{values['artifact_perplexity'].value:.2f}",
        f"{ratio.value - 1:+.1%} on {tokens:,} tokens, windows of {found.protocol.sequence_length}",
    )
    for row in (figure_row(values[name]) for name in _SHOWN if name in values):
        table.add_row(row.label, "", row.value, f"{row.interval}, {row.units}")


def _add_size(table: Table, manifest: Manifest) -> None:
    sizes = manifest.sizes
    reference = sizes.parameters * _BYTES_PER_VALUE.get(manifest.recipe["merge"]["dtype"], 2)
    shown = size_view(sizes, reference)
    table.add_row("weights", shown.reference, shown.total, f"{shown.share}, {shown.bits_per_weight}")


def _remarks(manifest: Manifest) -> Iterator[RenderableType]:
    layers = manifest.layers
    fallen = fallen_back(layers)
    losses = [(layer, layer.loss, layer.rtn_loss) for layer in layers if layer not in fallen]
    compared = [(layer, loss, rtn) for layer, loss, rtn in losses if loss is not None and rtn is not None]
    no_better = [layer for layer, loss, rtn in compared if loss >= rtn]
    if total_rtn := sum(rtn for _, _, rtn in compared):
        share = sum(loss for _, loss, _ in compared) / total_rtn
        yield Text(f"{counted(len(layers), 'layer')} quantized; their loss is {share:.0%} of round-to-nearest's.")
    yield from _layer_list(fallen, "fell back to round-to-nearest")
    yield from _layer_list(no_better, "not better than round-to-nearest")


def _notes(manifests: Mapping[str, Manifest]) -> Iterator[Table]:
    """One line for each note, beside the layouts that it is about; one that all share is shown once."""
    layouts_of: dict[str, list[str]] = {}
    for layout, manifest in manifests.items():
        for note in manifest.notes:
            layouts_of.setdefault(note, []).append(layout)
    if not layouts_of:
        return
    table = Table.grid(padding=(0, 2))
    before = ""
    for note, layouts in layouts_of.items():
        of = "note" if len(layouts) == len(manifests) else " + ".join(layouts)
        table.add_row(Text("" if of == before else of, "yellow"), Text(note))
        before = of
    yield table


def _layer_list(layers: list[LayerRecord], verdict: str) -> Iterator[Text]:
    if layers:
        names = ", ".join(layer.name for layer in layers[:MAX_LAYERS_LISTED])
        rest = f" and {len(layers) - MAX_LAYERS_LISTED} more" if len(layers) > MAX_LAYERS_LISTED else ""
        yield Text.assemble((f"{counted(len(layers), 'layer')} {verdict}: ", "yellow"), names, rest)


def _how_to_load(result: Result, path: Path) -> Iterator[RenderableType]:
    manifests, passed = result.manifests, result.passed
    style = "bold green" if passed else "bold red"
    files = sum(len(manifest.files) for manifest in manifests.values())
    where = "its manifest" if len(manifests) == 1 else "the manifests"
    content = f"{counted(files, 'file')}, {size(_bytes_on_disk(manifests))}, checksums in {where}"
    yield Text("")
    yield _line("Artifact" if passed else "Set aside", f"{path}  ({content})", style)
    for layout, root in result.roots.items():
        yield _line("Root digest", root + (f"  {layout}" if len(result.roots) > 1 else ""), style)
    for layout in [*result.reports][:1]:
        yield _line("Report", str(_folder(result, path, layout) / REPORT_FOLDER / PAGE_NAME), style)
    if passed:
        for layout, manifest in manifests.items():
            for label, command in _commands(manifest, _folder(result, path, layout)):
                yield _line(label, command, style)


def _folder(result: Result, path: Path, layout: str) -> Path:
    return path / layout if len(result.manifests) > 1 else path


def _line(label: str, text: str, style: str) -> Text:
    return Text.assemble((f"{label:<13}", style), text, no_wrap=True, overflow="ignore")


def _bytes_on_disk(manifests: Mapping[str, Manifest]) -> int:
    """Shards that layouts share are links to one file, and count once."""
    records = [item for manifest in manifests.values() for item in manifest.files.items()]
    shards = {record.sha256: record.size for name, record in records if name.endswith(".safetensors")}
    return sum(shards.values()) + sum(record.size for name, record in records if not name.endswith(".safetensors"))


def _commands(manifest: Manifest, folder: Path) -> list[tuple[str, str]]:
    match manifest.layout:
        case "tgi":
            return [("TGI", f"sh {quote(str(folder / 'launch' / 'docker-run.sh'))}")]
        case "vllm":
            return [("vLLM", f"sh {quote(str(folder / 'launch' / 'vllm-serve.sh'))}")]
        case "gguf":
            return [("llama.cpp", f"sh {quote(str(folder / 'launch' / 'llama-server.sh'))}")]
        case "onnx" if "launch/generate.py" in manifest.files:
            return [("ONNX", f'python {quote(str(folder / "launch" / "generate.py"))} "TEXT"')]
        case _:
            return [("Python", f"import qexport; model = qexport.load({json.dumps(str(folder))})")]
