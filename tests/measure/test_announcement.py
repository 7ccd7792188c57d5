"""What a spectrum and a landscape say before they begin, and after their first part."""

import logging
import time

import pytest
import torch
from torch import nn

import lightning_flatness as lf
from lightning_flatness.measure import announcement

NET = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
BATCHES = [(torch.randn(5, 2), torch.arange(5) % 3), (torch.randn(3, 2), torch.arange(3))]
MEASUREMENTS = {
    "spectrum": (
        lambda **options: lf.hessian_spectrum(NET, BATCHES, num_steps=4, num_probes=2, top_k=1, **options),
        "The spectrum takes 32 products with the Hessian (8 for the density and about 24, at most 501, for 1 "
        "eigenvalue), each a pass forward and back over 8 samples.",
    ),
    "eigenvalues alone": (
        lambda **options: lf.hessian_spectrum(NET, BATCHES, num_probes=0, top_k=2, max_products=9, **options),
        "The spectrum takes 11 products with the Hessian (about 11, at most 11, for 2 eigenvalues), each a pass "
        "forward and back over 8 samples.",
    ),
    "landscape": (
        lambda **options: lf.loss_landscape(NET, BATCHES, steps=3, **options),
        "The landscape takes 9 points, each a pass over 8 samples.",
    ),
}


@pytest.fixture(params=MEASUREMENTS)
def measurement(request):
    return MEASUREMENTS[request.param]


def said(caplog):
    return [(record.levelno, record.message) for record in caplog.records if record.name == "lightning_flatness"]


def test_number_before_and_time_after_the_first(measurement, caplog):
    caplog.set_level(logging.INFO, logger="lightning_flatness")
    measure, text = measurement
    measure()
    begin, after = said(caplog)
    assert begin == (logging.INFO, text)
    assert after[0] == logging.INFO
    assert after[1].startswith(f"{' '.join(text.split()[:2])} will take about ")
    assert after[1].endswith(" s.")


def test_what_is_long_is_a_warning_with_what_makes_it_cheaper(measurement, caplog, monkeypatch):
    monkeypatch.setattr(announcement, "LONG", 0.0)
    measure, text = measurement
    measure()
    ((level, message),) = said(caplog)  # the logger's own level shows warnings only
    assert level == logging.WARNING
    assert text.split(" takes ")[1].removesuffix(".") in message
    assert "To make it cheaper: " in message
    assert message.endswith("or fewer samples.")


def test_nothing_is_said_twice_where_a_progress_bar_is_shown(measurement, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="lightning_flatness")
    monkeypatch.setattr(announcement, "LONG", 0.0)
    measurement[0](progress=True)
    assert said(caplog) == []


def test_the_estimate_is_that_of_the_first_times_their_number():
    messages = []
    announced = announcement.Announcement("work", 100, "100 parts", "less", lambda *args: messages.append(args))

    def slow(vector):
        time.sleep(0.02)
        return vector

    timed = announced.timing_first(slow)
    assert [float(timed(torch.tensor(value))) for value in (1.0, 2.0)] == [1.0, 2.0]
    ((level, text),) = messages
    assert level == logging.INFO
    assert 2.0 <= float(text.split()[-2]) < 20.0


def test_seconds_are_those_of_the_call(measurement):
    start = time.perf_counter()
    result = measurement[0]()
    assert 0 < result.seconds <= time.perf_counter() - start
    assert result.to_dict()["seconds"] == result.seconds


def test_a_landscape_that_is_resumed_adds_up(caplog):
    caplog.set_level(logging.INFO, logger="lightning_flatness")
    whole = lf.loss_landscape(NET, BATCHES, steps=3)
    again = lf.loss_landscape(NET, BATCHES, steps=3, resume=whole)
    assert again.seconds > whole.seconds
    assert len(said(caplog)) == 2  # nothing of the second, which has nothing to do
