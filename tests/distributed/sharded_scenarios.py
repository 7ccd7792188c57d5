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


@scenario
def fully_sharded_weights():
    distributed.init_process_group("gloo")
    net = Net()
    for part in (net.conv1, net.conv2, net):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    return error_of(lambda: lf.measure_flatness(net, batches()))


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
