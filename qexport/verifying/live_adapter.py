"""The merged model compared with the base and the adapter, applied live by PEFT: the proof that the merge is right.

PEFT wraps the layers of a model on the meta device, so that all its rules on what an adapter changes apply to the whole
model. The weights of base and adapter are loaded one block at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.naming import Naming
from qexport.architectures.runner import Batch, BlockRunner, Call
from qexport.architectures.structure import find_blocks
from qexport.artifact.disk import disk_failure
from qexport.hidden_packages import hidden, nothing_compiled
from qexport.progress import Steps
from qexport.tensors.safetensors_file import SafetensorsFile
from qexport.tensors.source import WeightSource
from qexport.verifying.divergence import TokenFigures, compare_two
from qexport.verifying.lockstep import run_in_lockstep

if TYPE_CHECKING:
    from peft import PeftModel

WINDOWS: Final = 16
"""Windows of the held-out text: enough to separate the noise of two computations from three times the noise floor."""

_TOKENS: Final = 64
"""Tokens of each window."""

_FILE: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
"""What PEFT writes before every module path."""

_NAME: Final = "default"
"""PEFT's name for the adapter in memory, a component of the paths of all its tensors."""


@dataclass(frozen=True)
class LiveAdapter:
    """What the merged model is compared with.

    Attributes:
        base: the model without the adapter.
        folder: the adapter's.
        unrounded: the merged model in float32, before its tensors are rounded to the dtype of the merge.
        tensors: the adapter's, named as PEFT names them; None for those of its file.
        config: what stands for its adapter_config.json; None for the file.
    """

    base: Checkpoint
    folder: Path
    unrounded: Checkpoint
    tensors: WeightSource | None = None
    config: Mapping[str, Any] | None = None


class NotMeasured(Exception):
    """Why the merge could not be compared with PEFT.

    The text goes into the manifest, so PEFT's own message, which may contain paths, is only in the exception's cause.
    """


@dataclass(frozen=True)
class ComparedMerge:
    """How far models are from base and adapter as PEFT computes them. Each has one row per window.

    Attributes:
        merged: the merged model.
        unrounded: the merged model before its tensors are rounded: how exact the merge's arithmetic is.
        base: the model without the adapter: the effect of the adapter.
    """

    merged: TokenFigures
    unrounded: TokenFigures
    base: TokenFigures


@hidden("bitsandbytes")
def compare_merge(
    merged: Checkpoint,
    live: LiveAdapter,
    input_ids: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
    steps: Steps,
) -> ComparedMerge:
    """The figures of the merged model, with base and adapter as PEFT computes them as the reference.

    In memory is one block of one model, or what two models' predictions need (`two_predictors`), besides the hidden
    states of all four models. Only the beginnings of some windows are used: hundreds of tokens are enough to see that
    an adapter is missing or wrong.

    Args:
        merged: the merged model.
        live: base, adapter, and the unrounded merge.
        input_ids: int64 [windows, sequence_length].
        dtype: what all compute in. In a dtype wider than the merged model's, the rounding of the merge is the only
            difference left.
        device: where to compute.
        steps: counts the steps.

    Raises:
        NotMeasured: PEFT cannot load the adapter into this base, or cannot run it.
        InputError: a tensor cannot be read.
    """
    ids = input_ids[:WINDOWS, :_TOKENS]
    runners: list[BlockRunner] = [
        LiveRunner(live.base, live.folder, dtype=dtype, device=device, tensors=live.tensors, config=live.config)
    ]
    runners += [
        BlockRunner(each.architecture, each.weights, dtype=dtype, device=device)
        for each in (merged, live.unrounded, live.base)
    ]
    blocks, tokens = len(runners[0].structure.blocks), len(runners) * ids.numel()
    steps.expect(blocks)
    batches, _ = run_in_lockstep(
        runners, ids, lambda block: steps.finished_block("merge beside PEFT", block, blocks, tokens), drift=False
    )
    return ComparedMerge(
        *(
            compare_two((runners[0], runner), (batches[0], hidden), ids)
            for runner, hidden in zip(runners[1:], batches[1:], strict=True)
        )
    )


