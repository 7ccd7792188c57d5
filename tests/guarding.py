"""Guards: parts of the package that a test must miss when they are gone.

A guard is a function, or a line or two, that keeps a user's training as it is or a number right. The test that goes red
without it says so in a decorator::

    @guards("model.isolation:refuse_sharded", returns=None)  # a function that returns something else
    @guards("model.isolation:_full_float32", body="yield")  # a function with another body
    @guards("model/isolation.py", "module.training = False", "pass")  # text that occurs once, and what replaces it

``python -m tests.guarding`` takes the guards out one at a time, in copies of the project, and runs their tests; with
words, those with one of the words in their description; with ``--list``, it prints them only.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[1]
SECONDS = 600
TESTS_FAILED = 1  # pytest's exit code; 2 to 5 are errors of collection or usage, or that nothing ran


def guards(where, before=None, after=None, *, returns=None, body=None, ids=()):
    """Declare what a test guards, in literals: :func:`declared` reads them from the source.

    ``ids`` are parameters of the test that must fail; by default one of them must.
    """
    return lambda test: test


@dataclass(frozen=True)
class Guard:
    test: str  # a pytest node without parameters
    where: str
    before: str | None = None
    after: str | None = None
    returns: object = None
    body: str | None = None
    ids: str | tuple = ()

    def __str__(self):
        change = f": {' '.join(self.before.split())}" if self.before else ""
        return f"{self.where}{change} ({self.test.removeprefix('tests/')})"

    @property
    def path(self):
        module = self.where.partition(":")[0].removesuffix(".py").replace(".", "/")
        return Path("lightning_flatness", f"{module}.py")

    @property
    def nodes(self):
        ids = [self.ids] if isinstance(self.ids, str) else self.ids
        return [f"{self.test}[{name}]" for name in ids] or [self.test]

    def removed_from(self, source):
        """The source of its file without the guard; a ValueError if what it names does not occur once."""
        name = self.where.partition(":")[2]
        found = [node for path, node in functions(ast.parse(source)) if path == name]
        number = len(found) if name else source.count(self.before)
        if number != 1:
            raise ValueError(f"The guard {self} is out of date: what it names occurs {number} times in {self.path}.")
        if not name:
            return source.replace(self.before, self.after)
        lines, first = source.splitlines(keepends=True), found[0].body[0]
        statement = self.body or f"return {self.returns!r}"
        lines[first.lineno - 1 : found[0].end_lineno] = [f"{' ' * first.col_offset}{statement}\n"]
        return "".join(lines)


def functions(tree, prefix=""):
    """Names and nodes of the functions of a module, and of the methods of its classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield f"{prefix}{node.name}", node


def declared(folder=ROOT / "tests"):
    """The guards that the tests declare."""
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            for call in getattr(node, "decorator_list", []):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "guards":
                    keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
                    test = f"{path.relative_to(folder.parent)}::{node.name}"
                    yield Guard(test, *map(ast.literal_eval, call.args), **keywords)


def run_tests(nodes, guard=None):
    """Exit code and output of pytest in a copy of the project, which is without a guard."""
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for part in ("lightning_flatness", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        if guard:
            path = folder / guard.path
            path.write_text(guard.removed_from(path.read_text()))
        environment |= {"PYTHONPATH": temporary, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *nodes]
        try:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return None, f"no end within {SECONDS} seconds"
    return done.returncode, done.stdout + done.stderr


def why_unseen(guard):
    """Why the tests of a guard are no proof of it; empty, if one of them fails without it."""
    code, output = run_tests(guard.nodes, guard)
    return {TESTS_FAILED: "", 0: "its test passes without it"}.get(code, f"pytest ends with {code}: {output[-2000:]}")


def main():
    parser = argparse.ArgumentParser(description="Take guards out, one at a time, and see their tests fail.")
    parser.add_argument("words", nargs="*", help="parts of descriptions; all guards by default")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="tests at a time")
    parser.add_argument("--list", action="store_true", help="print the guards and stop")
    options = parser.parse_args()
    chosen = [guard for guard in declared() if not options.words or any(word in str(guard) for word in options.words)]
    console = Console(soft_wrap=True)
    if options.list or not chosen:
        console.print(*map(str, chosen), f"{len(chosen)} guards", sep="\n", markup=False)
        return 0 if chosen else 1
    code, output = run_tests(sorted({node for guard in chosen for node in guard.nodes}))
    if code != 0:
        console.print(f"With all guards in place pytest ends with {code}.\n{output[-6000:]}", markup=False)
        return 1
    num_unseen = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for guard, reason in zip(chosen, pool.map(why_unseen, chosen), strict=True):
            console.print(f"{'NOT SEEN' if reason else 'seen    '}  {guard}  {reason}", markup=False)
            num_unseen += bool(reason)
    console.print(f"{len(chosen)} guards, {num_unseen} of them not seen")
    return int(num_unseen > 0)


if __name__ == "__main__":
    sys.exit(main())
