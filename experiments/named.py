"""Configurations and runs by name or by path, as commands and scenarios take them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import ConfigError, StateError

if TYPE_CHECKING:
    from ..common.settings.config import Config

__all__ = ["CONFIGS", "RUNS", "configuration", "run_folder"]

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

    path = CONFIGS / f"{named}.toml"
    if Path(named).suffix == ".toml" or not path.exists():
        if not Path(named).is_file():
            known = sorted(path.stem for path in CONFIGS.glob("*.toml"))
            raise ConfigError(
                f"there is no configuration {str(named)!r}: expected a TOML file or one of "
                f"{', '.join(known)}"
            )
        path = Path(named)
    return read(path, overrides)


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
