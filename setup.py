"""What pyproject.toml cannot say: the address of the project, and the README's links to it.

The environment variables SITE_URL and REPO_URL have the address, as in mkdocs.yml; .github/actions/address sets them.
Without them the package has no addresses, and a release is refused.
"""

import os
import re
from pathlib import Path

from setuptools import setup

site, repository = os.environ.get("SITE_URL", ""), os.environ.get("REPO_URL", "")
urls = {
    "Documentation": site,
    "Source": repository,
    "Issues": repository and f"{repository}/issues",
    "Changelog": repository and f"{repository}/blob/main/CHANGELOG.md",
}


def absolute(link: re.Match[str]) -> str:
    """Return the start of a Markdown link or image whose target is a file of the repository."""
    return f"{link.group()}{repository}/{'raw' if link.group().startswith('!') else 'blob'}/main/"


readme = Path("README.md").read_text(encoding="utf-8")
if repository:
    readme = re.sub(r"!?\[[^\]]*\]\((?![a-z]+:|#)", absolute, readme)

setup(
    long_description=readme,
    long_description_content_type="text/markdown",
    project_urls={name: url for name, url in urls.items() if url},
)
