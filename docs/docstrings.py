"""A Griffe extension: docstrings of this package, as mkdocstrings reads them.

It makes links of roles such as ``:class:`FlatnessReport` ``, if the reference has the name, and of pages such as
``docs/theory.md``. Fields of records get anchors. The heading ``Example:`` becomes ``Examples:``, under which doctests
are code. A role or a page that does not exist stops the build.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import griffe
from markdown.extensions.toc import slugify
from mkdocs.exceptions import PluginError

DOCS = Path(__file__).parent
ENTRY = re.compile(r"^::: (\S+)$", flags=re.MULTILINE)
ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`([^`<]+?)(?: <([^`>]+)>)?`")
PAGE = re.compile(r"``docs/([\w/-]+\.md)``(?:,\s+\"([^\"]+)\")?")
HEADING = re.compile(r"^#+ (.+)$", flags=re.MULTILINE)
FIELDS = re.compile(r"^Attributes:\n(?:(?: .*)?\n)*", flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites the docstring of every object."""

    def on_package(self, *, pkg: griffe.Module, **options: Any) -> None:
        """Rewrite the docstrings of a package."""
        names, faults = Names(pkg), []
        for obj in objects_in(pkg):
            if obj.docstring is None:
                continue
            text = with_anchors(obj.docstring.value, names.places.get(obj.canonical_path))
            for pattern in (ROLE, PAGE):
                for found in reversed(list(pattern.finditer(text))):
                    with reported(faults, f"{obj.path}: {found.group()}"):
                        link = names.linked(found, obj) if pattern is ROLE else linked_page(found)
                        text = text[: found.start()] + link + text[found.end() :]
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
        if faults:
            raise PluginError("\n".join(["Docstrings name what does not exist.", *faults]))


@contextmanager
def reported(faults: list[str], where: str) -> Iterator[None]:
    """In a ``with`` block, add what is not found to a list of faults."""
    try:
        yield
    except LookupError as error:
        faults.append(f"{where}: {error}")


def objects_in(obj: griffe.Object) -> Iterator[griffe.Object]:
    """Yield an object and all objects that are defined in it."""
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from objects_in(member)


class Names:
    """The names of a package.

    ``places`` has the names that are in the reference, by the paths at which the package defines them.
    """

    def __init__(self, package: griffe.Module) -> None:
        self._package = package
        self._all = {obj.name: obj for obj in objects_in(package)}
        self.places = {}
        for page in sorted((DOCS / "reference").glob("*.md")):
            for place in ENTRY.findall(page.read_text()):
                entry = package[place.partition(".")[2]]
                public = (
                    {f"{place}.{name}": entry[str(name)] for name in entry.exports or ()} if entry.is_module else {}
                )
                for path, obj in {place: entry, **public}.items():
                    self._all[obj.name] = obj
                    self.places[obj.canonical_path] = path

    def linked(self, role: re.Match[str], obj: griffe.Object) -> str:
        """Return a link for a role in the docstring of an object, or code if the reference does not have the name."""
        text, target = role.group(1), (role.group(2) or role.group(1)).lstrip("~")
        shown = target.rpartition(".")[2] if text.startswith("~") else text
        place = self._place_of(target, obj)
        return f"[`{shown}`][{place}]" if place else f"`{shown}`"

    def _place_of(self, target: str, obj: griffe.Object) -> str | None:
        """Return where the reference has a name, or None if it does not. Raise a LookupError for an unknown name.

        The name is looked up in the class and the module of the docstring, then in the reference, then in the package.
        """
        first, *members = target.split(".")
        if first == self._package.name:
            at: Any = self._package
        else:
            at = obj
            while first not in at.all_members and not at.is_module:
                at = at.parent
            members = [first, *members] if first in at.all_members else members
            at = at if first in at.all_members else self._all[first]
        owner = at.parent
        for name in members:
            owner, at = at, at.all_members[name]
            at = at.final_target if at.is_alias else at
        if owner.is_class and owner.canonical_path in self.places:
            return f"{self.places[owner.canonical_path]}.{at.name}"
        return self.places.get(at.canonical_path)


def with_anchors(text: str, place: str | None) -> str:
    """Put an anchor in front of the description of every field of a record, if the reference has the record."""

    def anchored(fields: re.Match[str]) -> str:
        # In emphasis, since mkdocstrings doubles an anchor and the text behind it.
        return re.sub(r"^(    (\w+): )", rf"\1*[](){{#{place}.\2}}*", fields.group(), flags=re.MULTILINE)

    return text if place is None else FIELDS.sub(anchored, text)


def linked_page(page: re.Match[str]) -> str:
    """Return a link to a page, or to the section of it that is named behind it."""
    path, section = page.groups()
    if not (DOCS / path).exists():
        raise LookupError("there is no such page")
    title, *headings = HEADING.findall((DOCS / path).read_text())
    if section is None:
        return f"[{title}](../{path})"
    section = " ".join(section.split())
    if section not in headings:
        raise LookupError("there is no such section")
    return f'[{title}, "{section}"](../{path}#{slugify(section, "-")})'