class LiveRunner(BlockRunner):
    """Runs a model with an adapter live in PEFT, block by block.

    Args:
        base: the model.
        folder: the adapter's.
        dtype: the dtype to compute in, at least float32.
        device: where to compute.
        tensors: the adapter's; None for those of its file.
        config: what stands for its adapter_config.json; None for the file.

    Raises:
        NotMeasured: PEFT cannot load the adapter, or does not find all tensors of it.
        InputError: the adapter's file cannot be read.
    """

    def __init__(
        self,
        base: Checkpoint,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        tensors: WeightSource | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

        super().__init__(base.architecture, base.weights, dtype=dtype, device=device)
        self._adapter: WeightSource = tensors or SafetensorsFile(folder / _FILE)
        self._shapes = {key: spec.shape for key, spec in self._adapter.specs().items()}
        with of_peft("load the adapter"):
            self._live = _wrapped(self._model, folder, config)
            known: Any = self._live.peft_config[_NAME]
        self._constants = _constants(known, self._shapes)
        self._modules_of = _modules_of([*self._shapes, *self._constants], base.architecture.naming)
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING[known.peft_type]
        if any(prefix in key and _NAME in key for key in self._fill(set())):  # PEFT's own rule, at which it only warns
            raise NotMeasured("PEFT does not find all tensors of the adapter")

    @torch.no_grad()
    def forward(self, index: int, block: nn.Module, batch: Batch) -> None:
        """See `BlockRunner.forward`."""
        with of_peft("run the adapter"):
            super().forward(index, block, batch)

    @torch.no_grad()
    def _tail(self, hidden: Tensor) -> Tensor:
        with of_peft("run the adapter"):
            return super()._tail(hidden)

    def _record(self, ids: Tensor) -> Batch:
        with of_peft("run the adapter"):
            return super()._record(ids)

    def _probe(self, hidden: Tensor, call: Call) -> bool:
        """On a block without PEFT's layers, some of which cannot run on the meta device."""
        wrapped = self._model, self._layers
        self._model = self.architecture.empty_model().to(self.dtype)  # type: ignore[arg-type]
        self._layers = find_blocks(self._model)[1]
        try:
            return super()._probe(hidden, call)
        finally:
            self._model, self._layers = wrapped

    @contextmanager
    def _loaded(self, names: Iterable[str], *, wide: Container[str] = ()) -> Iterator[None]:
        names = list(names)
        with super()._loaded(names, wide=wide):
            self._fill({name.rpartition(".")[0] for name in names})
            try:
                yield
            finally:
                self._fill(set())

    def _fill(self, modules: Set[str]) -> Sequence[str]:
        """Loads the adapter's tensors for some modules, puts all others on the meta device, and returns the keys that
        PEFT misses. Tensors of no module are those that all of them share.
        """
        from peft import set_peft_model_state_dict

        needed = {key for key, module in self._modules_of.items() if modules and (module is None or module in modules)}
        tensors = {key: self._read_adapter(key) for key in needed}
        for key, shape in [*self._shapes.items(), *((key, value.shape) for key, value in self._constants.items())]:
            tensors.setdefault(key, torch.empty(shape, dtype=self.dtype, device="meta"))
        with of_peft("load the adapter"), _assigning(self._live):
            found: Any = set_peft_model_state_dict(self._live, tensors)
        return _without_shared(self._live, found.missing_keys)

    def _read_adapter(self, key: str) -> Tensor:
        tensor = self._constants[key] if key in self._constants else self._adapter.read(key)
        return tensor.to(device=self.device, dtype=self.dtype if tensor.is_floating_point() else None)


def _wrapped(model: PreTrainedModel, folder: Path, given: Mapping[str, Any] | None) -> PeftModel:
    """The model on the meta device with PEFT's layers around its own, which stay as they are."""
    from peft import PeftConfig, get_peft_model

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), nothing_compiled():
        warnings.simplefilter("ignore")
        config: Any = (
            PeftConfig.from_pretrained(str(folder), inference_mode=True) if given is None else configured(given)
        )
        if config.peft_type == "LORA":
            config.layer_replication = None  # the base has the layers already
        if config.peft_type == "SHIRA":
            config.mask_fn = None  # draws places, which no layer on the meta device can have; those stored are loaded
        live: Any = get_peft_model(model, config, adapter_name=_NAME, low_cpu_mem_usage=True)
        _cut_pruned_ranks(live, config)
    live.eval()
    wrapped: PeftModel = live
    return wrapped


