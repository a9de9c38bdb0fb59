"""What somebody found who built an artifact again, as an in-toto statement that can be attached to it.

The format: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from qexport.artifact import Environment

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://github.com/qexport/qexport/attestations/rebuild/v1"


@dataclass(frozen=True)
class FirstDifference:
    """Where the first file that differs begins to differ.

    Attributes:
        file: its name.
        byte: the first byte that differs; None where the recorded file is not at hand.
        tensor: the tensor that has the byte, in a safetensors file.
        tensors: how many tensors of the file differ.
    """

    file: str
    byte: int | None = None
    tensor: str | None = None
    tensors: int | None = None

    def words(self) -> str:
        """The place for the terminal."""
        place = "" if self.byte is None else f", byte {self.byte}"
        tensor = "" if self.tensor is None else f", in {self.tensor} ({self.tensors} tensors of the file differ)"
        return f"{self.file}{place}{tensor}"


@dataclass(frozen=True)
class Rebuild:
    """The comparison of an artifact with what was built from the same inputs.

    Attributes:
        layout: the artifact's.
        manifest_sha256: the digest of the manifest that was followed.
        root: the artifact's root digest; None if only a manifest was given.
        inputs: the digests that were compared before anything was built, by input and file.
        recorded: what made the artifact: `qexport` and the environment.
        here: what built it again.
        files: the recorded digests of what was compared, by file.
        rebuilt: the digests of the new files.
        not_compared: the other files, each with the reason.
        first: where they begin to differ.
        causes: likely causes, the likeliest first; empty if nothing differs.
    """

    layout: str
    manifest_sha256: str
    root: str | None
    inputs: Mapping[str, Mapping[str, str]]
    recorded: tuple[str, Environment]
    here: tuple[str, Environment]
    files: Mapping[str, str]
    rebuilt: Mapping[str, str]
    not_compared: Mapping[str, str]
    first: FirstDifference | None = None
    causes: Sequence[str] = ()

    @property
    def different(self) -> list[str]:
        """The files whose bytes are not the recorded ones, that are missing, or that are not recorded."""
        return [name for name in {**self.files, **self.rebuilt} if self.files.get(name) != self.rebuilt.get(name)]

    @property
    def equal(self) -> bool:
        """Whether all that was compared has the recorded bytes."""
        return not self.different

    def statement(self) -> dict[str, Any]:
        """The in-toto statement. Its subjects are the files that were compared, by their recorded digests."""
        return {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(self.files.items())],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "result": "equal" if self.equal else "different",
                "artifact": {"layout": self.layout, "manifestSha256": self.manifest_sha256, "root": self.root},
                "inputs": {name: dict(digests) for name, digests in self.inputs.items()},
                "recorded": _maker(self.recorded),
                "builder": _maker(self.here),
                "different": [
                    {"name": name, "recorded": self.files.get(name), "rebuilt": self.rebuilt.get(name)}
                    for name in self.different
                ],
                "firstDifference": asdict(self.first) if self.first else None,
                "causes": list(self.causes),
                "notCompared": dict(self.not_compared),
            },
        }

    def lines(self) -> list[str]:
        """The result for the terminal."""
        checked = sum(map(len, self.inputs.values()))
        state = "equal" if self.equal else f"different: {', '.join(self.different)}"
        return [
            f"inputs    {checked} files have the recorded digests: {', '.join(self.inputs)}",
            f"files     {len(self.files)} compared, {state}",
            *(f"skipped   {name}: {reason}" for name, reason in self.not_compared.items()),
            *([f"first     {self.first.words()}"] if self.first else []),
            *(f"cause     {cause}" for cause in self.causes),
        ]


def _maker(maker: tuple[str, Environment]) -> dict[str, Any]:
    qexport, environment = maker
    return {"qexport": qexport, "environment": environment.model_dump(mode="json")}
