"""The wire between the two apps: in this process, or Flower's Ray simulation.

Both run `privet.server.app` and `privet.client.app` as they are, and give the same adapter bit
for bit (with the test seed, which a comparison needs).
"""

import os
import time
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from ..client.app import app as client_app
from ..common.config import Config
from ..common.errors import ConfigError, PrivetError
from ..server.app import serve
from . import progress
from .grid import LocalGrid

__all__ = ["ENGINES", "run"]

ENGINES = ("local", "ray")


def run(name: str, folder: Path, config: Config) -> None:
    """All rounds that are missing in `folder`.

    Raises:
        ConfigError: there is no engine of that name, or it is not installed.
    """
    if name not in ENGINES:
        raise ConfigError(f"--engine {name}: expected one of {', '.join(ENGINES)}")
    folder = folder.resolve()
    with progress.rounds(config, folder) as live:
        if name == "ray":
            _ray(folder, config, live.show)
        else:
            _local(folder, config, live)


def _local(folder: Path, config: Config, live: Any) -> None:
    from .simulate import add

    seconds = 0.0

    def timed(message: Message, context: Context) -> Message:
        nonlocal seconds
        began = time.perf_counter()
        reply = client_app(message, context)
        if message.metadata.message_type == "train.round":
            seconds += time.perf_counter() - began
            live.advance()
        return reply

    try:
        serve(LocalGrid(timed, config.data.clients, str(folder)), folder, live.show)
    finally:
        add(folder, training=seconds)


def _ray(folder: Path, config: Config, show: Any) -> None:
    try:
        from flwr.simulation import run_simulation
    except ImportError:
        raise ConfigError("--engine ray needs Ray: pip install 'privet[experiments]'") from None
    failed: list[BaseException] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, _: Context) -> None:
        try:
            serve(grid, folder, show)
        except PrivetError as error:
            failed.append(error)

    os.environ["PRIVET_RUN"] = str(folder)
    resources = {"num_cpus": config.speed.threads, "num_gpus": 0.0}
    run_simulation(
        server_app,
        client_app,
        num_supernodes=config.data.clients,
        backend_config={"client_resources": resources},
    )
    if failed:
        raise failed[0]
