"""templates.py and template_store.py: which templates get in, and what they can do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.client.assistant import template_store
from privet.client.assistant.templates import (
    MAX_FILE_BYTES,
    PLACEHOLDERS,
    Template,
    builtins,
    read,
    render,
    sign,
    unsigned,
)
from privet.client.store import key_file as unlock_module
from privet.client.store.device_store import DeviceStore
from privet.client.store.key_file import Passphrase
from privet.common.errors import ConfigError, PrivacyError
from privet.common.secure_aggregation.keys import Identity

PUBLISHER, STRANGER = Identity.of(b"p" * 32), Identity.of(b"s" * 32)
TRUSTED = (PUBLISHER.public.hex(),)


def table(version: str = "1.0.0", **changes: Any) -> dict[str, Any]:
    """The fields of a template."""
    return {
        "name": "letters",
        "version": version,
        "about": "letters to friends",
        "text": "{profile}\n\n{history}\n\n{prompt}",
        "metadata": {"licence": "CC0"},
        **changes,
    }


def file(version: str = "1.0.0", publisher: Identity = PUBLISHER, **changes: Any) -> bytes:
    """A signed template file."""
    return sign(tomli_w.dumps(table(version, **changes)).encode(), "letters.toml", publisher)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceStore]:
    cost = {"iterations": 1, "lanes": 1, "memory_kib": 1024}
    monkeypatch.setattr(unlock_module, "_ARGON2ID", cost)
    with DeviceStore.create(tmp_path / "home", Passphrase("own")) as made:
        trust(made, TRUSTED)
        yield made


def trust(home: DeviceStore, publishers: tuple[str, ...]) -> None:
    """The owner's policy names exactly these."""
    path = home.folder / "policy.toml"
    head, mark, _ = path.read_text().partition("[prompts]")
    path.write_text(head + mark + "\n" + tomli_w.dumps({"publishers": list(publishers)}))


# --- files and signatures ------------------------------------------------------------------------


def test_what_a_trusted_publisher_signed_is_read_with_every_field():
    found = read(file(segment={"name": "newcomers", "most_records": 3}), "f", TRUSTED)
    assert found.name == "letters"
    assert found.number == (1, 0, 0)
    assert found.publisher == PUBLISHER.public.hex()
    assert found.metadata["licence"] == "CC0"
    assert found.segment.most_records == 3


def test_an_unsigned_an_untrusted_and_a_changed_template_are_refused_in_a_sentence():
    plain = tomli_w.dumps(table()).encode()
    with pytest.raises(PrivacyError, match="is not signed"):
        read(plain, "f", TRUSTED)
    with pytest.raises(PrivacyError, match=r"does not trust.*prompts\.publishers"):
        read(file(publisher=STRANGER), "f", TRUSTED)
    with pytest.raises(PrivacyError, match="does not trust"):
        read(file(), "f", ())
    for before, after in (
        (b"letters to friends", b"letters to enemies"),
        (b"{prompt}", b"{prompt} "),
        (b'"1.0.0"', b'"9.0.0"'),
        (b"CC0", b"CC1"),
    ):
        changed = file().replace(before, after, 1)
        assert changed != file()
        with pytest.raises(PrivacyError, match="was changed after"):
            read(changed, "f", TRUSTED)
    added = file().replace(b"fewest_records = 0", b"fewest_records = 1\nmost_records = 1", 1)
    with pytest.raises(PrivacyError, match="was changed after"):
        read(added, "f", TRUSTED)


def test_a_signature_of_another_template_or_under_another_name_is_no_signature():
    other = file("2.0.0").split(b"[signature]")[1]
    mixed = file().split(b"[signature]")[0] + b"[signature]" + other
    with pytest.raises(PrivacyError, match="was changed after"):
        read(mixed, "f", TRUSTED)
    as_other = file(publisher=STRANGER).replace(
        STRANGER.public.hex().encode(), PUBLISHER.public.hex().encode()
    )
    with pytest.raises(PrivacyError, match="was changed after"):
        read(as_other, "f", TRUSTED)


