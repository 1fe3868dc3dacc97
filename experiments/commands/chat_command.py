"""`privet chat`: the shared and the personal answer beside each other, offline.

Heavy imports wait inside the functions.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...common.errors import ConfigError

if TYPE_CHECKING:
    from ...client.assistant.text_generation import Assistant, Recorder, Sampling

__all__ = ["chat"]


def chat(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's name or folder, with --user.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="As whom, for example hamlet/HAMLET.")] = None,
    device: Annotated[
        bool, typer.Option("--device", help="As this device's owner; RUN: whose adapter.")
    ] = False,
    home: Annotated[
        Path | None,
        typer.Option("--home", metavar="PATH", help="Else $PRIVET_HOME, else your own."),
    ] = None,
    passphrase: Annotated[
        Path | None,
        typer.Option("--passphrase-file", metavar="FILE", help="Else it is asked for."),
    ] = None,
    once: Annotated[
        str | None, typer.Option(metavar="PROMPT", help="Answer this alone, and end.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Of privet prompts list; else memory, or your arm's.")
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="Of sentence vectors; none: search by words.")
    ] = "minilm",
    budget: Annotated[
        int, typer.Option(min=0, help="Tokens that may stand before a prompt.")
    ] = 256,
    tokens: Annotated[int, typer.Option(min=1, max=1024, help="Of an answer, at most.")] = 60,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Talk to the shared model and to your own, and say which answer is better."""
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported
    from ...client.assistant.terminal_chat import talk
    from ...client.assistant.text_generation import Sampling

    sampling = Sampling(tokens, temperature, seed, budget)
    if device == (user is not None) or (not device and run is None):
        raise ConfigError(
            "say as whom: privet chat RUN --user NAME (a simulated user), or privet chat --device"
        )
    began = time.perf_counter()
    asked = (
        _own(home, passphrase, run, template, encoder, sampling)
        if device
        else _simulated(str(run), str(user), template or "memory", encoder, sampling)
    )
    with asked as (assistant, record):
        print(f"ready after {time.perf_counter() - began:.1f} s", file=sys.stderr)
        talk(assistant, record, sys.stdin, once=once, as_json=as_json)


@contextmanager
def _simulated(
    run: str, user: str, template: str, encoder: str, sampling: "Sampling"
) -> Iterator[tuple["Assistant", "Recorder"]]:
    from ..named import run_folder
    from . import simulated_chat as chats

    folder = run_folder(run)
    assistant = chats.assistant_of(folder, user, template, encoder, sampling)
    yield assistant, chats.RunRecorder(folder, user)


@contextmanager
def _own(
    home: Path | None, passphrase: Path | None, run: str | None, template: str | None,
    encoder: str, sampling: "Sampling",
) -> Iterator[tuple["Assistant", "Recorder"]]:  # fmt: skip
    import torch

    from ...client.assistant.device_chat import VaultRecorder, assistant_of
    from ...client.consent.device_conditions import threads
    from ...client.enrolled.access import opened

    with opened(home, passphrase) as found:
        torch.set_num_threads(threads(found.policy.resources))
        assistant = assistant_of(found, run, template, encoder, sampling)
        yield assistant, VaultRecorder(found, assistant.ab_run)
