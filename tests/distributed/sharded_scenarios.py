"""Weights that are spread over ranks, in a Trainer and without one."""

from functools import partial

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Classifier, Net, dataset, quiet_trainer
from tests.distributed.scenarios import SCENARIOS, rank, scenario


def error_of(measure):
    try:
        measure()
    except lf.FlatnessError as error:
        return str(error)
    return None


def batches():
    return DataLoader(dataset(5, seed=rank()), 4)


def fully_sharded():
    distributed.init_process_group("gloo")
    net = Net()
    for part in (net.conv1, net.conv2, net):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    return net


@scenario
def fully_sharded_weights():
    net = fully_sharded()
    return error_of(lambda: lf.measure_flatness(net, batches()))


NUMBERS = {
    "last": lambda net, batches, **sync: report_numbers(net, batches, layers="last", **sync),
    "classifier": lambda net, batches, **sync: report_numbers(net, batches, layers="classifier", **sync),
    "all": lambda net, batches, **sync: report_numbers(net, batches, layers="all", **sync),
    "eigenvalue": lambda net, batches, **sync: [
        found.lambda_max for found in lf.measure_lambda_max(net, batches, dtype="float64", **sync).values()
    ],
    "spectrum": lambda net, batches, **sync: (
        lf.hessian_spectrum(net, batches, dtype="float64", top_k=1, num_steps=3, num_probes=1, **sync).ritz_values
    ),
    "landscape": lambda net, batches, **sync: (
        lf.loss_landscape(net, batches, dtype="float64", steps=2, axes=["random"], **sync).losses
    ),
}


def report_numbers(net, batches, **options):
    report = lf.measure_flatness(net, batches, dtype="float64", **options)
    return {
        name: (layer.relative_flatness, layer.hessian_trace, layer.num_samples, layer.exact)
        for name, layer in report.layers.items()
    }


def whole_batches(ranks=(0, 1)):
    return [(x.double(), y) for seed in ranks for x, y in DataLoader(dataset(5, seed=seed), 4)]


def step_of(net, optimizer):
    """One step of training, and the outputs after it."""
    x, y = dataset(8, seed=7)[:]
    nn.functional.cross_entropy(net.train()(x), y).backward()
    optimizer.step(), optimizer.zero_grad()
    return net.eval()(x).detach()


@scenario
def measured_while_sharded():
    """The numbers at each point, and whether training goes on to the same bits."""
    net = fully_sharded()
    net.dropout.p = 0.0
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    step_of(net, optimizer)
    state = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
        for name, tensor in net.state_dict().items()
    }
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), type(m).__name__) for m in net.modules()]
    found = {kind: numbers(net, whole_batches([rank()]), sync=True) for kind, numbers in NUMBERS.items()}
    of_one = NUMBERS["last"](net, whole_batches() if rank() == 0 else [], sync=True)
    after = [(len(m._forward_hooks), len(m._forward_pre_hooks), type(m).__name__) for m in net.modules()]
    outputs = step_of(net, optimizer)
    plain = Net()
    plain.load_state_dict(state)
    plain.dropout.p = 0.0
    wanted = {kind: numbers(plain, whole_batches()) for kind, numbers in NUMBERS.items()}
    expected = step_of(plain, torch.optim.SGD(plain.parameters(), 0.1))
    return found, wanted, of_one, hooks == after, float((outputs - expected).abs().max())


@scenario
def wrapped_by_fully_sharded_data_parallel():
    distributed.init_process_group("gloo")
    net = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    return error_of(lambda: lf.measure_flatness(net, batches()))


class Sharded(Classifier):
    def configure_model(self):
        for part in (self.net.conv1, self.net.conv2, self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class ShardedAsAWhole(Sharded):
    def configure_model(self):
        super().configure_model()
        fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).double().mean(), batch_size=len(batch[1]))


def sharding_trainer(*callbacks, **options):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    return quiet_trainer(".", *callbacks, devices=2, strategy=strategy, max_epochs=2, **options)


