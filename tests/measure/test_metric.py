"""The contract of a torchmetrics.Metric, and sums over batches and ranks."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from tests.guarding import guards
from tests.measure.ranks import Ranks

STATES = ("block_traces", "weight_gram", "num_samples", "normalizer", "variances", "extra", "groups")


def batch_statistics(seed, num_samples, filters=4, groups=2):
    """Sums over ``num_samples`` samples: traces that differ from batch to batch, the Gram matrix of one kernel."""
    generator = torch.Generator().manual_seed(seed)
    shape = (groups, filters // groups, filters // groups)
    kernel = torch.randn(groups, filters // groups, 3, generator=torch.Generator().manual_seed(99)).double()
    traces = num_samples * torch.randn(shape, generator=generator, dtype=torch.float64)
    extra, groups = (torch.rand(size, generator=generator, dtype=torch.float64) for size in (2, (32, 5)))
    return traces, kernel @ kernel.mT, num_samples, None, None, extra, groups


BATCHES = [batch_statistics(0, 7), batch_statistics(1, 3), batch_statistics(2, 5)]


def filled(batches=BATCHES, **kwargs):
    metric = lf.FlatnessMetric(num_filters=4, groups=2, **kwargs)
    for batch in batches:
        metric.update(*batch)
    return metric


def assert_same_values(actual, expected, **tolerance):
    tolerance = tolerance or {"rtol": 1e-12, "atol": 1e-14}
    assert actual.keys() == expected.keys()
    assert_close(actual, expected, **tolerance)


def test_values_are_means_over_samples():
    samples = 7 + 3 + 5
    traces = sum(batch[0] for batch in BATCHES) / samples
    gram = BATCHES[0][1]
    values = filled().compute()
    assert_close(values["hessian_trace"], torch.einsum("gss->", traces))
    assert_close(values["relative_flatness"], (traces * gram).sum())
    assert_close(values["neuronwise_flatness"], torch.einsum("gss,gss->", traces, gram))
    assert_close(values["layerwise_flatness"], torch.einsum("gss->", traces) * torch.einsum("gss->", gram))
    assert_close(values["weight_norm"], torch.einsum("gss->", gram).sqrt())
    assert {value.dtype for value in values.values()} == {torch.float64}


@pytest.mark.parametrize(
    "copied",
    [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy, lambda m: m.clone()],
    ids=["pickle", "deepcopy", "clone"],
)
def test_copies_carry_the_states_and_live_on_their_own(copied):
    metric = filled(BATCHES[:2])
    twin = copied(metric)
    assert_same_values(twin.compute(), metric.compute(), rtol=0, atol=0)
    before = metric.compute()
    twin.update(*BATCHES[2])
    assert_same_values(twin.compute(), filled().compute())
    assert_same_values(metric.compute(), before, rtol=0, atol=0)


def test_reset_forgets_everything():
    metric = filled()
    metric.reset()
    with pytest.raises(lf.BatchError, match="No sample was measured"):
        metric.means()
    metric.update(*BATCHES[0])
    assert_same_values(metric.compute(), filled(BATCHES[:1]).compute(), rtol=0, atol=0)


def test_reset_restores_the_defaults_unharmed():
    metric = filled()
    metric.reset()
    assert all(not getattr(metric, name).any() for name in STATES)


def test_merged_states_add_up():
    metric = filled(BATCHES[:2])
    metric.merge_state(filled(BATCHES[2:]))
    assert_same_values(metric.compute(), filled().compute())


def test_forward_gives_the_batch_and_keeps_the_whole():
    metric = lf.FlatnessMetric(num_filters=4, groups=2)
    for batch in BATCHES:
        assert_same_values(metric(*batch), filled([batch]).compute())
    assert_same_values(metric.compute(), filled().compute())


def test_hash_tells_metrics_apart():
    first, second = filled(), filled()
    assert hash(first) == hash(first)
    assert hash(first) != hash(second)
    assert len({first, second}) == 2


def test_checkpoints_stay_small():
    assert filled().state_dict() == {}
    assert lf.FlatnessMetric(4).load_state_dict({}).missing_keys == []


def test_states_are_float64_sums():
    metric = filled()
    assert set(metric.metric_state) == set(STATES)
    assert {getattr(metric, name).dtype for name in STATES} == {torch.float64}
    assert metric.num_samples == 15


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), order=st.randoms(use_true_random=False))
def test_shards_equal_the_whole(sizes, order):
    batches = [batch_statistics(seed, size) for seed, size in enumerate(sizes)]
    whole = filled(batches).compute()
    order.shuffle(batches)
    assert_same_values(filled(batches).compute(), whole)
    merged = filled(batches[:1])
    for batch in batches[1:]:
        merged.merge_state(filled([batch]))
    assert_same_values(merged.compute(), whole)


def test_compute_without_samples_is_refused():
    with (
        pytest.warns(UserWarning, match="compute.*before the.*update"),
        pytest.raises(lf.BatchError, match="No sample was measured"),
    ):
        lf.FlatnessMetric(num_filters=4).compute()


@pytest.mark.parametrize("position", [0, 1], ids=["block_traces", "weight_gram"])
@pytest.mark.parametrize(
    "spoil",
    [lambda t: t[0], lambda t: t[:, :1], lambda t: t.flatten(0, 1)[None], lambda t: t.float(), lambda t: t.long()],
    ids=["2-D", "filters", "groups", "float32", "integers"],
)
def test_wrong_shapes_and_dtypes_are_refused(position, spoil):
    metric = filled(BATCHES[:1])
    spoilt = list(BATCHES[1])
    spoilt[position] = spoil(spoilt[position])
    name = ("block_traces", "weight_gram")[position]
    with pytest.raises(lf.BatchError, match=rf"{name} is .*expected float64 \(2, 2, 2\)"):
        metric.update(*spoilt)
    assert_close(metric.metric_state, filled(BATCHES[:1]).metric_state, rtol=0, atol=0)


@pytest.mark.parametrize(("filters", "groups"), [(4, 3), (0, 1), (4, 0), (-4, 2), (2, 4)])
def test_filters_that_do_not_divide_into_groups_are_refused(filters, groups):
    with pytest.raises(lf.BatchError, match=f"num_filters={filters} must be a positive multiple of groups={groups}"):
        lf.FlatnessMetric(num_filters=filters, groups=groups)


@pytest.mark.parametrize(
    "convert",
    [lambda m: m.half(), lambda m: m.float(), lambda m: m.bfloat16(), lambda m: m.type(torch.float16)],
    ids=["half", "float", "bfloat16", "type"],
)
def test_states_stay_float64_when_a_module_is_converted(convert):
    metric = convert(filled(BATCHES[:2]))
    metric.update(*BATCHES[2])
    assert {getattr(metric, name).dtype for name in STATES} == {torch.float64}
    assert_same_values(metric.compute(), filled().compute(), rtol=0, atol=0)
    metric.reset()
    metric.update(*BATCHES[0])
    assert_same_values(metric.compute(), filled(BATCHES[:1]).compute(), rtol=0, atol=0)


@guards("measure/metric.py", "if self.block_traces.dtype != torch.float64:", "if False:")
@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to(torch.float32),
        lambda m: nn.ModuleDict({"metric": m}).to(torch.bfloat16)["metric"],
    ],
    ids=["to bfloat16", "to float32", "to bfloat16 in a module"],
)
def test_a_cast_that_torchmetrics_lets_through_is_refused_at_the_next_update(convert):
    metric = convert(filled(BATCHES[:2]))
    with pytest.raises(lf.BatchError, match="was cast to .*float64"):
        metric.update(*BATCHES[2])


def test_moving_keeps_states():
    assert_same_values(filled().to("cpu").compute(), filled().compute(), rtol=0, atol=0)


@pytest.mark.parametrize("outside_first", [True, False])
def test_updates_inside_and_outside_inference_mode_mix(outside_first):
    metric = lf.FlatnessMetric(num_filters=4, groups=2)
    if outside_first:
        metric.update(*BATCHES[0])
    with torch.inference_mode():
        metric.update(*(part.clone() if isinstance(part, torch.Tensor) else part for part in BATCHES[1]))
    if not outside_first:
        metric.update(*BATCHES[0])
    metric.update(*BATCHES[2])
    assert_same_values(metric.compute(), filled().compute())


@guards(
    "measure/metric.py",
    "self.block_traces = self.block_traces + block_traces.to(self.block_traces)",
    "self.block_traces += block_traces.to(self.block_traces)",
)
def test_created_and_reset_inside_inference_mode():
    with torch.inference_mode():
        metric = filled(BATCHES[:1])
        metric.reset()
        metric.update(*BATCHES[0])
        metric.compute()
    metric.update(*BATCHES[1])
    metric.update(*BATCHES[2])
    assert_same_values(metric.compute(), filled().compute())


def test_values_carry_no_graph():
    traces, gram, samples, *_ = BATCHES[0]
    metric = lf.FlatnessMetric(num_filters=4, groups=2)
    metric.update(traces.clone().requires_grad_(), gram, samples)
    assert not any(value.requires_grad for value in metric.compute().values())


def test_synced_ranks_equal_the_whole():
    ranks = Ranks()
    ranks.metrics = [filled(part, **ranks.sync_options()) for part in (BATCHES[:1], BATCHES[1:])]
    for metric, part in zip(ranks.metrics, (BATCHES[:1], BATCHES[1:]), strict=True):
        assert_same_values(metric.compute(), filled().compute())
        # Afterwards a rank has its own sums again, so that it can go on.
        assert_close(metric.metric_state, filled(part).metric_state, rtol=0, atol=0)


def test_means_of_synced_states_are_those_of_the_whole():
    ranks = Ranks()
    ranks.metrics = [filled(part, **ranks.sync_options()) for part in (BATCHES[:1], BATCHES[1:])]
    with ranks.metrics[0].sync_context(dist_sync_fn=ranks.gather):
        synced = ranks.metrics[0].means()
    assert_close(synced, filled().means(), rtol=1e-12, atol=1e-14)


def test_a_rank_without_samples_does_not_matter():
    ranks = Ranks()
    ranks.metrics = [filled(**ranks.sync_options()), filled([], **ranks.sync_options())]
    assert_same_values(ranks.metrics[0].compute(), filled().compute(), rtol=0, atol=0)


@pytest.mark.parametrize("arguments", [{"num_filters": 6.0}, {"num_filters": "6"}, {"num_filters": 6, "groups": 2.0}])
def test_numbers_that_are_not_whole(arguments):
    with pytest.raises(lf.FlatnessError, match=f"{list(arguments)[-1]}=.* must be a whole number"):
        lf.FlatnessMetric(**arguments)


@guards("model.answer:certify_unchanged", body="return before")
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("change", ["a kernel", "the classifier"])
def test_an_observer_is_for_one_network(batches, change):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    observer, x = lf.FlatnessObserver(net), torch.randn(5, 1, 8, 8)
    for _ in range(batches):
        observer(x)
    with torch.no_grad():
        net[0 if change == "a kernel" else 4].weight.mul_(1.1)
    with pytest.raises(lf.BatchError, match="weights have changed.*FlatnessObserver.*a new one for every measurement"):
        observer(x)
    lf.FlatnessObserver(net)(x)
