"""The one command `privet`: sub-commands put together, and every error told in one place.

Belongs to no side and imports each only when it is asked for: `privet client` and `privet server`
run where nothing of the experiments is installed.

Exit codes: 0 done; 1 a fault of privet's, or a run that ended without its rounds; 2 a sentence
about the call, the settings or the files; 130 stopped by Ctrl-C.
"""

import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from .common.errors import PrivetError

if TYPE_CHECKING:
    from .common.privacy.round_plan import Plan
    from .common.settings.config import Config

__all__ = ["main", "run"]

_VERBOSE = frozenset({"-v", "--verbose"})
_QUIET_LIBRARIES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYDANTIC_DISABLE_PLUGINS": "1",  # it would ask every installed package for one
}
_SINGLE = {
    "simulate": "experiment",
    "evaluate": "experiment",
    "report": "experiment",
    "generate": "experiment",
    "clusters": "experiment",
    "chat": "chat_command",
    "ab": "ab_command",
    "coldstart": "cold_start_command",
    "lamp": "lamp_command",
}
"""Commands without sub-commands, and the module of each in `experiments/commands/`."""
_FORMER = {"personas": "clusters"}
"""Commands that have another name now."""
_GROUPS = {
    "assets": "experiments.commands.assets_command",
    "client": "client.commands.client",
    "prompts": "client.commands.prompts",
    "server": "server.operations.commands",
}
"""Commands with sub-commands, and the module of each."""


def main() -> None:
    """Run privet's command line, as its entry point."""
    for name, value in _QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    # where it is installed PEFT imports it, and it warns of products that privet does not use
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line, and return the exit code.

    `-v` is taken at any place, because it is what the last line of an error tells to add.
    """
    verbose = bool(_VERBOSE & set(arguments))
    if not verbose:
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    arguments = [argument for argument in arguments if argument not in _VERBOSE]
    if arguments and arguments[0] in _FORMER:
        today = _FORMER[arguments[0]]
        _say(f"warning: `privet {arguments[0]}` is called `privet {today}` now", 0)
        arguments[0] = today
    try:
        code = _command(arguments)(
            arguments, prog_name="privet", standalone_mode=False, obj=_Reports()
        )
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except PrivetError as error:
        _trace(verbose)
        return _say(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        code = 130
    except BrokenPipeError:
        # Whoever read the output has left; nothing more may be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        _trace(verbose)
        hint = "" if verbose else "; run again with -v for the traceback"
        return _say(f"{type(error).__name__}: {error}{hint}", 1)
    if code == 130:
        return _say(_how_to_resume(arguments), 130)
    return code if isinstance(code, int) else 0


def _command(arguments: Sequence[str]) -> click.Command:
    """Return the command with all its sub-commands, or with the one that the line begins with.

    `privet client status` has no time to import the others.
    """
    asked = arguments[0] if arguments and arguments[0] in (*_GROUPS, *_SINGLE) else None
    app = typer.Typer(no_args_is_help=True, add_completion=False, suggest_commands=False)
    app.callback()(_root)
    for name, module in _SINGLE.items():
        if asked in (None, name):
            function = getattr(import_module(f".experiments.commands.{module}", __package__), name)
            app.command(name)(function)
    if asked is None:
        from .experiments.commands import experiment

        app.command("demo-devices", hidden=True)(experiment.demo_devices)
    for name, module in _GROUPS.items():
        if asked in (None, name):
            app.add_typer(import_module(f".{module}", __package__).app, name=name)
    return typer.main.get_command(app)


class _Reports:
    """What `privet server run` does first and last.

    Its package may import neither.
    """

    def __call__(self, run_folder: Path) -> None:
        """Write the report, at the end of the run."""
        from .experiments.commands import experiment

        experiment.reported(run_folder)

    def refuse_unpaid(self, config: "Config", plan: "Plan", dimension: int) -> None:
        """Refuse, at the beginning, a run that its own cap does not pay for."""
        from .client.privacy.affordable_rounds import refuse_unpaid

        def warn(sentence: str) -> None:
            print(f"warning: {sentence}", file=sys.stderr)

        refuse_unpaid(config, plan, dimension, warn)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"privet {version('privet')}")
        raise typer.Exit


def _root(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version)
    ] = False,
    _verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print the traceback of an error.")
    ] = False,
) -> None:
    """Federated, differentially private personalisation of language models."""


def _say(sentence: str, code: int) -> int:
    print(f"privet: {sentence}", file=sys.stderr)
    return code


def _trace(verbose: bool) -> None:
    if verbose:
        traceback.print_exc()


def _how_to_resume(arguments: Sequence[str]) -> str:
    if arguments[:1] == ["ab"]:
        return "stopped; an experiment is not resumed: remove its folder, or choose another `name`."
    if arguments[:1] != ["simulate"]:
        return "stopped; run the same command again."
    again = shlex.join(["privet", *(word for word in arguments if word != "--resume"), "--resume"])
    return f"stopped; finished rounds are kept. To go on: {again}"
