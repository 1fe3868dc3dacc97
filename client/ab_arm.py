"""Which arm of an A/B experiment a device is in."""

from ..common.secure_aggregation.keys import Purpose, Secret, derive

__all__ = ["arm_of"]


def arm_of(key: Secret, run: str, count: int) -> int:
    """Return the index of this device's arm in an A/B run, the same in all rounds of the run.

    It lies in 0 .. count - 1, each as likely as the others.

    **Guarantee**: a keyed hash (HKDF with HMAC-SHA256) of the run's public id under a key of the
    device's own. Neither the server nor the device's records decide it, and it is not sent.
    """
    return int.from_bytes(derive(key, Purpose.ARM, run.encode()).value) % count
