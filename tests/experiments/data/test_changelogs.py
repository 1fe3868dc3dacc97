"""changelogs.py: maintainers' entries, in the order of time, and machines without."""

import gzip

import pytest

from privet.common.errors import DataError
from privet.experiments.data import changelogs, population
from privet.experiments.data.changelogs import entries, read_changelogs

TEXT = """tool (1.2-2) unstable; urgency=medium

  * Second thing.
    - in two lines

 -- Ann Bee <ann@example.org>  Tue, 03 Jan 2023 10:00:00 +0100

tool (1.2-1) unstable; urgency=low

  * First thing.

 -- Ann Bee <old@example.org>  Mon, 02 Jan 2023 10:00:00 +0100

tool (1.1-9) unstable; urgency=low

 -- Ann Bee <ann@example.org>  Sun, 01 Jan 2023 10:00:00 +0100

tool (1.1-8) unstable; urgency=low

  * No such day.

 -- Cid Dee <cid@example.org>  sometime
"""


def packed(folder, package, text, name="changelog.Debian.gz"):
    (folder / package).mkdir(parents=True)
    (folder / package / name).write_bytes(gzip.compress(text.encode("latin-1")))


def test_entries_without_text_or_date_are_left_out():
    found = list(entries(TEXT))
    assert [one[1] for one in found] == ["1.2-2", "1.2-1"]
    assert found[0][2:] == ("Ann Bee", 1672736400.0, "* Second thing.\n- in two lines")


def test_a_maintainers_records_are_earliest_first_and_copies_count_once(tmp_path):
    packed(tmp_path, "libtool", TEXT)
    packed(tmp_path, "tool-doc", TEXT)
    other = TEXT.replace("tool (", "own (").replace("Ann Bee", "Cid Dee")
    packed(tmp_path, "native", other, "changelog.gz")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "changelog.Debian.gz").write_bytes(b"no gzip at all")
    found = read_changelogs(tmp_path)
    assert list(found) == ["Ann Bee", "Cid Dee"]
    assert [one.text[:7] for one in found["Ann Bee"]] == ["* First", "* Secon"]


def test_a_machine_without_changelogs_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(changelogs.read_changelogs, "__defaults__", (tmp_path,))
    with pytest.raises(DataError, match=r"'changelogs' needs Debian changelogs.*another source"):
        population.load("changelogs", clients=2, test_clients=1, min_records=1, seed=0)


def test_the_source_is_one_of_the_built_in_ones(tmp_path, monkeypatch):
    for number in range(4):
        text = TEXT.replace("tool (", f"p{number} (").replace("Ann", f"A{number}")
        packed(tmp_path, f"p{number}", text)
    monkeypatch.setattr(changelogs.read_changelogs, "__defaults__", (tmp_path,))
    found = population.load("changelogs", clients=2, test_clients=1, min_records=2, seed=0)
    assert (len(found.train_users), len(found.test_users), found.task) == (2, 1, "generation")
