"""The journal of one run: what an interrupted run has finished is taken over, and what this one finishes is kept."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from qexport.artifact import describe_environment
from qexport.artifact.digests import FileDigests, sha256_bytes, sha256_json, tensor_bytes
from qexport.artifact.disk import sync
from qexport.artifact.journal import FORM, Journal, other_run, refuse_other_run
from qexport.artifact.publish import Publication
from qexport.errors import InputError
from qexport.export.tensor_writer import Stored
from qexport.export.weight_files import WeightWriter
from qexport.pipeline.made_choice import Choice
from qexport.pipeline.planning import Plan
from qexport.pipeline.texts import Evaluation, Texts
from qexport.progress import Notice, ProgressCallback
from qexport.quantizing.method import ResumePoint, Save
from qexport.records import LayerRecord
from qexport.tensors import CalibrationSet, TensorSpec
from qexport.verifying.divergence import TokenFigures
from qexport.verifying.reference import Preparation
from qexport.verifying.rounds import Look, Looks

_CHOICE: Final = "choice"
"""The records with which an attempt begins, see `qexport/pipeline/attempts.py`."""

_ACTIVATIONS: Final = ".activations"
"""The folder of what a pass needs to go on, as long as it runs."""


class RunJournal:
    """What the runs of one recipe have finished so far.

    Args:
        publication: holds the journal's file and the files that it names.
        identity: what must be the same to go on.
        base: the digests of the base's files.
    """

    def __init__(self, publication: Publication, identity: Mapping[str, Any], base: Mapping[str, str]) -> None:
        self._publication, self._journal = publication, Journal(publication.journal)
        self._identity, self._base, self._files = identity, base, stamps_of(base)

    def go_on(self, *, restart: bool) -> int | None:
        """Takes over what an interrupted run has finished.

        Args:
            restart: remove it instead.

        Returns:
            The number of tensors that are in the first layout's files; None if there was no interrupted run.

        Raises:
            RecipeError: it was another run, or its inputs have changed since.
        """
        begun = [] if restart else self._journal.of_kind("run")
        if not begun:
            self._journal.clear()
            self._publication.empty()
            return None
        refuse_other_run(begun[0]["identity"], self._identity, self._publication.folder)
        if begun[0]["files"] != self._files:
            self._refuse_other_base()
        return sum(len(unit["tensors"][0]) for unit in self._journal.of_kind("unit", since=_CHOICE))

    def _refuse_other_base(self) -> None:
        """Compares the contents of the base's files, where they are known: their times or places have changed."""
        if not (known := self._journal.of_kind("base")):
            differing = ["inputs.base: a file has another time or place, and its digest was not known yet"]
            raise other_run(differing, self._publication.folder)
        names = sorted(known[0].keys() | self._base.keys())
        if changed := [name for name in names if known[0].get(name) != self._base.get(name)]:
            raise other_run([f"inputs.base: {name} has changed" for name in changed], self._publication.folder)

    def refuse_changed_base(self) -> None:
        """Checks, when the base's digests are known, that all runs have read the same base.

        Raises:
            InputError: a file has changed meanwhile.
        """
        known = self._journal.of_kind("base")
        if known and dict(known[0]) != dict(self._base):
            raise InputError("the base has changed since the run was begun", where="load.base", mend="run again")

    @property
    def prepared(self) -> Preparation | None:
        """The reference's own figures, if they have been measured."""
        return next((Preparation.of(found) for found in self._journal.of_kind("reference")), None)

    def note_prepared(self, prepared: Preparation) -> None:
        """Keeps the reference's own figures."""
        self._note("reference", prepared.as_dict())

    @property
    def choice(self) -> Choice | None:
        """What the method `mixed` has chosen for the last attempt, if it has."""
        found = self._journal.of_kind(_CHOICE)
        return Choice.of(found[-1]) if found else None

    def begin_attempt(self, choice: Choice) -> None:
        """Keeps a choice. Units and looks before it count no more, and `units` removes what they have written."""
        self._note(_CHOICE, choice.as_dict())

    @contextmanager
    def units(self, writers: Sequence[WeightWriter], layers: list[LayerRecord]) -> Iterator[ResumePoint]:
        """Lets a pass go on, and keeps each further unit that it finishes.

        Args:
            writers: take the tensors of finished units as written.
            layers: gets the records of their layers, in the order of the pass.

        Raises:
            ResourceError: a tensor's bytes on the disk are not those that the journal names.
            OSError: the disk is full or failed.
        """
        folder = self._publication.folder / _ACTIVATIONS
        found = self._journal.of_kind("unit", since=_CHOICE)
        layers += [LayerRecord.model_validate(layer) for unit in found for layer in unit["layers"]]
        for index, writer in enumerate(writers):
            writer.adopt({name: _stored(each) for unit in found for name, each in unit["tensors"][index].items()})
        written = {path for writer in writers for path in writer.files(writer.written())}
        folder.mkdir(exist_ok=True)
        self._publication.keep_only({*written, *folder.iterdir()})
        with _Units(self, writers, layers) as units:
            yield ResumePoint(len(found), folder, units.finished)
        shutil.rmtree(folder)

    def note_unit(self, tensors: Sequence[Mapping[str, Stored]], layers: Sequence[LayerRecord]) -> None:
        """Keeps a unit whose tensors are on the disk."""
        self._note_base()
        content = {
            "tensors": [{name: _as_json(each) for name, each in own.items()} for own in tensors],
            "layers": [layer.model_dump(mode="json") for layer in layers],
        }
        self._note("unit", content)

    def looks(self, measured: str) -> Looks:
        """The rounds of windows of a measurement.

        Args:
            measured: names the measurement.
        """
        found = [look for look in self._journal.of_kind("look", since=_CHOICE) if look["measured"] == measured]
        return Looks(
            [_look(look) for look in found], lambda look: self._note("look", {"measured": measured} | _look_json(look))
        )

    def _note_base(self) -> None:
        known = not isinstance(self._base, FileDigests) or self._base.complete
        if known and not self._journal.of_kind("base"):
            self._note("base", dict(self._base))

    def _note(self, kind: str, content: Mapping[str, Any]) -> None:
        if not self._journal.entries:
            self._journal.append("run", {"identity": self._identity, "files": self._files})
        self._journal.append(kind, content)


