"""Text files with blanks, filled in: configurations, systemd units, a README, pages.

Templates lie in the folder `templates` beside the module that fills them in, in Jinja's syntax.
"""

import shlex

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["environment", "render", "systemd_word"]


def render(package: str, file: str, /, **values: object) -> str:
    """Fill in a template of a package, word for word: nothing is escaped but by the filters.

    Filters: `systemd` is `systemd_word`, `shell` quotes a word for a shell.

    Args:
        package: `__package__` of the caller.
        file: its name in the folder `templates` of that package.
        values: for the blanks; one that is missing is an error.
    """
    files = environment(package, autoescape=False)
    files.filters |= {"systemd": systemd_word, "shell": lambda word: shlex.quote(str(word))}
    return files.get_template(file).render(values)


def environment(package: str, *, autoescape: bool) -> Environment:
    """Find the templates of a package, in which a missing value is an error.

    Args:
        package: `__package__` of the caller.
        autoescape: whether values are escaped as in HTML.
    """
    return Environment(
        loader=PackageLoader(package),
        undefined=StrictUndefined,
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def systemd_word(word: object, in_command: bool = True) -> str:
    """Quote one word for a systemd unit, so that it is taken as it is.

    Quotes and backslashes are escaped, specifiers doubled.

    Args:
        word: a text or a path.
        in_command: it is an argument of a program, where variables would be replaced: `$` is
            doubled. Not so for the program's own path, nor for other settings.
    """
    text = str(word).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text.replace("$", "$$") if in_command else text}"'
