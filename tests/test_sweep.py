"""Sweeps: every variant is what a run of its own makes, the reference is measured once, and a stopped sweep goes on."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray

from qexport import pipeline
from qexport.architectures.runner import BlockRunner
from qexport.artifact.manifest import MANIFEST_NAME, Manifest
from qexport.artifact.report import Report
from qexport.artifact.sweep import SweepRecord
from qexport.cli import main
from qexport.errors import CompatibilityError, GateFailed, InputError, RecipeError
from qexport.execution import ray_cluster
from qexport.pipeline import SweepResult, sweep, sweeping
from qexport.progress import Notice, Progress
from qexport.quantizing import gptq_pass
from qexport.recipe.sweep import load_sweep
from qexport.verifying import continuing, reference, verification
from test_cli import tiny_run

SWEEP = """\
recipe: recipe.yaml
overrides: {verify.profile: "off"}
matrix:
  quantize.bits: [3, 4]
  quantize.group_size: [16, 32]
variants:
  - {name: nf4, overrides: {quantize: {method: nf4}}}
  - {name: odd, overrides: {quantize.group_size: 48}}
output: made
"""
MEASURED = ["bits-3_group_size-16", "bits-3_group_size-32", "bits-4_group_size-16", "bits-4_group_size-32", "nf4"]
BY_SIZE = ["bits-3_group_size-32", "bits-3_group_size-16", "nf4", "bits-4_group_size-32", "bits-4_group_size-16"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, what it names, and a sweep."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_run(folder)
    (folder / "sweep.yaml").write_text(SWEEP)
    return folder


@pytest.fixture(scope="module")
def made(inputs: Path) -> SweepResult:
    return sweep(load_sweep(inputs / "sweep.yaml"), device="cpu")


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Path:
    """The same inputs, with nothing made of them."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("made", "single"))
    return tmp_path


def states(found: SweepResult | SweepRecord) -> dict[str, str]:
    record = found.record if isinstance(found, SweepResult) else found
    return {each.name: each.state for each in record.variants}


def test_each_variant_is_what_a_run_of_its_own_makes(inputs: Path, made: SweepResult) -> None:
    """All bytes but the timings: the figures of the variants that read what the first one has left are the same."""
    loaded = load_sweep(inputs / "sweep.yaml")
    for variant in loaded.variants[:5]:
        alone = pipeline.run(
            variant.recipe.model_copy(update={"output": str(inputs / "single" / variant.name)}), device="cpu"
        )
        ours = made.folder / variant.name
        manifest = alone.manifest
        assert (ours / MANIFEST_NAME).read_bytes() == (alone.artifact_path / MANIFEST_NAME).read_bytes()
        assert {name: (ours / name).read_bytes() for name in manifest.files} == {
            name: (alone.artifact_path / name).read_bytes() for name in manifest.files
        }
        assert Report.read(ours).digest() == alone.report.digest()
        assert made.reports[variant.name] == Report.read(ours)


def test_the_record_tells_what_has_become_of_each_variant(made: SweepResult) -> None:
    assert states(made) == {**dict.fromkeys(MEASURED, "pass"), "odd": "refused"}
    assert SweepRecord.read(made.folder) == made.record
    odd = made.record.variant("odd")
    assert odd is not None
    assert "group_size 48 does not divide" in odd.reason
    assert (odd.total_bytes, odd.folder, odd.cost) == (None, None, None)
    assert isinstance(made.refused["odd"], CompatibilityError)
    first = made.record.variants[0]
    assert first.cost is not None
    assert first.cost.cpu_seconds > 0
    assert (first.windows, first.report) == (8, "reports/bits-3_group_size-16/report.json")
    assert made.record.finished
    made.raise_for_verdict()


def test_the_smallest_that_passes_is_recommended(made: SweepResult) -> None:
    assert made.record.recommended == "bits-3_group_size-32"
    assert made.recommended == made.folder / "bits-3_group_size-32"
    page = made.page.read_text(encoding="utf-8")
    assert "Recommended: bits-3_group_size-32, the smallest that passes" in page
    assert "<svg" in page
    for name in MEASURED:
        assert f'href="reports/{name}/report.html"' in page
        assert (made.folder / "reports" / name / "report.html").is_file()
    assert "group_size 48 does not divide" in page


