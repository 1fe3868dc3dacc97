"""Shares on their way through the server: AES-256-GCM (NIST SP 800-38D).

The key belongs to one direction between two clients in one round, and everything that says what
the bytes are for is authenticated with them.
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..errors import ProtocolError
from .keys import Purpose, Random, Secret, derive

__all__ = ["SEALING_OVERHEAD", "open_sealed", "seal"]

_NONCE, _TAG = 12, 16
SEALING_OVERHEAD = _NONCE + _TAG
"""Bytes a sealed message is longer than what it holds."""


def seal(
    shared: Secret, binding: bytes, sender: int, receiver: int, plain: Secret, random: Random
) -> bytes:
    """Encrypt for one receiver.

    Args:
        shared: what the two clients' sealing keys agree on.
        binding: digest of run, round, plan and participants.
        sender, receiver: their client numbers.
        plain: what only the receiver may read.
        random: draws the nonce, so that sealing twice by mistake reveals nothing.

    Returns:
        nonce (12 bytes), ciphertext, tag (16 bytes).
    """
    nonce = random(_NONCE)
    names = _names(binding, sender, receiver)
    return nonce + _encrypt(derive(shared, Purpose.SEALING, names), nonce, plain, names)


def _encrypt(key: Secret, nonce: bytes, plain: Secret, names: bytes) -> bytes:
    return AESGCM(key.value).encrypt(nonce, plain.value, names)


def open_sealed(
    shared: Secret, binding: bytes, sender: int, receiver: int, sealed: bytes
) -> Secret:
    """Decrypt what `seal` made for the same binding, sender and receiver.

    Raises:
        ProtocolError: any of them differs, or the bytes were changed. The caller names the sender.
    """
    names = _names(binding, sender, receiver)
    cipher = AESGCM(derive(shared, Purpose.SEALING, names).value)
    try:
        return Secret(cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], names))
    except (InvalidTag, ValueError):
        raise ProtocolError(
            "sealed shares do not open: changed on the way, or made for another run, round, "
            "plan, sender or receiver"
        ) from None


def _names(binding: bytes, sender: int, receiver: int) -> bytes:
    return binding + sender.to_bytes(4, "big") + receiver.to_bytes(4, "big")
