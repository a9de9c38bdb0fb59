"""A reference from a checkpoint, for measurements through a runtime alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from qexport.architectures.architecture import Checkpoint
from qexport.loading.small_files import open_tokenizer
from qexport.quantizing.rounding import NearestSource
from qexport.text.documents import read_documents
from qexport.text.windows import make_held_out
from qexport.verifying import VerifySettings
from qexport.verifying.reference import Preparation, Reference


def make_reference(checkpoint: Checkpoint, settings: VerifySettings) -> Reference:
    """The merged model on held-out text, whose windows count as independent."""
    tokenizer = open_tokenizer(checkpoint)
    held_out = make_held_out(
        read_documents([str(settings.text)]),
        tokenizer,
        windows=settings.windows,
        sequence_length=settings.sequence_length,
        vocab_size=checkpoint.architecture.structure.vocab_size,
    )
    return Reference(
        merged=checkpoint,
        base=checkpoint,
        adapter=None,
        changed=frozenset(),
        rounding_of=lambda matrix, codes: None,
        nearest=lambda grids, transposed: NearestSource(checkpoint.weights, grids, transposed),
        prepared=Preparation({}),
        held_out=replace(held_out, domains=(None,) * len(held_out.domains), documents=None),
        prompts=None,
        open_tokenizer=lambda: tokenizer,
        settings=settings,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
