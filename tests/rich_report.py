"""A report as large as a real one: 8 domains, 38 windows, 60 prompts, 210 layers, and text that means harm."""

from __future__ import annotations

import math
import random
from typing import Any

import reports
from qexport.artifact.answers import Answer, Answers, Counts
from qexport.artifact.figures import CheckResult, Figure, GateResult
from qexport.artifact.measurements import (
    BlockDrift,
    Generations,
    Histogram,
    LayerWeights,
    MarginBin,
    PromptComparison,
    SampledComparison,
    TaskRecord,
    TensorFault,
    WeightsRecord,
    WorstToken,
)
from qexport.artifact.report import Report
from qexport.records import LayerRecord

DOMAINS = ("creative", "code", "chat", "french", "legal", "medical", "news", "release notes")
SCRIPT = "<script>alert('caught')</script>"
OVERRIDE = "\u202eright to left\u202c"
LONG_WORD = "Donaudampfschifffahrtsgesellschaftskapitän" * 12
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def rich_report() -> Report:
    """One gate failed, one is undecided, the others passed. The same at every call."""
    chance = random.Random(7)
    return reports.report(
        gates(),
        figures=[*(each for each in reports.figures() if each.domain is None), *quantiles(), *domain_figures(chance),
                 *suite_figures(), *reports.baseline_figures()],
        kl_histogram=histogram(),
        flips_by_margin=margins(),
        block_drift=[BlockDrift(name=f"model.layers.{i}", relative_error=0.07 - 0.05 * 0.9**i) for i in range(30)],
        worst_tokens=worst_tokens(),
        generations=generations(chance),
        tasks=[
            TaskRecord(task="arithmetic", metric="exact match", num_fewshot=5, sha256="0" * 64, items=1319,
                       reference_accuracy=0.412, artifact_accuracy=0.388, only_reference=71, only_artifact=39,
                       p_value=0.0029),
        ],
        formats=formats(),
        layers=layers(chance),
        weights=weights(),
        document_sums=reports.document_sums(),
        baseline=reports.baseline_record(name=f"the release {SCRIPT}", method=LONG_WORD),
        checks=checks(),
        notes=["the adapter was made for a base of another name", f"a note with {SCRIPT}"],
        command="qexport verify out/gptq-4bit --reference recipes/gptq-4bit.yaml --report out/report",
    )  # fmt: skip


def weights() -> WeightsRecord:
    """One layer has a fault, one is exact, one tensor differs."""
    faulty = LayerWeights(
        name=f"model.layers.0.{LINEARS[0]}", exact=False, relative_error=0.61, nearest_error=0.09, gain=1.5,
        output_error=0.7, nearest_output_error=0.08,
        worst_row=17, worst_row_ratio=6.9, worst_group=(17, 3), worst_group_ratio=7.2,
        faults=[f"1.5 times as large {SCRIPT}"],
    )  # fmt: skip
    exact = LayerWeights(
        name=f"model.layers.0.{LINEARS[1]}", exact=True, relative_error=0.09, nearest_error=0.09, gain=1.0,
        worst_row=0, worst_row_ratio=1.0, worst_group=None, worst_group_ratio=None, faults=[],
    )  # fmt: skip
    return WeightsRecord(
        unquantized=61, unequal=[TensorFault(name="model.norm.weight", text=LONG_WORD)], layers=[faulty, exact]
    )


def gates() -> list[GateResult]:
    return [
        reports.gate_result("config", figure=None, bound=None, limit=None, value=None, low=None, high=None, n=0,
                            unit=None, reason="12 settings are equal"),
        reports.gate_result("tokenizer", figure=None, bound=None, limit=None, value=None, low=None, high=None, n=0,
                            unit=None, reason="ids are equal on 184 texts"),
        reports.gate_result("adapter", figure="kl_over_base", limit=0.0, value=-0.21, low=-0.24, high=-0.18,
                            reason="the artifact is nearer to the merged model than to the base"),
        reports.gate_result("better_than_rtn", figure="kl_over_rtn", limit=0.0, value=-0.352, low=-0.38, high=-0.32,
                            reason="below 0 with its whole interval"),
        reports.gate_result("mean_kl"),
        reports.gate_result("mean_kl[code]", domain="code", limit=0.2, value=0.231, low=0.212, high=0.25, n=5,
                            verdict="fail", reason="over 0.2 nats with its whole interval"),
        reports.gate_result("top1_agreement", figure="top1_agreement", bound="at_least", limit=0.78, value=0.793,
                            low=0.771, high=0.815, verdict="undecided",
                            reason="the interval still holds 0.78 after all 38 windows"),
        reports.gate_result("baseline_mean_kl", figure="baseline_mean_kl", limit=0.0155, value=0.006, low=0.002,
                            high=0.01, reason="all of it at most 0.0155"),
        reports.gate_result("edit_distance", figure="edit_distance", limit=0.8, value=0.62, low=0.52, high=0.72, n=60,
                            unit="prompt", reason="0.62 is below 0.8 with its interval"),
    ]  # fmt: skip


