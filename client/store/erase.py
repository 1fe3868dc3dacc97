"""The erasure of a vault, with proof (`destroy`), and the one worker's place in it (`exclusive`).

**Guarantee**: the key goes first. Whatever interrupts a destruction, what is left of the vault
cannot be opened, and the next call finishes it.

**Not covered**: copies and snapshots made elsewhere; a disk that moves blocks may keep an
overwritten key.json, which is worth no more than what it was wrapped with
(`client/store/key_file.py`).
"""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...common.errors import ConfigError, StateError
from ...common.files import explain_os_errors, sync_folder
from .key_file import KEY_FILE, KeyringBackend, Passphrase, erase_key
from .vault import FILE, Vault

__all__ = ["LOCK", "Erased", "destroy", "exclusive"]

LOCK = "worker.lock"


@dataclass(frozen=True)
class Erased:
    """The report of what `destroy` erased, for a person to read (`str`).

    Attributes:
        folder: the vault's folder.
        key_sha256: SHA-256 of key.json before, hex; "" where there was none any more. A copy of
            the file elsewhere is recognised by it, and must be destroyed too.
        keyring: what became of the OS keyring's entry.
        refusal: what an attempt to open the vault said once the key was gone.
        removed: the names of the files removed after that, with their sizes in bytes.
        kept: what else is in the folder, and is not the vault's.
    """

    folder: str
    key_sha256: str
    keyring: str
    refusal: str
    removed: tuple[tuple[str, int], ...]
    kept: tuple[str, ...]

    def __str__(self) -> str:
        key = self.key_sha256 or "no key.json was there any more"
        files = [f"  {name} ({size} bytes)" for name, size in self.removed]
        return "\n".join(
            [
                f"The vault in {self.folder} was erased.",
                f"1. key.json was overwritten and removed. SHA-256 before: {key}",
                f"   OS keyring: {self.keyring}.",
                f"2. Opening the vault was tried then: {self.refusal}",
                "3. Removed:",
                *(files or ["  nothing"]),
                f"Left, because the vault did not write it: {', '.join(self.kept) or 'nothing'}.",
                "Copies and snapshots made elsewhere are not erased; without key.json they cannot "
                "be opened either.",
            ]
        )


def destroy(folder: str | os.PathLike[str], *, keyring: KeyringBackend | None = None) -> Erased:
    """Erase the vault in `folder`: its key first, then its files.

    No passphrase is needed.

    A destruction that was interrupted is finished by the next one. Links are not followed, and
    files the vault did not write are left.

    Args:
        folder: the vault's folder.
        keyring: the keyring that has the entry; None finds the system's own.

    Raises:
        StateError: a worker has the vault (stop it first), there is none, the key could not be
            destroyed (then nothing was erased), or it was and the vault still opens.
    """
    folder = Path(os.path.abspath(folder))
    if not any(os.path.lexists(folder / name) for name in (FILE, KEY_FILE)):
        raise StateError(f"There is no vault in {folder}: nothing was erased.")
    with exclusive(folder):
        key = erase_key(folder, keyring)
        refusal = _refusal(folder)
        with explain_os_errors(folder, "erase the vault in"):
            removed = [(path.name, _unlink(path)) for path in _own_files(folder)]
            sync_folder(folder)
            kept = sorted(path.name for path in folder.iterdir())
    return Erased(os.fspath(folder), key.sha256, key.keyring, refusal, tuple(removed), tuple(kept))


def _refusal(folder: Path) -> str:
    """Prove that the vault cannot be opened, by trying to.

    Without key.json it does not matter with what.
    """
    try:
        Vault.open(folder, Passphrase("any")).close()
    except StateError as error:
        if not os.path.lexists(folder / KEY_FILE):
            return str(error)
    except ConfigError:  # it was asked for a passphrase: there is a key
        pass
    raise StateError(
        f"The key {folder / KEY_FILE} was destroyed and is there again: somebody put a copy back. "
        "Find out who, and erase again."
    )


def _own_files(folder: Path) -> list[Path]:
    """Return the vault's files and what a kill may have left of them.

    The lock is the last.
    """
    names = [FILE, *(f"{FILE}-{suffix}" for suffix in ("wal", "shm", "journal"))]
    left = sorted(folder.glob(f".{FILE}.*.tmp*"))
    every = [*(folder / name for name in names), *left, folder / LOCK]
    return [path for path in every if os.path.lexists(path) and _is_plain(path)]


def _is_plain(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _unlink(path: Path) -> int:
    size = path.lstat().st_size
    path.unlink()
    return size


@contextmanager
def exclusive(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the worker's place in a home, which one process at a time can have.

    It is given back also by a crash.

    Raises:
        StateError: another process has it (its number is named), or the folder is not writable.
    """
    path = Path(os.path.abspath(folder)) / LOCK
    with explain_os_errors(path, "lock"):
        handle = _locked(path)
    try:
        with explain_os_errors(path, "lock"):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _locked(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # `destroy` removes the file: a lock on a file without a name holds nobody back.
            if os.path.lexists(path) and os.path.samestat(os.fstat(handle), os.lstat(path)):
                return handle
        except BlockingIOError:
            holder = os.pread(handle, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise StateError(
                f"A worker (process {holder}) is using {path.parent} already; there is one at a "
                "time for a home. Stop that process, or use another --home."
            ) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
