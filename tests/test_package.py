"""What is published: the version is one, and the files that ``make dist`` builds have what they must and no more."""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from lightning_flatness import __version__

ROOT = Path(__file__).parents[1]
FOLDER = os.environ.get("DISTRIBUTIONS")  # where make dist has put them
RELEASE = os.environ.get("RELEASE")  # the tag that is released
built = pytest.mark.skipif(FOLDER is None, reason="make dist builds the files")
released = pytest.mark.skipif(not RELEASE, reason="no release")


def the_one(pattern):
    (path,) = Path(FOLDER).glob(pattern)
    return path


@pytest.fixture(scope="module")
def wheel():
    with zipfile.ZipFile(the_one("*.whl")) as file:
        yield {name: file.read(name) for name in file.namelist()}


@pytest.fixture(scope="module")
def metadata(wheel):
    return email.message_from_bytes(wheel[f"lightning_flatness-{__version__}.dist-info/METADATA"])


def test_the_citation_has_the_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_the_bibtex_of_the_software_is_that_of_the_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    entry = re.search(r"@software\{.*?\n\}", (ROOT / "docs" / "faq.md").read_text(), flags=re.DOTALL).group()
    (author,) = citation["authors"]
    assert dict(re.findall(r"(\w+) = \{+(.*?)\}+,?\n", entry)) == {
        "title": citation["title"], "author": author["name"], "version": citation["version"],
    }  # fmt: skip


@built
def test_the_wheel_is_the_package_alone(wheel):
    package = [path for path in (ROOT / "lightning_flatness").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected = {path.relative_to(ROOT).as_posix() for path in package}
    assert {name for name in wheel if ".dist-info/" not in name} == expected
    assert {"lightning_flatness/py.typed", "lightning_flatness/pages/report.html.j2"} <= expected


@built
def test_the_sdist_has_what_its_tests_need():
    with tarfile.open(the_one("*.tar.gz")) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    folders = ("lightning_flatness", "tests", "docs", "examples", "benchmarks", "studies")
    sources = {path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py")}
    others = {path.name for path in ROOT.glob("*.md")} | {"LICENSE", "CITATION.cff", "mkdocs.yml", "pyproject.toml"}
    assert sources | others | {"tutorials/digits.ipynb"} <= names


@built
def test_the_wheel_runs_by_itself(tmp_path):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    (site,) = environment.rglob("site-packages")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, the_one("*.whl")], check=True)
    # What the package needs is taken from here; a path in a .pth file does not bring the editable package along.
    (site / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [python, ROOT / "tests" / "installed.py"]
    done = subprocess.run(words, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"Works: lightning-flatness {__version__}"


@built
@released
def test_a_release_has_its_tag_its_changes_and_an_address(metadata):
    assert f"v{__version__}" == RELEASE
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text()).keys() >= {"date-released", "repository-code"}
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL") or ["none, none"])
    assert urls.keys() >= {"Documentation", "Source", "Issues", "Changelog"}, "set SITE_URL and REPO_URL"
    assert not re.search(r"\]\((?!https?:|#)", metadata.get_payload()), "a link that leads nowhere on the index"


@released
def test_a_release_does_not_say_that_there_is_none():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tutorials").glob("*.ipynb")]
    found = re.compile(r"PyPI\s+yet|PyPI\?\W+Not yet|No version has been released")
    assert [page.relative_to(ROOT).as_posix() for page in pages if found.search(page.read_text())] == []
