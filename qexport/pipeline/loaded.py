"""Base and adapter, found and merged."""

from __future__ import annotations

from qexport.loading.adapter import locate_adapter
from qexport.loading.checkpoint import load_checkpoint
from qexport.loading.settings import LoadSettings
from qexport.merge.merging import Merged, merge
from qexport.merge.settings import MergeSettings
from qexport.progress import Reporter


def load_merged(load: LoadSettings, merging: MergeSettings, *, report: Reporter) -> Merged:
    """The merged model; of the base only headers have been read.

    Raises:
        QexportError: base or adapter cannot be used, or they do not fit together.
    """
    checkpoint, adapter = load_checkpoint(load, report=report), locate_adapter(load, report=report)
    return merge(
        checkpoint,
        adapter.path if adapter else None,
        merging,
        adapter_origin=adapter.origin if adapter else None,
        report=report,
    )
