"""Results on the hub's own benchmarks, in the hub's form for them (https://huggingface.co/docs/hub/eval-results)."""

from __future__ import annotations

from io import StringIO
from typing import Final

from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from ruamel.yaml import YAML

from qexport.artifact.report import Report

EVALUATION_NAME: Final = ".eval_results/qexport.yaml"

_BENCHMARKS: Final = {
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "gsm8k": ("openai/gsm8k", "main"),
    "hellaswag": ("Rowan/hellaswag", "default"),
    "mmlu": ("cais/mmlu", "all"),
    "openbookqa": ("allenai/openbookqa", "main"),
    "winogrande": ("allenai/winogrande", "winogrande_xl"),
}
"""The hub's dataset and configuration of lm-evaluation-harness' tasks."""


def evaluation_results(report: Report) -> str:
    """The tasks of a report in the hub's form `.eval_results`, which is for the hub's benchmarks alone; empty without
    one. Figures on other text are in the card's metadata.
    """
    entries = [
        EvalResultEntry(
            dataset_id=_BENCHMARKS[each.task][0],
            task_id=_BENCHMARKS[each.task][1],
            value=each.artifact_accuracy,
            notes=f"{each.metric}, {each.items} items, {each.num_fewshot} shots; reference: {each.reference_accuracy}",
        )
        for each in report.tasks
        if each.task in _BENCHMARKS
    ]
    if not entries:
        return ""
    stream = StringIO()
    YAML().dump(eval_result_entries_to_yaml(entries), stream)
    return stream.getvalue()
