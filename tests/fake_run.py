"""A run folder as `privet simulate` leaves it, made in seconds without a model: real ledgers."""

import json
import random
from pathlib import Path
from typing import Any

from privet.client.privacy.gate import budgets
from privet.client.privacy.ledger import Ledger
from privet.common.errors import BudgetExceeded
from privet.common.privacy.accounting import Charge
from privet.common.settings.config import Config, parse, to_toml

RUN = "0123456789abcdef"
DISTANCE = 1e-18  # of the integer noise from Gaussian noise; a release's charge has one


def fake_config(**changes: Any) -> Config:
    """Settings of a small run; `changes` are sections, merged one level deep."""
    table: dict[str, Any] = {
        "name": "fake",
        "data": {"clients": 60, "test_clients": 20},
        "rounds": {"count": 4, "cohort": 20},
        "privacy": {"client": {"noise_at": "server"}},
        "evaluation": {"bootstrap": 200},
    }
    for section, values in changes.items():
        table[section] = {**table.get(section, {}), **values} if type(values) is dict else values
    return parse(table)


def fake_charges(config: Config) -> tuple[Charge, ...]:
    """What one release costs, as `client/privacy/gate.py` would say it."""
    found = []
    client, example = config.privacy.client, config.privacy.example
    by_device = client.enabled and client.noise_at == "device"
    for against in ("analyst", "server") if by_device else ("analyst",):
        if client.enabled:
            found.append(
                Charge(
                    "client", against, client.adjacency, client.noise_multiplier, 1.0, 1, DISTANCE
                )
            )
    if example.enabled:
        rate, own = config.sampling_rate, example.noise_multiplier
        if client.enabled:
            found.append(Charge("example", "analyst", example.adjacency, 3.6, rate, 1, DISTANCE))
        else:
            found.append(Charge("example", "analyst", example.adjacency, own, rate))
        found.append(Charge("example", "server", example.adjacency, own, rate))
    return tuple(found or [Charge("client", "analyst", client.adjacency, 0.0)])


def fake_run(
    folder: Path, config: Config | None = None, *, rounds: int = 4, evaluated: bool = True
) -> Path:
    """Fills `folder`: cohorts of the configured size, drawn so that a few repeat."""
    config = config or fake_config()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(to_toml(config), "utf-8")
    (folder / "run-id").write_text(RUN + "\n", "utf-8")
    draw = random.Random(1)
    names = [f"hamlet/{place:04d}" for place in range(config.data.clients)]
    with Ledger.open(folder / "ledgers.sqlite", owner=RUN) as ledger:
        lines = [_round(ledger, number, names, draw, config) for number in range(1, rounds + 1)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluated:
        (folder / "evaluation.json").write_text(json.dumps(fake_evaluation(config)))
    return folder


def _round(
    ledger: Ledger, number: int, names: list[str], draw: random.Random, config: Config
) -> dict[str, Any]:
    size, at = config.rounds.cohort, (number - 1) * config.rounds.cohort
    asked = [names[(at + place) % len(names)] for place in range(size)]
    answered = 0
    for name in asked:
        cost = fake_charges(config)
        try:
            ledger.check(name, cost, budgets(config.privacy), config.privacy.delta)
        except BudgetExceeded as refusal:
            ledger.decline(name, RUN, number, str(refusal))
            continue
        ledger.commit(name, RUN, number, "0" * 64, cost, draw.randbytes(16))
        answered += 1
    return {"round": number, "asked": size, "answered": answered, "declined": size - answered}


def fake_evaluation(config: Config, seed: int = 2) -> dict[str, Any]:
    """Losses in the size of those that docs/privacy.md reports."""
    draw = random.Random(seed)
    users = min(config.evaluation.users, config.data.clients)
    base = [draw.gauss(5.0, 0.25) for _ in range(users)]
    shared = [loss - draw.gauss(0.10, 0.04) for loss in base]
    gains = [max(0.0, gain) if draw.random() < 0.6 else gain for gain in _gains(draw, users)]
    personal = [loss - gain for loss, gain in zip(shared, gains, strict=True)]
    swapped = [loss + draw.gauss(0.012, 0.01) for loss in shared]
    fresh = [draw.gauss(5.0, 0.25) for _ in range(20)]
    return {
        "name": "nats per token",
        "seen": {
            "users": [f"hamlet/{place:04d}" for place in range(users)],
            "base": base,
            "global": shared,
            "personal": personal,
            "swapped_head": swapped,
        },
        "unseen": {
            "users": [f"lear/{place:04d}" for place in range(20)],
            "base": fresh,
            "global": [loss - draw.gauss(0.09, 0.05) for loss in fresh],
        },
    }


def _gains(draw: random.Random, users: int) -> list[float]:
    return [draw.gauss(0.03, 0.03) for _ in range(users)]
