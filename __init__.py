"""privet: federated, differentially private personalisation of language models.

    import privet

    config = privet.load_config("demo", overrides={"rounds.count": 2})
    run = privet.simulate(config, folder="runs/mine")
    print(run.summary["metrics"], run.privacy["lines"], run.adapter_folder)

Nothing heavy is loaded before it is used.

>>> charge = Charge("client", "analyst", "add_remove", noise_multiplier=1.0)
>>> round(epsilon([charge], delta=1e-5), 2)
4.38
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .common.errors import PrivetError
    from .common.privacy.accounting import Charge, calibrate, epsilon
    from .common.settings.config import Config
    from .experiments.api import Run, evaluate, load_config, report, simulate

__all__ = [
    "Charge",
    "Config",
    "PrivetError",
    "Run",
    "__version__",
    "calibrate",
    "epsilon",
    "evaluate",
    "load_config",
    "report",
    "simulate",
]

__version__: str

_PLACES = {
    "Charge": "common.privacy.accounting",
    "Config": "common.settings.config",
    "PrivetError": "common.errors",
    "Run": "experiments.api",
    "calibrate": "common.privacy.accounting",
    "epsilon": "common.privacy.accounting",
    "evaluate": "experiments.api",
    "load_config": "experiments.api",
    "report": "experiments.api",
    "simulate": "experiments.api",
}


def __getattr__(name: str) -> Any:
    """A public name, loaded when it is first asked for."""
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import version

        return version("privet")
    if name not in _PLACES:
        raise AttributeError(f"module 'privet' has no attribute {name!r}")
    value = getattr(import_module(f".{_PLACES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
