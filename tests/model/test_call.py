"""Calls that are heard: their copies, and forwards that are put back."""

from collections import UserList
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_flatness.model.call import (
    Call,
    Overheard,
    as_call,
    equal_inputs,
    only_heard_by,
    same_inputs,
    same_tensors,
)
from tests.guarding import guards

X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 1])


class Uncopied(torch.Tensor):
    def clone(self, **options):
        raise RuntimeError("not this one")

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        if function is torch.clone:
            raise RuntimeError("not this one")
        return super().__torch_function__(function, types, arguments, keywords or {})


def test_copies_are_of_the_tensors_alone():
    call = Call((X, "name"), {"scale": 2.0})
    copied = call.copied()
    assert equal_inputs(call, copied)
    assert not same_inputs(call, copied)
    assert copied.keywords == {"scale": 2.0}


def test_missing_values_are_equal():
    inputs = torch.tensor([[1.0, torch.nan], [torch.inf, 2.0]])
    assert equal_inputs(inputs, inputs.clone())
    assert not equal_inputs(inputs, inputs.nan_to_num())


@guards("model/call.py", "except Exception:", "except ZeroDivisionError:")
def test_what_cannot_be_copied_is_taken_as_it_is():
    call = as_call(X.as_subclass(Uncopied))
    assert call.copied() is call


def test_inputs_are_compared_entry_by_entry():
    assert same_tensors(as_call({"image": X, "label": Y}), X, Y)
    assert same_tensors(as_call(X.clone()), (X,), None)
    assert not same_tensors(as_call(X + 1), X, Y)
    assert not same_tensors(as_call(X.double()), X, Y)
    assert not equal_inputs(as_call({"x": X}), as_call({"y": X}))
    assert equal_inputs(UserList([X]), [X.clone()])


def hear(names, name):
    def heard(module, forward, arguments, keywords):
        names.append(name)
        return forward(*arguments, **keywords)

    return heard


@pytest.mark.parametrize("first", [0, 1])
def test_two_hear_a_module_and_leave_in_any_order(first):
    net, names = nn.Linear(2, 2), []
    pair = [Overheard([net], hear(names, name)) for name in ("one", "other")]
    before = dict(vars(net))
    for overheard in pair:
        overheard.__enter__()
    net(X)
    assert sorted(names) == ["one", "other"]
    pair[first].__exit__()
    net(X)
    assert names[2:] == ["other" if first == 0 else "one"]
    pair[1 - first].__exit__()
    assert vars(net) == before


@guards("model/call.py", "if Overheard._only and Overheard._only[-1] is not self:", "if False:")
def test_passes_of_our_own_are_not_heard():
    net, names = nn.Linear(2, 2), []
    with Overheard([net], hear(names, "user")), only_heard_by(None):
        net(X)
    assert names == []


@guards("model/call.py", "for attribute in ATTRIBUTES:", "for attribute in ATTRIBUTES[:1]:")
def test_a_module_that_is_compiled_meanwhile_is_put_back():
    net = nn.Linear(2, 2)
    with Overheard([net], hear([], "user")):
        net.compile(backend="eager")
    assert "forward" not in vars(net)


def test_a_forward_that_fails_is_put_back():
    net = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), Overheard([net], hear([], "user")):
        net(torch.ones(1, 5))
    assert "forward" not in vars(net)


def test_arguments_may_have_any_name():
    class Named(nn.Module):
        def forward(self, x, forward=True, module=None, overheard=None):
            return x if forward else -x

    net, names = Named(), []
    with Overheard([net], hear(names, "one")):
        assert torch.equal(net(X, forward=False, module=1, overheard=2), -X)
    assert names == ["one"]


def test_arrays_among_the_inputs_are_compared():
    numpy = pytest.importorskip("numpy")
    one, other = numpy.arange(3), numpy.array([0, 1, 3])
    assert equal_inputs(as_call((X, one)), as_call((X, one.copy())))
    assert not equal_inputs(as_call((X, one)), as_call((X, other)))
    assert not equal_inputs(as_call((X, one)), as_call((X, one[:2])))


@dataclass
class Sample:
    image: torch.Tensor


@pytest.mark.parametrize("pack", [Sample, lambda x: SimpleNamespace(x=x)], ids=["dataclass", "object"])
def test_inputs_in_objects_are_compared(pack):
    one = pack(X)
    assert equal_inputs(as_call((one,)), as_call((one,)))
    assert not equal_inputs(as_call((one,)), as_call((pack(X + 1),)))
    assert equal_inputs(as_call((one,)), as_call((pack(X.clone()),))) == isinstance(one, Sample)
