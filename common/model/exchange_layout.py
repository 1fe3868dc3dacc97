"""What server and devices exchange: the state that is sent, and what of it a contribution holds.

    state      one adapter vector, or one for each cluster (`max_clusters`), in a row; the first
               `active_clusters` of them are there to pick from
    released   the numbers of a contribution, which the plan's layout digest names:

        a family's turn (`families.py`): every number of the adapter vector, or some of its
        factors

        clusters                 a vector for each cluster, zero but for the chosen one, and
                                 `members`: a number for each cluster, zero but for the chosen one

**Guarantee**: a contribution to one of several clusters is clipped as one vector, `members` and
all. Its l2 norm, and so what a client can move, is that of a contribution without clusters: the
choice is as private as the delta (client level). A client without records contributes zero and is
nobody's member, so that with its records and without differ by one clip at most. At example level
the choice is not private: a record that changes it moves the contribution from one block to
another, by up to sqrt(2) times the clip, so the settings refuse an example-level claim.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..errors import ProtocolError
from ..privacy.clipping import clip
from ..settings.sections import ClusterSettings
from .families import A, B, R, family_named
from .vector_layout import Layout

__all__ = ["MEMBERS", "Exchange", "Vector", "turns"]

Vector = NDArray[np.float32]

MEMBERS = "members"


def turns(layout: Layout) -> tuple[Layout, ...]:
    """Split a layout into what contributions hold in successive rounds.

    A shared head is released with the first turn.
    """
    family = family_named(layout.family)
    parts: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in family.turns]
    for piece in layout.pieces:
        factor = piece[0].removesuffix(".weight").rpartition(".")[2]
        if factor not in (A, B, R):
            parts[0].append(piece)
        for part, factors in zip(parts, family.turns, strict=True):
            if factor in factors:
                part.append(piece)
    return tuple(replace(layout, pieces=tuple(part)) for part in parts)


@dataclass(frozen=True, eq=False)
class Exchange:
    """The layouts of one run: what the server sends, and what devices contribute.

    Attributes:
        adapter: layout of one adapter vector.
        first: the adapter vector before the first round, shape (d,).
        clusters: how many clusters, and how they are told apart.
    """

    adapter: Layout
    first: Vector = field(repr=False)
    clusters: ClusterSettings

    @cached_property
    def state(self) -> Layout:
        """Layout of what the server keeps and sends, shape (clusters * d,)."""
        return self._wide(self.adapter)

    @property
    def start(self) -> Vector:
        """The state before the first round."""
        return (
            self.first
            if self.clusters.count == 1
            else np.tile(self.first, self.clusters.max_clusters)
        )

    def released(self, number: int) -> Layout:
        """Layout of a contribution to round `number`."""
        return self._turns[(number - 1) % len(self._turns)]

    @cached_property
    def _turns(self) -> tuple[Layout, ...]:
        count = self.clusters.max_clusters
        if count == 1:
            return turns(self.adapter)
        return (replace(self.state, pieces=(*self.state.pieces, (MEMBERS, (count,)))),)

    def _wide(self, layout: Layout) -> Layout:
        if self.clusters.count == 1:
            return layout
        every = range(self.clusters.max_clusters)
        pieces = tuple((f"cluster {index}: {n}", s) for index in every for n, s in layout.pieces)
        return replace(layout, pieces=pieces)

    def cluster_vectors(self, state: Vector) -> NDArray[np.float32]:
        """The adapter vector of each cluster, shape (clusters, d).

        Raises:
            ProtocolError: the state is not of this run's shape.
        """
        if state.shape != (self.state.dimension,):
            raise ProtocolError(
                f"expected a state of {self.state.dimension} numbers, got shape {state.shape}; "
                "both sides need the same clusters.count, clusters.extra and adapter settings"
            )
        return state.reshape(self.clusters.max_clusters, -1)

    def contribution(self, delta: Vector, cluster: int | None, bound: float) -> Vector:
        """Build the vector that a client hands to the gate.

        Args:
            delta: what it trained, as `released` has it for one adapter.
            cluster: the chosen one; private. None: the client has no records, and contributes
                zero: neither what the noise of its training made, nor a member.
            bound: the clip of the whole contribution.
        """
        count = self.clusters.max_clusters
        if cluster is None:
            return np.zeros(len(delta) * count + (count if count > 1 else 0), np.float32)
        if count == 1:
            return delta
        vectors = np.zeros((count, len(delta)))
        mark = np.zeros(count)
        mark[cluster] = self.mark(bound)
        if np.isfinite(delta).all():
            vectors[cluster] = clip(
                delta.astype(np.float64), (bound**2 - mark[cluster] ** 2) ** 0.5
            ).vector
        else:  # the gate says so
            vectors[cluster] = delta
        return np.concatenate([vectors.ravel(), mark]).astype(np.float32)

    def mark(self, bound: float) -> float:
        """Return the number that each member of a cluster adds to `members`."""
        return self.clusters.members_share * bound
