"""The part of an adapter that is trained and never leaves the device (fedsa's B).

Its file has its two last rounds.

**Guarantee**: nothing here is read by `client/privacy/gate.py`, `client/app.py` or
`client/privacy/masked_upload.py`. It was fitted on private records without DP. What a round trains
depends on it, as it does on the records; so a client-level claim holds, and no example-level one
can be made.

Two rounds are kept: a round that is begun again after a crash starts from what it started from
before, and gives the same bits.
"""

from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from ...common.errors import StateError

__all__ = ["added", "before"]

_KEPT = 2


def before(kept: bytes | None, number: int, dimension: int) -> NDArray[np.float32] | None:
    """Return what the last round before `number` left of the part that stays at home.

    None where there was none.

    Raises:
        StateError: the file is damaged, or of another adapter.
    """
    rounds = _read(kept)
    earlier = [one for one in rounds if one < number]
    if not earlier:
        return None
    factor = rounds[max(earlier)]
    if factor.shape != (dimension,) or factor.dtype != np.float32:
        raise StateError(
            f"what this device keeps of its adapter has {factor.shape} numbers, expected "
            f"{dimension}; remove it, and it is trained again"
        )
    return factor


def added(kept: bytes | None, number: int, own: NDArray[np.float32]) -> bytes:
    """Return the file after round `number`."""
    rounds = {past: values for past, values in _read(kept).items() if past < number}
    last = {past: rounds[past] for past in sorted(rounds)[-(_KEPT - 1) :]}
    return safetensors.numpy.save({str(past): v for past, v in {**last, number: own}.items()})


def _read(kept: bytes | None) -> Mapping[int, NDArray[np.float32]]:
    if kept is None:
        return {}
    try:
        return {int(name): values for name, values in safetensors.numpy.load(kept).items()}
    except (safetensors.SafetensorError, ValueError) as error:
        raise StateError(
            f"what this device keeps of its adapter is damaged ({error}); remove it, and it is "
            "trained again"
        ) from error
