"""What ``hessian_spectrum`` refuses, and that it leaves everything as it was."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import lightning_flatness as lf
from tests.guarding import guards
from tests.spectra import ConvNet, data


def measure(model, batches=None, **options):
    batches = [data(6)] if batches is None else batches
    return lf.hessian_spectrum(model.double(), batches, **({"num_steps": 4, "num_probes": 2, "top_k": 1} | options))


class WithSpot(ConvNet):
    """Does something on the way."""

    def __init__(self, action, **options):
        super().__init__(**options)
        self.action, self.calls = action, 0

    def forward(self, x):
        self.calls += 1
        return super().forward(self.action(x))


WRONG = [
    ({"matrix": "fisher"}, "matrix='fisher'"),
    ({"top_k": -1}, "top_k=-1"),
    ({"top_k": 1.5}, "top_k=1.5"),
    ({"num_steps": 0}, "num_steps=0"),
    ({"num_probes": -1}, "num_probes=-1"),
    ({"num_probes": True}, "num_probes=True"),
    ({"max_products": 0}, "max_products=0"),
    ({"seed": "now"}, "seed='now'"),
    ({"exponent": 0}, "exponent=0"),
    ({"tolerance": -1e-3}, "tolerance=-0.001"),
    ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
    ({"loss": "hinge"}, "hinge"),
    ({"params": []}, "params="),
    ({"params": 3}, "params=3"),
    ({"params": "conv7"}, "conv7.*There are: conv1.weight, conv1.bias"),
    ({"params": ["conv1", "nothing.*"]}, "nothing"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_arguments(options, message):
    with pytest.raises(lf.FlatnessError, match=message):
        measure(ConvNet(), **options)


def test_frozen_parameters():
    model = ConvNet()
    model.conv1.requires_grad_(False)
    with pytest.raises(
        lf.LayerSelectionError, match="params='conv1' selects is frozen or empty: conv1.weight, conv1.bias"
    ):
        measure(model, params="conv1")
    model.requires_grad_(False)
    with pytest.raises(lf.LayerSelectionError, match="Every parameter of the model is frozen or empty"):
        measure(model)
    with pytest.raises(lf.LayerSelectionError, match="none"):
        measure(nn.Flatten())


IGNORED = [(data(6)[0], torch.full((6,), -100))]


@pytest.mark.parametrize("batches", [[], [(torch.zeros(0, 1, 6, 6), torch.zeros(0).long())], IGNORED])
def test_no_samples(batches):
    with pytest.raises(lf.BatchError, match="No sample was measured, so there is no spectrum.*are all targets ignored"):
        measure(ConvNet(), batches)


def test_batches_that_can_be_read_only_once():
    with pytest.raises(lf.BatchError, match=r"generator, which can be read only once.*list\(batches\)"):
        measure(ConvNet(), (batch for batch in [data(6)]))


def test_batches_that_change():
    class Augmented:
        passes = 0

        def __iter__(self):
            Augmented.passes += 1
            x, y = data(6)
            return iter([(x * Augmented.passes, y)])

    with pytest.raises(lf.BatchError, match="The mean loss over all batches is .* in one pass"):
        measure(ConvNet(), Augmented())


@guards("model/hessian.py", "certify_deterministic(logits.detach()", "(lambda *_: None)(logits.detach()")
@pytest.mark.parametrize("only_in", [None, 5], ids=["every batch", "second batch"])
@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_a_random_forward(matrix, only_in):
    def drops(x):
        return dropout(x) if only_in in (None, len(x)) else x

    with pytest.raises(lf.LayerSelectionError, match="Two forward passes on the same samples give different logits"):
        measure(WithSpot(drops), [data(6), data(5)], matrix=matrix)


def test_targets():
    x, y = data(6)
    with pytest.raises(lf.BatchError, match="Batch 1 has no targets"):
        measure(ConvNet(), [(x, y), x])
    with pytest.raises(lf.BatchError, match="has 4 classes"):
        measure(ConvNet(), [(x, y + 1)])


def test_losses_and_products_that_are_not_finite():
    x, y = data(6)
    with pytest.raises(lf.BatchError, match="NaN or infinity"):
        measure(ConvNet(), [(x, y), (x * torch.nan, y)])
    with pytest.raises(lf.BatchError, match="The loss of batch 1 is not finite"):
        measure(ConvNet(), [(x, y), (x, y.double())], loss=infinite_for_real_targets)
    model = WithSpot(lambda x: x)
    model.head.register_forward_hook(lambda module, arguments, output: output + (output - output).abs().sqrt())
    with pytest.raises(lf.BatchError, match="product with the Hessian is not finite"):
        measure(model)


def infinite_for_real_targets(f, y):
    return f.square().sum(1) + (torch.inf if y.is_floating_point() else 1.0)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):
        return gradient * 2


class Wrong(torch.autograd.Function):
    """Products of neighbours, with half of their derivative."""

    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x * x.flip(1)

    @staticmethod
    def backward(context, gradient):
        return gradient * context.saved_tensors[0].flip(1)


def margins(x):
    loss = torch.nn.functional.multi_margin_loss(x[:, :, 0, 0], x.new_zeros(len(x)).long())
    return x * loss


WITHOUT = {
    "once differentiable": (Once.apply, "without a second derivative .*once_differentiable"),
    "wrong derivative": (Wrong.apply, "not symmetric"),
    "of torch": (margins, "without a second derivative .*multi_margin_loss_backward"),
}


@pytest.mark.parametrize("operation", WITHOUT)
@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_operations_without_a_second_derivative(operation, matrix):
    function, message = WITHOUT[operation]
    if (operation, matrix) == ("wrong derivative", "gauss_newton"):
        pytest.skip("a product with itself, which is always symmetric")
    model = ConvNet()
    model.norm.register_forward_hook(lambda module, arguments, output: function(output))
    with pytest.raises(lf.LayerSelectionError, match=message):
        measure(model, matrix=matrix)
    assert measure(model, params="head").converged  # behind it all is well


def test_gradient_checkpointing():
    def on_the_way(model):
        inner = model.activation.forward
        model.activation.forward = lambda x: checkpoint(inner, x, use_reentrant=False)
        return model

    model = ConvNet(activation=nn.Tanh)
    plain = measure(copy.deepcopy(model), top_k=2)
    result = measure(on_the_way(model), top_k=2)
    assert_close(result.eigenvalues, plain.eigenvalues, rtol=1e-9, atol=0)


def test_reentrant_checkpointing_is_refused():
    model = ConvNet()
    inner = model.activation.forward
    model.activation.forward = lambda x: checkpoint(inner, x, use_reentrant=True)
    with pytest.raises(lf.LayerSelectionError, match="gradient checkpointing"):
        measure(model)


def test_attention_has_a_second_derivative_here():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.map, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            q = self.map(x)
            return self.head(nn.functional.scaled_dot_product_attention(q, q, q).mean((1, 2)))

    assert measure(Attends(), top_k=3).converged


def test_out_of_memory():
    def fails(x):
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(lf.BatchError, match="Out of memory in batch 0. Give smaller batches"):
        measure(WithSpot(fails))


def snapshot(model):
    model_state = {name: (t.detach().clone(), t.requires_grad, t._version) for name, t in model.named_parameters()}
    buffers = {name: (t.clone(), t._version) for name, t in model.named_buffers()}
    attributes = [
        {k: len(v) if hasattr(v, "__len__") else v for k, v in vars(module).items()} for module in model.modules()
    ]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    chance = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    return model_state, buffers, attributes, gradients, chance


def draws(x):
    x.add_(0.0)
    torch.rand(3)
    np.random.rand(3)  # noqa: NPY002
    random.random()
    return x


class UserError(RuntimeError):
    pass


@pytest.mark.parametrize("fails_in_pass", [None, 1, 2, 5])
@pytest.mark.parametrize("training", [True, False])
def test_no_trace(training, fails_in_pass):
    passes = []

    def action(x):
        passes.append(1)
        if len(passes) - 1 == fails_in_pass:
            raise UserError
        return draws(x)

    model = WithSpot(action).double().train(training)
    model.norm.eval()
    batch = data(6)
    cross_entropy(model(batch[0].clone()), batch[1]).backward()
    model.conv2.bias.requires_grad_(False)
    inputs, before = batch[0].clone(), snapshot(model)
    if fails_in_pass:
        with pytest.raises(UserError):
            measure(model, [batch])
    else:
        measure(model, [batch])
        assert len(passes) > 5
    after = snapshot(model)
    assert_close(after[0], before[0], rtol=0, atol=0)
    assert_close(after[1], before[1], rtol=0, atol=0)
    assert after[2] == before[2]
    assert_close(after[3], before[3], rtol=0, atol=0)
    assert_close(after[4][0], before[4][0], rtol=0, atol=0)
    assert after[4][1:] == before[4][1:]
    assert_close(batch[0], inputs, rtol=0, atol=0)


@guards(
    "measure/spectrum.py",
    "with isolated(model), torch.no_grad():",
    "with torch.inference_mode(False), torch.no_grad():",
)
@pytest.mark.slow
def test_inference_mode_and_autocast_around_it():
    model = ConvNet().double()
    plain = measure(model)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(measure(model).ritz_values, plain.ritz_values, rtol=0, atol=0)
    with torch.no_grad():
        assert_close(measure(model).ritz_values, plain.ritz_values, rtol=0, atol=0)
    single, batches = model.float(), [(data(6)[0].float(), data(6)[1])]
    options = {"num_steps": 4, "num_probes": 2, "top_k": 1}
    plain = lf.hessian_spectrum(single, batches, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = lf.hessian_spectrum(single, batches, **options)
    assert_close(actual.ritz_values, plain.ritz_values, rtol=0, atol=0)


@pytest.mark.parametrize("detached", [True, False])
def test_parameters_that_the_loss_does_not_depend_on(detached):
    model = WithSpot(lambda x: x)
    model.other = nn.Linear(2, 2)
    if detached:
        model.forward = lambda x: model.conv1(x).detach().flatten(1)[:, :4]
    named = "conv1.weight" if detached else "other.weight, other.bias"
    with pytest.raises(lf.LayerSelectionError, match=f"The loss does not depend on {named}"):
        measure(model, params="conv1" if detached else "other*")
