"""Faults that a release must not have, each planted in a sound artifact and caught by a gate with a name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import factories
import trained_models
from adapters import save_adapter
from qexport.architectures.architecture import Checkpoint
from qexport.architectures.runner import Batch, BlockRunner
from qexport.artifact.figures import GateResult, find_figure
from qexport.artifact.report import Report
from qexport.errors import InputError, RecipeError
from qexport.formats.gptq import tensors as gptq
from qexport.gates.profiles import PROFILES
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.merge import MergeSettings
from qexport.merge.merging import Merged, merge
from qexport.pipeline import run
from qexport.pipeline.verification import verify
from qexport.quantizing.solver import Options, round_to_nearest
from qexport.reading.safetensors_weights import SafetensorsWeights
from qexport.recipe import load_recipe
from qexport.tensors import Origin
from qexport.text.windows import HeldOut
from qexport.verifying import VerifySettings
from qexport.verifying.reference import Preparation, prepare
from qexport.verifying.weights import ArtifactWeights

TARGETS = ["q_proj", "v_proj", "down_proj"]
GROUP = 32
GATES = {"mean_kl": {"at_most": 0.03}, "top1_agreement": {"at_least": 0.85}}
"""What the sound artifact keeps with room to spare."""

NO_LIMITS: dict[str, Any] = dict.fromkeys(PROFILES["16bit"].limits)
"""Null for what profiles limit, which leaves the built-in gates; `profile: off` would not."""


def with_own_limits(values: dict[str, Any]) -> dict[str, Any]:
    """The settings with no limits but those that they name, unless they name a profile."""
    return values if "profile" in values else values | {"gates": NO_LIMITS | values["gates"]}


Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sound:
    """A base, an adapter and a text in a folder, and artifacts made of them."""

    folder: Path

    @property
    def load(self) -> LoadSettings:
        return LoadSettings(base=str(self.folder / "base"), adapter=str(self.folder / "adapter"))

    @cached_property
    def intact(self) -> Report:
        """The report of the sound GPTQ artifact."""
        return self.verify(self.gptq)

    @cached_property
    def gptq(self) -> Path:
        return self.make("gptq", self.load)

    @cached_property
    def asymmetric(self) -> Path:
        return self.make("asymmetric", self.load, sym=False)

    @cached_property
    def without_adapter(self) -> Path:
        return self.make("without", LoadSettings(base=str(self.folder / "base")))

    @cached_property
    def dense(self) -> Path:
        return self.make("dense", self.load, method="none")

    def make(self, name: str, load: LoadSettings, *, method: str = "gptq", sym: bool = True) -> Path:
        """Without a manifest, which would find most faults by their digests."""
        calibration = {
            "source": str(self.folder / "calibration.jsonl"),
            "samples": 32,
            "sequence_length": trained_models.WINDOW,
        }
        quantize = {"method": method, "bits": 4, "group_size": GROUP, "sym": sym, "calibration": calibration}
        recipe = {
            "load": load.model_dump(exclude_none=True),
            "quantize": {"method": "none"} if method == "none" else quantize,
            "export": [{"layout": "safetensors"}],
            "output": str(self.folder / name),
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(recipe))
        found = run(load_recipe(path), device="cpu").artifact_path
        return factories.without_digests(found)

    def merged(self, dtype: str = "bfloat16") -> Merged:
        settings = MergeSettings.model_validate({"dtype": dtype})
        return merge(
            load_checkpoint(self.load), self.folder / "adapter", settings, adapter_origin=Origin("folder", "adapter")
        )

    def verify(self, artifact: Path, *, merging: MergeSettings | None = None, **changes: Any) -> Report:
        values: dict[str, Any] = dict(
            text=str(self.folder / "held-out.jsonl"), windows=16, max_windows=64,
            sequence_length=trained_models.WINDOW, gates=GATES,
        )  # fmt: skip
        settings = VerifySettings.model_validate(with_own_limits(values | changes))
        return verify(artifact, self.load, settings, merging=merging, device="cpu")


PREPARED: dict[tuple[str, ...], Preparation] = {}
"""What was measured of a reference alone, by its weights and its text."""


@pytest.fixture(autouse=True)
def each_reference_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Base and adapter are never changed here; a merge that is wrong has other weights."""

    def prepared(merged: Checkpoint, live: Any, held_out: HeldOut, **options: Any) -> Preparation:
        weights = [merged.weights.read(name) for name in merged.weights.specs()]
        digests = [tensor_digest(tensor) for tensor in (*weights, held_out.input_ids)]
        key = (str(live is None), str(options["dtype"]), *digests)
        if key not in PREPARED:
            PREPARED[key] = prepare(merged, live, held_out, **options)
        return PREPARED[key]

    monkeypatch.setattr("qexport.pipeline.reference.prepare", prepared)


