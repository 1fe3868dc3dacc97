"""The wire between the two apps: in this process, or Flower's Ray simulation.

Both run `privet.server.app` and `privet.client.app` as they are, and give the same adapter bit
for bit (with the test seed, which a comparison needs).
"""

import contextlib
import functools
import importlib.util
import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from flwr.app import Context, Error, Message
from flwr.serverapp import Grid, ServerApp

from ..client.app import app as client_app
from ..client.simulated import SimulatedContext, learn_together
from ..client.training.local_training import Trainer
from ..common.errors import ConfigError, StateError
from ..common.files import read_lines
from ..common.model.adapter import shared
from ..common.privacy.round_plan import Plan
from ..common.settings.config import Config
from ..server.app import serve
from ..server.round_record import LOG
from ..server.rounds import Show
from . import progress, run_costs
from .forked_grid import ForkedGrid
from .grid import Done, LocalGrid, Together

__all__ = ["ENGINES", "check", "run"]

ENGINES = ("local", "ray")
LOST = "lost, by simulation.dropout"
Answers = Callable[[Message, Context], Message]
Loss = Literal["before", "after"]
TRAINING = ("train.round", "train.vector")
PHASES = ("keys", "shares", "vector", "confirm", "unmask")


def check(name: str) -> None:
    """Refuse an engine that is not there, before anything is written.

    Raises:
        ConfigError: there is no engine of that name, or it is not installed.
    """
    if name not in ENGINES:
        raise ConfigError(f"--engine {name}: expected one of {', '.join(ENGINES)}")
    if name == "ray" and importlib.util.find_spec("ray") is None:
        raise ConfigError("--engine ray needs Ray: pip install 'privet[experiments]'")


def run(name: str, folder: Path, config: Config) -> None:
    """Run all rounds that are missing in `folder`.

    Raises:
        ConfigError: as `check`.
    """
    check(name)
    folder = folder.resolve()
    with progress.rounds(config, folder) as live:
        if name == "ray":
            _ray(folder, config, live.show)
        else:
            _local(folder, config, live)


def _local(folder: Path, config: Config, live: progress.Live) -> None:
    """Run in this process, or in forks of it where `speed.processes` asks for several."""
    seconds = 0.0

    def done(kind: str, took_s: float) -> None:
        nonlocal seconds
        if kind in TRAINING:
            seconds += took_s / config.speed.processes
            live.advance()

    try:
        with _grid(folder, config, done) as grid:
            serve(grid, folder, live.show)
    finally:
        run_costs.add(folder, training=seconds)


@contextlib.contextmanager
def _grid(folder: Path, config: Config, done: Done) -> Iterator[LocalGrid]:
    app = functools.partial(mortal, config, told, folder=folder)
    clients, processes = config.data.clients, config.speed.processes
    together = Together(config.speed.together, functools.partial(train_ahead, folder))
    if processes == 1:
        yield LocalGrid(app, clients, str(folder), done, together)
        return
    device = shared(config).base.compute.device
    if device.type != "cpu":
        raise ConfigError(
            f"speed.processes = {processes}: forked processes cannot share {device}; set "
            'speed.processes = 1, or compute.device = "cpu"'
        )
    SimulatedContext.open.cache_clear()  # no process goes on with the ledger of another
    Trainer.of(shared(config), config.speed.cache_mb, config.pairs)  # before the fork: one for all
    with ForkedGrid(app, clients, str(folder), done, processes, together) as grid:
        yield grid


def train_ahead(folder: Path, messages: Sequence[tuple[int, Message]]) -> None:
    """Train the devices of several messages in one batch, where they ask for training."""
    if len(messages) == 1 or messages[0][1].metadata.message_type not in TRAINING:
        return
    context, content = SimulatedContext.open(folder), messages[0][1].content
    if context.config.ab_run is None:
        devices = [context.device(number) for number, _ in messages]
        plan = Plan.from_dict(dict(content["plan"]))
        learn_together(context, devices, plan, content["adapter"]["vector"].numpy())


def mortal(
    config: Config, app: Answers, message: Message, context: Context, folder: Path | None = None
) -> Message:
    """Run the ClientApp of a device that may die before or after it has handled a message."""
    loss = _lost(config, message, int(context.node_config["partition-id"]), folder)
    reply = None if loss == "before" else app(message, context)
    return Message(Error(code=0, reason=LOST), reply_to=message) if reply is None or loss else reply


def _lost(config: Config, message: Message, client: int, folder: Path | None = None) -> Loss | None:
    """Return whether this device dies here, at a phase of the round drawn by public seed.

    A void round that is asked again under its number has other weather: `folder` says how often.
    """
    kind = message.metadata.message_type.partition(".")[2]
    if not config.simulation.dropout or kind == "hello":
        return None
    phases = ("round",) if kind == "round" else PHASES
    number = int(message.content["plan"]["round"])
    again = 0 if folder is None else _asked_before(folder / LOG, number)
    rng = np.random.default_rng([config.data.seed, number, client, *([again] if again else [])])
    if rng.random() >= config.simulation.dropout:
        return None
    fatal, side = int(rng.integers(len(phases))), rng.random()
    here = phases.index(kind)
    if here > fatal:
        return "before"
    return ("before" if side < 0.5 else "after") if here == fatal else None


