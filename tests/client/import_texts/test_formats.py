"""formats.py: each kind of file gives its owner's own text, and nobody else's."""

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.client.import_texts.formats import read
from privet.client.import_texts.text_pieces import Note, Reading, clean, pieces
from privet.client.training.records import RECORD_LIMIT, Record
from privet.common.errors import DataError

MTIME = 1_700_000_000.5


def items(path: Path, *me: str, limit: int = 64_000_000, size: int = 240) -> list[Record | Note]:
    names = frozenset(name.casefold() for name in me)
    with path.open("rb") as file:
        return list(read(file, path.suffix, Reading(names, MTIME, size, limit)))


def texts(path: Path, *me: str, limit: int = 64_000_000, size: int = 240) -> list[str]:
    found = items(path, *me, limit=limit, size=size)
    return [item.text for item in found if isinstance(item, Record)]


def notes(path: Path, *me: str, limit: int = 64_000_000) -> list[tuple[str, int | None]]:
    found = items(path, *me, limit=limit)
    return [(item.reason, item.line) for item in found if isinstance(item, Note)]


def times(path: Path, *me: str) -> list[object]:
    return [item.time for item in items(path, *me) if isinstance(item, Record)]


@pytest.fixture
def write(tmp_path):
    def _write(name: str, content: str | bytes) -> Path:
        path = Path(tmp_path / name)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return _write


# --- pieces -------------------------------------------------------------------------------------

TEXT = st.text(
    st.sampled_from("ab.!? \n\t\r\f\x00。é\u0301👩\u200d\ufeff\ud800<>:[]"), max_size=400
)


@given(st.one_of(TEXT, st.text(max_size=400)), st.integers(16, 60))
def test_pieces_lose_nothing_but_white_space_and_none_is_too_long(text, size):
    text = clean(text)
    found = list(pieces([text], size))
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(piece == piece.strip() and 0 < len(piece) <= size for piece in found)


@given(st.lists(st.text(st.sampled_from("abcé."), min_size=1, max_size=16), max_size=60))
def test_no_word_is_cut_that_fits_in_a_piece(words):
    found = list(pieces([" ".join(words)], 16))
    assert [word for piece in found for word in piece.split()] == words


@given(st.lists(TEXT, max_size=6), st.integers(16, 40))
def test_pieces_do_not_depend_on_the_chunks_a_text_is_read_in(chunks, size):
    chunks = [clean(chunk) for chunk in chunks]
    assert list(pieces(chunks, size)) == list(pieces(["".join(chunks)], size))


def test_cutting_every_n_characters_would_fail_the_law_on_words():
    text = "these words are whole " * 5
    faulty = [text[start : start + 16] for start in range(0, len(text), 16)]
    assert [word for piece in faulty for word in piece.split()] != text.split()
    assert [word for piece in pieces([text], 16) for word in piece.split()] == text.split()


def test_a_piece_ends_at_a_paragraph_then_a_sentence_then_a_line_then_a_word():
    assert list(pieces(["aaaa bbbb\n\ncccc dddd. eeee"], 20)) == ["aaaa bbbb", "cccc dddd. eeee"]
    assert list(pieces(["One two three. Four five six."], 20)) == [
        "One two three.",
        "Four five six.",
    ]
    assert list(pieces(["one two\nthree four five six"], 20)) == ["one two", "three four five six"]
    assert list(pieces(["one two three four five six"], 16)) == ["one two three", "four five six"]


def test_a_short_heading_stays_with_its_text_and_short_paragraphs_share_a_piece():
    assert list(pieces(["Hi\n\none two three. four five six"], 24)) == [
        "Hi\n\none two three.",
        "four five six",
    ]
    assert list(pieces(["one\n\ntwo\n\nthree"], 24)) == ["one\n\ntwo\n\nthree"]