def configured(given: Mapping[str, Any]) -> Any:
    """PEFT's configuration from the content of an adapter_config.json."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[given["peft_type"]]
    known = {each.name for each in fields(kind)}
    return kind(**{key: value for key, value in given.items() if key in known} | {"inference_mode": True})


def _without_shared(live: PeftModel, missing: Sequence[str]) -> Sequence[str]:
    """Those keys whose tensors are not in other modules too, where they were found."""
    tensors = live.state_dict(keep_vars=True)
    found = {id(tensor) for key, tensor in tensors.items() if key not in set(missing)}
    return [key for key in missing if id(tensors[key]) not in found]


def _cut_pruned_ranks(live: PeftModel, config: Any) -> None:
    """AdaLoRA's layers get the ranks that training left. PEFT does this whenever tensors are loaded, by indexing the
    layers' own, which have no values on the meta device.
    """
    if config.peft_type == "ADALORA" and config.rank_pattern:
        for key, kept in config.rank_pattern.items():
            layer: Any = live.get_submodule(f"{PREFIX}{key.partition('.lora_E')[0]}")
            layer.update_layer(_NAME, sum(kept), config.lora_alpha, config=config)
        config.rank_pattern = None


@contextmanager
def _assigning(live: PeftModel) -> Iterator[None]:
    """Makes PEFT put tensors in the place of those on the meta device. Its own option for that also moves tensors that
    layers share to the device of the last of them.
    """
    live.load_state_dict = partial(live.load_state_dict, assign=True)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del live.load_state_dict


def _constants(config: Any, keys: Iterable[str]) -> Mapping[str, Tensor]:
    """The tensors of PEFT's layers that it computes and does not store: AdaLoRA's initial ranks."""
    if config.peft_type != "ADALORA":
        return {}
    rank = torch.tensor([float(config.init_r)])
    end = ".lora_E"
    return {f"{key.removesuffix(end)}.ranknum": rank for key in keys if key.endswith(end)}


def _modules_of(keys: Iterable[str], naming: Naming) -> Mapping[str, str | None]:
    """The module of each of the adapter's tensors, by its name in the base's files; that of a tied weight's original;
    None for tensors that no module owns.

    The modules of experts may be named as in the model or as in the files.
    """
    stored = {part.parameter: name for name, part in naming.parts.items()}
    stored |= {path: naming.tied.get(name, name) for path, name in naming.files.items()}
    stored |= {name: name for name in naming.parts}
    modules = {path.rpartition(".")[0]: name.rpartition(".")[0] for path, name in stored.items()}
    return {key: _owner(key.removeprefix(PREFIX), modules) for key in keys}


def _owner(path: str, modules: Mapping[str, str]) -> str | None:
    while path:
        if path in modules:
            return modules[path]
        path = path.rpartition(".")[0]
    return None


@contextmanager
def of_peft(task: str) -> Iterator[None]:
    """Raises whatever PEFT raises as `NotMeasured`, but for failures of the disk.

    Args:
        task: what PEFT was asked to do.
    """
    try:
        yield
    except Exception as error:  # PEFT raises exceptions of any type
        if disk_failure(error, where=None):
            raise
        raise NotMeasured(f"PEFT cannot {task}") from error
