"""How the programs that serve a layer round its inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

CodeType = Literal["int8", "float8"]
"""What inputs become: 127 steps on either side of zero, or e4m3."""


@dataclass(frozen=True)
class InputRounding:
    """Inputs of a linear layer that become 8-bit codes: symmetric, with a scale for each token or each block of one.

    Attributes:
        block: inputs that share a scale, the last of a token perhaps fewer; None for all inputs of a token.
        order: int64 [in], the input at each place of the blocks; None if they are in order.
        codes: what the inputs become.
    """

    block: int | None = None
    order: Tensor | None = field(default=None, compare=False)
    codes: CodeType = "int8"
