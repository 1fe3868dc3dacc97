"""`privet generate`: base, shared and personal model continue one prompt, side by side."""

import hashlib
from pathlib import Path

from ...client.assistant.terminal_chat import as_text
from ...client.assistant.text_generation import Sampling, completed
from ...client.device import Device, local_factor_of
from ...client.personal.text_evaluator import TextEvaluator, alone
from ...client.personal.text_head import TextHead
from ...client.simulated import SimulatedContext
from ...common.errors import ConfigError, DataError
from ...common.files import explain_os_errors, write_atomic
from ...common.model.adapter import Vector
from .cluster_evaluation import adapter_of, state_of

__all__ = ["kept_head", "side_by_side"]


def side_by_side(
    folder: Path, user: str, prompt: str, *, tokens: int, seed: int, temperature: float
) -> dict[str, str]:
    """Continue the prompt with each model, with the same seed for each.

    Raises:
        ConfigError: the run is not about generation, the prompt is empty, or the temperature is
            none.
        DataError: nobody of that name; a prompt that is no text.
    """
    drawn = Sampling(tokens, temperature, seed)
    bench = SimulatedContext.open(folder.resolve())
    if bench.config.outputs:
        raise ConfigError(f"{folder} predicts labels; privet generate needs a run that makes text")
    if user not in bench.index.blocks:
        close = [name for name in bench.index.blocks if user.lower() in name.lower()][:5]
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise DataError(f"{folder} has no user {user!r}{hint}")
    ids = bench.trainer.adapter.base.tokenizer(as_text(prompt))["input_ids"]
    if not ids:
        raise ConfigError("--prompt is empty; give the model a few words to begin with")
    # of several clusters the person's own one
    adapter, final = bench.trainer.adapter, adapter_of(bench, user, state_of(folder))
    adapter.write(adapter.start)
    found = {"base": _continue(bench, ids, None, drawn)}
    adapter.write(final, local_factor_of(Device(user, bench)))
    head = kept_head(bench, user, final)
    found["shared"] = _continue(bench, ids, None, drawn)
    found["personal"] = _continue(bench, ids, head, drawn)
    return found


def kept_head(bench: SimulatedContext, user: str, final: Vector) -> TextHead:
    """Return the person's head under this adapter.

    It is read from the device's file when fitted before.
    """
    name = hashlib.sha256(user.encode() + b"\0" + final.tobytes()).hexdigest()[:32]
    path = bench.folder / "heads" / f"{name}.safetensors"
    if path.exists():
        with explain_os_errors(path, "read"):
            return TextHead.from_bytes(path.read_bytes(), str(path))
    device = Device(user, bench)
    records, _ = device.measured_on()
    if not records:
        raise DataError(f"{user!r} has no record with at least two tokens to fit a head on")
    evaluator = TextEvaluator(bench.trainer.adapter, final, local_factor_of(device))
    head = evaluator.scored(alone(evaluator.asked(records)))[0].fitted()
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_atomic(path, head.to_bytes())
    return head


def _continue(
    bench: SimulatedContext, ids: list[int], head: TextHead | None, drawn: Sampling
) -> str:
    base = bench.trainer.adapter.base
    (added,) = completed(base, [ids], head, drawn)
    return str(base.tokenizer.decode([*ids, *added], skip_special_tokens=True))