def test_a_long_word_is_cut_before_a_character_that_stands_alone():
    word = "e\u0301" * 40
    assert all(not piece.startswith("\u0301") for piece in pieces([word], 17))
    faulty = [word[start : start + 17] for start in range(0, len(word), 17)]
    assert any(piece.startswith("\u0301") for piece in faulty)


def test_clean_strips_controls_and_half_surrogates_and_keeps_words_apart():
    assert clean("a\x00b\x07\ud800c\x0cd\r\ne\rf\tg\x85h") == "abc\nd\ne\nf\tg\nh"


# --- plain text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_is_read_in_any_unicode_that_can_be_told(write, encoding):
    path = write("a.txt", "Grüße, Welt — ☃\r\n".encode(encoding))
    assert items(path) == [Record("Grüße, Welt — ☃", None, MTIME)]


def test_western_text_that_is_not_utf8_is_read_as_windows_1252_and_that_is_said(write):
    path = write("a.txt", ("x" * 70_000 + " später “zitiert”").encode("cp1252"))
    assert "".join(texts(path)).endswith("später “zitiert”")
    assert notes(path) == [("it is not UTF-8 and was read as Windows-1252", None)]


@pytest.mark.parametrize("encoding", ["koi8-r", "shift-jis", "gb18030"])
def test_other_scripts_in_old_encodings_are_refused_rather_than_garbled(write, encoding):
    text = {"koi8-r": "Привет, как дела? ", "shift-jis": "今日は良い天気です。"}
    path = write("a.txt", (text.get(encoding, "你好，世界。") * 9).encode(encoding))
    with pytest.raises(DataError, match="not UTF-8: save it"):
        texts(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"text\0text", "zero bytes"),
        (b"t" * 80_000 + b"\0", "zero bytes"),
        (b"%PDF-1.7 ...", "a PDF"),
        (b"PK\x03\x04 ...", "an archive"),
        (b"\x89PNG\r\n", "a picture"),
        (b"\x7fELF", "a program"),
        (bytes(range(1, 32)) * 9, "control characters"),
        ("\ufffe\ue000".encode("utf-16"), "cannot be printed"),
        (b"\xff\xfea", "damaged UTF-16"),
    ],
)
def test_what_is_not_text_is_refused_with_a_reason(write, content, reason):
    with pytest.raises(DataError, match=reason):
        texts(write("a.txt", content if b"\xfe" not in content[:2] else content * 9))


@given(st.binary(max_size=2000), st.sampled_from([".txt", ".md", "", ".jsonl", ".json", ".mbox"]))
def test_any_bytes_give_good_records_or_a_reason(tmp_path_factory, content, suffix):
    check_good(tmp_path_factory.getbasetemp() / f"bytes{suffix}", content)


@given(
    st.one_of(TEXT, st.text(max_size=500)),
    st.sampled_from(
        [
            (".txt", "{}"),
            (".txt", "1/2/24, 10:00 - me: {}"),
            (".mbox", "From a Sat Jan 01 12:00:00 2022\nFrom: me\n\n{}"),
            (".eml", "Content-Type: text/html\n\n<p>{}"),
        ]
    ),
)
def test_any_text_gives_good_records(tmp_path_factory, text, kind):
    suffix, frame = kind
    content = frame.replace("{}", text).encode("utf-8", "surrogatepass")
    check_good(tmp_path_factory.getbasetemp() / f"text{suffix}", content)


KEYS = [
    *["text", "time", "label", "user", "messages", "role", "content", "parts", "mapping"],
    *["message", "author", "chats", "list", "from", "type", "date_unixtime", "content_type"],
    *["create_time", "personal_information"],
]
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.just("user")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=25,
)


@given(JSON, st.sampled_from([".json", ".jsonl"]))
def test_any_json_gives_good_records_or_a_reason(tmp_path_factory, value, suffix):
    check_good(tmp_path_factory.getbasetemp() / f"j{suffix}", json.dumps(value).encode())


