"""A server and devices on this machine for the benchmarks: TLS, registered keys, own processes."""

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ...client.consent import policy as policies
from ...client.consent.policy_settings import Policy
from ...client.enrolled import join
from ...client.import_texts import watched_folders
from ...client.runtime.processes import free_port
from ...client.store.device_store import POLICY, DeviceStore
from ...client.store.key_file import Passphrase
from ...common.child_processes import privet_command
from ...common.errors import StateError
from ...common.settings.config import Config, parse
from ...server.operations import control, device_runs, enrolment, proxy, services, setup
from ...server.operations.server_folder import Server
from ...server.round_record import RoundRecord, read_records
from ..data.made_model import save_made_model
from .harness import Program, listening, program, wait_for

__all__ = [
    "Up",
    "followed",
    "homes",
    "people",
    "quiet",
    "run_config",
    "server_up",
    "tiny_model",
]

PASSPHRASE = "own"
WORDS = tuple(a + b for a in "bdgklm" for b in ("an", "er", "ir", "os", "uta"))
OWNER: Mapping[str, Mapping[str, object]] = {
    "budget": {"client": 1e5, "example": 1e5},
    "limits": {"min_cohort": 3, "colluding": 0.0, "min_example_noise": 0.0},
    "when": {"max_load": 1000.0},
    "resources": {"nice": 0},
    "consent": {"ask": False},
}


@dataclass(frozen=True)
class Up:
    """A running server: its folder, address, certificate and programs.

    Attributes:
        server: its folder.
        address: where devices reach it: the proxy, or the SuperLink itself where there is no nginx.
        authority: the certificate they trust there.
        programs: `superlink`, `superexec` and, if there, `proxy`.
        env: the environment these were started with.
    """

    server: Server
    address: str
    authority: Path
    programs: Mapping[str, Program]
    env: dict[str, str]


@contextmanager
def server_up(folder: Path) -> Iterator[Up]:
    """Run `privet server init` and `up` in `folder / "server"`, until the block ends."""
    server = setup.init(folder / "server", ["localhost"], port=free_port(), inner_port=free_port())
    nginx = proxy.find_nginx()
    lines = dict(services.commands(server, nginx))
    if nginx is None:
        del lines["proxy"]
    env = {**os.environ, **services.environment(server), "PYTHONUNBUFFERED": "1"}
    programs: dict[str, Program] = {}
    with ExitStack() as stack:
        for name, line in lines.items():
            programs[name] = stack.enter_context(program(list(line), env))
            if name == "superlink":
                wait_for(lambda: listening(server.inner), 90, "the SuperLink")
        outside = f"localhost:{server.port}"
        if nginx is None:
            yield Up(server, server.inner, server.certificate("internal-ca.crt"), programs, env)
        else:
            wait_for(lambda: listening(outside), 30, "the proxy")
            yield Up(server, outside, server.folder / "ca.crt", programs, env)


def quiet(_: str) -> None:
    """Ignore a line that would be shown."""


def homes(folder: Path, up: Up, count: int, models: list[str]) -> list[Path]:
    """Make `count` devices with a few records each, joined and enrolled but not running."""
    found, cards = [], []
    allowed = Policy.model_validate({**OWNER, "allowed": {"models": models}})
    (folder / "pass").write_text(PASSPHRASE)
    for number in range(count):
        home, texts = folder / f"home{number}", folder / f"texts{number}"
        texts.mkdir()
        draw = random.Random(number)
        lines = [" ".join(draw.choices(WORDS, k=40)) for _ in range(40)]
        (texts / "notes.txt").write_text("\n\n".join(lines))
        with DeviceStore.create(home, Passphrase(PASSPHRASE), f"device {number}") as made:
            (home / POLICY).write_text(policies.text(allowed))
            join.join(made, join.Asked(up.address, up.authority, None, insecure=False))
            watched_folders.rescan(made, roots=[str(texts)])
            cards.append(folder / f"card{number}.json")
            cards[-1].write_text(made.card)
        found.append(home)
    enrolment.enrol(up.server, cards, quiet)
    return found


@contextmanager
def people(homes: list[Path]) -> Iterator[list[Program]]:
    """Run `privet client start` for each home, until the block ends."""
    with ExitStack() as stack:
        started = []
        for home in homes:
            opened = ("--home", home, "--passphrase-file", home.parent / "pass")
            command = privet_command("client", "start", *opened)
            env = {**os.environ, "PYTHONUNBUFFERED": "1"}
            started.append(stack.enter_context(program(list(command), env)))
        yield started


def run_config(name: str, base: str, count: int, rounds: int, **changes: object) -> Config:
    """Make the settings of a run of masked rounds of all devices.

    `changes` replace whole sections.

    A sum needs all of three devices, of which none may collude: how long a round takes does not
    depend on it.
    """
    table: dict[str, object] = {
        "name": name,
        "data": {
            "source": "devices",
            "clients": count,
            "records_per_client": 32,
            "max_tokens": 16,
            "task": "generation",
        },
        "model": {"base": base},
        "adapter": {"rank": 16, "last_blocks": 4},
        "training": {"batch_size": 4},
        "rounds": {"count": rounds, "cohort": count, "timeout_s": 900.0, "answer_timeout_s": 600.0},
        "head": {"enabled": False},
        "privacy": {"budget": {"client": 1e5, "example": 1e5}},
        "secure_aggregation": {"survivors": 0.6, "colluding": 0.0, "min_cohort": 3},
        "speed": {"threads": 1},
    }
    return parse({**table, **changes})


def followed(
    up: Up, config: Config, limit_s: float, began: Callable[[], None] = lambda: None
) -> list[RoundRecord]:
    """Start a run, wait for its end, and return the records of its rounds."""
    resolved = device_runs.prepare(up.server, config, resume=False)
    folder = up.server.folder / "runs" / resolved.name
    number = control.start_run(up.server, folder)
    began()
    until = time.monotonic() + limit_s
    while True:
        with suppress(StateError):  # so busy that it does not answer
            run = next(run for run in control.runs(up.server) if run.run_id == number)
            if run.over:
                break
        if time.monotonic() > until:
            raise TimeoutError(f"the run {config.name} is not over after {limit_s:.0f} s")
        time.sleep(1)
    if run.status != "completed":
        log = "".join(line for _, line in up.programs["superexec"].lines[-40:])
        raise RuntimeError(f"the run {config.name} has {run.status}: {run.details}\n{log}")
    return read_records(folder)


def tiny_model(folder: Path) -> Path:
    """A random decoder (width 32, four blocks): training it costs next to nothing."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 128}  # fmt: skip
    save_made_model(folder, WORDS, size, seed=1)
    return folder
