"""What the figures of a run mean, in words: who is kept out, by which noise, under what conditions.

Nothing here computes an epsilon. The words are chosen from what the ledgers hold (`Charge`s) and
from what the settings promised, and say no more than follows from them; DESIGN section 2 names the
adversaries.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ...client.privacy.collusion import conditions
from ...common.privacy.accounting import Adjacency, Against, Charge, Unit
from ...common.privacy.mechanism import mechanism_of
from ...common.privacy.statistics_blocks import BOUNDS
from ...common.settings.config import Config
from ...common.settings.sections import DEVICES, ClientPrivacySettings, StatisticsSettings
from .facts import LineFacts, PrivacyFacts, Promised

__all__ = [
    "ADDERS",
    "Line",
    "alone",
    "assumptions",
    "budget_of",
    "condition",
    "conditions_of",
    "from_training",
    "headline",
    "holds_against",
    "line_name",
    "looked",
    "main_line",
    "measured",
    "no_claims",
    "noise_at",
    "noise_counted",
    "not_covered",
    "problems",
    "promised",
    "spoken",
]

AGREEMENT = 0.02  # two accountants may differ by this fraction
ADVERSARIES = (
    "analyst",
    "colluding clients",
    "server, honest but curious",
    "server, malicious",
    "colluding clients with the server",
    "network",
    "thief",
)
ADJACENCY = {
    "client": {
        "add_remove": "all records of one person added or removed",
        "zero_out": "one person's contribution replaced by zero",
        "replace_one": "all records of one person replaced by others",
    },
    "example": {
        "add_remove": "one record of one person added or removed",
        "zero_out": "one record of one person replaced by nothing in its place",
        "replace_one": "one record of one person replaced by another",
    },
}
NOT_COVERED = (
    "Hyper-parameter tuning: the figures are those of this run alone. Choosing the best of several "
    "runs on the same people costs more.",
    "The personal model's own output: it stays on the device, and what it says may repeat the "
    "person's own text.",
    "Whether a device took part: who was asked and who answered is not hidden. What a device's "
    "numbers are does not decide it: what overflows in training counts as nothing, and is noised "
    "and paid for like anything else.",
    "A person with several homes: a person is one device's home here. Two devices with the same "
    "person's records, or a home that was erased and one begun after it, are two budgets, and what "
    "is known of the person is both together.",
    "Anything a person pastes elsewhere.",
    "A thief with the device's disk: these figures say nothing about what is stored.",
)
_NO_TIMES = (
    "Timing and other side channels: no times are observed in a simulation, and nothing is claimed "
    "against whoever would observe them."
)
_TIMES = (
    "Side channels but for the time of an answer: in a round a device does the same work whatever "
    "its records are, and answers at a moment that it found on dummies (docs/privacy.md). What "
    "another program on the device sees of its work, and power and heat, are not covered; nor are "
    "answers that are late because reading records or fitting a head outlasted the wait. That the "
    "times tell nothing was measured with a small model only (docs/numbers.md)."
)
_EVALUATION = (
    "The evaluation figures below: in a simulation the experimenter reads them off the simulated "
    "people, without noise. They are no part of what the server sees."
)
_OTHER_RUNS = (
    "Other runs with the same devices: the figures are those of this run alone. A device's own "
    "ledger counts all of them against one budget."
)
NO_EVALUATION = (
    "No losses were measured: that would take the people's texts, which stay on their devices. "
    "With statistics.enabled = true the devices' own measurements come as noised sums."
)
_PLACES = {
    "device": "by the device itself.",
    "distributed": "in shares by the devices, so that every sum that may be opened carries it; "
    "the server sees masked contributions and their sum, nothing else.",
    "server": "by the server, to the sum.",
}
ADDERS = {"device": "device", "distributed": "devices, each a share", "server": "server"}
OWN_SHARE = ("client", "unmasked server")
"""The line of what is left for a person if masking is broken; it has no budget."""
NOT_COUNTED = (
    "What is left for a person if masking is broken is not known of some releases: an older privet "
    "wrote them down, and their plans are not here or cannot be read."
)
AS_GAUSSIAN = "reckoned as Gaussian noise, no bound"
COLLUDING = (
    "They take their own noise out of the sum. The masks are built for at most the agreed number; "
    "with more they may break, and then the last row is what is left, the device's own share of "
    "the noise. Where no bound is said, so little noise is left that none holds for integer noise; "
    "the figure is that of Gaussian noise of this size."
)
NO_AMPLIFICATION = (
    "none is claimed: the server chooses who takes part, so every participation counts in full"
)


class Line(NamedTuple):
    """One epsilon's kind: whose presence it hides, from whom, between which neighbours."""

    unit: Unit
    against: Against
    adjacency: Adjacency

    @property
    def key(self) -> str:
        """How the line is named in `privacy.json`."""
        return f"{self.unit}/{self.against}"

    def of(self, charges: Iterable[Charge]) -> tuple[Charge, ...]:
        """Return those of some charges that are on this line."""
        return tuple(charge for charge in charges if charge.line == self)


