"""What is given as batches: a single batch is measured as one or refused by name, and nothing is read in part."""

from collections import UserList, deque, namedtuple
from dataclasses import dataclass

import pytest
import torch
from rich.progress import Progress
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lightning_flatness as lf
from lightning_flatness.measure.batches import as_batches, described, rivals_of, split_batch, targets_of
from tests.guarding import guards

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
X, Y = torch.randn(6, 3, 8, 8), torch.arange(6) % 4
SOFT = torch.softmax(torch.randn(6, 4), 1)
Named = namedtuple("Named", ["first", "second"])


@dataclass(frozen=True)
class Frozen:
    image: torch.Tensor
    label: torch.Tensor


@dataclass
class Batch:
    image: torch.Tensor
    label: torch.Tensor


def flatness(batches):
    return lf.measure_flatness(NET, batches).hessian_trace


def eigenvalue(batches):
    return lf.measure_lambda_max(NET, batches, by_filter=False)["0"].lambda_max


def spectrum(batches):
    return lf.hessian_spectrum(NET, batches, num_steps=2, num_probes=1, top_k=0).trace


def landscape(batches):
    return lf.loss_landscape(NET, batches, axes=["random"], steps=2).origin_loss


FUNCTIONS = [flatness, eigenvalue, spectrum, landscape]
SINGLE = {
    "tuple": (X, Y),
    "list of a default collate": [X, Y],
    "sequence that is no list": UserList([X, Y]),
    "queue": deque([X, Y]),
    "soft targets": (X, SOFT),
    "mapping": {"image": X, "label": Y},
    "dataclass": Batch(X, Y),
    "frozen dataclass": Frozen(X, Y),
    "named tuple": Named(X, Y),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("batch", SINGLE.values(), ids=SINGLE)
def test_a_single_batch_is_measured_as_one(function, batch):
    assert_close(function(batch), function([batch]), rtol=1e-6, atol=0)


def test_a_single_batch_without_targets():
    assert_close(flatness((X, None)), flatness([X]))


def test_a_sequence_that_is_no_list_is_a_batch_or_its_inputs():
    for batch in (UserList([X, Y]), deque([X, Y]), (UserList([X]), Y)):
        assert_close(flatness([batch]), flatness([(X, Y)]))
    assert rivals_of(UserList([(X, Y), Y])) == [Y]
    assert described(deque([X, 1])) == "a deque of length 2 (Tensor, int)"


def test_inputs_that_a_loader_puts_into_a_list():
    for batches in (DataLoader(TensorDataset(X), 4), [(X,)], [[X], (X, Y)]):
        assert_close(flatness(batches), flatness([X]))
    with pytest.raises(lf.FlatnessError, match="no targets"):
        spectrum(DataLoader(TensorDataset(X), 4))


@pytest.mark.parametrize("names", ["label image", "species image", "label pixels"])
def test_names_of_a_named_tuple_are_stronger_than_its_order(names):
    batch = namedtuple("Turned", names)(Y, X)
    inputs, targets = split_batch(batch)
    assert (inputs is X, targets is Y, targets_of(batch) is Y) == (True, True, True)


def test_without_names_that_tell_a_named_tuple_is_a_pair():
    batch = Named(X, Y)
    assert (split_batch(batch)[1] is Y, targets_of(batch) is Y) == (True, True)


def test_the_progress_bar_of_a_single_batch_ends_with_it(monkeypatch):
    totals, own = [], Progress.add_task
    monkeypatch.setattr(
        Progress,
        "add_task",
        lambda self, *args, total, **options: totals.append(total) or own(self, *args, total=total),
    )
    lf.measure_flatness(NET, (X, Y))
    lf.compare([NET, NET], (X, Y))
    assert totals == [1, 2]


class Samples(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index], Y[index]


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


REFUSED = {
    "path": ("runs/batches.pt", "batches='runs/batches.pt' is a path or text.*give a DataLoader"),
    "tensor": (X, r"batches is a Tensor, of shape \(6, 3, 8, 8\).*one batch without targets, give \[inputs\]"),
    "array": (X.numpy(), "batches is a ndarray, of shape"),
    "arrays": (
        (X.numpy(), Y.numpy()),
        "batches is a tuple, of ndarray, which looks like one batch.*are torch tensors",
    ),
    "tensor and array": ((X, Y.numpy()), "of Tensor, ndarray, which looks like one batch"),
    "tensor and list": ([X, Y.tolist()], "of Tensor, list, which looks like one batch"),
    "inputs of several tensors": (
        ((X, X), Y),
        r"of tuple, Tensor, which looks like one batch.*\[\(inputs, targets\)\]",
    ),
    "inputs by name": (({"x": X}, Y), "of dict, Tensor, which looks like one batch"),
    "three tensors": ((X, X > 0, Y), r"3 tensors \(\(6, 3, 8, 8\), \(6, 3, 8, 8\), \(6,\)\), which may be one batch"),
    "other numbers of samples": ((X, Y[:5]), "of 2 tensors"),
    "tables that are alike": ((SOFT, SOFT), r"of 2 tensors.*\[\(inputs, None\), ...\]"),
    "list of tables that are alike": ([SOFT, SOFT], "of 2 tensors"),
    "sequence of tables that are alike": (UserList([SOFT, SOFT]), "batches is a UserList, of 2 tensors"),
    "tokens of two lengths": ([torch.ones(6, 4), torch.ones(6, 5)], "of 2 tensors"),
    "tuple of images": ((X, X), "of 2 tensors"),
    "mapping of other names": ({"a": X, "b": Y}, r"batches is a dict, not a list of batches: give a DataLoader"),
    "mapping of loaders": ({"x": [X], "y": [Y]}, "batches is a dict"),
    "data set": (Samples(), r"batches is a Samples, a data set.*DataLoader\(dataset, batch_size=64\)"),
    "tensor data set": (TensorDataset(X, Y), "batches is a TensorDataset, a data set"),
    "stream of samples": (Stream(), "seems to be one sample of a data set.*DataLoader"),
    "nothing": (None, "batches is a NoneType, not a list of batches"),
    "number": (3, "batches is a int"),
    "function": (lambda: [(X, Y)], "batches is a function"),
    "model": (NET[0], "batches is a Conv2d"),
    "loader of labels alone": (DataLoader([{"label": 0}]), "A batch is a dict with the entries 'label'"),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("batches", "message"), REFUSED.values(), ids=REFUSED)
def test_anything_else_is_refused_by_name(function, batches, message):
    with pytest.raises(lf.FlatnessError, match=message):
        function(batches)


@guards("measure.batches:_of_sequence", body="return batches")
def test_a_pair_is_not_read_as_two_batches_of_inputs():
    # The targets of a regression have the shape of other inputs.
    net, inputs = nn.Linear(4, 4), torch.randn(6, 4)
    with pytest.raises(lf.BatchError, match="of 2 tensors"):
        lf.measure_flatness(net, (inputs, 2 * inputs), layers="all", loss="mse")


LISTS = {
    "batches of inputs": [X, X[:3]],
    "pairs": [(X, Y), (X[:3], Y[:3])],
    "lists": [[X, Y], [X[:3], Y[:3]]],
    "tuple of pairs": ((X, Y), (X[:3], Y[:3])),
    "one": [X],
    "three of inputs": [X, X, X],
    "tables of other numbers of samples": [SOFT, SOFT[:3]],
    "pairs and inputs": [(X, Y), X],
    "with None": [(X, None), (X, None)],
    "sequences that are no lists": UserList([UserList([X, Y]), deque([X, Y])]),
    "inputs, and pairs that are no lists": [X, UserList([X, Y])],
}


@pytest.mark.parametrize("batches", LISTS.values(), ids=LISTS)
def test_lists_of_batches_stay_what_they_are(batches):
    assert as_batches(batches) is batches


def test_what_can_be_read_is_read():
    class Loader:
        def __getitem__(self, index):
            return [(X, Y)][index]

    @dataclass
    class Made:
        label: torch.Tensor
        image: torch.Tensor

        def __iter__(self):
            yield self.image, self.label

    expected = flatness([(X, Y)])
    for batches in (Loader(), Made(Y, X), iter([(X, Y)]), DataLoader(Samples(), batch_size=4), {"a": (X, Y)}.values()):
        assert_close(flatness(batches), expected)


@pytest.mark.parametrize("function", [flatness, eigenvalue])
def test_a_generator_that_was_read_already_is_told(function):
    batches = iter([(X, Y)])
    function(batches)
    with pytest.raises(lf.BatchError, match="No sample was measured.*a generator that has been read already"):
        function(batches)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_targets_that_are_all_ignored_are_told(function):
    with pytest.raises(lf.BatchError, match="No sample was measured.*are all targets ignored"):
        function([(X, torch.full_like(Y, -100))])


@pytest.mark.parametrize("function", [spectrum, landscape])
def test_generators_cannot_be_read_many_times(function):
    with pytest.raises(lf.FlatnessError, match="list_iterator.*many times|list_iterator, which can be read only once"):
        function(iter([(X, Y)]))
