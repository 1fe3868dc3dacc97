"""The HTML pages are templates, in which Jinja2 escapes whatever comes from data or settings.

The only markup that is not in a template is a picture's, from `pictures.svg`.
"""

from ...common.file_templates import environment
from .pictures import DARK, LIGHT

__all__ = ["render"]


def render(name: str, **values: object) -> str:
    """Fill in a template of the folder `templates`, which is a whole page in the common style."""
    pages = environment(__package__, autoescape=True)
    pages.filters["cell_class"] = _cell_class
    pages.globals |= {"light": LIGHT, "dark": DARK}
    return pages.get_template(name).render(values)


def _cell_class(text: str) -> str:
    """Return the class of a table's cell: short numbers stay on one line, marks have colours."""
    start = text.lstrip("+-[")
    number = "number" if start[:1].isdigit() and len(text) < 24 else ""
    return {"holds": "yes", "does not hold": "no"}.get(text, number)
