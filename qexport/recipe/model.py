"""The recipe's model: one part per stage."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from qexport.export.settings import ExportSettings, OnnxSettings
from qexport.loading.settings import LoadSettings
from qexport.merge.settings import MergeSettings
from qexport.quantizing.method import Method
from qexport.quantizing.methods import AnyMethod
from qexport.recipe.paths import portable
from qexport.settings import Settings
from qexport.verifying.settings import VerifySettings
from qexport.yaml.problems import combination


def _each_layout_once(exports: list[ExportSettings]) -> list[ExportSettings]:
    counts = Counter(export.layout for export in exports)
    if twice := [layout for layout, count in counts.items() if count > 1]:
        raise ValueError(f"the layout {twice[0]} is listed {counts[twice[0]]} times: list it once")
    return exports


def _calibration_text_is_named(method: Method) -> Method:
    if method.needs_calibration and method.calibration_settings is None:
        raise combination({"calibration": f"missing: {method.method} needs calibration text"})
    return method


class Recipe(Settings):
    """What to make of which model. One run follows one recipe.

    Local files are named by absolute paths in a recipe that was read from a file; in one that was made in Python,
    relative paths start from the current directory.
    """

    load: LoadSettings
    """The base model and the adapter."""

    merge: MergeSettings = MergeSettings()
    """The arithmetic of the merge."""

    quantize: Annotated[AnyMethod, AfterValidator(_calibration_text_is_named)]
    """The method and its settings."""

    export: Annotated[list[ExportSettings], Field(min_length=1), AfterValidator(_each_layout_once)]
    """The layouts to write, each at most once. One pass writes all of them."""

    verify: VerifySettings | None = None
    """How the finished artifact is compared with the merged reference. Without it, nothing is measured."""

    output: str | None = None
    """The artifact's folder. `--output` on the command line replaces it."""

    @model_validator(mode="after")
    def _shared_weights_are_there(self) -> Recipe:
        if "safetensors" not in {each.layout for each in self.export}:
            for index, each in enumerate(self.export):
                if isinstance(each, OnnxSettings) and each.share_weights:
                    message = "there is nothing to share: add the layout safetensors, or remove share_weights"
                    raise combination({f"export.{index}.share_weights": message})
        return self

    @model_validator(mode="after")
    def _held_out_text_is_not_the_calibration_text(self) -> Recipe:
        calibration = self.quantize.calibration_settings
        if not self.verify or calibration is None:
            return self
        if shared := set(_listed(self.verify.text)) & set(_listed(calibration.source)):
            message = f"{min(shared)} is the calibration text too: verify on text that the method has not seen"
            raise combination({"verify.text": message})
        return self

    def portable(self) -> dict[str, Any]:
        """The recipe as JSON values without a host's path, for the manifest.

        Defaults are filled in, local files and folders are reduced to their last component, `output` is omitted.
        """
        return portable(self.model_dump(mode="json"))


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
