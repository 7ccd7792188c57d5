"""Hooks of MkDocs: pages from files and notebooks outside of ``docs/``, and links to such files."""

from __future__ import annotations

import json
import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINKED = PAGES | {f"tutorials/{path.name}": f"tutorials/{path.stem}.md" for path in NOTEBOOKS}
COLAB = "colab"  # a folder of the site, and a branch of the repository
# In index.md; the site has the repository's address in place of it, if it knows one.
CLONE = "git clone ADDRESS lightning-flatness  # the address of the repository"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose files lie at the top of the repository."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    for notebook in NOTEBOOKS:
        for path, content in notebook_files(notebook, config.repo_url).items():
            files.append(File.generated(config, f"tutorials/{path}", content=content))
        if is_on_github(config.repo_url):
            content = for_colab(notebook, str(config.repo_url), config.site_url or "")
            files.append(File.generated(config, f"{COLAB}/{notebook.name}", content=content))
    return files


def is_on_github(repository: str | None) -> bool:
    """Return whether Colab can open notebooks of this repository."""
    return "://github.com/" in (repository or "")


def for_colab(notebook: Path, repository: str, site: str) -> str:
    """Return a notebook that installs the package first, and whose links lead to the site, or are plain without one.

    The workflow that publishes the site puts these notebooks on the branch ``colab``.
    """
    content = json.loads(notebook.read_text(encoding="utf-8"))
    install = f'%pip install --quiet "lightning-flatness[examples] @ git+{repository}"'
    cell = {"cell_type": "code", "execution_count": None, "id": "install", "metadata": {}, "outputs": []}
    content["cells"].insert(1, {**cell, "source": [install]})

    def replaced(link: re.Match[str]) -> str:
        text, folder, page, anchor = link.groups()
        return f"[{text}]({site}{'' if folder else 'tutorials/'}{page}/{anchor or ''})" if site else text

    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            text = re.sub(r"\[([^\]]+)\]\((\.\./docs/)?([\w/-]+)\.(?:md|ipynb)(#[^)]*)?\)", replaced, text)
            cell["source"] = text.splitlines(keepends=True)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def notebook_files(notebook: Path, repository: str | None) -> dict[str, str | bytes]:
    """Return a notebook as a page, with the outputs that it has stored, and its figures, by their paths."""
    names = {"unique_key": notebook.stem, "output_files_dir": f"{notebook.stem}_files"}
    text, resources = MarkdownExporter().from_filename(str(notebook), names)
    text = text.replace("![png]", "![Figure of the code above]").replace("](../docs/", "](../")
    text = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", text)
    title, _, rest = text.partition("\n")
    path = f"tutorials/{notebook.name}"
    where = [f"[Notebook]({repository}/blob/main/{path})" if repository else f"Notebook: `{path}`"]
    if is_on_github(repository):
        name = str(repository).partition("://github.com/")[2]
        where.append(f"[Open in Colab](https://colab.research.google.com/github/{name}/blob/{COLAB}/{notebook.name})")
    page = f"{notebook.stem}.md"
    return {page: f"{title}\n\n{' · '.join(where)}\n{rest}", **resources["outputs"]}


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links out of ``docs/`` links to the repository, or plain text while that has no address.

    Also put the address into the line of index.md that clones the repository.
    """
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")
    if page.file.src_uri == "index.md":
        if CLONE not in markdown:
            raise PluginError(f"index.md has no line '{CLONE}'")
        if config.repo_url:
            markdown = markdown.replace(CLONE, f"git clone {config.repo_url} lightning-flatness")

    def replaced(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            return link.group()
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_uri}: there is no {path}")
        if path in LINKED:
            return (
                f"[{text}]({os.path.relpath(LINKED[path], posixpath.dirname(page.file.src_uri) or '.')}{anchor or ''})"
            )
        return (
            f"[{text}]({config.repo_url}/blob/main/{path}{anchor or ''})" if config.repo_url else f"{text} (`{path}`)"
        )

    return LINK.sub(replaced, markdown)
