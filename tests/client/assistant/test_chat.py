"""`privet chat`: both answers, what the personal one came from, verdicts; offline, scriptable."""

import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import torch

from privet import commands as main
from privet.client.assistant import terminal_chat as chats
from privet.client.assistant.device_chat import assistant_of
from privet.client.assistant.profile import profile_of, public_chances
from privet.client.assistant.retrieval import TextIndex
from privet.client.assistant.sentence_encoder import read_kept
from privet.client.assistant.templates import builtins
from privet.client.assistant.text_generation import Assistant, Sampling, continued
from privet.client.personal.text_head import TextHead, no_text_head
from privet.client.store import key_file as unlock_module
from privet.client.store import verdicts
from privet.client.store.device_store import DeviceStore, Joined
from privet.client.store.key_file import Passphrase
from privet.client.training.records import tokenize
from privet.common.errors import AssetError, ConfigError, StateError
from privet.common.model.adapter import shared
from privet.common.model.base_model import final_states
from privet.common.secure_aggregation.keys import Directory
from privet.common.settings.config import to_toml
from privet.experiments.simulate import simulate

from ...tiny import WORDS, fresh, population, tiny_config
from ..enrolled.test_participant import config_of, records

RUN, SERVER = "run-1", "fl.example.org:9092"
SHORT = Sampling(tokens=6, temperature=0.0, seed=0, budget=40)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a connection fails the test; passphrases cost nothing."""

    def refuse(*given: Any) -> None:
        raise AssertionError(f"a connection to {given[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    cost = {"iterations": 1, "lanes": 1, "memory_kib": 1024}
    monkeypatch.setattr(unlock_module, "_ARGON2ID", cost)


def assistant(base: Any, head: TextHead | None = None, template: str = "memory") -> Assistant:
    texts = [f"{WORDS[n]} {WORDS[n + 1]} {WORDS[n + 2]}" for n in range(12)]
    index = TextIndex.build(texts)
    return Assistant(base, "run-1", head, index, None, builtins()[template], SHORT)


# --- the engine ----------------------------------------------------------------------------------


def without_a_cache(base: Any, head: TextHead | None, text: str, tokens: int) -> str:
    """The likeliest continuation, all of it computed anew for each token."""
    from privet.client.personal.text_head import adjusted_logits

    (row,) = tokenize([_record(text)], base.tokenizer, 100, "generation")
    ids, before = list(row.ids[:-1]), len(row.ids) - 1
    for _ in range(tokens):
        state = final_states(base, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))
        token = int(adjusted_logits(head, state[0, -1], base.output.scores(state[0, -1])).argmax())
        if token == base.tokenizer.eos_token_id:
            break
        ids.append(token)
    return str(base.tokenizer.decode(ids[before:], skip_special_tokens=True))


def _record(text: str) -> Any:
    from privet.client.training.records import Record

    return Record(text)


def own_head(width: int) -> TextHead:
    """A head that wants one word above all."""
    plain = no_text_head(width)
    return TextHead(
        torch.tensor([50]), torch.tensor([100.0]), plain.keys, plain.slots, plain.centre,
        bias_weight=1.0, memory_offset=0.0,
    )  # fmt: skip


@torch.no_grad()
def test_answers_with_kept_keys_and_values_are_those_without(llama_folder):
    base = fresh(llama_folder)
    for text in ("ba da ga", "ba", "ka la ma ba da ga ka la ma"):
        found = continued(base, None, text, SHORT)
        assert found.text == without_a_cache(base, None, text, 6)
        assert 0 < found.first_s <= found.seconds


def test_the_head_and_the_retrieved_texts_change_the_personal_answer_only(llama_folder):
    base = fresh(llama_folder)
    prompt = f"{WORDS[3]} {WORDS[4]}"
    plain = assistant(base).reply(prompt)
    assert plain.shared.text == continued(base, None, prompt, SHORT).text
    assert plain.sources
    assert not plain.with_head
    assert all(WORDS[3] in s.text or WORDS[4] in s.text for s in plain.sources[:2])
    with_head = assistant(base, own_head(base.width)).reply(prompt)
    assert with_head.shared.text == plain.shared.text
    assert with_head.with_head
    wanted = str(base.tokenizer.decode([50]))
    assert with_head.personal.text.split() == [wanted] * 6
    alone = assistant(base, no_text_head(base.width))
    assert not alone.reply(prompt).with_head


def test_the_same_seed_gives_the_same_answers_and_another_one_others(llama_folder):
    base = fresh(llama_folder)
    drawn = [
        continued(base, None, "ba da", Sampling(8, 1.5, seed, 0)).text for seed in (1, 1, 2, 3, 4)
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_an_empty_prompt_and_one_longer_than_the_model_reads_are_told(llama_folder):
    talker = assistant(fresh(llama_folder))
    with pytest.raises(ConfigError, match="prompt is empty"):
        talker.reply("  \n")
    with pytest.raises(ConfigError, match="the model reads 128"):
        talker.reply("ba " * 200)
    nearly = talker.reply("ba " * 118)  # no room is left for anything before it
    assert nearly.context_tokens <= 128 - SHORT.tokens


# --- the conversation ----------------------------------------------------------------------------


class Kept:
    """What was recorded."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str, str | None, str | None]] = []
        self.taken: list[bool] = []

    def __call__(
        self, kind: str, prompt: str, answer: str, *, over: str | None, edited: str | None,
        taken: bool = False,
    ) -> int:  # fmt: skip
        self.seen.append((kind, prompt, answer, over, edited))
        self.taken.append(taken)
        return len(self.seen)


