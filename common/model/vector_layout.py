"""The order of an adapter's numbers, and its digest."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """Which numbers a vector has, in which order: (name, shape) pieces of one flat vector."""

    family: str
    base: str
    pieces: tuple[tuple[str, tuple[int, ...]], ...]

    @cached_property
    def dimension(self) -> int:
        """Length of the vector that this layout describes."""
        return sum(int(np.prod(shape)) for _, shape in self.pieces)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of family, base model and pieces."""
        text = json.dumps(["privet layout 1", self.family, self.base, self.pieces])
        return hashlib.sha256(text.encode()).hexdigest()

    def places(self, part: "Layout") -> NDArray[np.intp]:
        """Where the numbers of `part`, some of these pieces, stand in this vector, in its order."""
        places, begin = {}, 0
        for name, shape in self.pieces:
            size = int(np.prod(shape))
            places[name] = np.arange(begin, begin + size)
            begin += size
        return np.concatenate([np.zeros(0, np.intp), *(places[name] for name, _ in part.pieces)])
