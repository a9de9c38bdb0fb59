"""An artifact as a server finds it, planned or on disk, and the rules that it must satisfy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar

from qexport.artifact.disk import disk_failure
from qexport.artifact.stray_files import stray_files
from qexport.errors import CompatibilityError, InputError, QexportError, listed
from qexport.tensors.safetensors_index import INDEX_NAME, SINGLE_NAME
from qexport.tensors.strict_files import parse_json

if TYPE_CHECKING:
    from qexport.tensors import TensorSpec

CONFIG: Final = "config.json"

_LARGEST: Final = 1 << 26


@dataclass(frozen=True)
class ServedWeights:
    """The tensors that a server loads.

    Attributes:
        specs: shape and dtype by stored name; from the first file if a tensor is in several.
        files: the file of each tensor, by the tensor's name. Empty for a plan.
        duplicates: tensors that are in several files.
        unreadable: files that cannot be read, with the reason.
    """

    specs: Mapping[str, TensorSpec]
    files: Mapping[str, str] = field(default_factory=dict)
    duplicates: tuple[str, ...] = ()
    unreadable: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ServedModel:
    """An artifact as a server finds it. Each server has a subclass, with what it derives from these attributes.

    Attributes:
        files: the files beside the weights, by name. A folder is an empty entry whose name ends with a slash.
        weights: the tensors.
        folder: the path; None for a plan.
    """

    files: Mapping[str, bytes]
    weights: ServedWeights
    folder: Path | None = None
    _objects: dict[str, tuple[dict[str, Any], str | None]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def planned(cls, files: Mapping[str, bytes], tensors: Mapping[str, TensorSpec]) -> Self:
        """The artifact that will be written.

        Args:
            files: the files beside the weights.
            tensors: the tensors of the weights, by stored name.
        """
        return cls(files, ServedWeights(tensors))

    @classmethod
    def on_disk(cls, folder: Path) -> Self:
        """A finished folder, read as the server reads it: small files on demand, and the headers of the weights.

        A file that cannot be read is not an error here, but breaks a rule.
        """
        return cls(FolderFiles(folder), cls.read_weights(folder), folder)

    @staticmethod
    def read_weights(folder: Path) -> ServedWeights:
        """The tensors that the server finds in a folder."""
        raise NotImplementedError

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of every tensor that is loaded, by stored name."""
        return self.weights.specs

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json; empty if it cannot be read."""
        return self.json(CONFIG)

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The `quantization_config` of config.json; empty if there is none."""
        value = self.config.get("quantization_config")
        return value if isinstance(value, Mapping) else {}

    @property
    def method(self) -> str | None:
        """The `quant_method` of config.json; None if there is none."""
        method = self.quantization.get("quant_method")
        return method if isinstance(method, str) else None

    def json(self, name: str) -> Mapping[str, Any]:
        """The object in a JSON file; empty if it cannot be read."""
        return self._parsed(name)[0]

    def json_fault(self, name: str) -> str | None:
        """Why a JSON file cannot be read; None if it can."""
        return self._parsed(name)[1]

    def _parsed(self, name: str) -> tuple[dict[str, Any], str | None]:
        if name not in self._objects:
            self._objects[name] = _parse(self.files, name)
        return self._objects[name]


def beside_the_weights(model: ServedModel) -> Iterator[str]:
    """A rule of every server: no file that a loader would read beside the artifact; see `stray_files`."""
    inside = [name for name in model.files if not name.endswith("/")]
    for name, reason in stray_files(inside, _listed_weights(model, inside)).items():
        yield f"{name}: {reason}"


def _listed_weights(model: ServedModel, inside: Sequence[str]) -> set[str]:
    """The index and the files that it names; without an index the single file, or all if none has its name."""
    if INDEX_NAME in inside:
        return {INDEX_NAME, *map(str, model.json(INDEX_NAME).get("weight_map", {}).values())}
    return {SINGLE_NAME} if SINGLE_NAME in inside else {name for name in inside if name.endswith(".safetensors")}


