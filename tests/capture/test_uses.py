"""Which functions take a kernel, without a trace on it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from lightning_flatness.capture.uses import KernelUses


class Image(torch.Tensor):
    """Somebody else's class of tensors, which stays what it is under its own functions."""


class Strict(torch.Tensor):
    """One that takes no part in functions of classes that it does not know."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        if any(not issubclass(cls, kind) for kind in types):
            return NotImplemented
        return super().__torch_function__(function, types, arguments, keywords)


class OwnParameter(nn.Parameter):
    pass


class Calls(TorchFunctionMode):
    """What a mode sees of two tensors: the way to find uses that needs no class."""

    def __init__(self, tensors):
        super().__init__()
        self.tensors, self.found = tensors, []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        for argument in (*arguments, *(keywords or {}).values()):
            for tensor in argument if isinstance(argument, (tuple, list)) else (argument,):
                for name, watched in self.tensors.items():
                    if tensor is watched:
                        self.found.append((name, function.__name__))
        return function(*arguments, **(keywords or {}))


def everything(a, b):
    x = torch.ones(2, 3)
    y = F.linear(x, a) + F.linear(input=x, weight=b)
    y = y + torch.stack([a, b]).sum() + (a @ b.T).mean() + a.shape[0] + b.numel()
    y = F.layer_norm(y, (4,), weight=a[:, 0], bias=None) + F.gelu(b).sum() + F.softmax(a, dim=1).sum()
    y = y + F.multi_head_attention_forward(
        torch.ones(1, 1, 3), torch.ones(1, 1, 3), torch.ones(1, 1, 3), 3, 1, torch.cat([a[:3], a[:3], a[:3]]), None,
        None, None, False, 0.0, b[:3], None,
    )[0].sum()  # fmt: skip
    return y.detach() + a.requires_grad


def tensors(kind):
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    return {"a": kind(a), "b": kind(b)}


@pytest.mark.parametrize("kind", [nn.Parameter, torch.clone, OwnParameter], ids=["parameter", "tensor", "own_class"])
def test_uses_are_those_that_a_mode_sees(kind):
    given = tensors(kind)
    with Calls(given) as calls:
        expected = everything(**given)
    with KernelUses(given) as uses:
        found = everything(**given)
    assert len(calls.found) > 15
    assert uses.found == calls.found
    assert_close(found, expected, rtol=0, atol=0)
    before = len(uses.found)
    everything(**given)
    assert len(uses.found) == before


@pytest.mark.parametrize("kind", [nn.Parameter, torch.clone], ids=["parameter", "tensor"])
def test_classes_are_put_back(kind):
    given = tensors(kind)
    own = type(given["a"])

    def fails():
        with KernelUses(given):
            assert type(given["a"]) is not own
            assert isinstance(given["a"], own)
            given["a"] @ given["b"]

    with pytest.raises(RuntimeError, match="mat1"):
        fails()
    assert type(given["a"]) is type(given["b"]) is own


def test_kernels_are_watched_after_a_function_that_fails():
    given = tensors(nn.Parameter)
    with KernelUses(given) as uses:
        with pytest.raises(RuntimeError, match="mat1"):
            torch.mm(given["a"], given["b"])
        given["b"].sum()
    assert uses.found == [("a", "mm"), ("b", "mm"), ("b", "sum")]


def test_functions_that_take_a_tensor_see_its_own_class():
    kernel, seen = nn.Parameter(torch.ones(2)), []

    class Looks(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), keywords=None):
            seen.append([type(argument) for argument in arguments])
            return super().__torch_function__(function, types, arguments, keywords)

    with KernelUses({"a": kernel}) as uses:
        torch.add(kernel, torch.ones(2).as_subclass(Looks))
    assert seen == [[nn.Parameter, Looks]]
    assert uses.found == [("a", "add")]


@pytest.mark.parametrize("kind", [Image, Strict])
def test_other_classes_of_tensors_are_what_they_are(kind):
    kernel, x = nn.Parameter(torch.ones(2, 3)), torch.ones(1, 3).as_subclass(kind)
    expected = F.linear(x, kernel)
    with KernelUses({"a": kernel}) as uses:
        found = F.linear(x, kernel)
    assert type(found) is type(expected) is kind
    assert uses.found == [("a", "linear")]


def test_copies_and_files_have_the_own_class():
    net, file = nn.Linear(3, 2), io.BytesIO()
    net.weight.note = "kept"
    plain = torch.ones(2)
    with KernelUses({"a": net.weight, "b": plain}) as uses:
        copies = [copy.deepcopy(net).weight, copy.copy(net.weight), pickle.loads(pickle.dumps(net.weight))]
        others = [copy.deepcopy(plain), pickle.loads(pickle.dumps(plain)), net.state_dict()["weight"]]
        torch.save(net, file)
        assert type(net.weight) is not nn.Parameter
    file.seek(0)
    copies.append(torch.load(file, weights_only=False).weight)
    assert {type(made) for made in copies} == {nn.Parameter}
    assert {type(made) for made in others} == {torch.Tensor}
    for made in copies:
        assert_close(made, net.weight, rtol=0, atol=0)
    assert all(name in ("a", "b") for name, _ in uses.found)


def test_one_within_another():
    kernel, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with KernelUses({"a": kernel}) as outer:
        with KernelUses({"b": kernel, "c": other}) as inner:
            torch.add(kernel, other)
        torch.mul(kernel, other)
    assert inner.found == [("b", "add"), ("c", "add")]
    assert outer.found == [("a", "add"), ("a", "mul")]
    assert type(kernel) is type(other) is nn.Parameter


def test_a_tensor_with_two_names_is_watched_once():
    kernel = nn.Parameter(torch.ones(2))
    with KernelUses({"a": kernel, "b": kernel}) as uses:
        kernel.sum()
    assert uses.found == [("b", "sum")]
    assert type(kernel) is nn.Parameter


def test_gradients_and_hooks_are_those_of_the_tensor():
    kernel, heard = nn.Parameter(torch.ones(2)), []
    kernel.register_hook(lambda gradient: heard.append(gradient.clone()))
    with KernelUses({"a": kernel}):
        (3 * kernel).sum().backward()
    assert_close(kernel.grad, torch.full((2,), 3.0))
    assert len(heard) == 1
    assert type(kernel.grad) is torch.Tensor
