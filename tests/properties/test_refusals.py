"""What cannot be measured is refused by an error that names the culprit and the remedy."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from tests.guarding import guards
from tests.refused import Net, X, Y, measure, refused


def test_the_network_of_these_tests_is_measured():
    assert list(measure().layers) == ["conv"]


@pytest.mark.parametrize("script", [torch.jit.script, lambda net: torch.jit.trace(net, X)], ids=["script", "trace"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(script):
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    refused(lf.FlatnessError, "TorchScript.*original module", script(net))


def test_data_parallel_wrapper():
    net = nn.DataParallel(Net())
    refused(lf.FlatnessError, "DataParallel.*module", net)


class FSDPModule:
    """What torch's fully_shard makes a module inherit from."""


class Wrapped(FSDPModule, Net):
    pass


@guards("model.isolation:refuse_sharded", returns=None)
def test_sharded_weights():
    refused(lf.LayerSelectionError, "'Wrapped' are sharded over processes.*strategy='ddp'", Wrapped())
    net = Net()
    net.conv.weight.ds_id = 0  # DeepSpeed's mark
    refused(lf.LayerSelectionError, "'conv' are sharded over processes", net)


def test_unknown_loss():
    refused(lf.FlatnessError, "loss='hinge' is not known.*'cross_entropy'", loss="hinge")


def test_arguments_are_checked_before_the_model_runs():
    with pytest.raises(lf.FlatnessError, match="loss="):
        lf.FlatnessObserver(Net(), loss="hinge")
    with pytest.raises(lf.FlatnessError, match="layers="):
        lf.FlatnessObserver(Net(), layers=[])


def test_activations_that_overflow():
    # Finite logits, but squares of the input that are not.
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    refused(lf.BatchError, "block traces of layer '0' are not finite: activations overflow", net, [(1e30 * X, Y)])


def test_nan_in_the_weights():
    net = Net()
    net.conv.weight.data[1, 0, 0, 0] = torch.nan
    refused(lf.BatchError, "NaN or infinity, and so does the parameter 'conv.weight': training has diverged", net)


def test_nan_in_the_weights_that_the_tail_hides():
    net = Net(tail=torch.nan_to_num)
    net.conv.weight.data[1, 0, 0, 0] = torch.nan
    refused(lf.BatchError, "'conv': its weights contain NaN or infinity: training has diverged", net)


class CastsItself(Net):
    def forward(self, x):
        return super().forward(x.bfloat16())


@guards("model.copy:_are_cast", returns=False)
def test_forward_that_casts_to_half_precision():
    refused(
        lf.BatchError,
        r"fails in torch.float32, in which it is measured.*cast to the type of.*conv.weight.dtype\)\.$",
        CastsItself().bfloat16(),
    )


@pytest.mark.parametrize(("own", "other"), [("float32", "float64"), ("float64", "float32")])
def test_forward_that_casts_to_another_precision_names_it(own, other):
    class Casts(Net):
        def forward(self, x):
            return super().forward(x.to(getattr(torch, own)))

    net = Casts().to(getattr(torch, own))
    refused(lf.BatchError, f"fails in torch.{other}.*or set dtype='{own}'", net, dtype=other)


class CastsWeights(Net):
    """Its layer convolves in half precision, whatever it is given."""

    def __init__(self):
        super().__init__()

        class Half(nn.Conv2d):
            def forward(self, x):
                return self._conv_forward(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16()).float()

        self.conv = Half(3, 6, 3)


def test_layer_that_casts_its_weights():
    refused(lf.BatchError, "'conv': it runs with weights in torch.bfloat16.*leave the casting", CastsWeights())


@pytest.mark.parametrize("batches", [[], iter(()), torch.utils.data.DataLoader([])], ids=["list", "iterator", "loader"])
def test_no_batches(batches):
    refused(lf.BatchError, "No sample was measured.*Is the data set empty", batches=batches)


@pytest.mark.parametrize(
    ("batch", "described"),
    [
        ((X, Y, Y), "tuple of length 3"),
        ((X.tolist(),), "tuple of length 1"),
        ({"face": X, "person": Y}, "dict"),
        ({"image": X, "label": Y, "mask": X}, "dict"),
        ({"image": X, "x": X, "label": Y}, "dict"),
        ((X, Y.tolist()), "tuple of length 2"),
        ((X, Y.numpy()), "tuple of length 2"),
        (None, "NoneType"),
    ],
)
def test_batch_of_another_structure(batch, described):
    refused(lf.BatchError, rf"A batch is a {described}.*expected \(inputs, targets\).*batch_fn=", batches=[batch])


