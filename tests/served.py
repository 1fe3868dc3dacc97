"""A run as its server holds it, without a model: rounds in milliseconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from privet.common.model.exchange_layout import Exchange
from privet.common.model.vector_layout import Layout
from privet.common.settings.config import Config
from privet.common.settings.sections import ClusterSettings
from privet.server.rounds import Ask, ServedRun

RUN = "run-1"


def exchange_of(size: int) -> Exchange:
    """An adapter of so many numbers that begins at zero, all of which each round releases."""
    layout = Layout("ffa", "no base", (("lora_B.weight", (size,)),))
    return Exchange(layout, np.zeros(size, np.float32), ClusterSettings())


def served(
    folder: Path, config: Config, ask: Ask, show: Callable[[Any], None] | None = None
) -> ServedRun:
    """A run whose devices are all there."""
    everybody = range(config.data.clients)
    return ServedRun(
        config, RUN, folder, ask, lambda: everybody, show or (lambda _: None), lambda: None
    )
