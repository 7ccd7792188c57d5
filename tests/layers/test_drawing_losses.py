"""Losses of the user's own that draw random numbers, which do not change them: all generators stay as they are."""

import random
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.functional import Loss, find_loss
from lightning_flatness.layers.observer import FlatnessObserver
from lightning_flatness.model import generators
from tests.guarding import guards


def losses_drawing(f, y, generator):
    torch.rand(2, generator=generator)
    return F.cross_entropy(f, y, reduction="none")


class Drawing(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, f, y):
        return losses_drawing(f, y, self.generator)


class OwnLoss(Loss):
    name = "own"

    def __init__(self, generator):
        self.inner, self.generator = find_loss("cross_entropy"), generator

    def __call__(self, f, y=None):
        torch.rand(2, generator=self.generator)
        return self.inner(f, y)


def closure(generator):
    return lambda f, y: losses_drawing(f, y, generator)


def default(generator):
    return lambda f, y, generator=generator: losses_drawing(f, y, generator)


def keyword(generator):
    def loss(f, y, *, generator=generator):
        return losses_drawing(f, y, generator)

    return loss


LOSSES = {
    "module": Drawing,
    "method": lambda generator: Drawing(generator).forward,
    "closure": closure,
    "default": default,
    "keyword": keyword,
    "partial": lambda generator: partial(losses_drawing, generator=generator),
    "own class": OwnLoss,
}


def network(classes=5):
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
    return nn.Sequential(nn.Conv2d(3, 4, 3), *head).eval()


def data():
    return torch.randn(16, 3, 8, 8), torch.arange(16) % 5


def observe(observer, model, x, y):
    """Yields after the trial, after the certificates of a pass, and after its sums."""
    with torch.no_grad():
        assert observer.why_not_live(x, y) == ""
        yield
        with observer.listen(x) as heard:
            model(x)
    forms = observer.observed_forms(heard, y)
    yield
    observer.sums_of(forms)
    yield


@guards("model/generators.py", 'getattr(function, "__self__", None)', "None", ids="method")
@guards("model/generators.py", 'getattr(function, "__defaults__", None)', "None", ids="default")
@guards("model/generators.py", 'getattr(function, "__kwdefaults__", None)', "None", ids="keyword")
@guards("model/generators.py", 'getattr(function, "keywords", None)', "None", ids="partial")
@guards("model/generators.py", "if cell != CellType()", "if False", ids="closure")
@guards("layers/passes.py", "generators_kept(self._options.held_by_loss)", "generators_kept(None)", ids="module")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_generator_of_the_loss_stays_as_it_is_when_measured(loss):
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    lf.measure_flatness(network(), [data()], loss=LOSSES[loss](generator))
    assert_close(generator.get_state(), before, rtol=0, atol=0)


@pytest.mark.parametrize("classes", [5, 128])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_generator_of_the_loss_stays_as_it_is_when_observed(loss, classes):
    generator, model = torch.Generator().manual_seed(0), network(classes)
    before = generator.get_state()
    observer = FlatnessObserver(model, loss=LOSSES[loss](generator), measures=("hessian_trace",))
    for _ in observe(observer, model, *data()):
        assert_close(generator.get_state(), before, rtol=0, atol=0)


@guards("layers/options.py", "states_kept(held, [device]) if held else nullcontext()", "nullcontext()")
@pytest.mark.parametrize("classes", [5, 128])
def test_what_a_loss_draws_is_drawn_again_afterwards(classes):
    def drawing(f, y):
        random.random()
        return losses_drawing(f, y, None)

    model = network(classes)
    observer, given = FlatnessObserver(model, loss=drawing, measures=("hessian_trace",)), data()
    before = torch.get_rng_state(), random.getstate()
    for _ in observe(observer, model, *given):
        assert_close(torch.get_rng_state(), before[0], rtol=0, atol=0)
        assert random.getstate() == before[1]


def test_generators_of_an_observed_network_are_not_looked_for(monkeypatch):
    looked_at, parts_of = [], generators.parts_of
    monkeypatch.setattr(generators, "parts_of", lambda owner: [looked_at.append(owner), *parts_of(owner)])
    model, loss = network(), Drawing(torch.Generator())
    observer = FlatnessObserver(model, loss=loss, measures=("hessian_trace",))
    stages = observe(observer, model, *data())
    next(stages)
    looked_at.clear()
    list(stages)
    assert looked_at
    assert not any(part is model for owner in looked_at for part in parts_of(owner))