@pytest.mark.parametrize(
    "signature",
    ["x", {}, {"publisher": "00", "ed25519": "00"}, {"publisher": "zz" * 32, "ed25519": "0" * 128},
     {"publisher": 1, "ed25519": 2}, {"publisher": "0" * 64, "ed25519": "0" * 128, "more": ""}],
)  # fmt: skip
def test_a_malformed_signature_is_said(signature):
    with pytest.raises(ConfigError, match=r"\[signature\] must have"):
        read(tomli_w.dumps({**table(), "signature": signature}).encode(), "f", TRUSTED)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"text": "{prompt} {0.__class__}"}, "another brace"),
        ({"text": "{prompt} {profile!r}"}, "another brace"),
        ({"text": "{prompt} {{history}}"}, "another brace"),
        ({"text": "{history}"}, "exactly once"),
        ({"text": "{prompt}{prompt}"}, "exactly once"),
        ({"text": "{prompt}" + "x" * 8000}, "text"),
        ({"text": "{prompt}\x1b[2J"}, "U\\+001B, which does not show"),
        ({"text": "{prompt} \u202eevil"}, "U\\+202E"),
        ({"about": "a\u200bb"}, "U\\+200B"),
        ({"metadata": {"a\u2066": "b"}}, "U\\+2066"),
        ({"version": "1.0"}, "version"),
        ({"version": "01.0.0"}, "version"),
        ({"version": "1.0.0-beta"}, "version"),
        ({"version": "1.0.\u0661"}, "version"),
        ({"name": "../../x"}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "Letters"}, "name"),
        ({"code": "import os"}, "code"),
        ({"publisher": "me"}, "publisher"),
        ({"segment": {"name": "few", "fewest_records": 5, "most_records": 2}}, "nobody"),
        ({"segment": {"who": "all"}}, "who"),
        ({"about": 3}, "about"),
    ],
)
def test_a_malformed_template_is_refused_and_cannot_be_signed(changes, sentence):
    content = tomli_w.dumps({**table(), **changes}).encode()
    with pytest.raises(ConfigError, match=sentence):
        unsigned(content, "f")
    with pytest.raises(ConfigError, match=sentence):
        sign(content, "f", PUBLISHER)


@pytest.mark.parametrize(
    "content", [b"\xff", b"name = ", b"[" * 5000, b" " * (MAX_FILE_BYTES + 1), b""]
)
def test_what_is_no_template_file_is_said(content):
    with pytest.raises(ConfigError, match="f "):
        read(content, "f", TRUSTED)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="{}"), max_size=80))
def test_every_text_that_is_accepted_keeps_its_signature_through_a_file(words):
    content = tomli_w.dumps(table(text="{prompt}" + words)).encode()
    try:
        before = unsigned(content, "f")
    except ConfigError:
        return
    signed = sign(content, "f", PUBLISHER)
    assert read(signed, "f", TRUSTED).text == before.text
    assert sign(signed, "f", PUBLISHER) == signed


# --- rendering -----------------------------------------------------------------------------------


def test_what_is_filled_in_is_never_read_as_a_template():
    template = unsigned(tomli_w.dumps(table()).encode(), "f")
    shown = render(template, prompt="{history} {0}", profile="{prompt}", history="{profile.x}")
    assert shown == "{prompt}\n\n{profile.x}\n\n{history} {0}"


def test_a_paragraph_without_anything_to_say_is_left_out_with_its_heading():
    notes = builtins()["notes"]
    assert "Notes on" not in render(notes, prompt="Hello")
    assert "What they wrote" not in render(notes, prompt="Hello", profile="short")
    assert render(notes, prompt="Hello").endswith("Hello")
    assert render(builtins()["memory"], prompt="Hello") == "Hello"


def test_the_templates_that_come_with_privet_are_well_formed():
    found = builtins()
    assert set(found) == {"memory", "notes", "portrait"}
    assert all(isinstance(one, Template) and one.publisher is None for one in found.values())
    assert all("{prompt}" in one.text and set(PLACEHOLDERS) for one in found.values())


# --- the library in the vault --------------------------------------------------------------------


