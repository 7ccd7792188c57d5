"""Hooks of MkDocs: pages from files outside of ``docs/``, and links to such files."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose files lie at the top of the repository."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links out of ``docs/`` links to the repository, or plain text while that has no address."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def replaced(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            return link.group()
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_uri}: there is no {path}")
        if path in PAGES:
            return (
                f"[{text}]({os.path.relpath(PAGES[path], posixpath.dirname(page.file.src_uri) or '.')}{anchor or ''})"
            )
        return (
            f"[{text}]({config.repo_url}/blob/main/{path}{anchor or ''})" if config.repo_url else f"{text} (`{path}`)"
        )

    return LINK.sub(replaced, markdown)