def check_good(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        found = items(path, "me")
    except DataError:
        return
    for item in found:
        if isinstance(item, Record):
            assert item.text.strip()
            assert item.text == clean(item.text)
            assert len(item.text.encode()) <= RECORD_LIMIT
            assert isinstance(item.time, float)


def test_of_a_file_over_the_limit_the_last_lines_are_read_and_that_is_said(write):
    path = write("a.txt", "".join(f"line {n:05}é\n" for n in range(1000)))
    found = texts(path, limit=1000)
    assert "".join(found).endswith("line 00999é")
    assert found[0].startswith("line 009")
    (note,) = notes(path, limit=1000)
    assert "the first 0.012 MB are left out" in note[0]


def test_one_endless_line_is_read_from_a_whole_character_on(write):
    path = write("a.txt", "é" * 5000)
    assert set("".join(texts(path, limit=1001))) == {"é"}
    with pytest.raises(DataError, match="save it as UTF-8"):
        texts(write("b.txt", ("é" * 5000).encode("utf-16")), limit=1001)


def test_bytes_that_are_added_while_a_file_is_read_are_not_read(write):
    path = write("a.txt", "before\n")
    with path.open("rb") as file:
        reader = read(file, ".txt", Reading(frozenset(), MTIME, 240, 1000))
        with path.open("ab", buffering=0) as more:
            first = next(reader)
            more.write(b"after\n")
        assert [first, *reader] == [Record("before\n".strip(), None, MTIME)] or os.name == "nt"


# --- JSON Lines ---------------------------------------------------------------------------------


def lines(*values: object) -> str:
    return "".join(v + "\n" if isinstance(v, str) else json.dumps(v) + "\n" for v in values)


def test_the_native_format_needs_no_user_and_keeps_label_and_time(write):
    path = write(
        "a.jsonl",
        "\ufeff"
        + lines(
            {"text": "plain"},
            {"text": "rated " * 100, "label": 4, "time": "1970-01-02T00:00:00Z"},
            {"text": "dated", "time": 7, "user": None, "other": [1]},
        ),
    )
    assert items(path) == [
        Record("plain", None, MTIME),
        Record(("rated " * 100).strip(), 4.0, 86_400.0),
        Record("dated", None, 7.0),
    ]


def test_a_long_text_without_a_label_is_cut_into_pieces(write):
    found = texts(write("a.jsonl", lines({"text": "word " * 200})))
    assert len(found) > 3
    assert " ".join(found).split() == ["word"] * 200


def test_broken_lines_are_left_out_by_number_and_the_others_are_taken(write):
    secret = "SECRET"
    broken = ['{"text": "' + secret, f"[{json.dumps(secret)}]", json.dumps({"text": [secret]})]
    path = write("a.jsonl", lines({"text": "one"}, *broken, "", {"text": "two"}, {"no": secret}))
    assert texts(path) == ["one", "two"]
    assert notes(path) == [
        ("not one JSON object in UTF-8", 2),
        ("not one JSON object in UTF-8", 3),
        ('"text" must be a text, found a list', 4),
        ('expected "text", but the record has none', 7),
    ]
    assert secret not in str(notes(path))


def test_a_line_longer_than_the_record_limit_is_skipped_and_the_next_is_read(write):
    path = write("a.jsonl", lines({"text": "x" * (RECORD_LIMIT + 9)}, {"text": "two"}))
    assert texts(path) == ["two"]
    assert notes(path) == [("longer than 1,000,000 bytes", 1)]


def test_of_a_chat_only_the_persons_own_side_is_taken(write):
    chat = [
        {"role": "system", "content": "no"},
        {"role": "user", "content": "mine"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": [{"type": "text", "text": "mine too"}, {"type": "image"}]},
    ]
    assert texts(write("a.jsonl", lines({"messages": chat}))) == ["mine", "mine too"]


def test_records_of_several_users_are_only_taken_when_the_owner_is_named(write):
    path = write("a.jsonl", lines({"user": "Ann", "text": "a"}, {"user": "Bob", "text": "b"}))
    with pytest.raises(DataError, match=r"'Ann', 'Bob'.*--me NAME"):
        texts(path)
    assert texts(path, "ann") == ["a"]
    with pytest.raises(DataError, match="none of which is a name given"):
        texts(path, "Eve")
    assert texts(write("b.jsonl", lines({"user": "Ann", "text": "a"}))) == ["a"]


# --- mail ---------------------------------------------------------------------------------------

MBOX = """From ann@x.org Sat Jan 01 12:00:00 2022
From: Ann Example <Ann@x.org>
Date: Sat, 1 Jan 2022 12:00:00 +0100
Subject: HEADER
Content-Type: text/plain; charset=utf-8

My own words.
>From here it was escaped.
From now on no postmark.

Am Sa., 1. Jan. 2022 um 10:00 schrieb Bob
<bob@x.org>:

> QUOTED
>> QUOTED

More words:

> QUOTED

--\x20
SIGNATURE

From bob@x.org Sat Jan 01 13:00:00 2022
From: Bob <bob@x.org>
Date: nonsense

Words of Bob.

---------- Forwarded message ---------
From: Eve <eve@x.org>

FORWARDED
"""


def test_of_mails_the_own_plain_text_is_taken_without_quotes_signature_and_headers(write):
    path = write("a.mbox", MBOX)
    assert texts(path, "ann@x.org") == [
        "My own words.\nFrom here it was escaped.\nFrom now on no postmark.\n\nMore words:"
    ]
    assert times(path, "ann@x.org") == [1641034800.0]
    assert texts(path, "Ann Example") == texts(path, "ann@X.org")
    assert texts(write("Inbox", MBOX), "bob@x.org") == ["Words of Bob."]
    assert times(path, "bob@x.org") == [MTIME]


def test_without_an_address_all_mails_are_taken_and_that_is_said(write):
    path = write("a.mbox", MBOX)
    assert len(texts(path)) == 2
    assert notes(path) == [
        ("the mails of all 2 senders were taken: --me ADDRESS takes yours only", None)
    ]
    with pytest.raises(DataError, match=r"'Ann@x.org', 'bob@x.org'.*--me"):
        texts(path, "eve@x.org")


@pytest.mark.parametrize(
    "above",
    [
        "On Mon, 3 Jan 2022 at 10:00, Bob <b@x.org> wrote:\n> QUOTED",
        "Am 03.01.2022 um 10:00 schrieb Bob:\n> QUOTED",
        "Le lun. 3 janv. 2022 à 10:00, Bob <b@x.org> a écrit :\n\n> QUOTED",
        "El lun, 3 ene 2022 a las 10:00, Bob (<b@x.org>) escribió:\n\n> QUOTED",
        "From: Bob\nSent: Monday, January 3, 2022 10:00 AM\nTo: Ann\n\nQUOTED",
        "Von: Bob <b@x.org>\nGesendet: Montag, 3. Januar 10:00\nAn: Ann\n\nQUOTED",
        "De : Bob <b@x.org>\nEnvoyé : lundi 3 janvier\nÀ : Ann\n\nQUOTED",
        "De: Bob <b@x.org>\nEnviado el: lunes, 3 de enero\nPara: Ann\n\nQUOTED",
        "-----Original Message-----\nFrom: Bob\n\nQUOTED",
    ],
)
def test_what_is_quoted_is_left_out_in_four_languages(write, above):
    assert texts(write("a.eml", f"From: a@x.org\n\nMy words.\n\n{above}\n")) == ["My words."]


def test_own_words_between_quotes_and_own_lists_are_kept(write):
    body = "> Will you come?\n\nYes, at nine.\n\n> And Ann?\n\nBring:\n\n"
    body += "wine: 2\nbread: 3\ncheese: 1\n"
    (text,) = texts(write("a.eml", f"From: a@x.org\n\n{body}"))
    assert "".join(text.split()) == "Yes,atnine.Bring:wine:2bread:3cheese:1"


def test_html_mail_is_read_as_text_and_attachments_are_not(write):
    html = "<style>no</style><p>One &amp; <b>two</b></p><blockquote>no</blockquote><div>three"
    body = base64.b64encode(html.encode()).decode()
    attached = "--b\nContent-Type: text/plain\nContent-Disposition: attachment\n\nno\n"
    inner = "--b\nContent-Type: message/rfc822\n\nSubject: x\n\nno\n"
    part = f"--b\nContent-Type: text/html\nContent-Transfer-Encoding: base64\n\n{body}\n--b--\n"
    head = "From: a@x.org\nContent-Type: multipart/mixed; boundary=b\n\n"
    assert texts(write("a.eml", head + attached + inner + part)) == ["One & two\n\nthree"]
    assert texts(write("b.eml", head + attached + inner + "--b--\n")) == []


def test_a_mail_in_an_unknown_encoding_is_still_read(write):
    raw = b"From: a@x.org\nContent-Type: text/plain; charset=none\n\nsp\xe4ter\n"
    assert texts(write("a.eml", raw)) == ["später"]


def test_of_one_large_mail_the_start_is_read(write):
    head = "From: a@x.org\nContent-Type: multipart/mixed; boundary=b\n\n--b\n\nmine\n--b\n"
    path = write("a.eml", head + "Content-Disposition: attachment\n\n" + "QUJD\n" * 5000)
    assert texts(path, limit=9000) == ["mine"]


def test_a_file_that_is_no_mailbox_is_refused(write):
    with pytest.raises(DataError, match="no mail in it"):
        texts(write("a.mbox", "just text"))


# --- chats --------------------------------------------------------------------------------------

JUNE_5 = 1_717_545_600.0  # 2024-06-05, midnight UTC


@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        ("05/06/2024, 21:45 - {}", 78_300),
        ("05.06.24, 21:45 - {}", 78_300),
        ("[05.06.24, 21:45:10] {}", 78_310),
        ("\u200e[05/06/2024, 21:45:10] {}", 78_310),
        ("6/5/24, 9:45\u202fPM - {}", 78_300),
        ("[2024-06-05, 9:45:10 p.m.] {}", 78_310),
        ("2024-06-05 21:45 - {}", 78_300),
        ("5-6-2024 0:00 – {}", 0),
        ("6/5/24, 12:00 am - {}", 0),
    ],
)
def test_whatsapp_dates_of_several_countries_are_read(write, line, seconds):
    content = line.format("Messages are encrypted.") + "\n"
    content += line.format("Bob: no") + "\n" + line.format("Ann B: yes: really") + "\nsecond line\n"
    path = write("chat.txt", content)
    assert items(path, "ann b") == [Record("yes: really\nsecond line", None, JUNE_5 + seconds)]


