"""A chat as one simulated user of a run: what their device would know, read off the run folder."""

import hashlib
import time
from pathlib import Path

from ...client.assistant.device_chat import encoder_of, loaded
from ...client.assistant.profile import profile_of, public_chances
from ...client.assistant.retrieval import TextIndex
from ...client.assistant.templates import builtins
from ...client.assistant.text_generation import Assistant, Sampling
from ...client.simulated import SimulatedContext
from ...client.training import records
from ...common.errors import ConfigError, DataError
from ...common.files import append_line
from ...common.settings.config import of_run
from ..evaluation.generation import kept_head
from ..evaluation.run_evaluation import global_adapter

__all__ = ["RunRecorder", "assistant_of"]


def assistant_of(
    folder: Path, user: str, template: str, encoder: str, sampling: Sampling
) -> Assistant:
    """The shared adapter of a run, and one user's head and own records, the held-out ones not.

    Args:
        folder: of a run about generation, with a finished round.
        user: as the run names them.
        template: one that comes with privet.
        encoder: of sentence vectors, or "none".
        sampling: how answers are drawn.

    Raises:
        ConfigError: the run predicts labels, or there is no such template.
        DataError: nobody of that name.
        AssetError: a model is not in the cache; a chat fetches nothing.
    """
    known = builtins()
    if template not in known:
        raise ConfigError(
            f"no template {template!r} comes with privet: {', '.join(known)}; one of your own is "
            "for a device (privet prompts add)"
        )
    loaded(of_run(folder).model.base)
    bench = SimulatedContext.open(folder.resolve())
    if bench.config.outputs:
        raise ConfigError(f"{folder} predicts labels; a chat needs a run that makes text")
    if user not in bench.index.blocks:
        close = [name for name in bench.index.blocks if user.lower() in name.lower()][:5]
        some = close or list(bench.index.blocks)[:5]
        raise DataError(f"{folder} has no user {user!r}; it has {', '.join(some)} …")
    adapter, final = bench.trainer.adapter, global_adapter(folder)
    adapter.write(final)
    own, _ = records.split(
        records.read_user(bench.folder, user, bench.index), bench.config.data.holdout
    )
    profile = profile_of(own, public_chances(adapter.base.tokenizer))
    index = TextIndex.build([record.text for record in own], encoder_of(encoder))
    head = kept_head(bench, user, final)
    return Assistant(adapter.base, bench.run, head, index, profile, known[template], sampling)


class RunRecorder:
    """Verdicts of a simulated user, in the run folder: `feedback/<hash of the name>.jsonl`."""

    def __init__(self, folder: Path, user: str) -> None:
        name = hashlib.sha256(user.encode()).hexdigest()[:32]
        self.path = folder / "feedback" / f"{name}.jsonl"

    def __call__(
        self, kind: str, prompt: str, answer: str, *, over: str | None, edited: str | None,
        taken: bool = False,
    ) -> str:  # fmt: skip
        """Keep one verdict, and return the name of its file.

        `taken` is for a device in an experiment.
        """
        del taken
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        fields = {"kind": kind, "prompt": prompt, "answer": answer, "over": over,
                  "edited": edited, "time": time.time()}  # fmt: skip
        append_line(self.path, fields)
        return self.path.name
