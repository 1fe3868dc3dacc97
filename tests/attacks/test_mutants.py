"""Faults that must not go unseen: each is planted in a copy of the code, and a test there fails.

The first fifteen are those of a review that planted them by hand, two of which no test saw. A
mutant names the text it replaces; where that text has moved or changed the mutant says so, and is
then to be written anew: it would plant nothing.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
COPIED = ("client", "common", "experiments", "server", "tests", "typings", "pyproject.toml")


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        fault: what is wrong then.
        file: where.
        old, new: the text that is replaced, which the file has once, and what by.
        caught: the test, or the tests, of which one fails: a file of `tests/`, `::`, a name.
    """

    fault: str
    file: str
    old: str
    new: str
    caught: str


RELEASE, COSTS = (
    "client/privacy/gate.py",
    "client/privacy/test_gate.py::test_a_release_costs_exactly_these_lines",
)
EMPTY = "client/training/test_local_training.py::test_an_empty_batch_steps_with_the_declared_noise"
VECTORS = (
    "common/secure_aggregation/test_masking_vectors.py::"
    "test_a_message_with_one_fault_is_refused_with_the_known_sentence"
)
TERMS = (
    "common/secure_aggregation/test_terms.py::"
    "test_terms_below_the_policy_are_refused_with_the_field_named"
)

MUTANTS = (
    # what one unit moves, and what it is charged
    Mutant("a record's reach capped at one clip", "common/privacy/round_plan.py",
           "/ self.batch_size, 2 * self.clip)", "/ self.batch_size, self.clip)",
           "client/privacy/test_gate.py::test_one_record_reaches_from_one_side_of_the_clip_to_the_other"),
    Mutant("rounding sensitivity dropped", "common/privacy/encoding.py",
           "    l2 = ratio + root\n", "    l2 = ratio\n",
           "common/privacy/test_encoding.py::test_the_sensitivity_is_the_published_formula"),
    Mutant("colluders counted as noise", "common/privacy/round_plan.py",
           "return self.survivors - self.colluders if self.masked else 1",
           "return self.survivors if self.masked else 1",
           "common/privacy/test_round_plan.py::test_a_masked_plan_laxer_than_the_devices_own_settings_is_refused_by_name"),
    Mutant("local steps ignored", RELEASE,
           'if _carries_noise(plan, "analyst") and plan.local_steps == 1:',
           'if _carries_noise(plan, "analyst"):', COSTS),
    Mutant("batch size squared", "common/privacy/round_plan.py",
           "/ self.batch_size, 2 * self.clip)", "/ self.batch_size**2, 2 * self.clip)", COSTS),
    Mutant("closeness never charged", "common/privacy/mechanism.py",
           "distance=near.slack, ratio=near.ratio,", "",
           "client/privacy/test_gate.py::test_integer_noise_is_charged_for_what_it_lacks_to_gaussian_noise"),
    Mutant("two steps counted once", RELEASE,
           "sampling_rate=plan.rate, steps=plan.local_steps,",
           "sampling_rate=plan.rate, steps=1,", COSTS),
    # the noise
    Mutant("no shrink: a record's clip without room for float32",
           "client/training/local_training.py", "max_grad_norm=plan.record_clip * _SHRINK,",
           "max_grad_norm=plan.record_clip,",
           "client/training/test_local_training.py::test_a_record_that_is_clipped_moves_the_sum_by_nearly_the_clip"),
    Mutant("no shrink: the spread of an arm where all agree", "server/ab_estimates.py",
           "* count / (count + 2)\n", "\n",
           "server/test_ab_estimates.py::test_an_arm_whose_devices_all_agree_is_not_called_certain"),
    Mutant("a block without noise", RELEASE,
           "plan.mechanism.sample(part.variance, ",
           "plan.mechanism.sample(part.variance * (part.name == 'adapter'), ",
           "server/test_round_statistics.py::test_the_noise_of_the_block_has_the_declared_variance"),
    Mutant("floor for ceil: colluders", "common/settings/sections.py",
           "return math.ceil(self.colluding * (cohort if self.colluding < 1 else 1) - 1e-9)",
           "return math.floor(self.colluding * (cohort if self.colluding < 1 else 1) + 1e-9)",
           "common/settings/test_config.py::test_colluders_and_the_smallest_sum_are_rounded_up"),
    Mutant("floor for ceil: the smallest sum", "common/settings/sections.py",
           "return math.ceil(self.survivors * cohort - 1e-9)",
           "return math.floor(self.survivors * cohort + 1e-9)",
           "common/settings/test_config.py::test_colluders_and_the_smallest_sum_are_rounded_up"),
    Mutant("no clamp", RELEASE,
           "    return np.clip(vector, -bound, bound)\n", "    return vector\n",
           "client/privacy/test_gate.py::test_a_coordinate_that_a_rotation_left_above_its_bound_is_cut"),
    Mutant("below float32 in any shape", "client/training/local_training.py",
           "if base.by_shape and shape is None:", "if False:",
           "client/training/test_local_training.py::test_below_float32_a_private_step_needs_a_public_shape"),
    Mutant("layers that mix records", "client/training/local_training.py",
           "for name in adapter.mixing:", "for name in ():",
           "common/model/test_architectures.py::test_a_layer_that_sees_other_rows_is_named_with_those_that_would_do"),
    Mutant("half the Opacus noise", "client/training/local_training.py",
           "(flat + self.noise * torch.from_numpy(noise))",
           "(flat + self.noise / 2 * torch.from_numpy(noise))",
           EMPTY),
    Mutant("training noise forgotten", "client/training/local_training.py",
           "(flat + self.noise * torch.from_numpy(noise))", "flat", EMPTY),
    # what the owner agreed to
    Mutant("the owner's smallest cohort replaced by 3", "common/secure_aggregation/terms.py",
           "min_cohort=own.min_cohort,", "min_cohort=3,",
           "common/secure_aggregation/test_terms.py::test_a_device_insists_on_the_cohort_its_owner_set"),
    Mutant("the plan's cohort not compared", "common/privacy/round_plan.py",
           'yield "cohort", self.cohort >= own.rounds.cohort, own.rounds.cohort\n', "\n",
           "common/privacy/test_round_plan.py::test_a_plan_laxer_than_the_devices_own_settings_is_refused_by_name"),
    Mutant("the plan's colluders not compared", "common/privacy/round_plan.py",
           'yield "colluders", self.colluders >= feared, feared\n', "\n",
           "common/privacy/test_round_plan.py::test_a_masked_plan_laxer_than_the_devices_own_settings_is_refused_by_name"),
    Mutant("the terms' colluders not compared", "common/secure_aggregation/terms.py",
           '("colluders", terms.colluders, self.colluders),\n', "\n", TERMS),
    # the masks
    Mutant("quorum one too low", "common/settings/sections.py",
           "return (participants + colluders) // 2 + 1", "return (participants + colluders) // 2",
           "common/secure_aggregation/test_terms.py::test_two_quorums_share_more_participants_than_collude"),
    Mutant("SECRECY 100 bits less", "common/secure_aggregation/terms.py", "SECRECY = 160.0",
           "SECRECY = 60.0",
           "common/secure_aggregation/test_terms.py::test_sparse_graphs_below_the_policy_are_refused"),
    Mutant("living holders unchecked", "client/privacy/masked_upload.py",
           "    _refuse_few_alive_holders(party, cohort, survivors)\n", "", VECTORS),
    Mutant("the device's own list of dealers not compared", "client/privacy/masked_upload.py",
           "    _refuse_other_dealers(party, state, survivors)\n", "", VECTORS),
    Mutant("the signatures of the dealt list not checked", "client/privacy/masked_upload.py",
           "    _refuse_otherwise_masked(party, state, survivors, signatures)\n", "", VECTORS),
    Mutant("the gap not checked", "client/privacy/masked_upload.py",
           "    _refuse_gap(party, cohort, survivors)\n", "",
           "client/privacy/test_masked_upload.py::"
           "test_a_device_signs_no_survivor_list_by_which_the_sum_could_be_taken_apart"),
    Mutant("the memo of verify ignores the message", "common/secure_aggregation/keys.py",
           "@functools.lru_cache(maxsize=1 << 13)\n",
           "@lambda check: lambda public, message, signature, kept={}: kept.setdefault(\n"
           "    (public, signature), check(public, message, signature)\n)\n",
           "common/secure_aggregation/test_keys.py::test_a_changed_or_cut_part_does_not_verify"),
)  # fmt: skip


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The code and its tests; `privet` there is the copy."""
    for name in COPIED:
        if (TOP / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(TOP / name, tmp_path / name, symlinks=True, ignore=skip)
        else:
            shutil.copy(TOP / name, tmp_path)
    return tmp_path


def run(copy: Path, *given: str) -> subprocess.CompletedProcess[str]:
    """A Python command that finds the copy."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy / "typings"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        [sys.executable, *given],
        cwd=copy,
        env={
            key: value for key, value in environment.items() if not key.startswith("PYTEST_XDIST")
        },
        capture_output=True,
        text=True,
        check=False,
    )


