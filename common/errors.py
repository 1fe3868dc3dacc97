"""Every exception privet raises on purpose.

    PrivetError                 exit code 2: a sentence for the person at the keyboard
    ├── ConfigError             a setting: unknown key, wrong value, contradiction
    ├── DataError               records: missing, unreadable, wrongly shaped
    ├── AssetError              catalogue: missing, damaged, no network
    ├── ModelError              base model: unknown architecture, tokenizer, vocabulary
    ├── AdapterError            adapter: shape, layout hash, trainable set
    ├── PrivacyError            the privacy path refuses
    │   ├── GateRefused         a contribution is non-finite, wrongly shaped or wrongly hashed
    │   └── BudgetExceeded      the next release would exceed the device's budget
    ├── StateError              files privet wrote: run folder, checkpoint, ledger
    │   ├── RunExists           the run folder holds a run already
    │   ├── RunUnfinished       a run ended without its rounds: exit code 1
    │   ├── CheckpointCorrupt   a checkpoint does not verify; it was kept aside
    │   └── LedgerCorrupt       a ledger does not verify; it was kept aside or left untouched
    └── ProtocolError           bytes from a peer: names the sender and the round
        └── RoundVoid           too few parties are left: no sum is revealed

A message says what was expected, the name, the value if it is not secret, and what to do.
"""

__all__ = [
    "FAILED",
    "AdapterError",
    "AssetError",
    "BudgetExceeded",
    "CheckpointCorrupt",
    "ConfigError",
    "DataError",
    "GateRefused",
    "LedgerCorrupt",
    "ModelError",
    "PrivacyError",
    "PrivetError",
    "ProtocolError",
    "RoundVoid",
    "RunExists",
    "RunUnfinished",
    "StateError",
]


FAILED = "this device could not take part; the reason is in its own log"
"""All that a server learns of a device's failure."""


class PrivetError(Exception):
    """Base class of privet's exceptions.

    Its message is a full sentence, printed without a traceback.
    """

    exit_code = 2


class ConfigError(PrivetError):
    """A setting is unknown, wrong, or contradicts another."""


class DataError(PrivetError):
    """Records are missing, unreadable or wrongly shaped."""


class AssetError(PrivetError):
    """A catalogue artefact is missing or damaged and could not be fetched."""


class ModelError(PrivetError):
    """A base model cannot be used as asked."""


class AdapterError(PrivetError):
    """An adapter's shape, layout hash or trainable set is not what was agreed."""


class PrivacyError(PrivetError):
    """The privacy path refuses to go on."""


class GateRefused(PrivacyError):
    """The gate got a contribution that it must not release. Nothing was spent."""


class BudgetExceeded(PrivacyError):
    """The next release would exceed the device's own budget. Nothing was spent."""


class StateError(PrivetError):
    """A file privet wrote is not usable."""


class RunExists(StateError):
    """The run folder holds a run already."""


class RunUnfinished(StateError):
    """A run ended before all its rounds were done.

    What is done is kept, and the run can be resumed.
    """

    exit_code = 1


class CheckpointCorrupt(StateError):
    """A checkpoint does not verify."""


class LedgerCorrupt(StateError):
    """A ledger does not verify."""


class ProtocolError(PrivetError):
    """Bytes from a peer are not what the protocol allows."""


class RoundVoid(ProtocolError):
    """Too few parties are left for a masked sum.

    Nothing was revealed, and what was spent stays spent.
    """