def test_day_and_month_are_told_apart_by_all_the_messages_of_a_chat(write):
    path = write("chat.txt", "6/5/24, 10:00 - Ann: one\n6/13/24, 10:00 - Bob: two\n")
    assert times(path, "Ann") == [JUNE_5 + 36_000]
    path = write("chat.txt", "5/6/24, 10:00 am - Ann: one\n13/6/24, 10:00 am - Bob: two\n")
    assert times(path, "Ann") == [JUNE_5 + 36_000]
    path = write("chat.txt", "45/45/24, 10:00 - Ann: one\n")
    assert times(path, "Ann") == [MTIME]


def test_what_whatsapp_says_itself_is_not_taken(write):
    own = "<Media omitted>", "\u200eimage omitted", "hello \u200e<This message was edited>", "a < b"
    content = "".join(f"1/2/24, 10:00 - Ann: {text}\n" for text in own)
    assert texts(write("chat.txt", content), "Ann") == ["hello", "a < b"]


def test_a_chat_without_the_owners_name_is_refused_with_the_names_in_it(write):
    path = write("chat.txt", "1/2/24, 10:00 - Ann: SECRET\n1/2/24, 10:00 - Bob: SECRET\n")
    for me in ([], ["Eve"]):
        with pytest.raises(DataError, match=r"'Ann', 'Bob'.*--me NAME") as caught:
            texts(path, *me)
        assert "SECRET" not in str(caught.value)


