"""A run from its folder: rounds that train an adapter, or the looks of an A/B experiment."""

from collections.abc import Callable
from pathlib import Path

from ...common.model.adapter import exchanged, shared
from ...common.settings.config import Config
from ..ab_rounds import run_looks
from ..rounds import Ask, Present, Show, Vector, run_rounds
from .saving import save
from .starting import started

__all__ = ["whole"]


def whole(
    ask: Ask,
    config: Config,
    run: str,
    folder: Path,
    show: Show,
    present: Present,
    greet: Callable[[], object],
) -> Vector:
    """Run all rounds or looks, and return what devices are told at the end.

    A trained adapter is then a PEFT folder.
    """
    if config.ab_run is not None:
        return run_looks(ask, config, config.ab_run, run, folder, show, present, greet)
    adapter, sent = shared(config), started(folder, config, exchanged(config))
    final = run_rounds(ask, config, run, sent.state.digest, sent.start, folder, show, present, sent)
    save(adapter, sent, final, folder)
    return final
