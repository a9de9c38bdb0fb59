"""Several adapters as one: held against PEFT's `add_weighted_adapter`, and named in everything that is made of them."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftConfig, PeftModel
from pydantic import ValidationError
from transformers import PreTrainedModel

import adapters
import factories
from qexport.architectures.architecture import Checkpoint
from qexport.artifact.manifest import Manifest
from qexport.cli import main
from qexport.errors import CompatibilityError, InputError, QexportError
from qexport.gates.deciding import MOST_MERGE_ERROR
from qexport.loading import LoadSettings, WeightedAdapter
from qexport.loading.adapter_folder import locate_adapters
from qexport.merge import MergeSettings
from qexport.merge.combining import Combination, CombinedFactors, layer_seed, random_masks
from qexport.merge.merging import Merged, merge_several
from qexport.pipeline import plan, run
from qexport.pipeline.rebuilding import Recorded, rebuild, recipe_of, recorded
from qexport.pipeline.reference import live_adapter
from qexport.progress import Steps
from qexport.recipe import Recipe, load_recipe
from qexport.release.record import BOM_NAME, PROVENANCE_NAME
from qexport.tensors import Origin
from qexport.verifying.live_adapter import ComparedMerge, LiveRunner, compare_merge
from qexport.verifying.lockstep import run_in_lockstep
from qexport.verifying.peft_combination import CombinedByPeft

CPU = torch.device("cpu")
ORIGIN = Origin("combination", "one+two")
COMBINATIONS = ("linear", "ties", "dare_linear", "dare_ties", "cat")


def lora(*modules: str, **options: Any) -> LoraConfig:
    return LoraConfig(target_modules=list(modules), **({"r": 4, "lora_alpha": 7, "init_lora_weights": False} | options))


TRAINED: Sequence[PeftConfig] = (
    lora("q_proj", "v_proj"),
    lora("q_proj", "down_proj", lora_alpha=3, use_rslora=True),
    lora("v_proj", "gate_proj", alpha_pattern={"v_proj": 2}),
)
WEIGHTS = (0.7, 1.5, -0.4)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return factories.build(factories.llama_config(), dtype=torch.float32)


@pytest.fixture(scope="module")
def base(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return adapters.save_base(model, tmp_path_factory.mktemp("base"))


def saved(model: PreTrainedModel, folder: Path, configs: Sequence[PeftConfig]) -> list[Path]:
    found = []
    for index, config in enumerate(configs, 1):
        found.append(adapters.save_adapter(model, config, folder / f"adapter-{index}", spread=0.1 * index))
    return found


@pytest.fixture(scope="module")
def trained(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return saved(model, tmp_path_factory.mktemp("adapters"), TRAINED)


def combined(base: Checkpoint, folders: Sequence[Path], weights: Sequence[float] = WEIGHTS, **settings: Any) -> Merged:
    pairs = list(zip(folders, weights, strict=True))
    return merge_several(base, pairs, MergeSettings.model_validate({"dtype": "float32"} | settings), origin=ORIGIN)


def in_peft(
    model: PreTrainedModel, folders: Sequence[Path], weights: Sequence[float], combination: str, density: float
) -> PeftModel:
    """The live model with the combination that PEFT makes."""
    names = [f"adapter{index}" for index in range(len(folders))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = PeftModel.from_pretrained(copy.deepcopy(model), str(folders[0]), adapter_name=names[0])
        for name, folder in zip(names[1:], folders[1:], strict=True):
            live.load_adapter(str(folder), adapter_name=name)
        tuner: Any = live
        with patch("torch.bernoulli", masks(live, folders, density)):
            tuner.add_weighted_adapter(names, list(weights), "all", combination_type=combination, density=density)
        live.set_adapter("all")
    live.eval()
    return live


def masks(live: PeftModel, folders: Sequence[Path], density: float) -> Any:
    """torch.bernoulli that gives PEFT, which asks for them module by module, the masks that are drawn here."""
    original = torch.bernoulli
    tensors = [adapters.read_tensors(folder) for folder in folders]
    paths = [path.removeprefix("base_model.model.") for path, _ in live.named_modules()]

    def ordered() -> Iterator[torch.Tensor]:
        for path in paths:
            wanted = [f"base_model.model.{path}.lora_{side}.weight" for side in "AB"]
            shapes = [held[key].shape for key in wanted for held in tensors if key in held]
            yield from random_masks(shapes, density, layer_seed(5, path))

    wanted = ordered()

    def bernoulli(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        return original(tensor, **options) if options else next(wanted)

    return bernoulli


def tensors_of(result: Merged) -> dict[str, torch.Tensor]:
    weights = result.checkpoint.weights
    return {name: weights.read(name) for name in weights.specs()}


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_combination_equals_pefts(
    model: PreTrainedModel, base: Checkpoint, trained: Sequence[Path], combination: str
) -> None:
    result = combined(base, trained, combination=combination, density=0.4, seed=5)
    live = in_peft(model, trained, WEIGHTS, combination, 0.4)
    ids = torch.arange(1, 49).view(2, 24)
    with torch.no_grad():
        logits = live(ids).logits
    merged: Any = copy.deepcopy(live)
    exact = merged.merge_and_unload(adapter_names=["all"]).state_dict()
    found, plain = tensors_of(result), model.state_dict()
    for name, tensor in found.items():
        assert torch.allclose(tensor, exact[name], rtol=0, atol=2e-6), name
        if combination != "cat":  # where PEFT multiplies by zeros up to the largest rank
            assert torch.equal(tensor, exact[name]), name
    described = result.adapter
    assert described is not None
    assert {name for name in found if not torch.equal(found[name], plain[name])} == set(described.changed)
    assert {name.split(".")[-2] for name in described.changed} == {"q_proj", "v_proj", "down_proj", "gate_proj"}

    proof = live_adapter(result)
    assert proof is not None
    assert isinstance(proof.tensors, CombinedByPeft)
    runner = LiveRunner(
        proof.base, proof.folder, dtype=torch.float32, device=CPU, tensors=proof.tensors, config=proof.config
    )
    ((batches,), _) = run_in_lockstep([runner], ids, lambda _: None, drift=False)
    with runner.head() as head, torch.no_grad():
        assert (head(batches[0].hidden) - logits).abs().max() < 2e-5 * logits.abs().max()


# The proof of the merge


def proved(result: Merged) -> ComparedMerge:
    live = live_adapter(result)
    assert live is not None
    ids = torch.randint(1, factories.VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(5))
    return compare_merge(result.checkpoint, live, ids, dtype=torch.float32, device=CPU, steps=Steps(lambda _: None))


def error(found: ComparedMerge) -> float:
    """The share of the adapters' effect that the merge misses."""
    return float(found.unrounded.kl.mean()) / float(found.base.kl.mean())


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_the_proof_holds_a_combination_against_the_one_that_peft_makes(
    base: Checkpoint, trained: Sequence[Path], combination: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = combined(base, trained, combination=combination, density=0.4, seed=5)
    assert error(proved(result)) < MOST_MERGE_ERROR / 100
    right = CombinedFactors.__init__

    def wrong(source: CombinedFactors, parts: Combination, layers: Any) -> None:
        right(source, replace(parts, **change(parts)), layers)

    def change(parts: Combination) -> dict[str, Any]:
        return {"weights": [*parts.weights[:-1], parts.weights[-1] * 1.2]}

    monkeypatch.setattr(CombinedFactors, "__init__", wrong)
    assert error(proved(combined(base, trained, combination=combination, density=0.4, seed=5))) > MOST_MERGE_ERROR


@pytest.mark.parametrize("change", [{"seed": 6}, {"density": 0.45}, {"combination": "linear"}])
def test_the_proof_sees_other_values_dropped(
    base: Checkpoint, trained: Sequence[Path], change: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = CombinedFactors.__init__

    def wrong(source: CombinedFactors, parts: Combination, layers: Any) -> None:
        right(source, replace(parts, settings=parts.settings.model_copy(update=change)), layers)

    monkeypatch.setattr(CombinedFactors, "__init__", wrong)
    result = combined(base, trained, combination="dare_linear", density=0.4, seed=5)
    assert error(proved(result)) > MOST_MERGE_ERROR


@pytest.mark.parametrize(
    "configs",
    [
        [lora("q_proj", r=6, use_rslora=True), lora("v_proj", r=3)],  # ranks that PEFT combines layer by layer only
        [lora("q_proj", r=6, rank_pattern={"v_proj": 4}), lora("v_proj", "q_proj", r=4, rank_pattern={"q_proj": 6})],
        [lora("q_proj")],  # which PEFT only scales
        [LoraConfig(target_modules=r".*layers\.0.*q_proj", init_lora_weights=False), lora("q_proj", "v_proj", r=8)],
        [lora("q_proj", init_lora_weights="mica"), lora("q_proj", init_lora_weights="orthogonal")],
        [
            lora("q_proj", layers_to_transform=[1]),
            lora("q_proj", "v_proj", exclude_modules=["layers.1.self_attn.q_proj"]),
        ],
    ],
)
def test_the_proof_covers_what_patterns_say_of_each_layer(
    model: PreTrainedModel, base: Checkpoint, configs: Sequence[PeftConfig], tmp_path: Path
) -> None:
    folders = saved(model, tmp_path, configs)
    for combination in COMBINATIONS:
        assert (
            error(proved(combined(base, folders, (1.0, -0.7)[: len(folders)], combination=combination)))
            < MOST_MERGE_ERROR / 100
        )


def test_the_proof_covers_embeddings(model: PreTrainedModel, base: Checkpoint, tmp_path: Path) -> None:
    folders = saved(model, tmp_path, [lora("q_proj"), lora("embed_tokens", "q_proj")])
    for folder in folders:
        kept = {key: value for key, value in adapters.read_tensors(folder).items() if "base_layer" not in key}
        adapters.write_tensors(folder, kept)
    for combination in COMBINATIONS:
        assert error(proved(combined(base, folders, (1.0, 1.0), combination=combination))) < MOST_MERGE_ERROR / 100


def test_a_wrong_combination_ends_the_run_before_anything_is_quantized(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = CombinedFactors._weights_of
    recipe = load_recipe(made / "recipe.yaml", [f"output={tmp_path / 'out'}"])
    monkeypatch.setattr(
        CombinedFactors, "_weights_of", lambda source, factors: [w * 1.2 for w in weights(source, factors)]
    )
    result = run(recipe, device="cpu")
    assert result.verdict == "fail"
    assert result.unproven_merge is not None
    assert not (tmp_path / "out").exists()


# What is combined


def test_concatenated_adapters_add_up_what_they_change_whatever_their_ranks(
    model: PreTrainedModel, base: Checkpoint, tmp_path: Path
) -> None:
    folders = saved(model, tmp_path, [lora("q_proj"), lora("q_proj", "v_proj", r=6)])
    found = tensors_of(combined(base, folders, (2.0, -1.0), combination="cat"))
    one, two = (adapters.merge_with_peft(model, folder) for folder in folders)
    for name, before in model.state_dict().items():
        wanted = before + 2 * (one[name] - before) - (two[name] - before)
        assert torch.allclose(found[name], wanted, rtol=0, atol=1e-5)
    with pytest.raises(CompatibilityError, match="different ranks, which linear cannot combine") as caught:
        combined(base, folders, (1.0, 1.0))
    assert "merge.combination to cat" in str(caught.value)


def test_random_values_are_dropped_the_same_way_each_time_and_otherwise_with_another_seed(
    base: Checkpoint, trained: Sequence[Path]
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    first, again, other = (
        combined(base, trained, combination="dare_linear", seed=seed).checkpoint.weights for seed in (1, 1, 2)
    )
    read = first.read(name)
    assert torch.equal(first.read(name), read)
    assert torch.equal(again.read(name), read)
    assert not torch.equal(other.read(name), read)
    mask, next_mask = random_masks([(200, 200), (200, 200)], 0.3, 1)
    assert abs(float(mask.mean()) - 0.3) < 0.02
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(mask, next_mask)


def test_the_weights_are_noted(base: Checkpoint, trained: Sequence[Path]) -> None:
    described = combined(base, trained).adapter
    assert described is not None
    assert described.notes[-1] == (
        "3 adapters are combined (linear): adapter-1 0.7, adapter-2 1.5, adapter-3 -0.4"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (LoHaConfig(target_modules=["q_proj"]), "it is LOHA"),
        (lora("q_proj", use_dora=True), "otherwise than by two factors"),
        (lora("q_proj", modules_to_save=["lm_head"]), r"it changes lm_head\.weight otherwise"),
        (lora("q_proj", trainable_token_indices=[1]), r"it changes model\.embed_tokens\.weight otherwise"),
        (lora("lm_head"), r"brings lm_head\.weight of its own base"),
        (lora("q_proj", layer_replication=[(0, 2), (1, 2)]), "repeated layers|does not fit the base"),
    ],
)
def test_what_is_more_than_loras_factors_is_not_combined(
    model: PreTrainedModel, base: Checkpoint, config: PeftConfig, word: str, tmp_path: Path
) -> None:
    folders = saved(model, tmp_path, [lora("q_proj"), config])
    with pytest.raises(QexportError, match=word):
        combined(base, folders, (1.0, 1.0))


def test_an_adapter_that_parts_tied_ends_is_not_combined(tmp_path: Path) -> None:
    tied = factories.build(factories.llama_config(tie_word_embeddings=True), dtype=torch.float32)
    folders = saved(tied, tmp_path, [lora("q_proj"), lora("lm_head")])
    tensors = adapters.read_tensors(folders[1])
    adapters.write_tensors(folders[1], {key: tensor for key, tensor in tensors.items() if "base_layer" not in key})
    with pytest.raises(CompatibilityError, match="tied embedding and head differently"):
        combined(adapters.headers_of(tied), folders, (1.0, 1.0))


# The recipe


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"adapter": "./a", "adapters": [{"path": "./b"}]}, "exclude each other"),
        ({"adapters": [{"path": "./b", "weight": 0.0}]}, "a weight of 0"),
        ({"adapters": [{"path": "./b", "revision": "main"}]}, "only for a hub id"),
        ({"adapters": [{"path": "./b"}] * 33}, "at most 32"),
    ],
)
def test_adapters_that_contradict_each_other_are_refused(values: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        LoadSettings.model_validate({"base": "./base"} | values)


def test_a_recipe_without_several_adapters_does_not_mention_them() -> None:
    assert "adapters" not in LoadSettings(base="./base").model_dump()
    assert MergeSettings().model_dump().keys().isdisjoint({"combination", "density", "seed"})


def test_an_adapter_that_is_listed_twice_is_refused(trained: Sequence[Path]) -> None:
    settings = LoadSettings(base="unused", adapters=[WeightedAdapter(path=str(trained[0]))] * 2)
    with pytest.raises(InputError, match="two of the adapters are the same"):
        locate_adapters(settings)


# What is made of them


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model = factories.build(factories.llama_config(num_hidden_layers=1))
    factories.save(model, folder / "base")
    for name, module in (("poet", "q_proj"), ("coder", "v_proj")):
        adapters.save_adapter(model, lora(module), folder / name)
        (folder / name / "README.md").write_text(f"---\nlicense: mit\nlanguage: {name[:2]}\n---\n")
        (folder / name / "LICENSE").write_text(f"of the {name}")
    factories.write_text(folder / "held-out.jsonl", seed=2)
    recipe: Mapping[str, Any] = {
        "load": {"base": "./base", "adapters": [{"path": "./poet"}, {"path": "./coder", "weight": 0.5}]},
        "merge": {"combination": "ties", "density": 0.8},
        "quantize": {"method": "none"},
        "export": [{"layout": "safetensors"}],
        "verify": {"text": "./held-out.jsonl", "windows": 4, "sequence_length": 32, "profile": "off"},
        "output": "./out",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    result = run(load_recipe(folder / "recipe.yaml"), device="cpu")
    assert result.verdict == "pass"
    return folder


def manifest_of(made: Path) -> Manifest:
    return Manifest.model_validate_json((made / "out" / "qexport-manifest.json").read_text())


def test_every_adapter_is_on_record(made: Path) -> None:
    manifest = manifest_of(made)
    assert manifest.adapter is not None
    assert (manifest.adapter.kind, manifest.adapter.name) == ("combination", "poet+coder")
    assert [(each.name, each.weight) for each in manifest.adapter.parts] == [("poet", 1.0), ("coder", 0.5)]
    assert [role for role, _ in manifest.roles] == ["base", "adapter-1", "adapter-2"]
    digests = [*manifest.adapter.parts[0].sha256.values(), *manifest.adapter.parts[1].sha256.values()]
    assert list(manifest.adapter.sha256.values()) == digests
    assert manifest.recipe["load"]["adapters"][1] == {"path": "coder", "revision": None, "weight": 0.5}
    assert Manifest.model_validate_json(manifest.to_json()) == manifest


def test_card_and_licenses_name_every_adapter(made: Path) -> None:
    card = (made / "out" / "README.md").read_text()
    assert "base + poet+coder" in card
    assert "base and poet and coder" in card
    assert (made / "out/licenses/adapter-1/LICENSE").read_text() == "of the poet"
    assert (made / "out/licenses/adapter-2/LICENSE").read_text() == "of the coder"


def test_the_plan_names_every_adapter(made: Path) -> None:
    found = plan(load_recipe(made / "recipe.yaml"))
    assert found.as_dict()["adapter"] == "poet+coder"
    assert any("2 adapters are combined (ties): poet 1, coder 0.5" in line for line in found.lines())


def test_a_release_names_every_adapter_and_checks(made: Path, tmp_path: Path) -> None:
    assert main(["release", str(made / "out"), "--to", str(tmp_path), "--version", "1.0.0"]) == 0
    released = tmp_path / "base-poet-coder-1.0.0+bfloat16"
    provenance = json.loads((released / PROVENANCE_NAME).read_text())
    materials = provenance["predicate"]["buildDefinition"]["resolvedDependencies"]
    names = {each.get("name") for each in materials}
    assert {"adapter-1/adapter_config.json", "adapter-2/adapter_model.safetensors"} <= names
    bom = json.loads((released / BOM_NAME).read_text())
    assert {"base", "poet", "coder"} <= {each["name"] for each in bom["components"]}
    assert main(["check", str(released)]) == 0


def again(given: Recorded, inputs: Path) -> Recipe:
    return recipe_of(given, recipe=None, inputs=inputs, overrides=(), verify=False)


def test_the_artifact_is_rebuilt_from_the_same_adapters_only(made: Path) -> None:
    given = recorded(made / "out")
    assert rebuild(given, again(given, made)).equal
    adapters.edit_config(made / "coder", lora_alpha=8)
    with pytest.raises(InputError, match="not the inputs") as caught:
        rebuild(given, again(given, made))
    assert "load.adapter: 2/adapter_config.json has the digest" in str(caught.value)
