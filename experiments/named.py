"""Configurations and runs by name or by path, as commands and scenarios take them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import ConfigError, StateError

if TYPE_CHECKING:
    from ..common.settings.config import Config

__all__ = ["CONFIGS", "RUNS", "configuration", "run_folder", "toml_file"]

CONFIGS = Path(__file__).parent / "configs"
"""Where the configurations are that come with privet."""

RUNS = Path("runs")
"""Where runs are made, below the working folder."""


def configuration(named: str | Path, overrides: Sequence[str] = ()) -> "Config":
    """Read a configuration.

    Args:
        named: one that comes with privet, such as `demo`, or the path of a TOML file.
        overrides: `section.key=value`, each in TOML's form.

    Raises:
        ConfigError: there is none, or a setting is wrong; names it.
    """
    from ..common.settings.config import read

    return read(toml_file(named, CONFIGS, "configuration"), overrides)


def toml_file(named: str | Path, folder: Path, kind: str) -> Path:
    """A TOML file by its path, or by name among those that come with privet.

    Args:
        named: a path, or a name without `.toml`.
        folder: where those that come with privet are.
        kind: what it is, for the error.

    Raises:
        ConfigError: there is none; names those that come with privet.
    """
    path = folder / f"{named}.toml"
    if Path(named).suffix != ".toml" and path.exists():
        return path
    if Path(named).is_file():
        return Path(named)
    known = ", ".join(sorted(path.stem for path in folder.glob("*.toml")))
    raise ConfigError(f"there is no {kind} {str(named)!r}: expected a TOML file or one of {known}")


def run_folder(run: str | Path, runs: Path = RUNS) -> Path:
    """A run's folder, by path or by name below `runs`.

    Raises:
        StateError: there is none.
    """
    for folder in (Path(run), runs / run):
        if (folder / "config.toml").is_file():
            return folder
    raise StateError(
        f"there is no run {str(run)!r}, neither a folder with config.toml nor {runs / run}; "
        f"`privet simulate` makes one"
    )
