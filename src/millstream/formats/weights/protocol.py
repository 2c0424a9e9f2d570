"""How weights are stored, and what multiplying by them means.

Shapes: O outputs, I inputs, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from millstream.core.errors import UnknownName

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Packed:
    """One matrix (O, I) in some format: `parts` are its tensors by the format's own names, a bias among them."""

    format: str
    shape: tuple[int, int]
    parts: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def __getitem__(self, name: str) -> torch.Tensor:
        try:
            return self.parts[name]
        except KeyError:
            raise UnknownName(f"part of a {self.format} weight", name, self.parts) from None


class WeightFormat(Protocol):
    """A way to store a matrix. Stateless: everything about one matrix is in its Packed."""

    name: str

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None, calibration: Any = None) -> Packed:
        """Stores `weight` (O, I) and `bias` (O,). Memory may be shared with the arguments.

        `calibration` is what was seen of the inputs, for formats that choose their rounding by it.
        """
        ...

    def load(self, tensors: Mapping[str, torch.Tensor], name: str, bias: bool = False) -> Packed:
        """The matrix `name` out of a checkpoint that holds it in this format (`<name>.weight`, `<name>.bias`, ...).

        Raises KeyError for a tensor that is not there.
        """
        ...

    def shard(self, packed: Packed, side: str, rank: int, num_ranks: int) -> Packed:
        """The part of one rank: a run of outputs ("column") or of inputs ("row"; the bias stays with rank 0).

        Raises ConfigError when the side does not divide by the number of ranks.
        """
        ...

    def unpack(self, packed: Packed) -> torch.Tensor:
        """The matrix (O, I) as floats, without bias: what `linear` must agree with."""
        ...

    def rows(self, packed: Packed, which: torch.Tensor) -> torch.Tensor:
        """Rows `which` (T,) of the matrix, (T, I): an embedding. New memory."""
        ...

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, I) as `linear` multiplies it: itself, but for formats that round their inputs too."""
        ...

    def linear(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        """x (T, I) -> (T, O), bias added. The result is new memory that the caller may write to."""
        ...


class InProgram(Protocol):
    """What a format has besides when `ops/cpu/program.cpp` can multiply by it: layers then run as one native call."""

    def native(self, packed: Packed, first: int = 0, last: int | None = None) -> Any:
        """The outputs [first, last) of the matrix as `ops.cpu.program.Matrix`, which shares the memory of `packed`.

        `first` is a multiple of 32.
        """
        ...
