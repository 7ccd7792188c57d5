"""What the tests declare as guards is in the package, once; ``make guards`` takes the guards out."""

import pytest

from tests.guarding import ROOT, Guard, declared


@pytest.mark.parametrize("guard", list(declared()), ids=str)
def test_every_guard_is_where_its_test_says(guard):
    source = (ROOT / guard.path).read_text()
    changed = guard.removed_from(source)
    assert changed != source
    compile(changed, str(guard.path), "exec")


@pytest.mark.parametrize(
    ("declaration", "number"),
    [
        (("model.isolation:nowhere",), 0),
        (("model/isolation.py", "nowhere", ""), 0),
        (("model/isolation.py", "import torch", ""), 2),
        (("model.isolation:twice",), 2),
    ],
    ids=str,
)
def test_a_guard_that_is_out_of_date_is_named(declaration, number):
    source = "import torch\nimport torch\n\ndef twice(): pass\n\ndef twice(): pass\n"
    with pytest.raises(ValueError, match=rf"isolation.*is out of date.*occurs {number} times in .*isolation.py"):
        Guard("tests/test_guards.py::test", *declaration).removed_from(source)


def test_functions_lose_their_bodies():
    source = "class A:\n    def f(self):\n        x = 1\n        return x\n\n    def g(self):\n        return 2\n"
    assert Guard("", "m:A.f", returns=0).removed_from(source) == source.replace("x = 1\n        return x", "return 0")
    assert "def g(self):\n        yield\n" in Guard("", "m:A.g", body="yield").removed_from(source)
