"""The list of guards is in step with the source and with the tests; ``make guards`` takes them out."""

import pytest

from tests.guards import GUARDS, ROOT, Guard


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.what)
def test_every_guard_is_where_it_is_said_to_be(guard):
    source = (ROOT / guard.path).read_text()
    changed = guard.removed_from(source)
    assert changed != source
    compile(changed, guard.file, "exec")
    file, _, function = guard.arguments[0].partition("::")
    assert f"def {function.partition('[')[0]}(" in (ROOT / file).read_text()


def test_guards_have_names_of_their_own():
    assert len({guard.what for guard in GUARDS}) == len(GUARDS)


@pytest.mark.parametrize("before", ["nowhere", "import torch"], ids=["nowhere", "often"])
def test_a_guard_that_is_out_of_date_is_named(before):
    guard = Guard("flags", "model/isolation.py", before, "", "test_guards.py")
    with pytest.raises(ValueError, match=r"'flags' is out of date.*occurs \d times in .*isolation.py"):
        guard.removed_from("import torch\nimport torch\n")