def verdict(copy: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Pytest in the copy, as far as the first failure."""
    named = [f"tests/{test}" for test in tests]
    return run(copy, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *named)


@pytest.mark.heavy
def test_the_copy_is_what_is_tested_and_without_a_fault_it_passes(copy: Path) -> None:
    where = "import privet.common.settings.config as found; print(found.__file__)"
    found = run(copy, "-c", where)
    assert Path(found.stdout.strip()).resolve() == copy / "common" / "config.py", found.stderr
    passed = verdict(copy, *dict.fromkeys(mutant.caught for mutant in MUTANTS))
    assert passed.returncode == 0, passed.stdout + passed.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.fault for mutant in MUTANTS])
def test_a_planted_fault_is_caught(mutant: Mutant, copy: Path) -> None:
    path = copy / mutant.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, (
        f"{mutant.file} has {mutant.old!r} {text.count(mutant.old)} times, expected it once: the "
        f"code has moved; plant {mutant.fault!r} where it is now"
    )
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    found = verdict(copy, mutant.caught)
    # 1: a test failed; 2 and more: pytest could not run it, which catches nothing
    assert found.returncode == 1, found.stdout + found.stderr
    assert " failed" in found.stdout
    assert "error" not in found.stdout.splitlines()[-1]


def test_every_mutant_still_finds_the_text_it_replaces_and_every_test_its_name() -> None:
    for mutant in MUTANTS:
        text = (TOP / mutant.file).read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1, f"{mutant.fault}: the code has moved"
        file, _, name = mutant.caught.partition("::")
        assert f"def {name}" in (TOP / "tests" / file).read_text(encoding="utf-8"), mutant.caught
