"""The chat in a terminal, which takes prompts, shows two answers side by side and keeps verdicts.

A line is a prompt, or begins with a colon and says what to do with the answers before it. The same
lines work from a terminal and from a file, so that a chat can be scripted.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

from ...common.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.table import Table

    from .text_generation import Assistant, Heard, Recorder, Reply

__all__ = ["HELP", "as_text", "facts", "talk"]

HELP = """\
:accept          the personal answer is the better one
:global          the global answer is the better one
:reject          neither will do
:edit TEXT       it should have been this
:why             the texts the personal answer came from
:help, :quit     a line that begins with two colons is a prompt that begins with one"""


def talk(
    assistant: "Assistant", record: "Recorder", lines: TextIO, *, once: str | None, as_json: bool
) -> None:
    """Hold a conversation until its lines end.

    Args:
        assistant: what answers.
        record: keeps verdicts.
        lines: prompts and commands.
        once: one prompt instead of them.
        as_json: one JSON object a line instead of tables.

    Raises:
        ConfigError: a command that is none, or a verdict before any answer; where lines come
            from a terminal it is said and the chat goes on.
    """
    output = _Output(as_json, live=once is None and lines.isatty())
    if once is not None:
        output.reply(assistant, as_text(once))
        return
    last: Reply | None = None
    if output.live:
        output.say(HELP)
    for line in _asked(lines, output.live):
        try:
            if not line.strip():
                continue
            if not line.startswith(":") or line.startswith("::"):
                prompt = line[1:] if line.startswith("::") else line
                last = output.reply(assistant, as_text(prompt))
            elif line.split()[0] in (":quit", ":q"):
                return
            else:
                _obey(line, last, record, output)
        except (ConfigError, DataError) as wrong:
            if not output.live:
                raise
            output.say(str(wrong))


# --- what is shown -------------------------------------------------------------------------------


def as_text(prompt: str) -> str:
    """Return the prompt if its bytes were UTF-8.

    DataError otherwise.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("the prompt is not UTF-8; write it again in that encoding") from None
    return prompt


def _asked(lines: TextIO, live: bool) -> Iterator[str]:
    while True:
        if live:
            print("> ", end="", flush=True)
        line = lines.readline()
        if not line:
            return
        yield line.rstrip("\n")


def _obey(line: str, last: "Reply | None", record: "Recorder", output: "_Output") -> None:
    command, _, rest = line.partition(" ")
    if command == ":help":
        output.say(HELP)
        return
    if command not in (":accept", ":global", ":reject", ":edit", ":why"):
        raise ConfigError(f"{command} is no command; :help lists them")
    if last is None:
        raise ConfigError(f"{command} needs an answer; ask something first")
    shared, personal = last.shared.text, last.personal.text
    if command == ":why":
        output.sources(last)
        return
    if command == ":edit" and not rest.strip():
        raise ConfigError(":edit needs the text it should have been")
    kind, answer, over, edited = {
        ":accept": ("accept", personal, shared, None),
        ":global": ("accept", shared, personal, None),
        ":reject": ("reject", personal, None, None),
        ":edit": ("edit", personal, None, rest.strip()),
    }[command]
    over = None if over == answer else over
    taken = command == ":accept"
    number = record(kind, last.prompt, answer, over=over, edited=edited, taken=taken)
    output.kept(kind, number)


class _Output:
    """Standard output: tables, or one JSON object a line."""

    def __init__(self, as_json: bool, live: bool) -> None:
        from rich.console import Console

        self.as_json, self.live = as_json, live and not as_json
        self.console = Console(highlight=False)

    def say(self, text: str) -> None:
        if not self.as_json:
            self.console.print(text, markup=False, soft_wrap=True)

    def kept(self, kind: str, number: object) -> None:
        if self.as_json:
            self._json({"kept": kind, "number": number})
        self.say(f"kept on this device: {kind} (number {number})")

    def reply(self, assistant: "Assistant", prompt: str) -> "Reply":
        if not self.live:
            reply = assistant.reply(prompt)
        else:
            with self._streaming() as heard:
                reply = assistant.reply(prompt, heard)
        if self.as_json:
            self._json(facts(reply, assistant))
        elif not self.live:
            self.console.print(_beside(reply.shared.text, reply.personal.text))
        self.say(_origin(reply, assistant))
        return reply

    def sources(self, reply: "Reply") -> None:
        if self.as_json:
            self._json({"retrieved": [asdict(source) for source in reply.sources]})
            return
        if not reply.sources:
            self.say("nothing was retrieved")
        for source in reply.sources:
            ranks = [f"{way} {rank}" for way, rank in
                     (("words", source.words), ("meaning", source.meaning)) if rank]  # fmt: skip
            by = ", ".join(ranks) or "the latest"
            self.say(f"text {source.place + 1} ({by}):\n{_indented(source.text)}")

    def _json(self, value: Mapping[str, object]) -> None:
        print(json.dumps(value, allow_nan=False), flush=True)

    @contextmanager
    def _streaming(self) -> Iterator["Heard"]:
        from rich.live import Live

        texts = {"global": "", "personal": ""}
        with Live(_beside("", ""), console=self.console, refresh_per_second=8) as live:

            def heard(name: str, text: str) -> None:
                texts[name] = text
                live.update(_beside(texts["global"], texts["personal"]))

            yield heard


def facts(reply: "Reply", assistant: "Assistant") -> dict[str, object]:
    """Return a reply as the object that is printed as JSON."""
    return {
        "prompt": reply.prompt,
        "global": reply.shared.text,
        "personal": reply.personal.text,
        "from": {
            "adapter": assistant.adapter or None,
            "head": reply.with_head,
            "profile": reply.with_profile,
            "template": reply.template,
            "experiment": assistant.ab_run or None,
            "retrieved": [asdict(source) for source in reply.sources],
        },
        "first_token_s": {"global": reply.shared.first_s, "personal": reply.personal.first_s},
        "first_token_core_s": {
            "global": reply.shared.first_core_s,
            "personal": reply.personal.first_core_s,
        },
        "tokens": {"global": reply.shared.tokens, "personal": reply.personal.tokens,
                   "context": reply.context_tokens},
    }  # fmt: skip


def _beside(shared: str, personal: str) -> "Table":
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(
        Panel(Text(_printable(shared)), title="global", border_style="dim"),
        Panel(Text(_printable(personal)), title="personal"),
    )
    return grid


def _origin(reply: "Reply", assistant: "Assistant") -> str:
    numbers = ", ".join(str(source.place + 1) for source in reply.sources)
    parts = [
        f"adapter {assistant.adapter}" if assistant.adapter else "no adapter",
        "own head" if reply.with_head else "no head that helped",
        "profile" if reply.with_profile else "no profile",
        f"own texts {numbers}" if numbers else "no own text",
        *([f"an arm of {assistant.ab_run}"] if assistant.ab_run else []),
    ]
    return (
        f"personal: {'; '.join(parts)} (template {reply.template}; :why shows them)\n"
        f"first token after {reply.shared.first_s:.2f} s (global), {reply.personal.first_s:.2f} s "
        f"(personal, {reply.context_tokens} tokens read)"
    )


def _printable(text: str) -> str:
    """Remove control characters, because a model may have learnt some that a terminal obeys."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in _printable(text).split("\n"))
