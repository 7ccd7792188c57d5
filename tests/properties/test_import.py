"""Names are imported when they are first asked for."""

import subprocess
import sys

import pytest

import lightning_flatness as lf
from tests.guarding import guards

MEASURE = "lf.measure_flatness, lf.hessian_spectrum, lf.loss_landscape, lf.FlatnessMetric, lf.FlatnessReport"


@pytest.mark.parametrize(
    ("names", "wanted"),
    [("lf", False), pytest.param(MEASURE, False, marks=pytest.mark.slow), ("lf.FlatnessCallback", True)],
)
def test_only_callbacks_import_lightning(names, wanted):
    code = f"import sys, lightning_flatness as lf; {names}; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(wanted)


@guards("__init__.py", "random.setstate(state)", "pass")
@pytest.mark.parametrize("name", ["lf.LayerFlatness", "lf.plots"])
def test_the_first_use_of_a_name_draws_no_random_numbers(name):
    """The package rich, which is imported with the name, draws some."""
    code = f"import random, lightning_flatness as lf; s = random.getstate(); {name}; print(s == random.getstate())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "True"


def test_a_first_use_that_fails_draws_no_random_numbers():
    code = """
import random, sys
import lightning_flatness as lf

class Fails:
    def find_spec(self, name, path, target=None):
        if name == "lightning_flatness.measure.flatness":
            random.random()
            raise ImportError(name)

sys.meta_path.insert(0, Fails())
state = random.getstate()
try:
    lf.measure_flatness
except ImportError:
    print(state == random.getstate())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "True"


def test_public_modules_are_there_without_another_import():
    names = ["testing", "functional", "results", "plots", "pages"]
    code = (
        f"import lightning_flatness as lf; print(*(getattr(lf, name).__name__ for name in {names} if name in dir(lf)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"lightning_flatness.{name}" for name in names]


def test_every_public_name_is_there():
    assert {name for name in lf.__all__ if getattr(lf, name) is not None} == set(lf.__all__) <= set(dir(lf))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lf.nothing  # noqa: B018
