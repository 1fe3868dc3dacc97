"""The grid of `grid.py` with its nodes in several processes of this machine, which share one model.

The processes are forked once, when the model is loaded and nothing is asked yet, so its weights are
in memory once. A node stays in its process: what it keeps between the phases of a round stays there
too. Each process computes with one thread, because a process that is forked must not use the
threads of the one it comes from.
"""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

import torch
from flwr.app import Message

from ..common.errors import StateError
from .grid import App, Done, LocalGrid, Together

__all__ = ["ForkedGrid"]

END_S = 10.0
"""A process that is told to end has this long for the message it works on."""


@dataclass
class _Process:
    """A forked process, its wire, and what kind of message it works on, one for each."""

    process: ForkProcess
    wire: Connection
    busy: list[str] = field(default_factory=list)


class ForkedGrid(LocalGrid):
    """`clients` nodes, spread over `processes` processes by their number.

    A context manager: at its end all processes have ended. Replies come as they are ready.

    Args:
        app, clients, run, done, together: as `LocalGrid`.
        processes: how many.

    Raises:
        StateError: from `pull_messages`: a process has died, as it does where memory runs out.
    """

    def __init__(
        self,
        app: App,
        clients: int,
        run: str,
        done: Done,
        processes: int,
        together: Together,
    ) -> None:
        super().__init__(app, clients, run, done, together)
        fork = multiprocessing.get_context("fork")
        self._processes: list[_Process] = []
        self._answered: list[Message] = []
        for _ in range(processes):
            here, there = fork.Pipe()
            inherited = [here, *(one.wire for one in self._processes)]
            process = fork.Process(target=self._work, args=(there, inherited), daemon=True)
            process.start()
            there.close()
            self._processes.append(_Process(process, here))

    def __enter__(self) -> "ForkedGrid":
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._processes:
            one.wire.close()
        until = time.monotonic() + END_S
        for one in self._processes:
            one.process.join(max(0.0, until - time.monotonic()))
            one.process.kill()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Have the processes handle the messages, and yield each reply when it is there."""
        theirs: list[list[Message]] = [[] for _ in self._processes]
        for name in sorted(set(message_ids) & set(self._pending), key=int):
            message = self._pending.pop(name)
            theirs[message.metadata.dst_node_id % len(theirs)].append(message)
        waiting = [self._together.parts(messages) for messages in theirs]
        while any(waiting) or self._answered or any(one.busy for one in self._processes):
            for one, parts in zip(self._processes, waiting, strict=True):
                if parts and not one.busy:
                    some = parts.pop(0)
                    one.wire.send(some)
                    one.busy = [message.metadata.message_type for message in some]
            if not self._answered:
                self._receive()
            while self._answered:
                yield self._answered.pop(0)

    def _receive(self) -> None:
        """Wait for answers, and raise what went wrong in a process."""
        for wire in wait([one.wire for one in self._processes if one.busy]):
            one = next(one for one in self._processes if one.wire is wire)
            try:
                answer = one.wire.recv()
            except EOFError:
                one.process.join(1.0)
                raise StateError(
                    f"a process of speed.processes = {len(self._processes)} has ended in the "
                    f"middle of its work (exit code {one.process.exitcode}); if memory ran out, "
                    "take fewer, and go on with --resume"
                ) from None
            if isinstance(answer, BaseException):
                raise answer
            kind = one.busy.pop(0)
            reply, seconds = answer
            self._done(kind, seconds)
            self._answered.append(reply)

    def _work(self, wire: Connection, inherited: list[Connection]) -> None:
        """Answer messages in the forked process until the wire is closed."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process says when it is over
        for other in inherited:
            other.close()
        torch.set_num_threads(1)
        with contextlib.suppress(EOFError, BrokenPipeError):
            while True:
                messages = wire.recv()
                try:
                    for answer in self._handled(messages):
                        wire.send(answer)
                except Exception as error:
                    wire.send(error)
        os._exit(0)
