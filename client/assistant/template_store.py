"""The templates of one device: versions kept in its vault, one of each name in use.

**Guarantee**: a template gets in only signed by a publisher the owner trusts; a name belongs to the
publisher who used it first; a version is never replaced, and a lower one never comes from outside
(`rollback` is the owner's). A publisher who is trusted no more is used no more.
"""

import difflib
from dataclasses import dataclass

from ...common.errors import ConfigError, PrivacyError
from ..store.device_store import DeviceStore
from .templates import Template, builtins, claimed_publisher, read

__all__ = [
    "TemplateVersion",
    "add",
    "changes",
    "check",
    "earlier",
    "find",
    "kept",
    "rollback",
    "trusted",
]

_KEPT, _USED = "prompts/", "prompts-in-use/"


@dataclass(frozen=True)
class TemplateVersion:
    """One version of a template on this device, and whether it is used.

    Attributes:
        template: its content.
        used: whether it is the one of its name that is in use.
        refused: why it is not used any more; empty: it is trusted.
    """

    template: Template
    used: bool
    refused: str = ""


def kept(home: DeviceStore) -> list[TemplateVersion]:
    """Return every version of every template, by name, the newest first."""
    trusted = home.policy.prompts.publishers
    versions = [TemplateVersion(template, used=True) for template in builtins().values()]
    for name in home.vault.names(_KEPT):
        content = home.vault.get(name) or b""
        used = home.vault.get(_USED + name.split("/")[1]) == name.split("/")[2].encode()
        try:
            versions.append(TemplateVersion(read(content, name, trusted), used))
        except PrivacyError as refusal:
            as_claimed = read(content, name, {claimed_publisher(content, name)})
            versions.append(TemplateVersion(as_claimed, used, str(refusal)))
    versions.sort(key=lambda version: version.template.number, reverse=True)
    return sorted(versions, key=lambda version: version.template.name)


def _versions(home: DeviceStore, name: str) -> list[TemplateVersion]:
    """Return every version of one template, the newest first."""
    return [version for version in kept(home) if version.template.name == name]


def find(home: DeviceStore, name: str, version: str | None = None) -> TemplateVersion:
    """Find one version of a template, or the version in use.

    Raises:
        ConfigError: there is none.
    """
    versions = _versions(home, name)
    if not versions:
        known = ", ".join(sorted({each.template.name for each in kept(home)}))
        raise ConfigError(f"there is no template {name!r}; there are {known}")
    for each in versions:
        if each.used if version is None else each.template.version == version:
            return each
    numbers = ", ".join(each.template.version for each in versions)
    raise ConfigError(f"template {name!r} has no version {version}; there are {numbers}")


def trusted(home: DeviceStore, name: str, version: str | None = None) -> Template:
    """Return a version of a template if its publisher is still trusted.

    `version` None means the one in use.

    Raises:
        ConfigError: there is none.
        PrivacyError: its publisher is trusted no more.
    """
    return _trusted(find(home, name, version))


def _trusted(version: TemplateVersion) -> Template:
    if version.refused:
        raise PrivacyError(version.refused)
    return version.template


def check(home: DeviceStore, content: bytes, where: str) -> tuple[Template, Template | None]:
    """Check a template file, and say which version it would replace.

    Nothing is changed. Returned are the new template and the one in use now, if there is one.

    Raises:
        ConfigError: malformed.
        PrivacyError: unsigned, untrusted, changed; a version that is not above all kept ones; a
            name that another publisher uses.
    """
    new = read(content, where, home.policy.prompts.publishers)
    versions = _versions(home, new.name)
    for version in versions:
        if version.template.publisher != new.publisher:
            owner = version.template.publisher or "privet itself"
            raise PrivacyError(f"{where}: the name {new.name!r} belongs to {owner}; choose another")
    if versions and versions[0].template.number >= new.number:
        raise PrivacyError(
            f"{where} is version {new.version} of {new.name!r}, and this device has "
            f"{versions[0].template.version}: only a higher one is taken (privet prompts rollback "
            "goes back to a version that is kept)"
        )
    return new, next((version.template for version in versions if version.used), None)


def add(home: DeviceStore, content: bytes, where: str) -> Template:
    """Keep the template in a file and use it from now on.

    Raises:
        As `check`.
    """
    with home.vault.transaction():  # of two programs that add, one sees what the other did
        new, _ = check(home, content, where)
        home.vault.put_all(
            {
                f"{_KEPT}{new.name}/{new.version}": content,
                f"{_USED}{new.name}": new.version.encode(),
            }
        )
    return new


def earlier(home: DeviceStore, name: str, version: str | None = None) -> tuple[Template, Template]:
    """Return the version in use and the one that `rollback` would use instead.

    That is the version before it, or the one named.

    Raises:
        ConfigError: there is no such version.
        PrivacyError: its publisher is trusted no more.
    """
    present = find(home, name).template
    if version is None:
        lower = [v for v in _versions(home, name) if v.template.number < present.number]
        if not lower:
            raise ConfigError(f"template {name!r} has no version before {present.version}")
        chosen = lower[0]
    else:
        chosen = find(home, name, version)
    return present, _trusted(chosen)


def rollback(home: DeviceStore, name: str, version: str | None = None) -> Template:
    """Use an earlier version again.

    Raises:
        As `earlier`.
    """
    with home.vault.transaction():
        _, chosen = earlier(home, name, version)
        if chosen.publisher is not None:  # what comes with privet has one version
            home.vault.put(_USED + name, chosen.version.encode())
    return chosen


def changes(before: Template | None, after: Template) -> list[str]:
    """Return the lines that differ between two versions of a template, as `diff -u` does.

    Where there is no version before, every line is new.
    """
    old = [] if before is None else before.lines()
    names = ("nothing" if before is None else before.version, after.version)
    return list(difflib.unified_diff(old, after.lines(), *names, lineterm="", n=2))
