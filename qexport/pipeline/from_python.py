"""`qexport.quantize`: a run described by Python values instead of a recipe file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import TypeAdapter, ValidationError

from qexport.artifact.disk import make_folder
from qexport.artifact.partial import scratch_folder
from qexport.errors import InputError, RecipeError, listed
from qexport.export import ExportSettings
from qexport.loading import WeightedAdapter
from qexport.merge import MergeSettings
from qexport.pipeline.result import Result
from qexport.pipeline.running import run
from qexport.progress import ProgressCallback, silent
from qexport.quantizing.method import CalibrationSettings, Method
from qexport.recipe import Recipe
from qexport.verifying import VerifySettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Texts = Iterable[str | Mapping[str, Any]]
"""Texts, or rows of a dataset with a field `text` or `messages`."""

_LAYOUTS: Final[TypeAdapter[ExportSettings]] = TypeAdapter(ExportSettings)


def quantize(
    base: str | Path | PreTrainedModel | PeftModel,
    *,
    method: Method,
    output: str | Path,
    adapter: str | Path | None = None,
    adapters: Sequence[str | Path | WeightedAdapter] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: CalibrationSettings | str | Path | Texts | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    layouts: Sequence[str | ExportSettings] = ("safetensors",),
    verify: VerifySettings | str | Path | Texts | None = None,
    merge: MergeSettings | None = None,
    force: bool = False,
    restart: bool = False,
    device: str = "auto",
    progress: ProgressCallback = silent,
) -> Result:
    """Merges the adapter, quantizes, exports and, where `verify` is given, verifies.

    Inputs in memory (a model, texts) are written beside `output` for the time of the run, so that the artifact has the
    same bytes as one made from files.

    Args:
        base: a folder, a hub id, `pkg:package/file.gguf`; or a model in memory with 16-bit or float32 weights. A
            `PeftModel` is split into its base and its active adapter.
        method: for example `qexport.Gptq(bits=4, group_size=64)`.
        output: the artifact's folder; each of several layouts gets a subfolder with its name.
        adapter: a PEFT adapter: a folder or a hub id.
        adapters: several LoRA adapters in its place, combined as `merge` says; with a weight or a revision, a
            `qexport.WeightedAdapter`.
        tokenizer: the tokenizer of a model in memory.
        calibration: text for the methods that need it: texts, rows of a dataset, a file, or settings.
        samples: how many calibration windows to take, 128 by default.
        sequence_length: tokens in a calibration window, 512 by default.
        layouts: names (`safetensors`, `tgi`, `vllm`, `onnx`), or settings such as `qexport.TgiSettings()`.
        verify: held-out texts, a file, or settings; nothing is measured if None.
        merge: the arithmetic of the merge, and of the combination of several adapters.
        force: replace an output folder that is not empty.
        restart: begin again, without what an interrupted run has finished.
        device: `auto`, `cpu` or `cuda`.
        progress: is called with each step, and with what a user should know.

    Returns:
        The folder, its manifests and reports, and the verdict; see `Result.raise_for_verdict`.

    Raises:
        QexportError: one of its subclasses, see `qexport.errors`. `output` is unchanged then.
    """
    output = Path(output)
    make_folder(output.absolute().parent)
    with scratch_folder(output.absolute()) as scratch:
        inputs = _Inputs(scratch)
        recipe = _recipe(
            load=inputs.load(base, adapter, adapters, tokenizer),
            merge=merge or MergeSettings(),
            quantize=inputs.calibrated(method, calibration, samples, sequence_length),
            export=[_layout(each) for each in layouts],
            verify=inputs.verification(verify),
            output=str(output),
        )
        return run(recipe, force=force, restart=restart, device=device, progress=progress)


def _recipe(**parts: Any) -> Recipe:
    try:
        return Recipe(**parts)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise RecipeError("the arguments do not fit together", where=listed(problems)) from error


@dataclass(frozen=True)
class _Inputs:
    """Inputs as values of a recipe. Those in memory are written below `scratch`."""

    scratch: Path

    def load(
        self,
        base: str | Path | PreTrainedModel | PeftModel,
        adapter: str | Path | None,
        adapters: Sequence[str | Path | WeightedAdapter],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> Mapping[str, Any]:
        several = [_weighted(each) for each in adapters]
        if isinstance(base, str | Path):
            if tokenizer is not None:
                raise RecipeError("a base in files has its own tokenizer", where="tokenizer", mend="omit it")
            return {"base": _named(base), "adapter": None if adapter is None else _named(adapter), "adapters": several}
        from qexport.loading.in_memory import save_model

        saved = save_model(base, tokenizer, self.scratch)
        if saved.adapter is not None and (adapter is not None or several):
            field = "adapters" if several else "adapter"
            raise RecipeError("the base already has an adapter", where=field, mend="give one of the two")
        chosen = saved.adapter or adapter
        return {"base": str(saved.base), "adapter": None if chosen is None else _named(chosen), "adapters": several}

    def calibrated(
        self,
        method: Method,
        calibration: CalibrationSettings | str | Path | Texts | None,
        samples: int | None,
        sequence_length: int | None,
    ) -> Method:
        """The method with its calibration text."""
        changes = {"samples": samples, "sequence_length": sequence_length}
        changes = {name: value for name, value in changes.items() if value is not None}
        if calibration is None and not changes:
            return method
        if not method.needs_calibration:
            raise RecipeError(f"{method.method} uses no calibration text", where="calibration", mend="omit it")
        if calibration is None:
            settings = method.calibration_settings
        elif isinstance(calibration, CalibrationSettings):
            settings = calibration
        else:
            settings = CalibrationSettings(source=self._file(calibration, "calibration"))
        if settings is None:
            raise RecipeError(f"{method.method} needs calibration text", where="calibration", mend="give texts")
        values = settings.model_dump() | changes
        return type(method).model_validate(method.model_dump() | {"calibration": values})

    def verification(self, verify: VerifySettings | str | Path | Texts | None) -> VerifySettings | None:
        if verify is None or isinstance(verify, VerifySettings):
            return verify
        return VerifySettings(text=self._file(verify, "held-out"))

    def _file(self, texts: str | Path | Texts, name: str) -> str:
        """The path of a file with the texts: the one given, or a new one."""
        if isinstance(texts, str | Path):
            return _named(texts)
        path = self.scratch / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for number, row in enumerate(texts):
                file.write(_line(row, f"{name} text {number}") + "\n")
        return str(path)


def _named(place: str | Path) -> str:
    """The value as in a recipe. A `Path` is always a local file or folder, even if it reads like a hub id."""
    return str(place.expanduser().absolute()) if isinstance(place, Path) else place


def _weighted(adapter: str | Path | WeightedAdapter) -> WeightedAdapter:
    return adapter if isinstance(adapter, WeightedAdapter) else WeightedAdapter(path=_named(adapter))


def _layout(layout: str | ExportSettings) -> ExportSettings:
    if not isinstance(layout, str):
        return layout
    try:
        return _LAYOUTS.validate_python({"layout": layout})
    except ValidationError as error:
        raise RecipeError(
            f"there is no layout {layout!r}", where="layouts", mend="use safetensors, tgi, vllm or onnx"
        ) from error


def _line(row: str | Mapping[str, Any], where: str) -> str:
    try:
        return json.dumps({"text": row} if isinstance(row, str) else dict(row), ensure_ascii=True)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"a text is neither a string nor a row with a field text or messages: {error}", where=where
        ) from error