def test_what_the_variants_have_in_common_is_removed_at_the_end(made: SweepResult) -> None:
    assert sorted(path.name for path in made.folder.iterdir() if path.is_dir()) == [*sorted(MEASURED), "reports"]


def counting(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> list[Any]:
    calls: list[Any] = []
    honest = getattr(where, name)

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return honest(*args, **options)

    monkeypatch.setattr(where, name, counted)
    return calls


def test_the_reference_is_measured_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = counting(monkeypatch, reference, "noise_floor")
    merges = counting(monkeypatch, reference, "compare_merge")
    padded = counting(monkeypatch, continuing, "check_padding")
    forwards = counting(monkeypatch, BlockRunner, "forward")
    seen: list[int] = []

    def note(event: Progress | Notice) -> None:
        if isinstance(event, Notice) and event.text.startswith("variant "):
            seen.append(len(forwards))

    sweep(load_sweep(folder / "sweep.yaml"), device="cpu", progress=note)
    assert (len(prepared), len(merges), len(padded)) == (1, 1, 1)
    first, second, third, _, fifth = (last - start for start, last in pairwise([*seen, len(forwards)]))
    blocks = 2
    # two models for the noise floor and four beside PEFT, then reference and base
    assert first - second == blocks * (2 + 4 + 2)
    # the model rounded to nearest runs again, since the grids are other ones
    assert second == third
    # the artifact alone: nf4 has no calibration and no model rounded to nearest
    assert fifth == blocks


def test_other_inputs_are_never_read_as_those_of_this_reference(folder: Path) -> None:
    """A sweep that was stopped leaves measurements; after the text or the adapter has changed they are not used."""
    loaded = load_sweep(folder / "sweep.yaml")
    stop_at(loaded, 3)
    kept = sorted((folder / "made" / sweeping.SHARED).iterdir())
    assert len(kept) == 1
    (folder / "heldout.jsonl").write_text((folder / "heldout.jsonl").read_text().replace("the", "thy"))
    shutil.rmtree(folder / "made" / "bits-3_group_size-32.partial", ignore_errors=True)
    stop_at(loaded, 3, restart=True)
    assert len(sorted((folder / "made" / sweeping.SHARED).iterdir())) == 2


def stop_at(loaded: Any, number: int, *, restart: bool = False, stage: str = "quantize") -> None:
    """Runs a sweep until the variant of this number has begun a stage."""
    begun: list[str] = []

    def stop(event: Progress | Notice) -> None:
        if isinstance(event, Notice):
            begun.extend([event.text] if event.text.startswith("variant ") else [])
        elif len(begun) == number and event.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(loaded, device="cpu", restart=restart, progress=stop)


def test_a_stopped_sweep_goes_on(folder: Path, made: SweepResult, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_sweep(folder / "sweep.yaml")
    stop_at(loaded, 3, stage="verify")
    record = SweepRecord.read(folder / "made")
    assert record is not None
    assert list(states(record).values()) == ["pass", "pass", "waiting", "waiting", "waiting", "refused"]
    assert not record.finished
    assert "3 variants are still to be made" in (folder / "made" / "comparison.html").read_text()
    runs = counting(monkeypatch, sweeping, "run")
    floors = counting(monkeypatch, reference, "noise_floor")
    told: list[str] = []
    found = sweep(loaded, device="cpu", progress=lambda event: told.append(getattr(event, "text", "")))
    assert states(found) == states(made)
    assert len(runs) == 3
    assert floors == []
    assert any("going on where a run was interrupted" in each for each in told)
    for name in MEASURED:
        assert found.reports[name].digest() == made.reports[name].digest()
    first, third = found.record.variants[0], found.record.variants[2]
    assert first == record.variants[0]
    assert third.cost is not None


def test_a_sweep_that_is_finished_is_only_told_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_sweep(folder / "sweep.yaml")
    first = sweep(loaded, device="cpu")
    monkeypatch.setattr(sweeping, "run", lambda *_, **__: pytest.fail("nothing is to be made"))
    again = sweep(loaded, device="cpu")
    assert again.record == first.record
    assert again.reports == first.reports


def test_a_variant_that_was_published_before_its_record_was_written_is_recognized(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_sweep(folder / "sweep.yaml")
    stop_at(loaded, 2)
    (folder / "made" / "sweep.json").write_text(
        (folder / "made" / "sweep.json")
        .read_text()
        .replace('"state": "pass"', '"state": "waiting"')
        .replace('"identity": "', '"identity": "x')
    )
    runs = counting(monkeypatch, sweeping, "run")
    found = sweep(loaded, device="cpu")
    assert len(runs) == 4
    assert found.record.variants[0].state == "pass"
    assert found.record.variants[0].cost is None


def test_a_finished_variant_whose_files_have_changed_is_not_taken(folder: Path) -> None:
    loaded = load_sweep(folder / "sweep.yaml")
    stop_at(loaded, 2)
    weights = folder / "made" / "bits-3_group_size-16" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RecipeError, match="the output folder is not empty"):
        sweep(loaded, device="cpu")
    assert states(sweep(loaded, device="cpu", restart=True))["bits-3_group_size-16"] == "pass"


def test_finished_variants_of_other_inputs_are_not_taken(folder: Path) -> None:
    loaded = load_sweep(folder / "sweep.yaml")
    stop_at(loaded, 2)
    (folder / "heldout.jsonl").write_text((folder / "heldout.jsonl").read_text().replace("the", "thy"))
    with pytest.raises(RecipeError, match="the output folder is not empty"):
        sweep(loaded, device="cpu")


def test_the_best_alone_is_kept_and_nothing_larger_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = counting(monkeypatch, sweeping, "run")
    found = sweep(load_sweep(folder / "sweep.yaml", keep="best"), device="cpu")
    assert [each.name for each in found.record.variants if each.name != "odd"] == BY_SIZE
    assert states(found) == {"bits-3_group_size-32": "pass", **dict.fromkeys(BY_SIZE[1:], "skipped"), "odd": "refused"}
    assert len(runs) == 1
    assert found.record.variants[1].reason == "larger than bits-3_group_size-32, which has passed"
    assert found.recommended is not None
    assert found.recommended.is_dir()


def test_what_is_kept_may_change(folder: Path) -> None:
    """All, then the best alone: what is not the best is removed. All again: it is made again, and nothing else."""
    every = load_sweep(folder / "sweep.yaml")
    sweep(every, device="cpu")
    best = sweep(load_sweep(folder / "sweep.yaml", keep="best"), device="cpu")
    assert states(best) == {**dict.fromkeys(BY_SIZE, "pass"), "odd": "refused"}
    assert [path.name for path in best.folder.iterdir() if (path / MANIFEST_NAME).is_file()] == [BY_SIZE[0]]
    again = sweep(every, device="cpu")
    assert states(again) == states(best)
    assert all((again.folder / name / MANIFEST_NAME).is_file() for name in MEASURED)


def test_variants_that_fail_end_early_and_leave_their_reports(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = counting(monkeypatch, verification, "measure_whole")
    loaded = load_sweep(
        folder / "sweep.yaml", ["verify.gates={mean_kl: {at_most: 1e-2}}", "verify.windows=4"], keep="best"
    )
    found = sweep(loaded, device="cpu")
    failed = [name for name, state in states(found).items() if state == "fail"]
    passed = [name for name, state in states(found).items() if state == "pass"]
    assert failed
    assert passed
    assert len(asked) == len(passed)
    for name in failed:
        report = found.reports[name]
        assert verification.ENDED_EARLY in report.notes
        record = found.record.variant(name)
        assert record is not None
        assert record.reason.endswith(f"; stopped after {record.windows} windows")
        assert report.generations is None
        assert (found.folder / "reports" / name / "report.json").is_file()
        assert not (found.folder / f"{name}.rejected").exists()
        assert not (found.folder / f"{name}.rejected.sha256").exists()
    assert [path.name for path in found.folder.iterdir() if (path / MANIFEST_NAME).is_file()] == [
        found.record.recommended
    ]


def test_rejected_artifacts_are_kept_with_all(folder: Path) -> None:
    loaded = load_sweep(folder / "sweep.yaml", ["verify.gates={mean_kl: {at_most: 1e-6}}"])
    with pytest.raises(RecipeError, match="noise"):
        sweep(loaded, device="cpu")
    loaded = load_sweep(folder / "sweep.yaml", ["verify.gates={mean_kl: {at_most: 3e-3}}"])
    found = sweep(loaded, device="cpu")
    assert set(states(found).values()) == {"fail", "refused"}
    assert all((found.folder / f"{name}.rejected" / MANIFEST_NAME).is_file() for name in MEASURED)
    assert found.recommended is None
    with pytest.raises(GateFailed, match="no variant passed"):
        found.raise_for_verdict()


def test_the_command_says_which_to_take(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sweep", str(folder / "sweep.yaml"), "--device", "cpu"]
    assert main([*arguments, "--keep", "best"]) == 0
    shown = capsys.readouterr().out
    assert "Recommended: bits-3_group_size-32, the smallest that passes" in " ".join(shown.split())
    assert f"Artifact     {folder / 'made' / 'bits-3_group_size-32'}" in shown
    assert main([*arguments, "--keep", "best", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["artifact"] == str(folder / "made" / "bits-3_group_size-32")
    assert document["recommended"] == "bits-3_group_size-32"
    assert document["finished"] is True


def test_all_variants_are_made_on_the_same_workers_with_the_same_bytes(
    folder: Path, made: SweepResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = SWEEP.replace("[3, 4]", "[4]").replace("[16, 32]", "[16]")
    (folder / "sweep.yaml").write_text("".join(line for line in fewer.splitlines(keepends=True) if "odd" not in line))
    clusters = counting(monkeypatch, ray_cluster, "workers_of_cluster")
    passes = counting(monkeypatch, gptq_pass, "Shards")
    loaded = load_sweep(folder / "sweep.yaml", ["execution.workers=1", "execution.threads=1"]).on_workers(2)
    found = sweep(loaded, device="cpu")
    assert [workers for workers, *_ in clusters] == [2]
    assert [execution.workers for execution, *_ in passes] == [2]
    assert states(found) == {"bits-4_group_size-16": "pass", "nf4": "pass"}
    for name in states(found):
        ours, theirs = (Manifest.read(each.folder / name) for each in (found, made))
        assert ours == theirs
        assert found.reports[name].digest() == made.reports[name].digest()
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("overrides", "code"),
    [
        (["verify.gates={mean_kl: {at_most: 3e-3}}"], 6),
        (["verify.gates={generation_flips: {at_most: 0.5}}"], 7),
        (["load.adapter=./none"], 3),
        (["verify.windowz=1"], 2),
    ],
)
def test_exit_codes(folder: Path, overrides: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    text = (folder / "sweep.yaml").read_text().partition("matrix:")[0]
    (folder / "sweep.yaml").write_text(
        text + "variants:\n  - {name: nf4, overrides: {quantize: {method: nf4}}}\noutput: made\n"
    )
    assert main(["sweep", str(folder / "sweep.yaml"), *overrides, "--device", "cpu"]) == code
    assert "error" in capsys.readouterr().err


def test_a_folder_that_is_not_a_sweeps_is_refused(folder: Path) -> None:
    (folder / "made").mkdir()
    (folder / "made" / "mine.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not the folder of a sweep"):
        sweep(load_sweep(folder / "sweep.yaml"), device="cpu")


def test_a_damaged_record_is_refused(folder: Path) -> None:
    (folder / "made").mkdir()
    (folder / "made" / "sweep.json").write_text("{}")
    with pytest.raises(InputError, match="the record of the sweep is malformed"):
        sweep(load_sweep(folder / "sweep.yaml"), device="cpu")


def test_what_is_wrong_with_all_texts_is_found_before_any_work(folder: Path) -> None:
    with pytest.raises(RecipeError, match="can never be decided"):
        sweep(load_sweep(folder / "sweep.yaml", ["verify.gates={mean_kl: {at_most: 0.1}}", "verify.max_windows=2"]))
    assert not (folder / "made").exists()


def test_a_variant_whose_calibration_text_is_missing_does_not_end_the_sweep(folder: Path) -> None:
    text = (folder / "sweep.yaml").read_text().partition("matrix:")[0]
    (folder / "sweep.yaml").write_text(
        f"{text}variants:\n  - {{name: nf4, overrides: {{quantize: {{method: nf4}}}}}}\n"
        "  - {name: other, overrides: {quantize.calibration.source: none.jsonl}}\noutput: made\n"
    )
    found = sweep(load_sweep(folder / "sweep.yaml"), device="cpu")
    assert states(found) == {"nf4": "pass", "other": "refused"}