def tensor_digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    folder = tmp_path_factory.mktemp("sound")
    model = trained_models.trained()
    model.save_pretrained(folder / "base")
    trained_models.tokenizer().save_pretrained(folder / "base")
    save_adapter(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), folder / "adapter")
    trained_models.write_held_out(folder / "held-out.jsonl", passages=600)
    trained_models.write_calibration(folder / "calibration.jsonl")
    return Sound(folder)


@pytest.fixture
def copy(sound: Sound, tmp_path: Path) -> Path:
    """The sound GPTQ artifact, to be changed."""
    return Path(shutil.copytree(sound.gptq, tmp_path / "copy"))


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def named(report: Report, name: str) -> GateResult:
    return next(gate for gate in report.gates if gate.name == name)


def verdicts(report: Report) -> dict[str, str]:
    return {gate.name: gate.verdict for gate in report.gates}


def failed(report: Report) -> set[str]:
    return {name for name, verdict in verdicts(report).items() if verdict == "fail"}


def value(report: Report, name: str = "mean_kl") -> float:
    figure = find_figure(report.figures, name)
    assert figure is not None
    return figure.value


def test_the_sound_artifact_passes_every_gate_at_its_first_look(sound: Sound) -> None:
    report = sound.intact
    assert report.verdict == "pass"
    assert verdicts(report) == dict.fromkeys(
        [
            "config",
            "files",
            "tokenizer",
            "weights",
            "merge",
            "adapter",
            "adapter_strength",
            "better_than_rtn",
            *GATES,
        ],
        "pass",
    )
    assert report.protocol.looks == [16]
    assert set(report.domains) == {"prose", "code", "french", "numbers"}
    assert report.unconfirmed == []


@pytest.mark.parametrize("block", range(trained_models.BLOCKS))
def test_one_corrupted_layer_fails_the_divergence_and_shows_in_its_block(sound: Sound, copy: Path, block: int) -> None:
    name = f"model.layers.{block}.mlp.down_proj.qweight"
    edit_tensors(copy, lambda tensors: tensors[name].copy_(tensors[name].flip(0)))
    report = sound.verify(copy)
    assert report.verdict == "fail"
    assert {"mean_kl", "better_than_rtn"} <= failed(report)
    drift = [drift.relative_error for drift in report.block_drift]
    intact = [drift.relative_error for drift in sound.intact.block_drift]
    assert drift[:block] == intact[:block]
    assert drift[block] > 1.5 * intact[block]


@pytest.fixture
def release(sound: Sound, tmp_path: Path) -> str:
    """The report of the sound artifact, as that of the release in production."""
    path = tmp_path / "report.json"
    path.write_text(sound.intact.to_json())
    return str(path)


def test_the_release_itself_is_not_worse_than_itself(sound: Sound, release: str) -> None:
    report = sound.verify(sound.gptq, baseline=release)
    assert report.verdict == "pass"
    assert report.protocol.looks == [16], "more windows would change nothing"
    assert {value(report, name) for name in ("baseline_mean_kl", "baseline_decisive_flips")} == {0.0}