def test_a_diary_with_dates_is_not_taken_for_a_chat(write):
    assert texts(write("d.txt", "5.6.24 was a good day\n6.6.24 too\n")) != []


TELEGRAM: dict[str, object] = {
    "name": "Bob",
    "messages": [
        {"type": "service", "actor": "Ann", "text": "joined"},
        {
            "type": "message",
            "from": "Ann",
            "from_id": "user7",
            "date_unixtime": "20",
            "text": ["two ", {"type": "bold", "text": "parts"}],
        },
        {"type": "message", "from": "Ann", "date": "1970-01-01T00:00:10", "text": "one"},
        {"type": "message", "from": "Ann", "forwarded_from": "Eve", "text": "no"},
        {"type": "message", "from": "Bob", "date_unixtime": "30", "text": "no"},
        {"type": "message", "from": "Ann", "date_unixtime": "40", "text": ""},
    ],
}


def test_of_a_telegram_chat_the_own_messages_are_taken_earliest_first(write):
    path = write("result.json", json.dumps(TELEGRAM))
    assert items(path, "Ann") == [Record("one", None, 10.0), Record("two parts", None, 20.0)]
    with pytest.raises(DataError, match=r"'Ann', 'Bob'.*--me NAME"):
        texts(path)


def test_a_whole_telegram_export_knows_its_owner(write):
    whole = {"personal_information": {"user_id": 7}, "chats": {"list": [TELEGRAM]}}
    assert texts(write("result.json", json.dumps(whole))) == ["two parts"]