def headline(facts: PrivacyFacts) -> str:
    """Write the one sentence that a privacy officer asks for.

    It is of the strongest client-level line, if there is any.
    """
    line = main_line(facts)
    if not facts["private"]:
        return "Not private: a test seed was set; the figures say what real noise would have cost."
    if line is None:
        return "No privacy claim is made for this run."
    subject = "Each person (one device's home)" if line["unit"] == "client" else "Each record"
    return (
        f"{subject} is protected with epsilon = {line['epsilon']:.2f} at delta = "
        f"{line['delta']:g} ({line['unit']}-level, {line['adjacency']}: "
        f"{line['adjacency_means']}; noise added by the {ADDERS[line['noise_at']]}) against "
        f"{spoken(line['holds_against'])}.{_under(line)}{_broken(facts)}"
    )


def _under(line: LineFacts) -> str:
    """The conditions of a line as a sentence."""
    return f" Against the server that rests on: {condition(line)}." if condition(line) else ""


def _broken(facts: PrivacyFacts) -> str:
    """Say what is left if masking is broken. It is empty where there are no masks."""
    found = [x for x in facts["lines"] if (x["unit"], x["against"]) == OWN_SHARE]
    if not found:
        return ""
    return (
        f" If masking is broken, the device's own share of the noise is left: epsilon = "
        f"{found[0]['epsilon']:.2f}{'' if found[0]['bound'] else f' ({AS_GAUSSIAN})'}."
    )


def condition(line: LineFacts) -> str:
    """Say what a line rests on, in one clause. It is empty where it rests on no masks."""
    return "; ".join(line["conditions"])


def conditions_of(
    config: Config, line: Line, charges: Sequence[Charge], at: str | None
) -> list[str]:
    """What must be so for a line against the server: nothing, where no masks are relied on."""
    masks = at == "distributed" and line.against == "server" and not alone(config, line, at)
    if not masks or all(map(from_training, charges)):
        return []
    return conditions(config.colluders, config.data.clients)


def alone(config: Config, line: Line, at: str | None) -> bool:
    """Whether a line counts one device's share of the noise: masks are broken, or not relied on."""
    open_ = config.privacy.directory == "open" and at == "distributed"
    return line.against == "unmasked server" or (open_ and line.against == "server")


def budget_of(config: Config, line: Line) -> float | None:
    """Return what the run allows on a line. None: nothing is limited, or by each owner alone."""
    return None if (line.unit, line.against) == OWN_SHARE else _allowed(config).get(line.unit)


def _allowed(config: Config) -> dict[str, float]:
    """Return the largest epsilon that the run allows, by unit.

    On devices it is the run's own cap, if any, for the budget is the owner's. In a simulation it is
    what its clients have.
    """
    privacy = config.privacy
    own = privacy.budget.simulated
    if config.data.source == DEVICES:
        named = {"client": privacy.budget.client, "example": privacy.budget.example}
        own = {unit: most for unit, most in named.items() if most is not None}
    enabled = {"client": privacy.client.enabled, "example": privacy.example.enabled}
    return {unit: most for unit, most in own.items() if enabled[unit]}


def main_line(facts: PrivacyFacts) -> LineFacts | None:
    """The line that a report shows first: client-level, then whichever holds against most."""
    return max(
        facts["lines"],
        key=lambda line: (
            line["unit"] == "client",
            len(line["holds_against"]),
            line["against"] == "server",
        ),
        default=None,
    )


def line_name(line: LineFacts) -> str:
    """What a line is about, with its conditions: `client-level, against the analyst`."""
    said = f"{line['unit']}-level, against the {line['against']}"
    if line["against"] == "unmasked server":
        less = "" if line["bound"] else f"; {AS_GAUSSIAN}"
        return f"{said} (if masking is broken{less})"
    return f"{said} (if: {condition(line)})" if condition(line) else said