def talked(base: Any, lines: str, capsys: pytest.CaptureFixture[str]) -> tuple[Kept, list[Any]]:
    kept = Kept()
    talker = assistant(base, own_head(base.width))
    chats.talk(talker, kept, io.StringIO(lines), once=None, as_json=True)
    return kept, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_verdicts_name_the_answer_they_are_about(llama_folder, capsys):
    lines = "ba da\n:accept\n:global\n:reject\n\n:edit ga ga\n:why\n::quit is a prompt\n:quit\nno\n"
    kept, said = talked(fresh(llama_folder), lines, capsys)
    shared, personal = said[0]["global"], said[0]["personal"]
    assert shared != personal
    assert kept.seen == [
        ("accept", "ba da", personal, shared, None),
        ("accept", "ba da", shared, personal, None),
        ("reject", "ba da", personal, None, None),
        ("edit", "ba da", personal, None, "ga ga"),
    ]
    assert kept.taken == [True, False, False, False]
    assert said[5]["retrieved"] == said[0]["from"]["retrieved"]
    assert said[6]["prompt"] == ":quit is a prompt"
    assert len(said) == 7


@pytest.mark.parametrize(
    ("line", "sentence"),
    [(":accept", "ask something first"), (":aaa", "is no command"), ("ba\n:edit  ", "needs the")],
)
def test_a_wrong_line_in_a_script_ends_it_with_a_sentence(llama_folder, capsys, line, sentence):
    with pytest.raises(ConfigError, match=sentence):
        talked(fresh(llama_folder), line + "\n", capsys)


class Terminal(io.StringIO):
    """Lines that say they come from a terminal."""

    def isatty(self) -> bool:
        return True


def test_at_a_terminal_a_wrong_line_is_said_and_the_chat_goes_on(llama_folder, capsys):
    talker, kept = assistant(fresh(llama_folder)), Kept()
    lines = Terminal(":accept\n:zzz\nba da\n:why\n:reject\n")
    chats.talk(talker, kept, lines, once=None, as_json=False)
    out = capsys.readouterr().out
    assert "ask something first" in out
    assert ":zzz is no command" in out
    assert all(word in out for word in ("global", "personal", "own texts", "first token after"))
    assert len(kept.seen) == 1


