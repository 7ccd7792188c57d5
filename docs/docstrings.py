"""A Griffe extension: docstrings of this package, as mkdocstrings reads them.

It turns roles such as ``:class:`~lightning_flatness.compare` `` into links, and the heading ``Example:`` into
``Examples:``, under which doctests are code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

import lightning_flatness

ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`([^`<]+?)(?: <([^`>]+)>)?`")


def linked(role: re.Match[str]) -> str:
    """Return a link to a public name, or the name as code if it has no page."""
    text, target = role.group(1), role.group(2) or role.group(1)
    path = target.lstrip("~")
    if path.partition(".")[0] in lightning_flatness.__all__:
        path = f"lightning_flatness.{path}"
    shown = path.rpartition(".")[2] if text.startswith("~") else text
    path = re.sub(
        r"^(lightning_flatness\.[A-Z]\w*)\..*", r"\1", path
    )  # a member, which may be inherited, leads to its class
    return f"[`{shown}`][{path}]" if path.startswith("lightning_flatness.") else f"`{shown}`"


class Docstrings(griffe.Extension):
    """Rewrites the docstring of every object."""

    def on_object(self, *, obj: griffe.Object, **options: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = ROLE.sub(linked, obj.docstring.value)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
