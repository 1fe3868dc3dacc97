"""A sentence for each fault of settings: the key, its value, and what is allowed.

An unknown key is answered with the nearest known one.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError


def faults(error: ValidationError, root: type[BaseModel]) -> str:
    """A sentence for each fault of settings, a line each.

    Args:
        error: of reading them.
        root: what was to be read; of its sections the nearest known key is named.
    """
    return "\n".join(_sentence(fault, root) for fault in error.errors(include_url=False))


def shortened(value: object) -> str:
    """A value as it was given, of which a file or a server may have sent any amount."""
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."


def _sentence(fault: Mapping[str, Any], root: type[BaseModel]) -> str:
    path = tuple(part for part in fault["loc"] if isinstance(part, str))
    where = ".".join(path)
    if fault["type"] == "extra_forbidden":
        return f"  {where}: unknown key{_nearest(path, root)}"
    if fault["type"] == "value_error":
        return f"  {where}: {fault['ctx']['error']}" if where else f"  {fault['ctx']['error']}"
    expected = str(fault["msg"]).removeprefix("Input should be ")
    expected = expected.replace("String should match pattern", "a text that fits")
    expected = expected.replace("String should have", "a text of")
    known = {
        "model_type": f"a section, as in [{where}]",
        "tuple_type": 'a list, as in ["one", "two"]',
        "bool_type": "true or false",
    }
    found = known.get(fault["type"], expected)
    return f"  {where} = {shortened(fault['input'])}: expected {found}"


def _nearest(path: Sequence[str], root: type[BaseModel]) -> str:
    section: Any = root
    for part in path[:-1]:
        section = section.model_fields[part].annotation
    known = list(section.model_fields)
    close = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
