"""Two processes log the numbers of one that measures every sample exactly once."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Classifier, Net, dataset, quiet_trainer
from tests.distributed.number_scenarios import CASES, OTHERS
from tests.distributed.ranks import returned, run_once_on_ranks

pytestmark = pytest.mark.slow
EXACT = {"rtol": 1e-12, "atol": 0.0}
PART_OF_A_KNOWN_ORDER = [
    name for name, case in CASES.items() if "max_samples" in case.options and name != "part of shuffled validation data"
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_once_on_ranks(*CASES, *OTHERS, name="numbers", tmp_path_factory=tmp_path_factory)


def network(net, weights):
    net = net.double()
    net.load_state_dict(weights)
    return net


def measured_in_one_process(net, samples, **options):
    """The keys that are logged, and what one process measures."""
    report = lf.measure_flatness(net, [(x.double(), y) for x, y in DataLoader(samples, 5)], **options)
    diagonal = "measures" in options
    names = ["hessian_trace", "relative_flatness", "normalized_relative_flatness"][: 1 if diagonal else 3]
    wanted = {name: getattr(report, name) for name in names}
    wanted |= {"weight_norm": report.weight_norm, "loss": report.loss, "top1": report.accuracy}
    if len(report.layers) > 1:
        wanted |= {f"{key}/{name}": getattr(layer, name) for key, layer in report.layers.items() for name in names}
    return {f"flatness/{key}": torch.tensor(value, dtype=torch.float64) for key, value in wanted.items()}


def assert_same(one, other):
    assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def assert_logged(logged, wanted):
    assert_close({key: logged[key] for key in wanted}, wanted, equal_nan=True, **EXACT)


@pytest.mark.parametrize("name", [name for name in CASES if "observed" in name])
def test_forward_passes_are_observed_on_every_rank(outcomes, name):
    assert [rank["why own passes"] for rank in returned(outcomes[name])] == ["", ""]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "max_samples" not in case.options])
def test_every_sample_is_measured_once(outcomes, name):
    first, second = returned(outcomes[name])
    case = CASES[name]
    options = {key: value for key, value in case.options.items() if key not in ("data", "model")}
    module = Classifier(network(case.net(), first["weights"]))
    wanted = measured_in_one_process(module, case.measured(), **options)
    assert_logged(first["logged"], wanted)
    assert_same(first["logged"], second["logged"])
    assert first["history"] == second["history"]
    assert len(first["history"]) == 2
    # Where the ranks have all samples each, all count twice in the mean.
    times = 2 if name == "no distributed sampler" else 1
    assert set(first["num_samples"].values()) == {times * len(case.measured())}
    assert first["num_samples"] == second["num_samples"]


@pytest.mark.parametrize("name", ["list of loaders", "dict of loaders", "list with 1 sample"])
def test_further_loaders_have_keys_of_their_own(outcomes, name):
    first, _ = returned(outcomes[name])
    module = Classifier(network(CASES[name].net(), first["weights"]))
    wanted = measured_in_one_process(module, dataset(13, 2))
    assert_logged(first["logged"], {f"{key}/dataloader_idx_1": value for key, value in wanted.items()})


class Kept(L.Callback):
    """What is left of a training step is undone: the weights stay as they are."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for parameter in pl_module.parameters():
            parameter.grad = None


@pytest.mark.parametrize("name", PART_OF_A_KNOWN_ORDER)
def test_a_part_is_the_part_of_one_process(outcomes, name, tmp_path):
    first, second = returned(outcomes[name])
    case = CASES[name]
    assert set(first["num_samples"].values()) == {min(case.options["max_samples"], len(case.measured()))}
    assert first["num_samples"] == second["num_samples"]
    assert_same(first["logged"], second["logged"])
    module = Classifier(network(case.net(), first["weights"]))
    callback = lf.FlatnessCallback(summary=False, **case.options)
    trainer = quiet_trainer(tmp_path, callback, Kept(), max_epochs=1, precision="64-true")
    if case.options.get("data") == "train":
        trainer.fit(module, DataLoader(dataset(case.training_samples), 4), case.loaders())
    else:
        trainer.validate(module, case.loaders(), verbose=False)
    wanted = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("flatness/")}
    assert_same(dict(module.net.state_dict()), dict(first["weights"]))
    assert first["logged"].keys() == wanted.keys()
    assert_logged(first["logged"], {key: value for key, value in wanted.items() if not key.endswith("/seconds")})


def test_a_part_of_shuffled_data_has_its_size(outcomes):
    first, second = returned(outcomes["part of shuffled validation data"])
    assert set(first["num_samples"].values()) == {7}
    assert_same(first["logged"], second["logged"])


def test_synchronised_batch_norms(outcomes):
    first, second = returned(outcomes["validate_with_synchronised_norms"])
    net = network(nn.SyncBatchNorm.convert_sync_batchnorm(Net()), first["weights"])
    plain = network(Net(), first["weights"])
    wanted = measured_in_one_process(plain, dataset(11, 1))
    assert_close(measured_in_one_process(net, dataset(11, 1)), wanted, **EXACT)
    assert_logged(first["logged"], wanted)
    assert_same(first["logged"], second["logged"])


def test_test_data(outcomes):
    first, second = returned(outcomes["test_data"])
    assert_logged(first["logged"], measured_in_one_process(network(Net(), first["weights"]), dataset(11, 1)))
    assert_same(first["logged"], second["logged"])


def test_checkpoints_are_kept_on_the_same_score(outcomes):
    first, second = returned(outcomes["checkpoint_on_flatness"])
    assert first == second
    assert_close(float(first["score"]), min(first["history"]), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("is_synced", [True, False])
def test_the_flattest_checkpoints_are_kept_on_all_ranks(outcomes, is_synced):
    first, second = returned(outcomes[f"flat checkpoint, accuracy synced: {is_synced}"])
    assert first == second
    # The mean accuracies are 0.25, 0.30, 0.35, 0.40, of which the last three are near the best.
    assert (first["best"], first["flatness"]) == ("epoch=1.ckpt", 2.0)
    assert first["known"] == first["on disk"] == [f"epoch={epoch}.ckpt" for epoch in (1, 2, 3)]


@pytest.mark.parametrize("name", ["stopping", "stopping, accuracy not synced"])
def test_ranks_stop_together(outcomes, name):
    first, second = returned(outcomes[name])
    assert_same(first, second)
    assert 0 < first["epoch"] <= 6
