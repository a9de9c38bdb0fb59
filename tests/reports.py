"""A small valid report, for what decides on reports and shows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qexport.artifact import Environment, Identity, Protocol
from qexport.artifact.baseline import BaselineRecord, DocumentSums
from qexport.artifact.figures import CATALOGUE, CheckResult, Figure, GateResult, overall
from qexport.artifact.manifest import Sizes, SourceRecord
from qexport.artifact.measurements import (
    BlockDrift,
    Generations,
    Histogram,
    MarginBin,
    PromptComparison,
    Speed,
    Timings,
    WorstToken,
)
from qexport.artifact.report import REPORT_NAME, ReferenceRecord, Report, Subject
from qexport.records import LayerRecord

DOMAINS = ("code", "news")


def figure(name: str, value: float, *, half: float = 0.01, domain: str | None = None, **changes: Any) -> Figure:
    """A figure with a fixed-sample interval of `half` on each side, and a confidence sequence of twice that."""
    is_windowed = CATALOGUE[name].teacher_forced or name.startswith("merge_")
    values: dict[str, Any] = dict(
        name=name, domain=domain, value=value, low=value - half, high=value + half, sequence_low=value - 2 * half,
        sequence_high=value + 2 * half, n=38, unit="window" if is_windowed else "prompt",
        tokens=38 * 511 if is_windowed else None,
    )  # fmt: skip
    return Figure(**(values | changes))


def gate_result(name: str = "mean_kl", **changes: Any) -> GateResult:
    """A gate on the mean KL divergence, passed."""
    values: dict[str, Any] = dict(
        name=name, figure="mean_kl", bound="at_most", limit=0.3, value=0.16, low=0.14, high=0.18, n=38, unit="window",
        verdict="pass", reason="0.16 is below 0.3 with its interval",
    )  # fmt: skip
    return GateResult(**(values | changes))


def figures() -> list[Figure]:
    """Overall and by domain, of a 4-bit artifact that is sound."""
    overall_figures = [
        figure("reference_perplexity", 32.25, half=1.0),
        figure("artifact_perplexity", 36.98, half=1.2),
        figure("perplexity_ratio", 1.147, noise_floor=1.0001),
        figure("mean_kl", 0.161, half=0.004, noise_floor=0.0001),
        figure("median_kl", 0.094, half=0.004),
        figure("kl_p99", 1.02, half=0.05),
        figure("max_kl", 7.3, low=None, high=None, sequence_low=None, sequence_high=None),
        figure("top1_agreement", 0.793, noise_floor=0.999),
        figure("decisive_flips", 0.061, half=0.002, noise_floor=0.0),
        figure("merge_kl", 0.00011, half=0.00001, noise_floor=0.0001),
        figure("kl_over_base", -0.21),
        figure("kl_over_rtn", -0.35),
        figure("edit_distance", 0.62, half=0.05),
        figure("chrf", 48.0, half=3.0),
    ]
    domains = [
        figure("mean_kl", value, half=0.006, domain=domain, n=19, tokens=19 * 511)
        for domain, value in zip(DOMAINS, (0.152, 0.170), strict=True)
    ]
    ratios = [
        figure("perplexity_ratio", value, domain=domain, n=19, tokens=19 * 511)
        for domain, value in zip(DOMAINS, (1.13, 1.16), strict=True)
    ]
    return [*overall_figures, *domains, *ratios]


def comparison(identifier: str = "news-1", **changes: Any) -> PromptComparison:
    """Two continuations that part after their third token."""
    values: dict[str, Any] = dict(
        id=identifier, domain="news", style="clean", pair=None, prompt="What happened today?",
        reference=" The council met in the town hall.", artifact=" The council met on the square.",
        reference_tokens=8, artifact_tokens=7, first_difference=3, margin=0.21, flips=1, edit_distance=0.5, chrf=61.0,
        rouge_l=0.66, reference_repetition=0.0, artifact_repetition=0.1, reference_hit_limit=False,
        artifact_hit_limit=False,
    )  # fmt: skip
    return PromptComparison(**(values | changes))


def layer(name: str = "model.layers.0.self_attn.q_proj", **changes: Any) -> LayerRecord:
    """A layer that GPTQ quantized."""
    values: dict[str, Any] = dict(
        name=name, method="gptq", bits=4, group_size=64, loss=0.002, rtn_loss=0.003, damp_percent=0.01, tokens=32768,
        dead_columns=0,
    )  # fmt: skip
    return LayerRecord(**(values | changes))


def report(gates: Sequence[GateResult] | None = None, **changes: Any) -> Report:
    """A report of a sound 4-bit artifact; its verdict follows from its gates."""
    gates = [gate_result()] if gates is None else list(gates)
    values: dict[str, Any] = dict(
        schema_version=1, qexport_version="0.2.0", verdict=overall(gate.verdict for gate in gates),
        subject=subject(), reference=reference(), identity=identity(), protocol=protocol(), figures=figures(),
        gates=gates,
        checks=[
            CheckResult(gate="config", name="rope_theta", passed=True, detail="equal"),
            CheckResult(gate="tokenizer", name="ids", passed=True, detail="equal on 160 texts"),
        ],
        kl_histogram=Histogram(edges=[1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0], counts=[900, 4100, 7800, 5700, 918]),
        flips_by_margin=[
            MarginBin(low=0.0, high=0.5, tokens=5000, flips=2600),
            MarginBin(low=0.5, high=None, tokens=14418, flips=1184),
        ],
        block_drift=[BlockDrift(name=f"model.layers.{i}", relative_error=0.02 * (i + 1)) for i in range(3)],
        worst_tokens=[
            WorstToken(
                domain="code", window=3, position=117, before="def parse(text: str) -> ", token="dict", kl=7.3,
                reference_top="dict", reference_probability=0.91, artifact_top="None", artifact_probability=0.004,
            ),
        ],
        generations=Generations(
            prompts=2, identical=1, max_new_tokens=32, samples=[], skipped={"long-1": "longer than the context"},
            comparisons=[
                comparison(),
                comparison("code-1", domain="code", artifact=" The council met in the town hall.", artifact_tokens=8,
                           first_difference=None, margin=None, flips=0, edit_distance=0.0, chrf=100.0, rouge_l=1.0),
            ],
        ),
        tasks=[], layers=[layer()], notes=[], readers=["qexport 0.2.0"], unconfirmed=["vLLM"],
        environment=environment(), command="qexport verify artifact --reference recipes/gptq-4bit.yaml",
        timings=timings(),
    )  # fmt: skip
    return Report(**(values | changes))


def subject() -> Subject:
    """A GPTQ artifact in one layout."""
    return Subject(
        name="model + adapter", layouts=["safetensors"], method="GPTQ 4-bit, group 64",
        sizes=Sizes(parameters=134_515_008, total_bytes=119_000_000, bits_per_weight=7.08),
        reference_bytes=269_030_016, weights_sha256={"model.safetensors": "a" * 64},
    )  # fmt: skip


def reference() -> ReferenceRecord:
    """A base from the hub and an adapter from a folder."""
    return ReferenceRecord(
        base=SourceRecord(kind="hub", name="org/model", revision="abc", sha256={"model.safetensors": "b" * 64}),
        adapter=SourceRecord(
            kind="folder", name="adapter", revision=None, sha256={"adapter_model.safetensors": "c" * 64}
        ),
        dtype="float32",
    )


def identity(**changes: Any) -> Identity:
    """Digests that are easy to tell apart."""
    values: dict[str, Any] = dict(
        base_sha256="1" * 64, adapter_sha256="2" * 64, text_sha256="3" * 64, prompts_sha256="4" * 64,
        tokenizer_sha256="5" * 64, template_sha256="6" * 64,
    )  # fmt: skip
    return Identity(**(values | changes))


def protocol(**changes: Any) -> Protocol:
    """38 windows of 512 tokens, looked at twice."""
    values: dict[str, Any] = dict(
        dtype="float32", sequence_length=512, stride=512, windows=38, tokens=38 * 511, looks=[16, 38], confidence=0.95
    )
    return Protocol(**(values | changes))


def document_sums() -> DocumentSums:
    """Of the 38 windows, with a second document in every other one."""
    parts = [2 - index % 2 for index in range(38)]
    tokens = [size for count in parts for size in ([511] if count == 1 else [200, 311])]
    return DocumentSums(
        windows=[f"{index:016x}" for index in range(38)], parts=parts, tokens=tokens,
        kl=[0.161 * size for size in tokens], nll=[0.137 * size for size in tokens],
        changed=[size // 5 for size in tokens], decisive_flips=[size // 17 for size in tokens],
    )  # fmt: skip


def baseline_record(**changes: Any) -> BaselineRecord:
    """A release that is a little better."""
    values: dict[str, Any] = dict(
        name="the release of March", method="GPTQ 4-bit, group 64", report_sha256="7" * 64, base_sha256="1" * 64,
        adapter_sha256="2" * 64, dtype="float32", margin=0.1, mean_kl=0.155, perplexity_ratio=1.14,
        top1_agreement=0.797, decisive_flips=0.058,
    )  # fmt: skip
    return BaselineRecord(**(values | changes))


def baseline_figures(**values: float) -> list[Figure]:
    """How much worse the artifact is than that release."""
    found = {"mean_kl": 0.006, "perplexity_ratio": 1.006, "top1_agreement": -0.004, "decisive_flips": 0.003} | values
    return [figure(f"baseline_{name}", value, half=0.002) for name, value in found.items()]


def environment() -> Environment:
    """Of no real machine."""
    return Environment(
        python="3.11.9", torch="2.13.0", transformers="5.23.0", safetensors="0.6.2", numpy="2.3.0",
        architecture="x86_64", cpu_capability="AVX2", device="cpu",
    )  # fmt: skip


def timings() -> Timings:
    """With three repeats of the speed."""
    ratio = figure("speed_ratio", 0.8, half=0.05, n=3, unit="repeat", tokens=None)
    speed = Speed(
        prompt_tokens=32, new_tokens=32, reference_tokens_per_second=[20.0, 21.0, 19.5],
        artifact_tokens_per_second=[16.0, 16.5, 15.9], reference_first_token_seconds=[0.1, 0.11, 0.1],
        artifact_first_token_seconds=[0.12, 0.12, 0.13], reference_bytes=269_030_016, artifact_bytes=119_000_000,
    )  # fmt: skip
    return Timings(seconds=131.0, peak_memory_bytes=900_000_000, speed=speed, speed_unmeasured=None, figures=[ratio])


def written(folder: Path, content: Report | None = None) -> Path:
    """The file of a report in a folder that exists."""
    path = folder / REPORT_NAME
    path.write_text((content or report()).to_json(), encoding="ascii")
    return path