def _asked_before(log: Path, number: int) -> int:
    return _voids(log, log.stat().st_size).get(number, 0) if log.exists() else 0


@functools.lru_cache(maxsize=1)
def _voids(log: Path, _size: int) -> dict[int, int]:
    """Count how often each round was void and is asked again.

    The log is read when it has grown.
    """
    return dict(Counter(one["round"] for one in read_lines(log) if one.get("again")))


def _ray(folder: Path, config: Config, show: Show) -> None:
    """Run on a Ray of this process's own or, where RAY_ADDRESS names one, on a cluster."""
    from flwr.simulation import run_simulation

    for name in ("flwr", "ray"):  # both log every step, and each error with its traceback
        logging.getLogger(name).setLevel(logging.CRITICAL)
    failed: list[BaseException] = []
    stopped = threading.Event()
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, _: Context) -> None:
        try:
            serve(_Strict(grid, stopped), folder, show)
        except BaseException as error:
            failed.append(error)

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns of its future
    resources = {"num_cpus": config.speed.threads, "num_gpus": _share_of_a_card(config)}
    try:
        run_simulation(
            server_app,
            functools.partial(
                at, str(folder), functools.partial(mortal, config, told, folder=folder)
            ),
            num_supernodes=config.data.clients,
            backend_config={
                "client_resources": resources,
                "init_args": {"log_to_driver": False, "logging_level": "CRITICAL"},
            },
        )
    finally:
        stopped.set()
    if failed:
        raise failed[0]


def _share_of_a_card(config: Config) -> float:
    """Return what each of Ray's actors gets of a GPU; 0 where the base model is on none.

    Raises:
        ConfigError: the run names a card that is not the first: Ray deals them out itself.
    """
    base = shared(config).base
    device = base.compute.device
    if device.type != "cuda":
        return 0.0
    if device.index:
        raise ConfigError(
            f'--engine ray deals the cards out itself, so compute.device = "{device}" cannot be '
            'had: set compute.device = "cuda"; CUDA_VISIBLE_DEVICES says which cards there are'
        )
    weights = sum(value.nbytes for value in base.network.parameters())
    cores = (os.cpu_count() or 1) // config.speed.threads
    return share_of_a_card(weights, torch.cuda.get_device_properties(device).total_memory, cores)


def share_of_a_card(weights: int, card: int, cores: int) -> float:
    """Return an actor's share of a card, so that as many are made as fit into its memory.

    Reckoned, not measured: an actor needs its own base model three times (weights, and what a chunk
    takes on its way) and a gigabyte. The server's process is on the card too.

    Args:
        weights: of the base model, bytes.
        card: its memory, bytes.
        cores: actors that the processors allow; more would wait.

    >>> share_of_a_card(weights=1 << 30, card=24 << 30, cores=16)
    0.2
    >>> share_of_a_card(weights=16 << 30, card=24 << 30, cores=16)
    1.0
    """
    fit = card // (3 * weights + (1 << 30)) - 1
    return math.floor(1e4 / max(1, min(fit, cores))) / 1e4  # Ray counts in ten-thousandths


def at(folder: str, app: Answers, message: Message, context: Context) -> Message:
    """Run the ClientApp in a process that may be older than this run, as a cluster's are."""
    os.environ["PRIVET_RUN"] = folder
    return app(message, context)


def told(message: Message, context: Context) -> Message:
    """Run the ClientApp, and raise what went wrong on a device.

    Only a simulation may tell that.
    """
    try:
        return client_app(message, context)
    except StateError as failed:
        raise failed.__cause__ or failed from None


class _Strict:
    """A grid on which a device that fails ends the run, as it does in the other engine.

    Args:
        grid: Flower's.
        stopped: set at Ctrl-C, which Flower tells the devices' side only; the server's thread
            would wait for replies until its timeout.
    """

    def __init__(self, grid: Grid, stopped: threading.Event) -> None:
        self._grid, self._stopped = grid, stopped

    def __getattr__(self, name: str) -> object:
        return getattr(self._grid, name)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Replies as they arrive.

        Raises:
            StateError: a device failed; in its own words.
            KeyboardInterrupt: the run was stopped.
        """
        if self._stopped.is_set():
            raise KeyboardInterrupt
        for message in self._grid.pull_messages(message_ids):
            if message.has_error() and message.error.reason != LOST:
                # Flower and Ray put their own tracebacks around what the device said
                said = message.error.reason.rpartition(" occurred. Message: ")[2]
                raise StateError(said.removesuffix("'>"))
            yield message
