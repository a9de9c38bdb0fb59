"""A YAML file as a tree, and the errors of the kinds of files that qexport reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qexport.errors import RecipeError
from qexport.yaml.document import Node, Origin, Problem
from qexport.yaml.parsing import SyntaxProblem, parse


@dataclass(frozen=True)
class FileKind:
    """What a file is called in its errors.

    Attributes:
        name: for example `recipe`.
        needs: what one must hold at least.
        reference: where its fields are described.
    """

    name: str
    needs: str
    reference: str

    def read(self, path: Path) -> tuple[Node, list[Problem]]:
        """The root, a mapping, and what was wrong with the YAML.

        Raises:
            RecipeError: there is no such file, it is not UTF-8, no YAML, or no mapping.
        """
        text = self._text(path)
        origin = Origin(str(path), path.absolute().parent)
        try:
            root, problems = parse(text, origin)
        except SyntaxProblem as error:
            raise self.error(path, [error.problem]) from error
        if root is None or not isinstance(root.value, Mapping):
            what = "is empty" if root is None or root.value is None else "is no mapping of keys to values"
            raise RecipeError(f"the {self.name} {what}", where=str(path), mend=self.needs)
        return root, problems

    def error(self, path: Path, problems: Sequence[Problem]) -> RecipeError:
        """All problems in one error, by their lines."""
        problems = sorted(problems, key=lambda problem: (problem.line is None, problem.line or 0))
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = "\n".join(f"  {problem}" for problem in problems)
        return RecipeError(f"the {self.name} has {count}:\n{listed}", where=str(path), mend=self.reference)

    def _text(self, path: Path) -> str:
        try:
            return path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecipeError(
                f"the {self.name} is not UTF-8: byte {error.start + 1} is 0x{error.object[error.start]:02x}",
                where=str(path),
                mend="save it as UTF-8",
            ) from error
        except OSError as error:
            raise RecipeError(
                f"the {self.name} cannot be read: {error.strerror}",
                where=str(path),
                mend="give the path of a YAML file",
            ) from error
