"""The personal head for text generation, which adds one person's own words to the next token.

Fitted on one device from cached final hidden states, after the release; no backward pass through
the base model. Two parts, each with a weight chosen on the person's own held-out records:

- *bias*: `weight * log((c_v + S p_v) / (S p_v))` added to the score of every token v the person
  used; c_v counts it, p_v is the shared model's own mean prediction at the person's positions, so
  what the model expects anyway gets nothing. S is `SHRINKAGE`.
- *memory*: a nearest-neighbour distribution over the tokens that followed the person's own hidden
  states, mixed in with a share that grows with how sure the memory is (Khandelwal et al. 2020,
  kNN-LM; a share by confidence as in He, Neubig, Berg-Kirkpatrick 2021).

Both touch only the tokens the person used, so a loss needs the full logits once per position
(`shared_scores`), and after that the person's own columns alone. A low-rank correction of the
output embedding was tried and gave nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...common.errors import DataError
from ...common.model.output_layer import OutputLayer
from .head import number_of, pack, unpack, unusable

__all__ = [
    "SharedScores",
    "TextHead",
    "TokenStates",
    "adjusted_logits",
    "fit_text_head",
    "no_text_head",
    "shared_scores",
    "token_losses",
]

# Public constants, tuned on 40 Shakespeare roles and checked on 40 others; see experiments/LOG.md.
SHRINKAGE = 1000.0
SHARPNESS = 13.0
GATE = (-2.88, 4.0, 2.4)  # constant, nearest cosine, largest remembered mass
BIAS_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
MEMORY_OFFSETS = (None, -5.0, -4.5, -4.0, -3.5, -3.0, -2.5, -2.0, -1.5)
FOLDS = 4
MIN_RECORDS = 4
CAUTION = 1.5

_LOGIT_BYTES = 24 * 2**20
_ROWS = 1024
_TENSORS = ("tokens", "bias", "keys", "slots", "centre")


@dataclass(frozen=True)
class TokenStates:
    """Final hidden states of one person's records, and the tokens that followed.

    Attributes:
        states: (n, w) float, after the model's final norm; `OutputLayer.scores` makes them logits.
        targets: (n,) int64, the token that followed.
        record: (n,) int64, which record; a larger number is a later record.

    Raises:
        DataError: shapes or types that do not fit together, NaN or infinity.
    """

    states: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    record: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        count = len(self.targets)
        if self.states.ndim != 2 or self.targets.ndim != 1 or self.record.shape != (count,):
            raise DataError(
                "states (n, w), targets (n,) and record (n,) were expected, got "
                f"{tuple(self.states.shape)}, {tuple(self.targets.shape)} and "
                f"{tuple(self.record.shape)}; give one row, one target and one record per position."
            )
        if len(self.states) != count:
            raise DataError(
                f"There are {len(self.states)} states for {count} targets; give one each."
            )
        if self.targets.dtype != torch.int64 or self.record.dtype != torch.int64:
            raise DataError("targets and record must be int64 tensors; convert them with .long().")
        if not bool(torch.isfinite(self.states).all()):
            raise DataError("states hold NaN or infinity; check the model that made them.")

    def __len__(self) -> int:
        return len(self.targets)

    def where(self, mask: Tensor) -> "TokenStates":
        """Return the positions where `mask` (n,) is true."""
        return TokenStates(self.states[mask], self.targets[mask], self.record[mask])


@dataclass(frozen=True)
class SharedScores:
    """The numbers for which the full vocabulary is needed, once per position.

    Attributes:
        log_z: (n,) log of the sum of exp(logits).
        target_logit: (n,) the logit of the token that followed.
    """

    log_z: Tensor = field(repr=False)
    target_logit: Tensor = field(repr=False)

    def where(self, mask: Tensor) -> "SharedScores":
        """Return the positions where `mask` (n,) is true."""
        return SharedScores(self.log_z[mask], self.target_logit[mask])


@dataclass(frozen=True)
class TextHead:
    """One person's head for text generation.

    Private: it is never in a log or a message.

    Attributes:
        tokens: (m,) int64, sorted: the tokens this head says something about.
        bias: (m,) float, added to their logits; >= 0 where `fit_text_head` fitted it.
        keys: (k, w) float, unit rows: the remembered states, centred.
        slots: (k,) int64: `tokens[slots]` is what followed each key.
        centre: (w,) float, subtracted from a state before it is compared.
        bias_weight: the chosen weight; 0 is no bias.
        memory_offset: the chosen offset of the memory's share (log-odds).

    An empty head (m = k = 0) is the shared model, to the bit.
    """

    tokens: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    keys: Tensor = field(repr=False)
    slots: Tensor = field(repr=False)
    centre: Tensor = field(repr=False)
    bias_weight: float
    memory_offset: float

    @property
    def is_shared(self) -> bool:
        """Whether this head changes nothing."""
        return not len(self.tokens)

    def to_bytes(self) -> bytes:
        """Return the head as a safetensors file, for the vault."""
        facts = {"bias_weight": repr(self.bias_weight), "memory_offset": repr(self.memory_offset)}
        return pack("text", {name: getattr(self, name) for name in _TENSORS}, facts)

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> "TextHead":
        """Read a head that `to_bytes` wrote, as `PersonalHead.from_bytes` says."""
        tensors, facts = unpack("text", _TENSORS, content, name)
        tokens, bias, keys, slots, centre = (tensors[key] for key in _TENSORS)
        fits = tokens.shape == bias.shape and len(keys) == len(slots)
        fits = fits and keys.ndim == 2 and centre.shape == keys.shape[1:]
        if not fits or bool((slots < 0).any() or (slots >= len(tokens)).any()):
            raise unusable(name, "its tensors do not fit together")
        numbers = {key: number_of(facts, key, name) for key in ("bias_weight", "memory_offset")}
        return cls(tokens, bias, keys, slots, centre, **numbers)


def no_text_head(width: int) -> TextHead:
    """Return the head that changes nothing."""
    return TextHead(
        tokens=torch.zeros(0, dtype=torch.int64),
        bias=torch.zeros(0),
        keys=torch.zeros(0, width),
        slots=torch.zeros(0, dtype=torch.int64),
        centre=torch.zeros(width),
        bias_weight=0.0,
        memory_offset=0.0,
    )


@torch.no_grad()
def shared_scores(data: TokenStates, output: OutputLayer) -> SharedScores:
    """Compute the shared model's scores, which every head that is measured on `data` reuses.

    The full logits exist for a few rows at a time, 24 MB, whatever n is.

    Args:
        data: n positions.
        output: the model's.

    Raises:
        DataError: `output` is for another width, or a target is outside the vocabulary.
    """
    _check_output(data, output)
    log_z = torch.empty(len(data))
    target_logit = torch.empty(len(data))
    for rows in _chunks(len(data), max(1, _LOGIT_BYTES // (4 * output.words))):
        logits = output.scores(data.states[rows])
        target_logit[rows] = logits.gather(1, data.targets[rows, None])[:, 0]
        top = logits.amax(1)
        # In place: a third faster than torch.logsumexp here, and one buffer instead of three.
        log_z[rows] = logits.sub_(top[:, None]).exp_().sum(1).log_() + top
    return SharedScores(log_z, target_logit)


@torch.no_grad()
def token_losses(
    head: TextHead | None, data: TokenStates, output: OutputLayer, shared: SharedScores
) -> Tensor:
    """Return the negative log probability of each target.

    Args:
        head: whose head; None is the shared model.
        data: n positions, of the same person or (the swap control) of another.
        output: the model's.
        shared: `shared_scores(data, output)`.

    Returns:
        (n,) nats per token.
    """
    losses = shared.log_z - shared.target_logit
    if head is None or head.is_shared:
        return losses
    slots = _slots_of(head.tokens, data.targets)
    for rows in _chunks(len(data), _ROWS):
        states = data.states[rows].float()
        log_p = -losses[rows]
        if head.bias_weight:
            own = output.scores(states, head.tokens) - shared.log_z[rows, None]
            log_p = log_p + _bias_gain(own, head.bias[None], slots[rows])
        if len(head.keys):
            similar = _unit(states - head.centre) @ head.keys.T
            mass, odds = _recall(similar, head.slots, len(head.tokens))
            log_p = _mix(log_p, _at(mass, slots[rows]), odds + head.memory_offset)
        losses[rows] = -log_p
    return losses


@torch.no_grad()
def adjusted_logits(head: TextHead | None, state: Tensor, logits: Tensor) -> Tensor:
    """Return the personal model's log probabilities of the next token, for generation.

    Args:
        head: the person's head; None is the shared model.
        state: (w,) or (n, w) final hidden states.
        logits: (v,) or (n, v) the shared model's logits at these states.

    Returns:
        log probabilities, shaped like `logits`; each row's exp sums to 1.
    """
    if head is None or head.is_shared:
        return torch.log_softmax(logits.float(), dim=-1)
    scores = logits.float().reshape(-1, logits.shape[-1]).clone()
    scores[:, head.tokens] += head.bias
    log_p = torch.log_softmax(scores, dim=1)
    if len(head.keys):
        states = state.float().reshape(len(scores), -1)
        mass, odds = _recall(
            _unit(states - head.centre) @ head.keys.T, head.slots, len(head.tokens)
        )
        odds = (odds + head.memory_offset)[:, None]
        mixed = _mix(log_p[:, head.tokens], mass, odds)
        log_p = log_p + torch.nn.functional.logsigmoid(-odds)
        log_p[:, head.tokens] = mixed
    return log_p.reshape(logits.shape)


@torch.no_grad()
def fit_text_head(
    own: TokenStates, output: OutputLayer, shared: SharedScores | None = None
) -> TextHead:
    """Fit one person's text head on all of `own`, on the device and after the release.

    The two weights are chosen by leaving out contiguous blocks of the person's own records, in
    order: speeches next to each other share a topic, so leaving out single records promises about
    twice the gain that later records keep. A pair of weights is adopted only if its mean gain per
    record is more than `CAUTION` standard errors above zero; the best such lower bound wins, and
    the head is refitted on all records. Fewer than `MIN_RECORDS` records, or no pair that passes:
    the shared model.

    Args:
        own: the person's fit records; never the records the head is measured on.
        output: the model's.
        shared: `shared_scores(own, output)`, if it is there already.

    Raises:
        DataError: as `shared_scores`.
    """
    _check_output(own, output)
    records = torch.unique(own.record)
    if len(records) < MIN_RECORDS:
        return no_text_head(output.width)
    shared = shared_scores(own, output) if shared is None else shared
    tokens, slots = torch.unique(own.targets, return_inverse=True)
    log_own = output.scores(own.states, tokens) - shared.log_z[:, None]
    chosen = _choice(_held_out_gains(own, shared, slots, log_own), own.record)
    if chosen is None:
        return no_text_head(output.width)
    weight, offset = chosen
    centre, keys = _memory(own.states) if offset is not None else _memory(own.states[:0])
    return TextHead(
        tokens=tokens,
        bias=weight * _evidence(slots, log_own),
        keys=keys,
        slots=slots[: len(keys)],
        centre=centre,
        bias_weight=weight,
        memory_offset=0.0 if offset is None else offset,
    )


_Pair = tuple[float, float | None]


def _held_out_gains(
    own: TokenStates, shared: SharedScores, slots: Tensor, log_own: Tensor
) -> dict[_Pair, Tensor]:
    """Return the nats (n,) that each pair of weights gains at positions it was not fitted on."""
    base, count = shared.target_logit - shared.log_z, log_own.shape[1]
    block = _blocks(own.record)
    gains: dict[_Pair, Tensor] = {
        (weight, offset): torch.zeros(len(own))
        for weight in BIAS_WEIGHTS
        for offset in MEMORY_OFFSETS
    }
    for number in range(int(block.max()) + 1):
        out, rest = block == number, block != number
        evidence = _evidence(slots[rest], log_own[rest])
        centre, keys = _memory(own.states[rest])
        similar = _unit(own.states[out].float() - centre) @ keys.T
        mass, odds = _recall(similar, slots[rest], count)
        remembered = _at(mass, slots[out])
        for weight in BIAS_WEIGHTS:
            gain = _bias_gain(log_own[out], weight * evidence[None], slots[out])
            for offset in MEMORY_OFFSETS:
                log_p = base[out] + gain
                if offset is not None:
                    log_p = _mix(log_p, remembered, odds + offset)
                gains[weight, offset][out] = log_p - base[out]
    return gains


def _choice(gains: dict[_Pair, Tensor], record: Tensor) -> _Pair | None:
    """Return the pair of weights whose gain per record is surest.

    None when none is sure to be above zero.
    """
    _, index = torch.unique(record, return_inverse=True)
    count = int(index.max()) + 1
    best, best_bound = None, 0.0
    for pair, gain in gains.items():
        per_record = torch.zeros(count).index_add_(0, index, gain)
        standard_error = per_record.std() / count**0.5
        bound = float(per_record.mean() - CAUTION * standard_error)
        if bound > best_bound:
            best, best_bound = pair, bound
    return best


def _blocks(record: Tensor) -> Tensor:
    """Number each position's contiguous block of records, (n,), at most `FOLDS` blocks."""
    records, index = torch.unique(record, return_inverse=True)
    return torch.div(index * min(FOLDS, len(records)), len(records), rounding_mode="floor")