def test_missing_targets_under_a_curved_activation():
    refused(
        lf.BatchError, r"'conv': the activation after it is curved.*Give batches of \(inputs, targets\)", batches=[X]
    )


def test_missing_targets_in_a_later_batch():
    refused(lf.BatchError, "'conv': the activation after it is curved", batches=[(X, Y), X])


@pytest.mark.parametrize("batches", [[(X[:0], Y[:0])], [(X[:0], Y[:0])] * 2], ids=["one", "two"])
def test_only_batches_without_samples(batches):
    refused(lf.BatchError, "[Nn]o sample", batches=batches)


@pytest.mark.parametrize("position", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.ReLU()], ids=["silu", "relu"])
def test_a_batch_without_samples_among_others_adds_nothing(position, activation):
    net = Net()
    net.activation = activation
    batches = [(X[:3], Y[:3]), (X[3:], Y[3:])]
    expected = measure(net, batches).layers["conv"]
    batches.insert(position, (X[:0], Y[:0]))
    actual = measure(net, batches).layers["conv"]
    assert actual.num_samples == 5
    assert_close(actual.block_traces, expected.block_traces, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (torch.tensor([0, 1, 2, 4, 1]), r"0\.\.4, but the model has 4 classes \(0\.\.3\)"),
        (torch.tensor([0, 1, -1, 3, 1]), r"-1\.\.3, but the model has 4 classes"),
        (Y.float(), r"dtype torch.float32.*class indices \(integers of shape \(samples,\)"),
        (Y > 0, "dtype torch.bool.*class indices"),
        (Y.to(torch.complex64), "dtype torch.complex64.*class indices"),
        (nn.functional.one_hot(Y, 4), r"shape \(5, 4\).*class indices"),
        (Y[:, None], r"shape \(5, 1\).*class indices"),
        (Y[0], r"shape \(\).*class indices"),
        (Y[:3], "5 rows of logits but 3 targets"),
        (Y[:0], "5 rows of logits but 0 targets"),
    ],
    ids=["high", "-1", "float", "bool", "complex", "one-hot", "column", "scalar", "short", "none"],
)
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_targets_that_do_not_fit(targets, match):
    refused(lf.BatchError, match, batches=[(X, targets)])
    refused(lf.BatchError, match, batches=[(X, Y), (X, targets)])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_targets_of_any_integer_dtype_are_measured(dtype):
    expected = measure().layers["conv"].block_traces
    assert_close(measure(batches=[(X, Y.to(dtype))]).layers["conv"].block_traces, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "inputs", [[X], (X,), {"x": X}], ids=["list of arguments", "tuple of arguments", "keyword arguments"]
)
def test_structured_inputs_are_measured(inputs):
    expected = measure().layers["conv"].block_traces
    assert_close(measure(batches=[(inputs, Y)]).layers["conv"].block_traces, expected, rtol=0, atol=0)


def test_an_error_of_the_users_forward_stays_itself():
    def fail(logits):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        measure(Net(fail))


def test_a_network_in_training_mode_is_measured_in_evaluation_mode():
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Dropout(0.5), *head)
    for _ in range(3):
        net(X)  # so that running statistics differ from those of the batch
    expected = measure(net.eval()).layers["0"].block_traces
    net.train()
    net[1].eval()
    assert_close(measure(net).layers["0"].block_traces, expected, rtol=0, atol=0)
    assert [module.training for module in net] == [True, False, True, True, True, True, True]
    assert net.training


@pytest.mark.parametrize("dtype", ["int", ["float64"], torch.float16, np.dtype("float64")])
@pytest.mark.parametrize("measure_this", [lf.measure_flatness, lf.hessian_spectrum, lf.loss_landscape])
def test_types_that_nothing_is_measured_in(measure_this, dtype):
    with pytest.raises(lf.FlatnessError, match="dtype=.*: give 'float32' or 'float64', or None"):
        measure_this(Net(), [(X, Y)], dtype=dtype)
