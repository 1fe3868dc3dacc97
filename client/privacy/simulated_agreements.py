"""X25519 agreements of simulated devices: one computation for the two ends of a pair.

Devices that one process simulates have both private keys of a pair there, and both agree on the
same secret (RFC 7748, section 6.1), which is the dearest step of a masked round. A person's device
has one end only and takes `RoundKey.agreement` itself: it keeps nothing of an agreement.
"""

from collections.abc import Callable

from ...common.secure_aggregation.keys import RoundKey, Secret

__all__ = ["SimulatedAgreements"]

MAX_KEPT = 1 << 17
"""Agreements that wait for their other end, which may have dropped out: 40 MB."""


class SimulatedAgreements:
    """Agreements that one end has computed, kept until the other end asks.

    **Guarantee**: each answer is what `RoundKey.agree` gives: what is kept is found by both public
    keys, each computed from its private half by the device that holds it. A key that is refused is
    refused at every end, because nothing is kept of it.
    """

    def __init__(self) -> None:
        self._kept: dict[bytes, Secret] = {}

    def of(self, key: RoundKey) -> Callable[[bytes], Secret]:
        """Return the function peer's public key -> shared secret, as `RoundKey.agreement` does."""
        agree = key.agreement()

        def shared(public: bytes) -> Secret:
            pair = min(key.public, public) + max(key.public, public)
            found = self._kept.pop(pair, None)
            if found is None:
                found = agree(public)
                if len(self._kept) >= MAX_KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[pair] = found
            return found

        return shared