def test_a_template_is_kept_used_gone_back_from_and_gone_forward_to(home):
    template_store.add(home, file(), "f")
    template_store.add(home, file("1.1.0", text="{history}\n\n{prompt}"), "f")
    assert template_store.trusted(home, "letters").version == "1.1.0"
    assert template_store.rollback(home, "letters").version == "1.0.0"
    assert template_store.trusted(home, "letters").version == "1.0.0"
    assert template_store.rollback(home, "letters", "1.1.0").version == "1.1.0"
    states = {(k.template.name, k.template.version): k.used for k in template_store.kept(home)}
    assert states[("letters", "1.0.0")] is False
    assert states[("letters", "1.1.0")] is True
    assert states[("memory", "1.0.0")] is True
    template_store.rollback(home, "letters")
    with pytest.raises(ConfigError, match="no version before"):
        template_store.rollback(home, "letters")


def test_a_lower_and_an_equal_version_are_refused_also_after_going_back(home):
    template_store.add(home, file("1.0.0"), "f")
    template_store.add(home, file("1.10.0"), "f")
    template_store.rollback(home, "letters")
    for version in ("1.0.0", "1.9.9", "1.10.0"):
        with pytest.raises(PrivacyError, match="only a higher one is taken"):
            template_store.add(home, file(version, about="another"), "f")
    assert template_store.add(home, file("2.0.0"), "f").version == "2.0.0"


def test_a_name_belongs_to_who_used_it_first_and_privets_own_to_privet(home):
    trust(home, (*TRUSTED, STRANGER.public.hex()))
    template_store.add(home, file(), "f")
    with pytest.raises(PrivacyError, match=f"belongs to {PUBLISHER.public.hex()}"):
        template_store.add(home, file("2.0.0", STRANGER), "f")
    with pytest.raises(PrivacyError, match="belongs to privet itself"):
        template_store.add(home, file("2.0.0", name="memory"), "f")
    assert template_store.trusted(home, "memory").publisher is None


def test_a_publisher_who_is_trusted_no_more_is_used_no_more_and_keeps_the_name(home):
    template_store.add(home, file("1.0.0"), "f")
    template_store.add(home, file("1.1.0"), "f")
    trust(home, (STRANGER.public.hex(),))
    with pytest.raises(PrivacyError, match="does not trust"):
        template_store.trusted(home, "letters")
    with pytest.raises(PrivacyError, match="does not trust"):
        template_store.rollback(home, "letters")
    with pytest.raises(PrivacyError, match="belongs to"):
        template_store.add(home, file("3.0.0", STRANGER), "f")
    assert sum(bool(one.refused) for one in template_store.kept(home)) == 2


def test_what_is_refused_changes_nothing(home):
    template_store.add(home, file(), "f")
    before = home.vault.names()
    for content in (b"", file(publisher=STRANGER), file("0.9.0"), file("2.0.0")[:-9]):
        with pytest.raises((ConfigError, PrivacyError)):
            template_store.add(home, content, "f")
    assert home.vault.names() == before


def test_changes_show_every_field_that_differs(home):
    template_store.add(home, file(), "f")
    new, before = template_store.check(
        home, file("1.1.0", text="{prompt}", segment={"name": "few", "most_records": 2}), "f"
    )
    lines = list(template_store.changes(before, new))
    assert "-version: 1.0.0" in lines
    assert "+version: 1.1.0" in lines
    assert "-  {history}" in lines
    assert any(line.startswith("+for: few") for line in lines)
    assert all(line.startswith(("+", "@", "---")) for line in template_store.changes(None, new))


def test_an_unknown_name_or_version_says_what_there_is(home):
    with pytest.raises(ConfigError, match="there are memory, notes, portrait"):
        template_store.find(home, "nothing")
    with pytest.raises(ConfigError, match=r"there are 1\.0\.0"):
        template_store.find(home, "memory", "7.0.0")


def test_a_publisher_in_the_policy_must_be_a_key(home):
    trust(home, ("PRIVET",))
    with pytest.raises(ConfigError, match="is not a public key"):
        template_store.kept(home)