def test_what_a_model_says_cannot_drive_the_terminal():
    assert chats._printable("a\x1b[2Jb\x07\n\tc\u202e") == "a[2Jb\n\tc"


# --- a device ------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, llama_folder: Path) -> Iterator[DeviceStore]:
    """A device on which one run has ended."""
    (tmp_path / "pass").write_text("own\n")
    with DeviceStore.create(tmp_path / "home", Passphrase("own")) as made:
        made.join(
            Joined(SERVER, "PEM", closed=True),
            Directory({n: bytes([n]) * 32 for n in range(1, 65)}, closed=True),
        )
        config = config_of(llama_folder)
        made.receive(RUN, to_toml(config))
        adapter = shared(config)
        vector = adapter.start + 0.1
        head = own_head(adapter.base.width).to_bytes()
        entries = {f"adapters/{RUN}": safetensors.numpy.save({"adapter": vector})}
        made.vault.put_all({**entries, f"heads/{RUN}": head, "records/own": records(3)})
        yield made


def command(home: DeviceStore, *words: str) -> list[str]:
    return ["chat", "--device", "--home", str(home.folder), "--passphrase-file",
            str(home.folder.parent / "pass"), "--temperature", "0", "--tokens", "4",
            "--budget", "40", *words]  # fmt: skip


def test_on_a_device_adapter_head_and_records_speak_and_verdicts_stay_in_the_vault(
    home, bert_folder, monkeypatch, capsys
):
    text = home.records()[0].text
    lines = f"{text[:5]}\n:accept\n{text[:9]}\n:edit a violet umbrella\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main.run(command(home, "--encoder", str(bert_folder), "--json")) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    origin = said[0]["from"]
    assert (origin["adapter"], origin["head"], origin["template"]) == (RUN, True, "memory 1.0.0")
    assert origin["retrieved"]
    assert origin["retrieved"][0]["meaning"] is not None
    assert home.vault.names("feedback/") == ["feedback/00000001", "feedback/00000002"]
    kept = [json.loads(home.vault.get(name) or b"") for name in home.vault.names("feedback/")]
    assert [one["kind"] for one in kept] == ["accept", "edit"]
    assert kept[0]["answer"] == said[0]["personal"]
    assert kept[1]["edited"] == "a violet umbrella"
    assert [pair.chosen for pair in verdicts.pairs(verdicts.kept(home).values())][-1:] == [
        "a violet umbrella"
    ]
    assert home.vault.names("retrieval/") == [f"retrieval/{bert_folder}"]
    assert home.outbox() == []
    plain = b"".join(path.read_bytes() for path in home.folder.iterdir())
    assert b"a violet umbrella" not in plain
    assert text.encode() not in plain


def test_a_chat_that_is_opened_again_encodes_new_records_only(home, bert_folder, monkeypatch):
    encoded: list[int] = []
    from privet.client.assistant import sentence_encoder

    real = sentence_encoder.embed

    def counting(base: Any, texts: Any, step: Any = None) -> Any:
        encoded.append(len(texts))
        return real(base, texts, step)

    monkeypatch.setattr(sentence_encoder, "embed", counting)
    for _ in range(2):
        assistant_of(home, None, "memory", str(bert_folder), SHORT)
    home.vault.put("records/more", records(9, 1))
    assistant_of(home, None, "memory", str(bert_folder), SHORT)
    assert [n for n in encoded if n > 1] == [12]
    found = assistant_of(home, None, "memory", "none", SHORT)
    assert found.index.encoder is None
    assert len(found.index.texts) == 13


def test_the_vector_of_a_record_that_has_gone_goes_with_the_next_chat(home, bert_folder):
    name = f"retrieval/{bert_folder}"
    assistant_of(home, None, "memory", str(bert_folder), SHORT)
    first = read_kept(home.vault.get(name), 32)
    home.vault.put("records/own", records(4))  # as many others
    assistant_of(home, None, "memory", str(bert_folder), SHORT)
    now = read_kept(home.vault.get(name), 32)
    assert len(first) == len(now) == 12
    assert not set(first) & set(now)