def test_one_corrupted_layer_is_worse_than_the_release(sound: Sound, copy: Path, release: str) -> None:
    """All limits but the release's are null: it is enough that production is better."""
    name = "model.layers.1.mlp.down_proj.qweight"
    edit_tensors(copy, lambda tensors: tensors[name].copy_(tensors[name].flip(0)))
    report = sound.verify(copy, gates={}, baseline=release)
    assert {"baseline_mean_kl", "baseline_top1_agreement"} & failed(report)
    gate = named(report, "baseline_mean_kl")
    assert gate.low is not None
    assert gate.limit is not None
    assert gate.low > gate.limit


def test_an_adapter_that_was_not_applied_fails_the_gate_of_that_name(sound: Sound) -> None:
    report = sound.verify(sound.without_adapter)
    assert report.verdict == "fail"
    assert {"adapter", "mean_kl"} <= failed(report)
    assert value(report, "kl_over_base") > 0
    assert named(report, "merge").verdict == "pass"


def test_a_merge_that_forgot_the_adapter_fails_the_merge(sound: Sound, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(*args: Any, **options: Any) -> Merged:
        right, forgotten = merge(*args, **options), merge(args[0], None, args[2])
        return replace(right, checkpoint=forgotten.checkpoint)

    monkeypatch.setattr("qexport.pipeline.planning.merge", forgetful)
    report = sound.verify(sound.without_adapter)
    assert report.verdict == "fail"
    assert "merge" in failed(report)


def test_a_wrong_rope_base_fails_the_config_and_the_divergence(sound: Sound, copy: Path) -> None:
    edit_json(copy / "config.json", rope_theta=300.0, rope_parameters={"rope_type": "default", "rope_theta": 300.0})
    report = sound.verify(copy)
    assert report.verdict == "fail"
    assert {"config", "mean_kl"} <= failed(report)
    assert "rope" in named(report, "config").reason


SHIFTS = {"up": 0x11111111, "down": -0x11111111}
"""By one in every nibble, as when a reader takes AutoGPTQ's first format for its second, or the other way round."""


def shift_zeros(folder: Path, shift: int) -> None:
    edit_tensors(folder, lambda found: [found[name].add_(shift) for name in found if name.endswith(".qzeros")])


@pytest.mark.parametrize("shift", SHIFTS)
def test_zero_points_shifted_by_one_fail_the_divergence(sound: Sound, tmp_path: Path, shift: str) -> None:
    shutil.copytree(sound.asymmetric, tmp_path / "copy")
    assert sound.verify(tmp_path / "copy").verdict == "pass"
    shift_zeros(tmp_path / "copy", SHIFTS[shift])
    report = sound.verify(tmp_path / "copy")
    assert report.verdict == "fail"
    assert {"mean_kl", "better_than_rtn"} <= failed(report)


@pytest.mark.parametrize("shift", SHIFTS)
def test_shifted_zero_points_that_contradict_the_config_are_refused(sound: Sound, copy: Path, shift: str) -> None:
    shift_zeros(copy, SHIFTS[shift])
    with pytest.raises(InputError, match="the zero points differ"):
        sound.verify(copy)


def test_a_changed_special_token_fails_the_tokenizer_and_its_file(sound: Sound, copy: Path) -> None:
    edit_json(copy / "tokenizer_config.json", eos_token="<|start|>")
    report = sound.verify(copy)
    assert report.verdict == "fail"
    assert failed(report) == {"files", "tokenizer"}
    assert "special_tokens" in named(report, "tokenizer").reason
    assert "tokenizer_config.json (eos_token is '<|start|>', not '<|end|>')" in named(report, "files").reason


def test_settings_of_generation_and_of_the_tokenizer_fail_the_files_alone(sound: Sound, copy: Path) -> None:
    """Text and prompts are encoded as before, so nothing else sees these."""
    edit_json(copy / "generation_config.json", repetition_penalty=1.3)
    edit_json(copy / "tokenizer_config.json", model_max_length=16)
    length = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    edit_json(copy / "tokenizer.json", truncation=length)
    report = sound.verify(copy)
    assert failed(report) == {"files"}
    reason = named(report, "files").reason
    assert "generation_config.json (repetition_penalty is 1.3, not missing" in reason
    assert "tokenizer.json (truncation is {'direction': 'Right', 'max_length': 16" in reason
    assert "tokenizer_config.json (model_max_length is 16, not " in reason


def test_a_merge_that_no_short_text_has_is_found_in_the_held_out_text(sound: Sound, copy: Path) -> None:
    """Another order of merges shows in the tokens of the text that was measured, and is named with its document."""
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (copy / "tokenizer.json").write_text(json.dumps(content))
    report = sound.verify(copy)
    assert "tokenizer.json (model.merges[" in named(report, "files").reason
    token_ids = next(check for check in report.checks if check.name == "token_ids")
    assert "of the held-out text" in token_ids.detail


def test_an_artifact_without_a_tokenizer_fails_the_tokenizer(sound: Sound, copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    assert failed(sound.verify(copy)) == {"tokenizer"}


class LeftPadded(BlockRunner):
    """A server that pads windows at the left and forgets to mask the padding."""

    padding = 16
    _padded: dict[int, torch.Tensor]

    def embed(self, input_ids: torch.Tensor, batch_size: int) -> list[Batch]:
        fill = torch.zeros(len(input_ids), self.padding, dtype=input_ids.dtype)
        batches = super().embed(torch.cat([fill, input_ids], dim=1), batch_size)
        self._padded = {id(batch): batch.hidden for batch in batches}
        for batch in batches:
            batch.hidden = batch.hidden[:, self.padding :]
        return batches

    def forward(self, index: int, block: torch.nn.Module, batch: Batch) -> None:
        batch.hidden = self._padded[id(batch)]
        super().forward(index, block, batch)
        self._padded[id(batch)] = batch.hidden
        batch.hidden = batch.hidden[:, self.padding :]


@pytest.mark.parametrize("padding", [0, 16])
def test_left_padding_without_a_mask_fails_the_divergence(
    sound: Sound, monkeypatch: pytest.MonkeyPatch, padding: int
) -> None:
    def runner(config: Any, source: Any, **options: Any) -> BlockRunner:
        kind = LeftPadded if isinstance(source, ArtifactWeights) else BlockRunner
        return kind(config, source, **options)

    monkeypatch.setattr(LeftPadded, "padding", padding)
    monkeypatch.setattr("qexport.verifying.verification.BlockRunner", runner)
    report = sound.verify(sound.gptq)
    assert ("mean_kl" in failed(report)) == (padding > 0)


def test_an_artifact_that_equals_its_reference_has_no_divergence_at_all_and_passes(sound: Sound) -> None:
    report = sound.verify(sound.dense, windows=64, max_windows=256, profile="16bit", gates={})
    assert report.verdict == "pass", [gate.reason for gate in report.gates if not gate.passed]
    zero = ("mean_kl", "median_kl", "kl_p999", "max_kl", "decisive_flips", "probability_change")
    assert {name: value(report, name) for name in zero} == dict.fromkeys(zero, 0.0)
    assert value(report, "perplexity_ratio") == value(report, "top1_agreement") == 1.0
    assert sum(report.kl_histogram.counts[1:]) == 0
    assert [drift.relative_error for drift in report.block_drift] == [0.0] * trained_models.BLOCKS
    assert "better_than_rtn" not in verdicts(report)


def test_sixteen_bits_against_thirty_two_are_at_the_noise_floor_and_pass(sound: Sound) -> None:
    wide = MergeSettings(dtype="float32")
    report = sound.verify(sound.dense, merging=wide, windows=64, max_windows=256, profile="16bit", gates={})
    floor = find_figure(sound.intact.figures, "mean_kl")
    assert floor is not None
    assert floor.noise_floor is not None
    assert 0 < value(report) < 3 * floor.noise_floor
    assert report.reference.dtype == "float32"
    assert report.verdict == "pass", [gate.reason for gate in report.gates if not gate.passed]


def test_round_to_nearest_in_place_of_gptq_fails_the_gate_of_that_name(sound: Sound, copy: Path) -> None:
    weights = sound.merged().checkpoint.weights
    with SafetensorsWeights(copy, dtype=torch.float32) as source:
        modules = list(source.quantized)

    def round_all(tensors: Tensors) -> None:
        for module in modules:
            exact = weights.read(f"{module}.weight").float()
            rounded = round_to_nearest(exact, Options(4, GROUP, "original", True, 0.0, False))
            tensors.update({f"{module}.{part}": tensor for part, tensor in gptq.pack(rounded).items()})

    edit_tensors(copy, round_all)
    report = sound.verify(copy)
    assert value(report, "kl_over_rtn") == 0.0
    assert failed(report) == {"better_than_rtn"}


def test_a_limit_that_the_text_cannot_decide_spends_the_budget_and_stays_undecided(sound: Sound) -> None:
    near = value(sound.verify(sound.gptq, windows=64, gates={}))
    report = sound.verify(sound.gptq, gates={"mean_kl": {"at_most": near}})
    assert report.protocol.looks == [16, 32, 64]
    assert (report.verdict, named(report, "mean_kl").verdict) == ("undecided", "undecided")
    assert "not decided by 76 documents" in named(report, "mean_kl").reason


def test_more_windows_decide_what_the_first_look_could_not(sound: Sound) -> None:
    gates = {"mean_kl": {"at_most": 0.02}}
    few = sound.verify(sound.gptq, windows=6, max_windows=6, gates=gates)
    assert (few.verdict, named(few, "mean_kl").verdict) == ("undecided", "undecided")
    more = sound.verify(sound.gptq, windows=6, gates=gates)
    assert more.verdict == "pass", [gate.reason for gate in more.gates]
    assert more.protocol.looks[0] == 6
    assert more.protocol.windows == more.protocol.looks[-1] > 6


def test_what_was_not_measured_is_not_passed(sound: Sound) -> None:
    report = sound.verify(sound.gptq, gates=GATES | {"chrf": {"at_least": 10.0}})
    assert (report.verdict, named(report, "chrf").verdict) == ("undecided", "undecided")
    assert named(report, "chrf").reason == "not measured"
    assert report.protocol.looks == [16]


def test_a_domain_that_the_text_does_not_have_is_refused(sound: Sound) -> None:
    report = sound.verify(sound.gptq, gates={"mean_kl": {"domains": {"code": {"at_most": 9.0}}}})
    assert named(report, "mean_kl[code]").verdict == "pass"
    with pytest.raises(RecipeError, match="no such domain"):
        sound.verify(sound.gptq, gates={"mean_kl": {"domains": {"law": {"at_most": 9.0}, "code": {"at_most": 9.0}}}})


def test_a_limit_under_three_times_the_noise_floor_is_refused(sound: Sound) -> None:
    floor = find_figure(sound.intact.figures, "mean_kl")
    assert floor is not None
    assert floor.noise_floor is not None
    with pytest.raises(RecipeError, match="three times the noise floor"):
        sound.verify(sound.gptq, gates={"mean_kl": {"at_most": 2.9 * floor.noise_floor}})
    report = sound.verify(sound.gptq, gates={"mean_kl": {"at_most": 3.1 * floor.noise_floor}})
    assert failed(report) == {"mean_kl"}


def test_the_same_verification_gives_the_same_report_but_for_timings(sound: Sound) -> None:
    one = sound.intact
    PREPARED.clear()
    other = sound.verify(sound.gptq)
    assert one.digest() == other.digest()
    assert one.model_copy(update={"timings": other.timings}) == other