def spoken(names: Sequence[str]) -> str:
    """Adversaries in a sentence: `an analyst who sees everything published and a thief ...`."""
    known = {
        "analyst": "an analyst who sees everything published",
        "server, honest but curious": "an honest but curious server",
        "server, malicious": "a malicious server",
        "network": "whoever reads an unencrypted network",
        "thief": "a thief with the device's disk",
    }
    said = [known.get(name, name) for name in names]
    return " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)


def not_covered(config: Config) -> list[str]:
    """What no figure of the report says anything about."""
    *most, last = NOT_COVERED
    if config.data.source == DEVICES:
        return [*most, _TIMES, _OTHER_RUNS, last]
    return [*most, _NO_TIMES, _EVALUATION, last]


def noise_at(config: Config, lines: Sequence[Line]) -> str | None:
    """Return who added the release's noise, as the ledgers say it. None: no such noise.

    Noise that holds against the server came from the devices; whether each added it in full or
    its share, the settings say.
    """
    against = {line.against for line in lines if line.unit == "client"}
    if not against:
        return None
    if "server" not in against:
        return "server"
    return "distributed" if config.privacy.client.noise_at == "distributed" else "device"


def holds_against(config: Config, by_device: bool) -> tuple[str, ...]:
    """Return the adversaries against whom a claim holds.

    Noise from the device keeps everybody out but a thief, the server's only who is outside.
    """
    if config.insecure_test_seed is not None:
        return ()
    return ADVERSARIES[:-1] if by_device else ADVERSARIES[:2]


def from_training(charge: Charge) -> bool:
    """Return whether a charge counts the noise inside training.

    A release's integer noise has a distance from the Gaussian one that its epsilon is computed
    with. Training's has none.
    """
    return charge.unit == "example" and charge.distance == 0 == charge.ratio


def noise_counted(
    config: Config, at: str | None, charges: Sequence[Charge], alone: bool = False
) -> str:
    """A sentence on which noise a line rests on, from what the ledger says of it.

    With statistics a charge is that of adapter and block together; `alone`: it counts the
    device's own share.
    """
    noise = f"the {mechanism_of(config.privacy.client).name}"
    counted = _both_counted if config.statistics.enabled else _one_counted
    said = []
    for charge, times in Counter(charges).items():
        often = f"in {times} releases" if times > 1 else "in one release"
        if measured(charge, charges):
            what = _measured_counted(noise, charge, alone)
        else:
            what = counted(noise, "alone" if alone else at, charge)
            steps = charge.steps > 1 and not config.statistics.enabled
            often += f", {charge.steps} steps each" if steps else ""
        said.append(f"{what} ({often})")
    return "; ".join(said)


def measured(charge: Charge, charges: Sequence[Charge]) -> bool:
    """Return whether a charge is that of gains.

    It is of a record, and in a line with batches it is the one that no batch was drawn for.
    """
    return (
        charge.unit == "example"
        and charge.sampling_rate == 1
        and any(other.unit == "example" and other.sampling_rate < 1 for other in charges)
    )


def _measured_counted(noise: str, charge: Charge, alone: bool) -> str:
    whose = "the device's own share of " if alone else ""
    return (
        f"{whose}{noise} on gains and A/B outcomes, which every record of a person "
        f"enters in every round, {charge.noise_multiplier:.3g} times the most that one record can "
        "move them"
    )


def _both_counted(noise: str, at: str | None, charge: Charge) -> str:
    adapter, block = f"{noise} {_adder(at)} on the adapter", "on the statistics"
    if charge.unit == "example":
        adapter += " or, where that is more, the Gaussian noise in the training step (DP-SGD)"
    if at == "alone":
        block = "of the device's own share on the statistics"
        if charge.unit == "example":
            adapter = "the Gaussian noise in the training step (DP-SGD, Opacus)"
    return f"{adapter}, and {noise} {block}, as one release: together {_size(charge)}"


def _one_counted(noise: str, at: str | None, charge: Charge) -> str:
    if from_training(charge):
        return (
            "the Gaussian noise in each training step (DP-SGD, Opacus), "
            f"{charge.noise_multiplier:.3g} times the clip of one record, batches at the public "
            f"rate {charge.sampling_rate:g}"
        )
    return f"{noise} {_adder(at)}, {_size(charge)}"


def _size(charge: Charge) -> str:
    subject, rate = "person" if charge.unit == "client" else "record", charge.sampling_rate
    drawn = f", record drawn at the public rate {rate:g}" if rate < 1 else ""
    return f"{charge.noise_multiplier:.3g} times the most that one {subject} can move it{drawn}"