class _Units:
    """Makes finished units durable in a thread, while the next one is computed. A context manager."""

    def __init__(self, journal: RunJournal, writers: Sequence[WeightWriter], layers: Sequence[LayerRecord]) -> None:
        self._journal, self._writers, self._layers = journal, writers, layers
        self._noted = [set(writer.written()) for writer in writers]
        self._noted_layers = len(layers)
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def finished(self, save: Save) -> None:
        """Begins to make the tensors since the last call durable. What the unit before needs is so by now."""
        self._wait()
        files = set(save())
        tensors = []
        for writer, noted in zip(self._writers, self._noted, strict=True):
            tensors.append({name: each for name, each in writer.written().items() if name not in noted})
            files |= writer.files(tensors[-1])
            noted.update(tensors[-1])
        layers, self._noted_layers = list(self._layers[self._noted_layers :]), len(self._layers)
        self._pending = self._thread.submit(self._keep, files, tensors, layers)

    def _keep(self, files: set[Path], tensors: Sequence[Mapping[str, Stored]], layers: Sequence[LayerRecord]) -> None:
        for path in files:
            sync(path)
        for folder in {path.parent for path in files}:
            sync(folder)
        self._journal.note_unit(tensors, layers)

    def __enter__(self) -> _Units:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self._wait()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def open_journal(
    publication: Publication,
    planned: Plan,
    texts: Texts,
    device: torch.device,
    *,
    restart: bool,
    progress: ProgressCallback,
) -> RunJournal:
    """The journal of a run, with what an interrupted run of the same recipe has left.

    Raises:
        RecipeError: what is left is that of another run; the error names what differs.
    """
    base = planned.merged.checkpoint.origin.sha256
    journal = RunJournal(publication, identity(planned, texts, device), base)
    if (found := journal.go_on(restart=restart)) is not None:
        total = len(planned.distinct[0][0].weights.specs)
        progress(Notice(f"going on where a run was interrupted: {found} of {total} tensors are written"))
    return journal