def quantiles() -> list[Figure]:
    return [reports.figure(name, value, half=0.04 * value) for name, value in (("kl_p90", 0.4), ("kl_p95", 0.58),
                                                                               ("kl_p999", 3.1))]  # fmt: skip


def domain_figures(chance: random.Random) -> list[Figure]:
    found = []
    for index, domain in enumerate(DOMAINS):
        n, mean = 5 - index % 2, 0.231 if domain == "code" else chance.uniform(0.11, 0.19)
        for name, value, half in (
            ("mean_kl", mean, chance.uniform(0.008, 0.03)),
            ("perplexity_ratio", 1 + 0.9 * mean, chance.uniform(0.01, 0.05)),
            ("top1_agreement", 0.87 - 0.5 * mean, 0.02),
        ):
            found.append(reports.figure(name, value, half=half, domain=domain, n=n, tokens=511 * n))
    return found


def histogram() -> Histogram:
    edges = [10 ** (-6 + index / 6) for index in range(44)]
    heights = [math.exp(-((math.log10(edge) + 1.05) ** 2) / 0.9) for edge in edges[:-1]]
    counts = [round(19418 * height / sum(heights)) for height in heights]
    return Histogram(edges=edges, counts=[count if edges[i] < 7.3 else 0 for i, count in enumerate(counts)])


def margins() -> list[MarginBin]:
    edges = [0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0]
    shares = [0.48, 0.41, 0.33, 0.2, 0.082, 0.019, 0.0004]
    tokens = [1100, 1600, 2400, 3800, 4600, 3600, 2318]
    return [
        MarginBin(low=low, high=high, tokens=count, flips=round(count * share))
        for low, high, count, share in zip(edges, [*edges[1:], None], tokens, shares, strict=True)
    ]


def worst_tokens() -> list[WorstToken]:
    texts = [
        ("code", "    for index, line in enumerate(lines):\n        if line.startswith(", "'#'", "'#'", '"'),
        ("legal", "the party of the first part shall, within thirty", " days", " days", " (30"),
        ("news", f"She wrote {SCRIPT} into the field and", " nothing", " nothing", " the"),
        ("chat", f"abc {OVERRIDE} def", "\n", "\n", "</s>"),
        ("creative", LONG_WORD, " sank", " sank", LONG_WORD[:60]),
        ("french", "Il était une", " fois", " fois", " belle"),
    ]
    return [
        WorstToken(domain=domain, window=3 * index, position=40 + 61 * index, before=before, token=token,
                   kl=7.3 - 0.61 * index, reference_top=ours, reference_probability=0.97 - 0.08 * index,
                   artifact_top=theirs, artifact_probability=0.0004 * (index + 1))
        for index, (domain, before, token, ours, theirs) in enumerate(texts)
    ]  # fmt: skip


def generations(chance: random.Random) -> Generations:
    comparisons = [generated(index, chance) for index in range(60)]
    identical = sum(each.first_difference is None for each in comparisons)
    sample = SampledComparison(
        id="news-1", sample=0, seed=3, reference="A calm day.", artifact="A windy day.", chrf=57.0
    )
    return Generations(prompts=60, identical=identical, max_new_tokens=32, comparisons=comparisons, samples=[sample],
                       skipped={"long-2": "longer than the model's context"})  # fmt: skip


