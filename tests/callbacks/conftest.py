import signal

import pytest

from lightning_flatness.callbacks import running
from tests.callbacks import live_networks as networks
from tests.callbacks.training_runs import end_of_run


@pytest.fixture(scope="module")
def end_without(tmp_path_factory):
    """The end of a run without the callback, run once."""
    ends = {}

    def end(run):
        if run not in ends:
            ends[run] = end_of_run(run, tmp_path_factory.mktemp("without"))
        return ends[run]

    return end


@pytest.fixture
def sigint_kept():
    """Lightning leaves a handler of its own when a run is interrupted."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def told(monkeypatch):
    """What is said about forward passes."""
    lines = []
    monkeypatch.setattr(running, "rank_zero_info", lines.append)
    return lines


@pytest.fixture(autouse=True)
def nothing_is_kept():
    yield
    networks.KEPT.clear()