def _evidence(slots: Tensor, log_own: Tensor) -> Tensor:
    """Return how much more often each token was used than the shared model expects, (m,).

    The log of it, shrunken, and 0 if the token was never used.

    Args:
        slots: (n,) the token used at each position.
        log_own: (n, m) the shared model's log probabilities there.
    """
    counts = torch.bincount(slots, minlength=log_own.shape[1]).float()
    expected = log_own.exp().mean(0)
    return torch.log1p(counts / (SHRINKAGE * expected.clamp_min(1e-12)))


def _bias_gain(log_own: Tensor, bias: Tensor, slot: Tensor) -> Tensor:
    """Return the nats (n,) a bias gives the target.

    That is its own bias less the growth of the normaliser.

    Args:
        log_own: (n, m) the shared model's log probabilities of the person's tokens.
        bias: (1, m), >= 0.
        slot: (n,) the target's column, or -1 when the person never used it.
    """
    growth = torch.log1p((log_own.exp() * torch.expm1(bias)).sum(1))
    return torch.where(slot >= 0, bias[0][slot.clamp_min(0)], 0.0) - growth


def _memory(states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centre (w,) and the unit keys (k, w) of the memory.

    Without states there are no keys, and the centre is zero.
    """
    states = states.float()
    centre = states.mean(0) if len(states) else torch.zeros(states.shape[1])
    return centre, _unit(states - centre)


def _recall(similar: Tensor, slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return what the memory says, and how sure it is.

    (n, count) masses that sum to 1, and (n,) log-odds.
    """
    share = torch.softmax(SHARPNESS * similar, dim=1)
    mass = torch.zeros(len(similar), count).index_add_(1, slots, share)
    constant, nearest, largest = GATE
    odds = constant + nearest * similar.amax(1) + largest * mass.amax(1)
    return mass, odds


def _mix(log_p: Tensor, mass: Tensor, odds: Tensor) -> Tensor:
    """Mix a remembered mass into log probabilities, with a share of s = sigmoid(odds).

    log((1 - s) p + s mass), where a mass of 0 is allowed.
    """
    logsigmoid = torch.nn.functional.logsigmoid
    return torch.logaddexp(log_p + logsigmoid(-odds), mass.log() + logsigmoid(odds))


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = torch.nn.functional.normalize(rows, dim=1)
    return unit


def _slots_of(tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the index of each target in the sorted `tokens`, (n,), or -1 where it is not there."""
    index = torch.searchsorted(tokens, targets).clamp_max(len(tokens) - 1)
    return torch.where(tokens[index] == targets, index, -1)


def _at(mass: Tensor, slot: Tensor) -> Tensor:
    """Return each row's `mass` in its own slot, (n,), or 0 where the slot is -1."""
    return torch.where(slot >= 0, mass.gather(1, slot.clamp_min(0)[:, None])[:, 0], 0.0)


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _check_output(data: TokenStates, output: OutputLayer) -> None:
    if output.width != data.states.shape[1]:
        raise DataError(
            f"The output layer takes states of {output.width} numbers, got "
            f"{data.states.shape[1]}; take both from the same model."
        )
    if len(data) and not 0 <= int(data.targets.min()) <= int(data.targets.max()) < output.words:
        raise DataError(
            f"A target is outside the vocabulary of {output.words} tokens; take the tokenizer and "
            "the output layer from the same model."
        )