def generated(index: int, chance: random.Random) -> PromptComparison:
    domain, style = DOMAINS[index % 8], ("clean", "messy")[index % 2]
    if index % 5 == 0:
        same = " The release is out and every test has passed."
        return reports.comparison(f"{domain}-{index}", domain=domain, style=style, reference=same, artifact=same,
                                  first_difference=None, margin=None, flips=0, edit_distance=0.0, chrf=100.0,
                                  rouge_l=1.0)  # fmt: skip
    prompts = [
        ("Summarise the change for the release notes.", " The importer now keeps the order of the columns, and refuses "
         "files without a header instead of guessing one. Existing exports are not affected.",
         " The importer now keeps the order of columns and no longer guesses a header: files without one are refused. "
         "Exports are affected in the next version."),
        (f"Explain {SCRIPT} to a beginner", " It runs a program in the reader's browser.", f" {SCRIPT} runs."),
        (f"read {OVERRIDE} aloud", " It says: right to left", f" It says {OVERRIDE}"),
        (LONG_WORD, " That is a captain.", f" That is {LONG_WORD}"),
        ("\u0645\u0631\u062d\u0628\u0627 \u0628\u0643", " \u0634\u0643\u0631\u0627 \u062c\u0632\u064a\u0644\u0627",
         " \u0634\u0643\u0631\u0627 \u0644\u0643\x1b[31m"),
    ]  # fmt: skip
    prompt, ours, theirs = prompts[index % len(prompts)] if index < 10 else prompts[0]
    distance = 0.95 - 0.03 * (index % 5) if index < 10 else chance.uniform(0.2, 0.7)
    return reports.comparison(f"{domain}-{index}", domain=domain, style=style, prompt=prompt, reference=ours,
                              artifact=theirs, edit_distance=distance, reference_tokens=31, artifact_tokens=48,
                              artifact_hit_limit=True, flips=index % 4)  # fmt: skip


def suite_figures() -> list[Figure]:
    lengths = [
        reports.figure(name, value, domain=domain, n=6, unit="window", tokens=6 * 511)
        for name, values in (("length_kl", (0.16, 0.17)), ("late_kl_over_early", (0.0, 0.04)))
        for domain, value in zip(("512", "4096"), values, strict=True)
    ]
    return [*lengths, reports.figure("format_validity_change", -0.5, half=0.4, n=2),
            reports.figure("position_kl", 0.18, domain="513-4096", n=6, unit="window")]  # fmt: skip


def formats() -> Answers:
    values: dict[str, Any] = dict(kind="json", prompt=f"As JSON, {SCRIPT}", reference_yes=True, reference_reason="")
    answers = [
        Answer(id="json-1", reference='{"a": 1}', artifact=f'{{"a": {SCRIPT}', artifact_yes=False,
               artifact_reason=f"there is no JSON in {OVERRIDE}", **values),
        Answer(id="json-2", reference='{"a": 2}', artifact='{"a": 2}', artifact_yes=True, artifact_reason="", **values),
    ]  # fmt: skip
    counts = Counts(kind="json", prompts=2, reference=2, artifact=1, only_reference=1, only_artifact=0, p_value=1.0)
    skipped = {"tools-1": f"the chat template does not name {SCRIPT}"}
    return Answers(sha256="0" * 64, max_new_tokens=256, counts=[counts], answers=answers, skipped=skipped)


def layers(chance: random.Random) -> list[LayerRecord]:
    found = []
    for index in range(210):
        name = f"model.layers.{index // 7}.{LINEARS[index % 7]}"
        if index in (6, 139):
            found.append(reports.layer(name, method="round_to_nearest", loss=None, rtn_loss=None, damp_percent=None))
            continue
        rtn = chance.uniform(0.002, 0.02)
        share = 0.93 + 0.1 * chance.random() if index % 31 == 3 else chance.uniform(0.3, 0.75)
        damping = 0.1 if index % 47 == 11 else 0.01
        found.append(reports.layer(name, loss=rtn * share, rtn_loss=rtn, damp_percent=damping))
    return found


def checks() -> list[CheckResult]:
    names = ("ids", "end of sequence", "padding side", "template", "added tokens", "generation_config")
    tokenizer = [CheckResult(gate="tokenizer", name=name, passed=True, detail="equal to the base's") for name in names]
    config = [
        CheckResult(gate="config", name=name, passed=True, detail="equal") for name in ("rope_theta", "vocab_size")
    ]
    return [
        *config,
        *tokenizer,
        CheckResult(gate="config", name="sliding_window", passed=False, detail="4096, base has none"),
    ]