def identity(planned: Plan, texts: Texts, device: torch.device) -> dict[str, Any]:
    """What decides the artifact's bytes and the figures, apart from the base's weights. No paths of this machine."""
    inputs = inputs_of(planned, texts.evaluation)
    if texts.calibration is not None:
        inputs["calibration"] = digests_of(texts.calibration)
    return {**of_environment(device), "journal": FORM, "recipe": planned.recipe.portable(), "inputs": inputs}


def digests_of(calibration: CalibrationSet) -> list[str]:
    """Of a calibration text and its windows."""
    return [calibration.sha256, _digest(calibration.input_ids)]


def of_environment(device: torch.device) -> dict[str, Any]:
    """What decides the bits of everything that is computed."""
    return {"qexport": version("qexport"), "environment": describe_environment(device).model_dump(mode="json")}


def inputs_of(planned: Plan, evaluation: Evaluation | None) -> dict[str, Any]:
    """The digests of what was read but the base's weights and the calibration text."""
    checkpoint, adapter = planned.merged.checkpoint, planned.merged.adapter
    found: dict[str, Any] = {
        "base": {name: sha256_bytes(content) for name, content in checkpoint.files.items()},
        "config": sha256_json(dict(checkpoint.config)),
        "adapter": dict(adapter.origin.sha256) if adapter else None,
    }
    if evaluation is not None:
        held_out, prompts = evaluation.held_out, evaluation.prompts
        found["text"] = [held_out.sha256, _digest(held_out.input_ids)]
        found["prompts"] = prompts.prompt_set.sha256 if prompts else None
        found["baseline"] = evaluation.baseline.record.report_sha256 if evaluation.baseline else None
    return found


def stamps_of(base: Mapping[str, str]) -> dict[str, Any]:
    """What changes whenever one of the base's files is written or replaced, found without reading it."""
    if not isinstance(base, FileDigests):
        return dict(base)
    found = {name: path.stat() for name, path in base.paths.items()}
    return {name: [each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino] for name, each in found.items()}


def _digest(tensor: Tensor) -> str:
    return sha256_bytes(tensor_bytes(tensor))


def _as_json(stored: Stored) -> list[Any]:
    return [*_spec_json(stored.spec), stored.sha256]


def _stored(values: Sequence[Any]) -> Stored:
    return Stored(_spec(values), values[2])


def _spec_json(spec: TensorSpec) -> list[Any]:
    return [str(spec.dtype).removeprefix("torch."), list(spec.shape)]


def _spec(values: Sequence[Any]) -> TensorSpec:
    return TensorSpec(tuple(values[1]), getattr(torch, values[0]))


def _look_json(look: Look) -> dict[str, Any]:
    parts = {
        name: {field.name: _tensor_json(getattr(tokens, field.name)) for field in fields(tokens)}
        for name, tokens in look.parts.items()
    }
    return {"windows": look.windows, "parts": parts, "block_drift": list(look.block_drift)}


def _look(values: Mapping[str, Any]) -> Look:
    parts = {
        name: TokenFigures(**{field: _tensor(each) for field, each in tokens.items()})
        for name, tokens in values["parts"].items()
    }
    return Look(values["windows"], parts, values["block_drift"])


def _tensor_json(tensor: Tensor) -> list[Any]:
    return [*_spec_json(TensorSpec(tuple(tensor.shape), tensor.dtype)), base64.b64encode(tensor_bytes(tensor)).decode()]


def _tensor(values: Sequence[Any]) -> Tensor:
    spec = _spec(values)
    return torch.frombuffer(bytearray(base64.b64decode(values[2])), dtype=spec.dtype).reshape(spec.shape)
