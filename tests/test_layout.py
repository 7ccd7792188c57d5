"""Where tests lie: folders mirror the package, files are short and do not import each other."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "lightning_flatness"
OTHER_FOLDERS = {"properties", "cross_checks", "distributed"}


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_a_test_file_is_short_and_on_its_own(path):
    source = path.read_text()
    assert source.count("\n") <= 350
    imported = [node.module or "" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert not [module for module in imported if module.rpartition(".")[2].startswith("test_")]


def test_folders_are_those_of_the_package():
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    assert {str(folder) for folder in folders if not (PACKAGE / folder).is_dir()} == OTHER_FOLDERS
