"""Inputs of several tensors, of which some are the same for all samples."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.layers.passes import PartSize
from lightning_flatness.model.call import as_call, tensors_of
from lightning_flatness.model.hessian import LossCurvature
from lightning_flatness.model.rows import SampleTensors
from tests.guarding import guards

MEASURE = {
    "flatness": lambda net, batches: torch.tensor(lf.measure_flatness(net, batches, layers="conv").hessian_trace),
    "lambda_max": lambda net, batches: torch.tensor(
        lf.measure_lambda_max(net, batches, layers="conv", tolerance=1e-9)["conv"].lambda_max
    ),
    "spectrum": lambda net, batches: lf.hessian_spectrum(net, batches, top_k=1, num_steps=3).eigenvalues,
    "landscape": lambda net, batches: lf.loss_landscape(net, batches, steps=3).losses,
}


class Prompted(nn.Module):
    """A classifier whose features are scaled by prompts, which are the same for all samples."""

    def __init__(self):
        super().__init__()
        self.conv, self.read, self.head = nn.Conv2d(2, 4, 3), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x, prompts, scale=None):
        x = self.conv(x).relu().mean((2, 3)) * self.read(prompts).sum(0)
        return self.head(x if scale is None else x * scale[:, None])


def bound(net, prompts):
    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.read, self.head = net.conv, net.read, net.head

        def forward(self, x, scale=None):
            return net.forward(x, prompts, scale)

    return Bound()


def data(samples=7):
    torch.manual_seed(samples)
    return Prompted().double(), torch.randn(samples, 2, 6, 6).double(), torch.arange(samples) % 3


def shared_batches(x, y, prompts, sizes):
    return [((part, prompts), labels) for part, labels in zip(x.split(sizes), y.split(sizes), strict=True)]


def at_most(monkeypatch, samples):
    monkeypatch.setattr(PartSize, "next_rows", lambda self, left, begun: min(left, samples))


@pytest.mark.parametrize("what", MEASURE)
@pytest.mark.parametrize("sizes", [[7], [6, 1], [1] * 7, [4, 3]], ids=str)
def test_a_shared_tensor_is_neither_cut_nor_doubled(sizes, what, monkeypatch):
    net, x, y = data()
    prompts = torch.randn(5, 3).double()
    expected = MEASURE[what](bound(net, prompts), list(zip(x.split(sizes), y.split(sizes), strict=True)))
    at_most(monkeypatch, 3)
    assert_close(MEASURE[what](net, shared_batches(x, y, prompts, sizes)), expected, rtol=1e-8, atol=1e-12)


@guards("model.rows:SampleTensors.certified", returns=None, ids="flatness")
@guards("model.rows:SampleTensors.certified", body="return self", ids="spectrum")
@pytest.mark.parametrize("what", ["flatness", "lambda_max", "spectrum"])
def test_one_sample_and_one_prompt_are_not_mistaken_for_each_other(what):
    net, x, y = data(1)
    with pytest.raises(lf.FlatnessError, match=r"inputs\[1\] of shape \(1, 3\).*share.*functools.partial.*batch_fn"):
        MEASURE[what](net, [((x, torch.randn(1, 3).double()), y)])


def test_as_many_prompts_as_samples_are_not_cut(monkeypatch):
    net, x, y = data(6)
    prompts = torch.randn(6, 3).double()
    whole = MEASURE["flatness"](bound(net, prompts), [(x, y)])
    assert_close(MEASURE["flatness"](net, [((x, prompts), y)]), whole)
    at_most(monkeypatch, 4)
    with pytest.raises(lf.FlatnessError, match=r"inputs\['prompts'\] of shape \(6, 3\)"):
        MEASURE["flatness"](net, [({"x": x, "prompts": prompts}, y)])


@guards("model/rows.py", "before and row", "row", ids="flatness")
@pytest.mark.parametrize("what", ["flatness", "lambda_max", "spectrum"])
def test_what_earlier_batches_have_shown_counts(what, monkeypatch):
    """Other batches have other numbers of samples, so the prompts of the last one are known to be shared."""
    net, x, y = data(8)
    for number, sizes in ((3, [5, 3]), (1, [7, 1])):
        prompts = torch.randn(number, 3).double()
        expected = MEASURE[what](bound(net, prompts), list(zip(x.split(sizes), y.split(sizes), strict=True)))
        with monkeypatch.context() as patched:
            at_most(patched, 2)
            actual = MEASURE[what](net, shared_batches(x, y, prompts, sizes))
        assert_close(actual, expected, rtol=1e-8, atol=1e-12)


def test_tensors_of_samples_are_cut_with_them(monkeypatch):
    net, x, y = data()
    prompts, scale = torch.randn(5, 3).double(), torch.rand(7).double()
    batch = {"x": x, "scale": scale, "prompts": prompts}, y
    expected = {what: measure(net, [batch]) for what, measure in MEASURE.items()}
    at_most(monkeypatch, 2)
    singles = [({"x": x[i : i + 1], "scale": scale[i : i + 1], "prompts": prompts}, y[i : i + 1]) for i in range(7)]
    for what, measure in MEASURE.items():
        assert_close(measure(net, [batch]), expected[what], rtol=1e-8, atol=1e-12)
        assert_close(measure(net, singles), expected[what], rtol=1e-8, atol=1e-12)


def test_a_random_forward_is_named_as_such():
    class Noisy(Prompted):
        def forward(self, x, prompts):
            return super().forward(x + torch.randn_like(x), prompts)

    _, x, y = data(1)
    net = Noisy().double()
    for measure in (
        MEASURE["flatness"],
        MEASURE["lambda_max"],
        lambda net, b: LossCurvature(net, None).sums([(inputs, targets) for inputs, targets in b]),
    ):
        with pytest.raises(lf.LayerSelectionError, match="different logits"):
            measure(net, [((x, torch.randn(5, 3).double()), y)])


@guards("model.rows:_is_single", returns=False)
def test_one_tensor_needs_no_comparison_with_the_whole_batch():
    x = torch.ones(3, 2)
    for inputs in (x, [x], {"x": x}, as_call(x), as_call({"x": x})):
        assert SampleTensors().narrowed(inputs, 3).is_certified
    for inputs in ((x, x), {"x": x, "scale": 2.0}, as_call((x, 2.0))):
        assert not SampleTensors().narrowed(inputs, 3).is_certified


def test_sparse_and_nested_inputs_cannot_be_cut():
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    for x, kind in ((torch.eye(2, 3).to_sparse(), "sparse_coo"), (nested, "jagged")):
        for measure in (lf.measure_flatness, lf.measure_lambda_max):
            with pytest.raises(lf.BatchError, match=f"{kind}.*dense.*batch_fn="):
                measure(nn.Linear(3, 3), [(x, torch.tensor([0, 1]))], layers="all")


def test_a_call_names_its_tensors():
    x = torch.ones(3, 2)
    tensors = SampleTensors().narrowed(as_call({"x": x, "table": x}), 3)
    with pytest.raises(lf.BatchError, match=r"inputs\['x'\] of shape \(3, 2\), inputs\['table'\] of shape"):
        tensors.certified(
            as_call({"x": x, "table": x}), slice(0, 2), lambda call: call.keywords["x"] / len(call[1]["x"])
        )


@dataclass(frozen=True)
class Frozen:
    image: Tensor
    prompts: Tensor
    name: str = "some"


class OfFrozen(Prompted):
    def forward(self, batch):
        return super().forward(batch.image, batch.prompts)


@guards("model.call:map_tensors", body="return apply_to_collection(values, Tensor, function, allow_frozen=True)")
@pytest.mark.parametrize("what", MEASURE)
def test_frozen_dataclasses_are_cut_and_copied(what, monkeypatch):
    net, x, y = data()
    prompts = torch.randn(5, 3).double()
    expected = MEASURE[what](net, [((x, prompts), y)])
    net.__class__ = OfFrozen
    at_most(monkeypatch, 3)
    assert_close(MEASURE[what](net, [(Frozen(x, prompts), y)]), expected, rtol=1e-8, atol=1e-12)


def test_tensors_of_frozen_dataclasses_are_found_and_copied():
    x = torch.ones(3, 2)
    call = as_call([Frozen(x, x), {"more": Frozen(x, x)}])
    assert len(tensors_of(call)) == 4
    assert not {id(tensor) for tensor in tensors_of(call.copied())} & {id(x)}
    assert call.copied().arguments[0].name == "some"


@pytest.mark.parametrize(
    ("pack", "kind"), [(list, "list"), (lambda x: SimpleNamespace(x=x), "SimpleNamespace"), (np.asarray, "ndarray")]
)
def test_inputs_without_rows_are_named(pack, kind, monkeypatch):
    class Unpacking(Prompted):
        def forward(self, x):
            return self.head(self.conv(torch.stack(list(map(torch.as_tensor, getattr(x, "x", x))))).relu().mean((2, 3)))

    _, x, y = data()
    at_most(monkeypatch, 3)
    with pytest.raises(
        lf.BatchError, match=rf"^No tensor in the inputs of the network \({kind}\) has a row .*batch_fn="
    ):
        lf.measure_flatness(Unpacking().double(), [((pack(x),), y)], layers="conv")


class Standardised(nn.Module):
    """Divides by a standard deviation over all samples of the batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.conv((x - x.mean()) / x.std()).relu().mean((2, 3)))


