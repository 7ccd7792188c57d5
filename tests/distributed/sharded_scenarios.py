"""Weights that are spread over ranks, in a Trainer and without one."""

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Classifier, Net, dataset, quiet_trainer
from tests.distributed.scenarios import rank, scenario


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
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


@scenario
def sharded_in_a_trainer():
    module = Sharded()
    trainer = quiet_trainer(
        ".",
        lf.FlatnessCallback(),
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
    )
    return error_of(lambda: trainer.fit(module, batches(), batches())), module.training_steps


@scenario
def plain_data_parallel():
    """Every rank gives its own samples, and gets the flatness over all."""
    distributed.init_process_group("gloo")
    net = nn.parallel.DistributedDataParallel(Net())
    report = lf.measure_flatness(net, [(x.double(), y) for x, y in batches()], dtype="float64", sync=True)
    return list(report.layers), report.num_samples, report.relative_flatness
