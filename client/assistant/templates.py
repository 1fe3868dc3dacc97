"""Prompt templates, as signed TOML files with a name, a version and an audience.

A template says where a person's profile summary and earlier texts stand around a prompt. It is text
with three placeholders, `{profile}`, `{history}` and `{prompt}`, and nothing else: no code, no
attributes, no further braces. A publisher signs it with Ed25519; a device takes it only from
publishers its owner trusts (`prompts.publishers` in policy.toml).
`client/assistant/template_store.py` keeps them.

**Guarantee**: what a template is filled with goes to the model on this device and to the screen.
Nothing that answers a server imports this module (a contract in pyproject.toml), so no words of a
template can make anything leave.
"""

import json
import re
import tomllib
import unicodedata
from collections.abc import Collection, Mapping
from importlib.resources import files
from typing import Annotated, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ...common.errors import ConfigError, PrivacyError
from ...common.secure_aggregation.keys import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    Identity,
    Purpose,
    digest,
    verify,
)
from ...common.settings.faults import faults

__all__ = [
    "PLACEHOLDERS",
    "Segment",
    "Template",
    "builtins",
    "claimed_publisher",
    "read",
    "render",
    "sign",
    "unsigned",
]

PLACEHOLDERS = ("profile", "history", "prompt")
MAX_FILE_BYTES, MAX_TEXT = 65_536, 8_000
"""Bytes of a file, characters of a text."""

_FIELD = re.compile(r"\{(" + "|".join(PLACEHOLDERS) + r")\}")
_JOINERS = "\u200c\u200d"  # ordinary letters need them in some scripts
_Short = Annotated[str, Field(min_length=1, max_length=200)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Segment(_Part):
    """The people a template is for, by task and number of records."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")] = "everyone"
    task: Literal["any", "generation", "regression", "classification"] = "any"
    fewest_records: int = Field(0, ge=0)
    most_records: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _somebody(self) -> Self:
        if self.most_records is not None and self.most_records < self.fewest_records:
            raise ValueError(
                f"most_records = {self.most_records} is below fewest_records = "
                f"{self.fewest_records}: nobody is in this segment"
            )
        return self


class Template(_Part):
    """One version of a prompt template, checked."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
    version: Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,5})(\.(0|[1-9][0-9]{0,5})){2}$")]
    about: _Short
    text: str = Field(min_length=1, max_length=MAX_TEXT)
    segment: Segment = Segment()
    metadata: Mapping[_Short, _Short] = Field(default_factory=dict, max_length=20)
    publisher: str | None = None

    @property
    def number(self) -> tuple[int, ...]:
        """The version as numbers that compare: major, minor, patch."""
        return tuple(map(int, self.version.split(".")))

    @field_validator("text")
    @classmethod
    def _known_placeholders(cls, text: str) -> str:
        if text.count("{prompt}") != 1:
            raise ValueError("the text must have {prompt} exactly once")
        rest = _FIELD.sub("", text)
        if "{" in rest or "}" in rest:
            known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise ValueError(f"the text has another brace; only {known} are allowed")
        return text

    @model_validator(mode="after")
    def _printable(self) -> Self:
        for words in (self.about, self.text, *self.metadata, *self.metadata.values()):
            for character in words:
                hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
                if hidden and character not in "\n\t" + _JOINERS:
                    raise ValueError(
                        f"it has the character U+{ord(character):04X}, which does not show; a "
                        "template must be what it looks like"
                    )
        return self

    def lines(self) -> list[str]:
        """Return the template as lines for a person to read and for comparing versions."""
        segment = self.segment
        max_records = "any" if segment.most_records is None else segment.most_records
        return [
            f"name: {self.name}",
            f"version: {self.version}",
            f"about: {self.about}",
            f"for: {segment.name}, task {segment.task}, records {segment.fewest_records} to "
            f"{max_records}",
            *(f"{key}: {value}" for key, value in sorted(self.metadata.items())),
            f"publisher: {self.publisher or 'comes with privet'}",
            "text:",
            *(f"  {line}" for line in self.text.split("\n")),
        ]


def unsigned(content: bytes, where: str) -> Template:
    """Read a template file without looking at its signature.

    Raises:
        ConfigError: too large, not text, not TOML, unknown keys, wrong values: what is wrong.
    """
    table = _table(content, where)
    table.pop("signature", None)
    return _checked(table, where)