def test_of_chatgpt_the_users_side_is_taken_earliest_first(write):
    def node(role: str, text: object, time: float | None, kind: str = "text") -> dict[str, object]:
        content = {"content_type": kind, "parts": [text]}
        return {"message": {"author": {"role": role}, "content": content, "create_time": time}}

    mapping = {
        "root": {"message": None},
        "a": node("user", "second", 30.0),
        "b": node("assistant", "no", 31.0),
        "c": node("user", "no", 32.0, "user_editable_context"),
        "d": node("user", {"asset_pointer": "file"}, 33.0, "multimodal_text"),
        "e": node("user", "first", None),
    }
    path = write("conversations.json", json.dumps([{"create_time": 5.0, "mapping": mapping}]))
    assert items(path) == [Record("first", None, 5.0), Record("second", None, 30.0)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1, 2]", "no export of Telegram"),
        ('{"a": 1}', "no export"),
        ('{"messages": [', "damaged"),
        ("[" * 100_000, "damaged"),
        ("1" * 5000, "damaged"),
    ],
)
def test_other_json_documents_are_refused(write, content, reason):
    with pytest.raises(DataError, match=reason):
        texts(write("a.json", content))


def test_a_json_export_over_the_limit_is_refused_unread(write):
    with pytest.raises(DataError, match="split it, or raise the limit"):
        texts(write("a.json", json.dumps(TELEGRAM)), limit=100)


def test_what_a_reader_is_told_does_not_show_who_the_owner_is():
    assert "ann" not in repr(Reading(frozenset(["ann"]), MTIME, 240, 1))


def test_reading_is_lazy(write):
    with write("a.txt", "text " * 100_000).open("rb") as file:
        reader = read(file, ".txt", Reading(frozenset(), MTIME, 240, 10**9))
        assert isinstance(reader, Iterator)
        next(reader)
        assert file.tell() == 65_536  # the text is read in steps
