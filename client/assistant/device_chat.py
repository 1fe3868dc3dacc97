"""A chat on a person's own device, made from what is in the vault.

It answers with the adapter and head of a run, and with the person's records. The owner's verdicts
on the answers go back into the vault.

    profile               the summary, made anew with each chat
    retrieval/<encoder>   sentence vectors of the records
    feedback/<number>     one verdict, as `client/store/verdicts.py` reads it

**Guarantee**: all of it stays in the vault, and no network is used: a model that is not in the
cache is an error.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import safetensors.numpy

from ...common.errors import AssetError, ConfigError, PrivacyError, StateError
from ...common.model.adapter import shared
from ...common.model.assets import CATALOGUE, status
from ...common.model.base_model import BaseModel, load
from ..consent.run_offers import by_beginning
from ..enrolled.ab_assignment import AbAssignment, current
from ..personal.text_head import TextHead
from ..store import verdicts
from ..store.device_store import DeviceStore
from . import template_store
from .profile import profile_of, public_chances
from .retrieval import Encoder, TextIndex
from .sentence_encoder import embed_new, kept_bytes, read_kept, sentence_encoder
from .templates import Template
from .text_generation import Assistant, Sampling

__all__ = ["BASE", "VaultRecorder", "assistant_of", "encoder_of", "index_of", "loaded"]

BASE = "smollm2-135m-instruct"
"""What answers on a device on which no run has ended yet."""

TEMPLATE = "memory"


class VaultRecorder:
    """Writes verdicts into the vault for `privet client feedback` and preference runs."""

    def __init__(self, home: DeviceStore, run: str = "") -> None:
        """Record verdicts in the vault of `home`.

        `run`: the experiment whose arm answers (`Assistant.ab_run`).
        """
        self._home, self._run = home, run

    def __call__(
        self, kind: str, prompt: str, answer: str, *, over: str | None, edited: str | None,
        taken: bool = False,
    ) -> int:  # fmt: skip
        """Keep one verdict and return its number.

        Raises:
            DataError: nothing was preferred to anything: the edit is the answer itself.
            StateError: the device keeps as many verdicts as it may.
        """
        fields = {"kind": kind, "prompt": prompt, "answer": answer, "over": over, "edited": edited}
        verdict = verdicts.check(fields, "this verdict", time.time())
        if self._run:
            verdict = replace(verdict, run=self._run, taken=taken)
        return verdicts.add(self._home, [verdict])[0]


def assistant_of(
    home: DeviceStore, run: str | None, template: str | None, encoder: str, sampling: Sampling
) -> Assistant:
    """Build the assistant that answers from what this device knows.

    That is the adapter and the head of a run it took part in, and its own records.

    Args:
        home: open.
        run: whose adapter; its beginning will do; None: the run that ended last.
        template: name of one in use on this device; None: what an experiment that the owner agreed
            to says (`client/enrolled/ab_assignment.py`), else `TEMPLATE`.
        encoder: of sentence vectors, or "none".
        sampling: how answers are drawn.

    Raises:
        StateError: no such run has ended here.
        ConfigError: the run predicts labels; no such template.
        AssetError: a model is not in the cache; a chat fetches nothing.
    """
    ended = _ended(home, run)
    used, ab_run = _template(home, template)
    base, head = (loaded(BASE), None) if ended is None else _result(home, ended)
    records = home.records()
    profile = profile_of(records, public_chances(base.tokenizer))
    home.vault.put("profile", profile.to_bytes())
    index = index_of(home, [record.text for record in records], encoder)
    if ab_run is not None and ab_run.arm == "shared":
        head = None
    name = "" if ab_run is None else ab_run.run
    return Assistant(base, ended or "", head, index, profile, used, sampling, name)


def _result(home: DeviceStore, run: str) -> tuple[BaseModel, TextHead | None]:
    """Return the model of a run that has ended, with its adapter, and the head fitted to it."""
    config = home.run(run)[0].config
    if config.outputs:
        raise ConfigError(f"run {run} predicts labels; a chat needs one that makes text")
    loaded(config.model.base)
    adapter = shared(config)
    content = home.vault.get(f"adapters/{run}") or b""
    adapter.write(safetensors.numpy.load(content)["adapter"])
    name = f"heads/{run}"
    head = home.vault.get(name)
    return adapter.base, None if head is None else TextHead.from_bytes(head, name)


def _template(home: DeviceStore, asked: str | None) -> tuple[Template, AbAssignment | None]:
    """Return the template to use, and the A/B experiment it is an arm of.

    An arm whose template this device has not, or trusts no more, is not taken part in: the chat is
    as ever, and its verdicts are no outcome.
    """
    ab_run = None if asked is not None else current(home)
    wanted = None if ab_run is None else ab_run.template
    if wanted is not None:
        try:
            return template_store.trusted(home, *wanted), ab_run
        except (ConfigError, PrivacyError):
            ab_run = None
    return template_store.trusted(home, asked or TEMPLATE), ab_run


def index_of(home: DeviceStore, texts: Sequence[str], encoder: str) -> TextIndex:
    """Build the retrieval index over the device's records.

    Sentence vectors that were made before are read from the vault.
    """
    encode = encoder_of(encoder)
    if encode is None or not texts:
        return TextIndex.build(texts)
    name = f"retrieval/{encoder}"
    kept = home.vault.get(name)
    known = read_kept(kept, encode(["width"]).shape[1])
    vectors = embed_new(texts, encode, known)
    content = kept_bytes(texts, vectors)
    if content != kept:  # also when a record has gone: its vector goes with it
        home.vault.put(name, content)
    return TextIndex.build(texts, encode, vectors)


def encoder_of(name: str) -> Encoder | None:
    """Load a sentence encoder by name, from the cache only.

    None for the name "none".
    """
    if name == "none":
        return None
    loaded(name)
    return sentence_encoder(name)


def loaded(name: str) -> BaseModel:
    """Load a base model from the cache, without a network.

    A model of the catalogue must be in the cache already.
    """
    if name in CATALOGUE:
        state = next(asset.state for asset in status() if asset.name == name)
        if state != "ready":
            raise AssetError(
                f"{name} is {state} in the cache, and a chat fetches nothing: run "
                f"`privet assets fetch {name}` first"
            )
    return load(name)


def _ended(home: DeviceStore, run: str | None) -> str | None:
    """Find the run whose adapter the chat uses.

    None where no run has ended here and none was asked for.
    """
    kept = {name.partition("/")[2] for name in home.vault.names("adapters/")}
    offered = [offer.run for offer, _ in home.runs() if offer.run in kept]
    if run is None:
        if kept and not offered:
            raise StateError(
                f"the settings of {', '.join(sorted(kept))} went when this device left its server, "
                "and its adapter cannot be read without them; join again, or chat about another run"
            )
        return offered[-1] if offered else None
    matching = by_beginning(run, offered)
    if len(matching) != 1:
        names = ", ".join(offered) or "none has"
        raise StateError(f"no run {run!r} has ended on this device: {names}")
    return matching[0]
