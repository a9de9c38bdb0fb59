"""The rules of a server, which an artifact must keep: asked of the plan before any work, and of the finished folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

from qexport.errors import CompatibilityError, InputError, QexportError, listed
from qexport.export.served import ServedModel

OTHER_LAYOUT: Final = "leave this layout out and choose another one"

ModelT = TypeVar("ModelT", bound=ServedModel)
Faults = Callable[[ModelT], Iterator[str]]


@dataclass(frozen=True)
class Check:
    """The result of one rule for one artifact.

    Attributes:
        name: the rule, in a few words.
        source: where the rule comes from: a file of the server's repository.
        passed: the artifact keeps it.
        detail: what was found.
    """

    name: str
    source: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.detail} ({self.source})"


@dataclass(frozen=True)
class Rule(Generic[ModelT]):
    """One demand of a server.

    Attributes:
        name: the demand in a few words; no two rules of a server have the same.
        source: the file of the server's repository that it comes from.
        faults: everything in an artifact that breaks the rule.
        mend: what can be done about it in a recipe, or in the base.
        disk: it needs what only a finished folder has, so it is left out for a plan.
    """

    name: str
    source: str
    faults: Faults[ModelT]
    mend: str = OTHER_LAYOUT
    disk: bool = False

    def check(self, model: ModelT) -> Check:
        """Whether an artifact keeps the rule. Values of a kind that the rule cannot judge break it."""
        try:
            faults = list(self.faults(model))
        except (ArithmeticError, AttributeError, InputError, LookupError, TypeError, ValueError) as error:
            faults = [f"cannot be judged: {type(error).__name__}: {error}"]
        detail = listed(faults, limit=3) if faults else "as demanded"
        return Check(self.name, self.source, not faults, detail)


class Rules(list[Rule[ModelT]]):
    """The rules of a server, or a part of them, each made of the function that looks for its faults."""

    def rule(
        self, name: str, source: str, mend: str = OTHER_LAYOUT, *, disk: bool = False
    ) -> Callable[[Faults[ModelT]], Faults[ModelT]]:
        """Adds the function that follows as a rule; see `Rule` for the arguments."""

        def add(faults: Faults[ModelT]) -> Faults[ModelT]:
            self.append(Rule(name, source, faults, mend, disk))
            return faults

        return add


@dataclass(frozen=True)
class Server(Generic[ModelT]):
    """A server, and what it demands of an artifact.

    Attributes:
        name: with the version that the rules were read in.
        model: how it sees an artifact.
        rules: everything that it demands.
    """

    name: str
    model: type[ModelT]
    rules: Sequence[Rule[ModelT]]

    def check(self, folder: Path) -> list[Check]:
        """One check for each rule, made from what lies on the disk: small files, and the headers of the weights.

        Rules that do not concern the folder (those of GPTQ, say, where nothing is quantized) pass.

        Args:
            folder: an artifact of any layout, or any folder that `save_pretrained` has written.
        """
        model = self.model.on_disk(folder)
        return [rule.check(model) for rule in self.rules]

    def refuse_folder(self, folder: Path) -> None:
        """Refuses a finished folder that breaks a rule.

        Raises:
            QexportError: with every rule that is broken.
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
            CompatibilityError: with every rule that would be broken, and what can be done about each.
        """
        checks = {rule: rule.check(model) for rule in self.rules if not rule.disk}
        if failed := {rule: check for rule, check in checks.items() if not check.passed}:
            mends = list(dict.fromkeys(rule.mend for rule in failed if rule.mend != OTHER_LAYOUT))
            raise CompatibilityError(
                f"{self.name} would not serve this",
                where=listed(list(map(str, failed.values()))),
                mend=listed(mends or [OTHER_LAYOUT]),
            )
