"""Shared by all tests: one thread, and the tiny models, made once."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("privet", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("privet")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small models are fastest on one thread, and sums then always round the same."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """A shell has background jobs ignore it, and programs that tests start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """No table folds a temporary folder's name."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random decoder; read only."""
    from .tiny import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random encoder; read only."""
    from .tiny import tiny_bert

    return tiny_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> Any:
    """A tiny decoder of the module's own, which `attach` may change."""
    from .tiny import fresh

    return fresh(llama_folder)


@pytest.fixture(scope="module")
def bert(bert_folder: Path) -> Any:
    """A tiny encoder of the module's own."""
    from .tiny import fresh

    return fresh(bert_folder)


@pytest.fixture(params=["llama", "bert"])
def base(request: pytest.FixtureRequest) -> Any:
    """Each of the two in turn."""
    return request.getfixturevalue(request.param)