def _adder(at: str | None) -> str:
    if at == "alone":
        return "of the device's own share, which nobody else knows"
    if at == "device":
        return "that each device adds in full to its own contribution"
    if at == "distributed":
        return (
            "of which each device adds a share to its own contribution, sized for the smallest "
            "sum that may be opened, less the colluders"
        )
    return "that the server adds to the sum"


def assumptions(
    config: Config, charges: Sequence[Charge], by_device: bool, at: str | None = None
) -> list[str]:
    """What must be so for a line's figure to hold."""
    training = [charge for charge in charges if from_training(charge)]
    examples = [charge for charge in charges if charge.unit == "example"]
    release = len(training) < len(charges)
    by_share = any(charge.against == "unmasked server" for charge in charges)
    said = ["the person's device runs the privet that was installed, unchanged"]
    if at == "distributed" and release and not by_share and config.privacy.directory == "closed":
        said += _masks_hold(config)
    if not by_device:
        said.append("the server runs as written: it adds the noise, and publishes nothing else")
    if release:
        said.append("rounding and integer noise come from the operating system's CSPRNG")
    if training or (examples and config.statistics.enabled):
        said.append(
            "the noise inside training is floating-point Gaussian, seeded by the operating system: "
            "four draws for one (Holohan and Braghin 2021) make an attack on the low-order bits of "
            "floats (Mironov 2012) costly, and do not rule it out"
        )
    if any(charge.sampling_rate < 1 for charge in charges):
        said.append(
            f"records enter a batch independently, at the rate q = {config.sampling_rate:g}, a "
            "public constant, with draws that nobody else learns"
        )
    if release and examples:
        said.append("one local step a round, so that one record moves the contribution by at most "
                    "learning rate x clip / batch size")  # fmt: skip
    said += _constants(config)
    if any(charge.unit == "client" for charge in charges):
        said.append(
            "a person is one device's home: two homes with the same person's records are two "
            "people here, and their epsilons add up"
        )
    return said


def _masks_hold(config: Config) -> Iterator[str]:
    most = f"at most {config.colluders} of the {config.data.clients:,} enrolled devices collude"
    yield (
        "masking holds (SecAgg+, docs/secure-aggregation.md): the devices check each other's "
        "identities against a closed directory, which the server cannot add to, a sum is opened "
        f"from {config.min_sum} devices on, and {most} with the server"
    )
    if config.data.source == DEVICES:
        yield (
            "the device joined with the operator's directory (`privet client join "
            "--directory`); for one that did not, this holds against the server only if "
            "nobody on a roster was invented, and it claims its own share of the noise alone"
        )


def _constants(config: Config) -> Iterator[str]:
    chosen = config.privacy.clip_chosen == "looked"
    if chosen:
        yield looked(config)
    yield (
        f"{'' if chosen else 'clips and '}denominators are public constants; no count of records "
        f"leaves a device{' but in the noised statistics' if config.statistics.enabled else ''}"
    )


def looked(config: Config) -> str:
    """Say that clips were chosen by looking at these people, and what that leaves uncovered."""
    whats = ["contributions"] * config.privacy.client.enabled
    whats += ["gradients"] * config.privacy.example.enabled
    return (
        f"the {'clips were' if len(whats) > 1 else 'clip was'} chosen by looking at the norms of "
        f"{' and '.join(whats)} of some of these {config.data.clients:,} people, which this "
        "epsilon does not cover"
    )


def promised(config: Config) -> Promised:
    """What the settings promise, before anything was spent."""
    budgets = _allowed(config)
    return {
        "budgets": budgets,
        "delta": config.privacy.delta,
        "sentences": [*_promises(config, budgets)],
    }


