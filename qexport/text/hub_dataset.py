"""Datasets of the Hugging Face hub, through the optional package `datasets`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

from qexport.errors import InputError

HUB_PREFIX: Final = "hub:"


def read_hub_dataset(source: str, *, split: str, revision: str | None) -> Iterable[Mapping[str, Any]]:
    """The rows of `hub:org/dataset`. HF_HUB_OFFLINE, HF_HOME and HF_TOKEN mean what they mean to `datasets`.

    Raises:
        InputError: `datasets` is not installed, or it cannot read the dataset (what it says is passed on).
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "hub datasets need the package datasets",
            where=source,
            mend="pip install qexport[datasets], or name a .jsonl or .txt file",
        ) from error
    try:
        rows = datasets.load_dataset(source.removeprefix(HUB_PREFIX), split=split, revision=revision)
    except Exception as error:  # the package raises what it, the hub client or a file reader comes upon
        raise InputError(
            f"datasets cannot read it: {error}",
            where=f"{source}, split {split}",
            mend="check the id, split and revision; offline, only what lies in the cache can be read",
        ) from error
    return cast(Iterable[Mapping[str, Any]], rows)