class FolderFiles(Mapping[str, bytes]):
    """The files of a folder by name, each read on demand; names of folders end with a slash."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        found = sorted(folder.rglob("*"))
        files = [path.relative_to(folder).as_posix() for path in found if path.is_file()]
        self._names = dict.fromkeys([*files, *(f"{path.relative_to(folder)}/" for path in found if path.is_dir())])

    def __getitem__(self, name: str) -> bytes:
        """The content.

        Raises:
            KeyError: the file does not exist.
            InputError: the file cannot be read, or is too large for one without weights.
        """
        if name not in self._names:
            raise KeyError(name)
        path = self._folder / name
        try:
            if (size := path.stat().st_size) > _LARGEST:
                raise InputError(f"{size} bytes are too many for this file; the limit is {_LARGEST}", where=name)
            return b"" if name.endswith("/") else path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", where=name) from error

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _parse(files: Mapping[str, bytes], name: str) -> tuple[dict[str, Any], str | None]:
    if name not in files:
        return {}, f"there is no {name}"
    try:
        value = parse_json(files[name], where=name)
    except InputError as error:
        if disk_failure(error, where=None):
            raise
        return {}, error.what
    return (value, None) if isinstance(value, dict) else ({}, f"must hold a JSON object, not {type(value).__name__}")


OTHER_LAYOUT: Final = "leave this layout out and choose another one"
REMOVE: Final = "remove these files from the base's folder"

ModelT = TypeVar("ModelT", bound=ServedModel)
Faults = Callable[[ModelT], Iterator[str]]


@dataclass(frozen=True)
class Check:
    """The result of one rule for one artifact.

    Attributes:
        name: the rule, in a few words.
        source: where the rule comes from: a file of the server's repository.
        passed: whether the artifact satisfies the rule.
        detail: the faults that were found.
    """

    name: str
    source: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.detail} ({self.source})"


@dataclass(frozen=True)
class Rule(Generic[ModelT]):
    """One rule of a server.

    Attributes:
        name: the rule in a few words, unique for a server.
        source: the file of the server's repository that it comes from.
        faults: the function that yields everything in an artifact that breaks the rule.
        mend: how to satisfy it, by changing the recipe or the base.
        disk: whether it needs a finished folder; if so it is not applied to plans.
    """

    name: str
    source: str
    faults: Faults[ModelT]
    mend: str = OTHER_LAYOUT
    disk: bool = False

    def check(self, model: ModelT) -> Check:
        """Whether an artifact satisfies the rule. Values of types that the rule cannot handle break it.

        Raises:
            InputError: the disk failed.
        """
        try:
            faults = list(self.faults(model))
        except (ArithmeticError, AttributeError, InputError, LookupError, TypeError, ValueError) as error:
            if disk_failure(error, where=None):
                raise
            faults = [f"cannot be judged: {type(error).__name__}: {error}"]
        detail = listed(faults, limit=3) if faults else "as required"
        return Check(self.name, self.source, not faults, detail)


class Rules(list[Rule[ModelT]]):
    """The rules of a server, or some of them, each made from the function that finds its faults."""

    def rule(
        self, name: str, source: str, mend: str = OTHER_LAYOUT, *, disk: bool = False
    ) -> Callable[[Faults[ModelT]], Faults[ModelT]]:
        """A decorator that adds a function as a rule; see `Rule` for the arguments."""

        def add(faults: Faults[ModelT]) -> Faults[ModelT]:
            self.append(Rule(name, source, faults, mend, disk))
            return faults

        return add


@dataclass(frozen=True)
class Server(Generic[ModelT]):
    """A server and its rules for artifacts.

    Attributes:
        name: with the version whose sources the rules come from.
        model: the class of an artifact as this server finds it.
        rules: all its rules.
    """

    name: str
    model: type[ModelT]
    rules: Sequence[Rule[ModelT]]

    def check(self, folder: Path) -> list[Check]:
        """One check per rule, from what is on disk: small files, and the headers of the weights.

        Rules that do not apply (those for GPTQ if nothing is quantized, for example) pass.

        Args:
            folder: an artifact of any layout, or any folder that `save_pretrained` wrote.
        """
        model = self.model.on_disk(folder)
        return [rule.check(model) for rule in self.rules]

    def refuse_folder(self, folder: Path) -> None:
        """Refuses a finished folder that breaks a rule.

        Raises:
            QexportError: a rule is broken; the error lists all that are.
        """
        checks = self.check(folder)
        if failed := [check for check in checks if not check.passed]:
            raise QexportError(
                f"{len(failed)} of {len(checks)} demands of {self.name} are not met",
                where=listed(list(map(str, failed))),
            )

    def refuse_plan(self, model: ModelT) -> None:
        """Refuses a planned artifact that would break a rule.

        Raises:
            CompatibilityError: a rule would be broken; the error lists all that would, and how to satisfy them.
        """
        checks = {rule: rule.check(model) for rule in self.rules if not rule.disk}
        if failed := {rule: check for rule, check in checks.items() if not check.passed}:
            mends = list(dict.fromkeys(rule.mend for rule in failed if rule.mend != OTHER_LAYOUT))
            raise CompatibilityError(
                f"{self.name} would not serve this",
                where=listed(list(map(str, failed.values()))),
                mend=listed(mends or [OTHER_LAYOUT]),
            )