def _promises(config: Config, budgets: Mapping[str, float]) -> Iterator[str]:
    client, example = config.privacy.client, config.privacy.example
    yield "To each person: text, profile and personal head stay on the device."
    if client.enabled:
        yield (
            f"To each person: whatever leaves the device is clipped to norm {client.clip:g} first, "
            f"and {mechanism_of(client).name} of {client.noise_multiplier:g} times that clip is "
            f"added {_PLACES[client.noise_at]}"
        )
    if client.enabled and config.clusters.count > 1:
        yield (
            f"To each person: the device picks one of up to {config.clusters.max_clusters} group "
            "adapters by itself. The contribution has a block for each, zero but for the picked "
            "one, and is clipped as a whole: the pick is as hidden as the rest of it, by the same "
            "noise. A noised sum tells how many picked each."
        )
    if example.enabled:
        yield (
            f"To each record: in training its gradient is clipped to norm {example.clip:g}, and "
            f"Gaussian noise of {example.noise_multiplier:g} times that clip is added in every "
            f"step (DP-SGD, Opacus), in random batches at the public rate {config.sampling_rate:g}."
        )
    if config.statistics.enabled and client.enabled:
        yield from _statistics_promises(config.statistics, client)
    if config.ab_run is not None:
        yield (
            "Of each device: it writes down what it spends before it answers, answers each of "
            f"{config.ab_run.looks} looks once at most, which cost epsilon "
            f"{config.privacy.budget.client:g} (client-level) in all at delta "
            f"{config.privacy.delta:g}, and declines a look that would bring its total, over all "
            "runs, above its owner's limits."
        )
    elif budgets or config.data.source == DEVICES:
        yield _budget_promise(config, budgets)
    if budgets:
        yield (
            "A person is one device's home: two devices, or a home that was erased and another "
            "begun, are two budgets."
        )


def _budget_promise(config: Config, budgets: Mapping[str, float]) -> str:
    limits = " and ".join(f"{value:g} ({unit}-level)" for unit, value in budgets.items())
    above = f"its total above epsilon {limits}, at delta {config.privacy.delta:g}"
    if config.data.source == DEVICES:
        above = "its total over all runs above its owner's budget"
        if budgets:
            above += (
                f", or what it spent in this run above the run's own cap, epsilon {limits} at "
                f"delta {config.privacy.delta:g}"
            )
    return (
        "Of each device: it writes down what it spends before it answers, and declines a "
        f"round that would bring {above}."
    )


def _statistics_promises(own: StatisticsSettings, client: ClientPrivacySettings) -> Iterator[str]:
    noise, place = mechanism_of(client).name, _PLACES[client.noise_at]
    yield (
        "To each person: the sum of a batch's losses, each clipped to "
        f"{own.loss_bound:g}, and its number of records leave in the same "
        f"vector, clipped to norm {BOUNDS['losses']:g} in shares of the public batch size; "
        f"{noise} of {own.noise_multiplier:g} times that is added {place}"
    )
    if own.gains:
        yield (
            "To each person: what adapter and head gain on the person's own held-out records, each "
            f"gain clipped to {own.gain_bound:g}, leaves in the same vector, with {noise} of "
            f"{own.multiplier('gains'):g} times the norm it can have added {place}"
        )


def no_claims(
    config: Config, lines: Sequence[Line], unbounded: Sequence[Line], released: bool
) -> list[str]:
    said = []
    if not released:
        said.append("Nothing has been released yet, so nothing has been spent.")
    have = {line.unit for line in lines}
    for unit, what in (
        ("client", "what a person contributes as a whole is not hidden by noise"),
        ("example", "nothing is counted for a single record by itself"),
    ):
        if released and unit not in have:
            said.append(f"No {unit}-level claim is made: {what}.")
    for line in unbounded:
        if line.unit in have:
            said.append(
                f"No {line.unit}-level claim is made against the {line.against}: some release "
                "carried no noise that counts against that party, or too little for any bound."
            )
    seen_by_server = {line.unit for line in lines if line.against == "server"}
    if config.privacy.client.noise_at == "server" and "client" in have - seen_by_server:
        said.append(
            "No client-level claim is made against the server: noise is added by the server, so it "
            "reads each person's clipped contribution before the noise."
        )
    return said


def problems(config: Config, lines: Sequence[LineFacts]) -> list[str]:
    said = []
    if config.insecure_test_seed is not None:
        said.append(
            "NOT PRIVATE: insecure_test_seed is set, so anybody can compute the noise again and "
            "take it away. The figures below hold for nobody."
        )
    said += [_disagreement(line) for line in lines if not line["cross_check"]["agrees"]]
    return said


def _disagreement(line: LineFacts) -> str:
    check = line["cross_check"]
    if check["epsilon"] is None:
        return f"NOT CROSS-CHECKED, {line_name(line)}: {check['accountant']}"
    return (
        f"THE ACCOUNTANTS DISAGREE on {line_name(line)}: {line['epsilon']:.4g} and "
        f"{check['epsilon']:.4g} ({check['accountant']}), {check['difference']:.1%} apart; at most "
        f"{AGREEMENT:.0%} is allowed. Do not quote this figure."
    )
