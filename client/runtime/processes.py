"""The two processes of a device: the supervisor in front, the worker behind it.

    privet client start    supervisor -> flower-supernode, and `privet client work`

Passphrase and secrets go from one to the other as open descriptors, never as arguments, which
everybody on the machine can read.
"""

import secrets
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...common.child_processes import Spec, privet_command, stop_on_signals, supervise
from ...common.errors import ConfigError, PrivetError, StateError
from ..consent import policy as policies
from ..consent.device_conditions import limit_process
from ..enrolled.access import unlock_of
from ..import_texts import watched_folders
from ..store.device_store import POLICY, DeviceStore
from ..store.erase import exclusive
from ..store.key_file import Passphrase, Unlock
from .supervisor import as_file_descriptor, descriptor_path, keep_to_itself, node_spec

if TYPE_CHECKING:
    from ..enrolled.participant import EnrolledParticipant
    from .worker import Handle

__all__ = ["free_port", "handler", "specs", "start", "watch", "work"]

SECRET_BYTES = 32
LONGEST_SECRET = 1024
DEFAULT_MINUTES = 15.0

Say = Callable[[str], None]


def start(folder: Path, passphrase: Path | None, port: int | None, say: Say) -> None:
    """Run SuperNode and worker, restarted when they end, until SIGINT or SIGTERM.

    Raises:
        StateError: no home, no server joined, or a worker is there already.
        ConfigError: the passphrase or the policy is wrong.
    """
    keep_to_itself()
    unlock = unlock_of(folder, passphrase)
    with exclusive(folder), DeviceStore.open(folder, unlock) as home:
        _ = home.policy  # a wrong one is said here, not by a worker that ends again and again
        children = specs(home, unlock, port or free_port())
        say(f"{home.folder} serves {home.joined.server if home.joined else ''}; stop with Ctrl-C")
    supervise(children, stop_on_signals(), say=say)


def specs(home: DeviceStore, unlock: Unlock, port: int) -> list[Spec]:
    """Describe the SuperNode and the worker that asks it on `port`.

    Raises:
        StateError: the device has joined no server.
    """
    joined = home.joined
    if joined is None:
        raise StateError("this device has joined no server: `privet client join` comes first")
    secret = secrets.token_bytes(SECRET_BYTES)
    key = None if joined.insecure else home.vault.get("node-key")
    certificates = None if joined.insecure else joined.ca.encode()
    node = node_spec(
        joined.server,
        port,
        key=key,
        certificates=certificates,
        secret=secret,
        insecure=joined.insecure,
        home=home.folder,
    )
    shared = as_file_descriptor(secret)
    command = privet_command("client", "work", "--home", home.folder, "--port", str(port))
    command += ("--secret-file", descriptor_path(shared), "--server", joined.server)
    given = [shared]
    if isinstance(unlock, Passphrase):
        given.append(as_file_descriptor(unlock.encoded()))
        command += ("--passphrase-file", descriptor_path(given[-1]))
    worker = Spec(
        "worker",
        command,
        pass_fds=tuple(given),
        orphaned=signal.SIGKILL,
        takes_down=(node.name,),
    )
    return [node, worker]


def work(
    folder: Path, passphrase: Path | None, port: int, secret: Path, server: str, say: Say
) -> None:
    """Run the worker, which answers the SuperNode on `port` until SIGTERM, one message at a time.

    Args:
        folder, passphrase: the home, and the file of what opens it.
        port: of the SuperNode's runtime API.
        secret: the file of the secret shared with the SuperNode.
        server: HOST:PORT that the SuperNode was started for.
        say: gets a line per event.

    Raises:
        StateError: another worker has this home.
    """
    from ..enrolled.participant import EnrolledParticipant
    from . import worker

    keep_to_itself()
    stop, busy = stop_on_signals(), threading.Lock()
    with exclusive(folder):
        resources = policies.read(folder / POLICY).resources
        limit_process(resources)
        with DeviceStore.open(folder, unlock_of(folder, passphrase)) as home:
            participant = EnrolledParticipant(home, server)
            watcher = threading.Thread(target=watch, args=(home, stop, busy, say), name="rescan")
            watcher.start()
            try:
                worker.work(
                    f"127.0.0.1:{port}",
                    handler(participant, busy, say),
                    stop=stop,
                    secret=_secret(secret),
                    idle_s=60 * resources.idle_minutes,
                    on_idle=participant.rest,
                    say=say,
                )
            finally:
                stop.set()
                watcher.join()


def handler(participant: "EnrolledParticipant", busy: threading.Lock, say: Say) -> "Handle":
    """Return the function that the worker calls with each message.

    `busy` is held while it runs.

    The app is imported with the first message, so that a worker nobody asks stays small.

    **Guarantee**: a device that has failed answers as one that declines, and, once it has touched
    what is private, at the same moment; `say` gets the type of the error and where it was raised.
    """

    def handle(message: Any, _context: Any) -> Any:
        with busy:
            from ..app import answer, greet, nothing
            from .worker import where

            if message.metadata.message_type == "query.hello":
                return greet(message, participant)
            participant.pace.begin()
            try:
                reply = answer(message, participant)
            except PrivetError as error:
                say(f"a message was declined after an error: {where(error)}")
                reply = nothing(message)
            participant.pace.settle()
            return reply

    return handle


def watch(home: DeviceStore, stop: threading.Event, busy: threading.Lock, say: Say) -> None:
    """Look for new records every `import_texts.rescan_minutes`, and wait while one is answered.

    What is wrong is said and tried again the next time; nothing ends this but `stop`.
    """

    def wait(_: object) -> None:
        while busy.locked() and not stop.is_set():
            stop.wait(0.1)
        if stop.is_set():
            raise _Stopped

    minutes = DEFAULT_MINUTES
    while not stop.is_set():
        try:
            minutes = home.policy.import_texts.rescan_minutes
            wait(None)
            scanned = watched_folders.rescan(home, progress=wait)
            if scanned.found or scanned.gone:
                say(f"{len(scanned.found)} files read, {scanned.records} records in all")
        except _Stopped:
            return
        except (ConfigError, StateError) as error:
            say(f"new records were not looked for: {error}")
        except Exception as error:  # its text might quote a file, and a log is no vault
            say(f"new records were not looked for: {type(error).__name__}")
        stop.wait(60 * minutes)


class _Stopped(Exception):
    """The signal to a scan that the worker ends."""


def free_port() -> int:
    """Return a port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _secret(path: Path) -> bytes:
    from ...common.files import explain_os_errors

    with explain_os_errors(path, "read the secret from"), open(path, "rb") as file:
        secret = file.read(LONGEST_SECRET)
    if len(secret) < SECRET_BYTES:
        raise StateError(
            f"{path}: expected at least {SECRET_BYTES} bytes; `privet client start` gives them"
        )
    return secret