def test_the_adapter_in_use_is_the_one_that_was_kept(home):
    found = assistant_of(home, "run", "memory", "none", SHORT)
    assert found.adapter == RUN
    adapter = shared(home.run(RUN)[0].config)
    assert adapter.read() == pytest.approx(adapter.start + 0.1)


def test_a_run_that_has_not_ended_and_a_server_that_was_left_are_told(home, capsys):
    assert main.run(command(home, "--once", "ba", "--encoder", "none", "nothing")) == 2
    assert f"no run 'nothing' has ended on this device: {RUN}" in capsys.readouterr().err
    assert main.run(command(home, "--once", "ba", "--template", "x")) == 2
    assert "there is no template 'x'" in capsys.readouterr().err
    home.leave()
    with pytest.raises(StateError, match=f"the settings of {RUN} went"):
        assistant_of(home, None, "memory", "none", SHORT)


def test_a_chat_fetches_nothing(home, tmp_path, monkeypatch):
    monkeypatch.setenv("PRIVET_CACHE", str(tmp_path / "cache"))
    with pytest.raises(AssetError, match="privet assets fetch minilm"):
        assistant_of(home, None, "memory", "minilm", SHORT)


# --- a simulated user ----------------------------------------------------------------------------


def test_a_chat_as_a_simulated_user_and_its_bad_input(llama_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(llama_folder, population(tmp_path / "people", 10, 8))
    simulate(config, tmp_path / "runs" / "tiny", engine_name="local", resume=False)
    words = ["chat", "tiny", "--encoder", "none", "--tokens", "4", "--budget", "40"]
    capsys.readouterr()
    assert main.run([*words, "--user", "user 001", "--once", "ba da", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["from"]["retrieved"]
    assert main.run([*words, "--user", "user 001", "--once", "ba da", "--template", "notes"]) == 0
    out = capsys.readouterr().out
    assert "global" in out
    assert "template notes 1.0.0" in out
    monkeypatch.setattr("sys.stdin", io.StringIO("ba da\n:reject\n"))
    assert main.run([*words, "--user", "user 001", "--json"]) == 0
    (file,) = Path("runs/tiny/feedback").iterdir()
    assert json.loads(file.read_text())["kind"] == "reject"
    capsys.readouterr()
    for given, sentence in (
        (["--user", "nobody"], "has no user 'nobody'"),
        (["--user", "user 001", "--template", "x"], "no template 'x' comes with privet"),
        ([], "say as whom"),
        (["--user", "user 001", "--device"], "say as whom"),
        (["--user", "user 001", "--once", ""], "prompt is empty"),
        (["--user", "user 001", "--once", "ba \udcff"], "the prompt is not UTF-8"),
        (["--user", "user 001", "--once", "ba", "--temperature", "nan"], "temperature = nan"),
        (["--user", "user 001", "--once", "ba", "--temperature", "1e-300"], "from 0.01 to 100"),
    ):
        assert main.run([*words, *given]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.heavy
def test_the_first_token_of_smollm2_comes_within_two_seconds_of_the_core():
    from privet.common.model.base_model import load

    base = load("smollm2-135m-instruct")
    texts = [" ".join(["my lord"] * 30 + [str(n)]) for n in range(20)]
    mine = profile_of([_record(text) for text in texts], public_chances(base.tokenizer))
    talker = Assistant(
        base, "", None, TextIndex.build(texts), mine, builtins()["portrait"], Sampling(tokens=3)
    )
    talker.reply("Speak, my lord")  # the first touches memory
    found = talker.reply("Speak, my lord")
    assert found.context_tokens > 150
    assert found.personal.first_core_s < 2.0
    assert found.shared.first_core_s < 2.0