@guards("layers/passes.py", "if samples == 1", "if False", ids="flatness")
@guards("model.rows:SampleTensors.certified_pair", body="return self", ids="spectrum")
@pytest.mark.parametrize("what", ["flatness", "lambda_max", "spectrum"])
def test_a_sample_with_other_logits_as_a_pair_is_refused(what):
    net, x, y = Standardised().double(), torch.randn(7, 3, 4, 4).double(), torch.arange(7) % 3
    for batches in ([(x[:1], y[:1])], [(x[:6], y[:6]), (x[6:], y[6:])]):
        with pytest.raises(lf.BatchError, match="one sample, .* a pair.*other logits.*drop_last"):
            MEASURE[what](net, batches)


def test_a_single_sample_is_compared_with_its_pair_once(monkeypatch):
    counts = []
    monkeypatch.setattr(
        Standardised, "forward", lambda self, x: counts.append(len(x)) or self.head(self.conv(x).mean((2, 3)))
    )
    net, x, y = Standardised(), torch.randn(4, 3, 4, 4), torch.arange(4) % 3
    lf.measure_flatness(net, [(x[i : i + 1], y[i : i + 1]) for i in range(4)])
    assert counts.count(1) == 1


class Squeezed(Standardised):
    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3), keepdim=True).squeeze())


@guards("model/rows.py", "except Exception:", "except KeyError:", ids="flatness")
@pytest.mark.parametrize("what", ["flatness", "lambda_max", "spectrum"])
def test_a_forward_that_fails_on_one_sample_runs_on_the_pair(what):
    net, x, y = Squeezed().double(), torch.randn(5, 3, 4, 4).double(), torch.arange(5) % 3
    found = MEASURE[what](net, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert_close(found, MEASURE[what](net, [(x, y)]), rtol=1e-10, atol=1e-14)


def test_many_rows_of_logits_for_a_sample_keep_their_message():
    class Dense(Standardised):
        def forward(self, x):
            return self.head(self.conv(x).relu().flatten(2).mT.reshape(-1, 4))

    with pytest.raises(lf.BatchError, match="8 rows of logits for 1 sample"):
        lf.measure_flatness(Dense(), [(torch.randn(1, 3, 4, 4), torch.arange(4) % 3)])