def read(content: bytes, where: str, trusted: Collection[str]) -> Template:
    """Read a template file, which must be signed by a publisher that this device trusts.

    Args:
        content: of the file.
        where: its name, for the sentence.
        trusted: publishers' public keys, 64 hexadecimal digits each.

    Raises:
        ConfigError: malformed.
        PrivacyError: unsigned, by a publisher who is not trusted, or changed after it was signed.

    **Guarantee**: every field of what is returned is under the publisher's signature.
    """
    table = _table(content, where)
    signature = table.pop("signature", None)
    template = _checked(table, where)
    if signature is None:
        raise PrivacyError(f"{where} is not signed: a device takes templates from publishers only")
    publisher, mark = _signature(signature, where)
    if publisher.hex() not in trusted:
        raise PrivacyError(
            f"{where} is signed by {publisher.hex()}, whom this device does not trust; if you do, "
            "add the key to prompts.publishers in policy.toml"
        )
    if not verify(publisher, _signed(template), mark):
        raise PrivacyError(
            f"{where} was changed after {publisher.hex()[:16]}… signed it: get it again from there"
        )
    return template.model_copy(update={"publisher": publisher.hex()})


def claimed_publisher(content: bytes, where: str) -> str:
    """Return the public key that a file says it is signed by, without checking it.

    Empty where the file names none.

    Raises:
        ConfigError: malformed.
    """
    signature = _table(content, where).get("signature")
    return "" if signature is None else _signature(signature, where)[0].hex()


def sign(content: bytes, where: str, publisher: Identity) -> bytes:
    """Sign a template file with a publisher's key.

    A signature that it has already is replaced.

    Raises:
        ConfigError: malformed.
    """
    template = unsigned(content, where)
    table = template.model_dump(mode="json", exclude={"publisher"}, exclude_none=True)
    mark = publisher.sign(_signed(template))
    table["signature"] = {"publisher": publisher.public.hex(), "ed25519": mark.hex()}
    return tomli_w.dumps(table, multiline_strings=True).encode()


def builtins() -> dict[str, Template]:
    """Load the templates that come with privet, by name.

    They are trusted as the program itself is.
    """
    folder = sorted(files(__package__).joinpath("prompts").iterdir(), key=lambda f: f.name)
    templates = [unsigned(f.read_bytes(), f.name) for f in folder if f.name.endswith(".toml")]
    return {template.name: template for template in templates}


def render(template: Template, *, prompt: str, profile: str = "", history: str = "") -> str:
    """Fill in a template, which gives the text that goes to the model.

    A paragraph (blank lines stand between two) whose placeholders are all empty is left out, with
    its heading; that of the prompt never is. Braces in what is filled in stay as they are.
    """
    values = {"prompt": prompt, "profile": profile, "history": history}
    parts = []
    for paragraph in template.text.split("\n\n"):
        names = _FIELD.findall(paragraph)
        if not names or "prompt" in names or any(values[name] for name in names):
            parts.append(_FIELD.sub(lambda match: values[match[1]], paragraph))
    return "\n\n".join(parts)


def _table(content: bytes, where: str) -> dict[str, object]:
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{where} has {len(content):,} bytes; a template has {MAX_FILE_BYTES:,}")
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not a template: not valid TOML ({error})") from None


def _checked(table: Mapping[str, object], where: str) -> Template:
    if "publisher" in table:
        raise ConfigError(f"{where}: publisher is no field; it stands in [signature]")
    try:
        return Template.model_validate(table)
    except ValidationError as error:
        raise ConfigError(f"{where} is not a template:\n{faults(error, Template)}") from None


def _signature(table: object, where: str) -> tuple[bytes, bytes]:
    try:
        if not isinstance(table, dict) or set(table) != {"publisher", "ed25519"}:
            raise ValueError
        publisher, mark = bytes.fromhex(table["publisher"]), bytes.fromhex(table["ed25519"])
        if (len(publisher), len(mark)) != (KEY_BYTES, SIGNATURE_BYTES):
            raise ValueError
    except (ValueError, TypeError):
        raise ConfigError(
            f"{where}: [signature] must have publisher (64 hexadecimal digits) and ed25519 (128)"
        ) from None
    return publisher, mark


def _signed(template: Template) -> bytes:
    """Return the digest that a signature is over, made of every field in one spelling."""
    fields = template.model_dump(mode="json", exclude={"publisher"})
    spelled = json.dumps(fields, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return digest(Purpose.TEMPLATE, spelled.encode())
