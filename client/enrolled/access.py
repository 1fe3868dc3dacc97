"""How a command finds the home it means, and how that home is unlocked.

A passphrase never stands on a command line, where every program of the machine could read it: it
comes from a file, a descriptor, systemd's credentials, or the terminal without an echo.
"""

import os
import sys
from pathlib import Path

from ...common.errors import ConfigError, StateError
from ...common.files import explain_os_errors
from ..store.device_store import DeviceStore
from ..store.key_file import KEY_FILE, Keyring, Passphrase, Unlock, unlock_kind
from ..store.vault import FILE, Vault

__all__ = ["folder_of", "from_environment", "new_unlock", "opened", "unlock_of"]

HOME, PASSPHRASE_FILE, CREDENTIALS = (
    "PRIVET_HOME",
    "PRIVET_PASSPHRASE_FILE",
    "CREDENTIALS_DIRECTORY",
)
CREDENTIAL_NAME = "privet-passphrase"
LONGEST = 65_536


def folder_of(home: Path | None) -> Path:
    """Return the home's folder as an absolute path.

    It is the one given, else `$PRIVET_HOME`, else the user's own.
    """
    named = home or os.environ.get(HOME)
    if named:
        return Path(os.path.abspath(Path(named).expanduser()))
    from platformdirs import user_data_path

    return user_data_path("privet")


def opened(home: Path | None, passphrase: Path | None) -> DeviceStore:
    """Open the home that a command means.

    The caller closes it.

    Raises:
        StateError: there is none, or it is damaged or newer.
        ConfigError: the passphrase is wrong, or there is nowhere to ask for it.
    """
    folder = folder_of(home)
    return DeviceStore.open(folder, unlock_of(folder, passphrase))


def unlock_of(folder: Path, passphrase: Path | None) -> Unlock:
    """Return how the home in `folder` is unlocked.

    In this order: the file named, the keyring where key.json says so, `$PRIVET_PASSPHRASE_FILE`,
    systemd's credential `privet-passphrase`, the terminal.

    Raises:
        StateError: there is no home.
        ConfigError: nothing says the passphrase, and there is no terminal to ask.
    """
    there = [os.path.lexists(folder / name) for name in (FILE, KEY_FILE)]
    if not any(there):
        raise StateError(
            f"there is no home in {folder}: make one with `privet client init`, or name another "
            f"with --home or ${HOME}"
        )
    if not all(there):
        Vault.open(folder, Passphrase("none")).close()  # says which half is missing
    if passphrase is None and unlock_kind(folder) == "keyring":
        return Keyring()
    found = passphrase or from_environment()
    return _read(found) if found is not None else _asked(f"Passphrase of {folder}", twice=False)


def new_unlock(passphrase: Path | None, keyring: bool, what: str) -> Unlock:
    """Return how a home will be unlocked from now on.

    A passphrase typed at the terminal is asked for twice.

    Args:
        passphrase: a file with it.
        keyring: the OS keyring instead.
        what: the question, such as "New passphrase".

    Raises:
        ConfigError: both were given; or neither, and there is no terminal to ask.
    """
    if keyring and passphrase is not None:
        raise ConfigError("a keyring and a passphrase were given: choose one of them")
    if keyring:
        return Keyring()
    return _read(passphrase) if passphrase is not None else _asked(what, twice=True)


def from_environment() -> Path | None:
    """Return the passphrase's file, where the environment or systemd names one."""
    if os.environ.get(PASSPHRASE_FILE):
        return Path(os.environ[PASSPHRASE_FILE])
    folder = os.environ.get(CREDENTIALS)
    if folder:
        found = Path(folder) / CREDENTIAL_NAME
        return found if found.exists() else None
    return None


def _read(path: Path) -> Passphrase:
    """Read a passphrase from a file that has it in one line.

    A descriptor will do as well, such as /dev/fd/3.
    """
    with explain_os_errors(path, "read the passphrase from"), open(path, "rb") as file:
        content = file.read(LONGEST)
    try:
        text = content.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        text = ""
    if not text or "\n" in text or len(content) == LONGEST:
        raise ConfigError(
            f"{path}: expected a passphrase in one line of UTF-8; correct the file, or name another"
        )
    return Passphrase(text)


def _asked(question: str, *, twice: bool) -> Passphrase:
    if not sys.stdin.isatty():
        raise ConfigError(
            f"a passphrase is needed, and there is no terminal to ask for it: give "
            f"--passphrase-file FILE, or set ${PASSPHRASE_FILE}"
        )
    import typer

    return Passphrase(typer.prompt(question, hide_input=True, confirmation_prompt=twice, err=True))