class Kept(Callback):
    """The whole weights at every validation, gathered as torch does it."""

    def __init__(self):
        self.states = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            state = pl_module.net.state_dict().items()
            self.states.append({k: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for k, t in state})


def sharded_run(make, sanity, *callbacks):
    torch.manual_seed(0)
    kept, module = Kept(), make()
    module.net.dropout.p = 0.0
    for norm in (module.net.norm1, module.net.norm2):
        norm.momentum = 0.0  # else every rank has statistics of its own
    trainer = sharding_trainer(*callbacks, kept, num_sanity_val_steps=sanity)
    trainer.fit(module, DataLoader(dataset(16), 4), DataLoader(dataset(9, 1), 2))
    return kept.states, {name: float(value) for name, value in trainer.callback_metrics.items()}


def measured_in_a_run(make, sanity, options):
    """The numbers that are logged, those of the unsharded network, and whether training was as without."""
    callback = lf.FlatnessCallback(summary=False, **options)
    states, logged = sharded_run(make, sanity, callback)
    if make is ShardedAsAWhole:  # one run apart takes long enough
        without, _ = sharded_run(make, sanity)
    else:
        without = states
    same = all(torch.equal(one[key], other[key]) for one, other in zip(states, without, strict=True) for key in one)
    net, wanted = Net(), []
    data = DataLoader(dataset(16) if "data" in options else dataset(9, 1), 16)
    for state in states:
        net.load_state_dict(state)
        kind = {"layers": options.get("layers", "last"), "dtype": options.get("dtype")}
        report = lf.measure_flatness(net, data, **kind)
        wanted.append((report.relative_flatness, report.hessian_trace, report.num_samples))
    found = [
        (record["relative_flatness"], record["hessian_trace"], callback.report.num_samples)
        for record in callback.history
    ]
    return found, wanted, same, logged["flatness/relative_flatness"]


SHARDED_RUNS = {
    "last": (Sharded, 1, {"dtype": "float64"}),
    "classifier": (Sharded, 0, {"layers": "classifier", "dtype": "float64"}),
    "in float32": (Sharded, 1, {}),
    "as a whole": (ShardedAsAWhole, 1, {"dtype": "float64"}),
    "training data": (Sharded, 1, {"data": "train", "dtype": "float64"}),
}
for name, run in SHARDED_RUNS.items():
    SCENARIOS[f"sharded, {name}"] = partial(measured_in_a_run, *run)


def batch_that_fails(batch):
    """On rank 0 only."""
    if rank() == 0 and len(batch[0]) == 1:
        raise ZeroDivisionError("on rank 0")
    return batch[0], batch[1]


@scenario
def sharded_and_failing():
    """The history if rank 0 fails on the last batch of every validation, which alone has one sample."""
    callback = lf.FlatnessCallback(summary=False, batch_fn=batch_that_fails, on_error="warn")
    sharded_run(Sharded, 1, callback)
    return len(callback.history)


def refused_in_a_run(make_callback):
    """The error, and the steps of training before it."""
    module = Sharded()
    trainer = sharding_trainer(make_callback())
    return error_of(lambda: trainer.fit(module, batches(), batches())), module.training_steps


SCENARIOS["sharded spectrum"] = partial(refused_in_a_run, lf.SpectrumCallback)
SCENARIOS["sharded landscape"] = partial(refused_in_a_run, lf.LandscapeCallback)


class SwapsWeights(Callback):
    """Behind the callback's back, after the weights were gathered."""

    def on_validation_epoch_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.mul_(1.5)


@scenario
def sharded_and_swapped():
    return error_of(lambda: sharded_run(Sharded, 1, lf.FlatnessCallback(summary=False), SwapsWeights()))


@scenario
def plain_data_parallel():
    """Every rank gives its own samples, and gets the flatness over all."""
    distributed.init_process_group("gloo")
    net = nn.parallel.DistributedDataParallel(Net())
    report = lf.measure_flatness(net, [(x.double(), y) for x, y in batches()], dtype="float64", sync=True)
    return list(report.layers), report.num_samples, report.relative_flatness
