"""The ledger of a simulated run, which must hold everything that the run's rounds opened.

A ledger that is made when a run is prepared is never made again: an empty one in the place of one
that was lost would say that nothing was spent.
"""

from pathlib import Path

from ...common.errors import LedgerCorrupt, StateError
from ...common.files import read_lines
from .ledger import Ledger

__all__ = ["LEDGERS", "ledger_path", "run_id", "run_ledger"]

LEDGERS = "ledgers.sqlite"
_RESTORE = (
    "what was spent is unknown. Restore it from a copy, or start the run anew under another name "
    "with --set name=..."
)


def run_id(folder: Path) -> str:
    """Read the id of the run in `folder`.

    Raises:
        StateError: the file is missing or no text.
    """
    try:
        return (folder / "run-id").read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(
            f"{folder / 'run-id'} cannot be read ({error}): it names the run that the ledger and "
            "the checkpoint belong to; restore it from a copy, or start the run anew under "
            "another name"
        ) from None


def ledger_path(folder: Path) -> Path:
    """Return the path of a run's ledger.

    LedgerCorrupt if it is missing.
    """
    path = folder / LEDGERS
    if not path.exists():
        raise LedgerCorrupt(f"The ledger {path} is missing: {_RESTORE}.")
    return path


def run_ledger(folder: Path, run: str) -> Ledger:
    """Open the ledger of `run`, never creating it.

    Close it, so that it is one file again.

    **Guarantee**: for each round of `rounds.jsonl` that was opened it has at least as many releases
    as contributions were in the sum, or it is refused.

    Raises:
        LedgerCorrupt: missing, damaged, another run's, or with fewer releases than were summed.
        StateError: it cannot be read.
    """
    path = ledger_path(folder)
    ledger = Ledger.open(path, owner=run)
    kept = ledger.releases(run)
    for line in read_lines(folder / "rounds.jsonl"):
        number, summed = line.get("round"), line.get("answered", 0)
        if not line.get("void") and kept.get(number, 0) < summed:
            raise LedgerCorrupt(
                f"The ledger {path} has {kept.get(number, 0)} releases of round {number}, in whose "
                f"sum are {summed} contributions: a part of it is lost (was {path.name}-wal left "
                f"behind?), and {_RESTORE}."
            )
    return ledger
