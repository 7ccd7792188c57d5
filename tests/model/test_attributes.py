"""What a forward changes in the attributes of modules, and in the collections among them, is undone."""

from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import pytest
import torch
from torch import nn

import lightning_flatness as lf
from lightning_flatness.model.attributes import attributes_kept
from tests.guarding import guards

BATCH = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3
Pair = namedtuple("Pair", ["names", "number"])


class Words(list):
    """A list that makes its entries as it is read."""

    def __iter__(self):
        return (str(word) for word in list.__iter__(self))


def network():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def test_what_a_forward_puts_into_lists_and_dictionaries_is_taken_out_again():
    class Keeps(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
            self.features, self.shapes = {"of": "the user"}, [1]
            self.same = self.features  # two names of one dictionary
            self[0].register_forward_hook(lambda module, args, out: self.features.update(first=out))

        def forward(self, x):
            self.shapes.append(x.shape)
            return self[4](self[3](self[2](self[1](self[0](x) + 0 * self.same["first"]))))

    model = Keeps()
    features, shapes = model.features, model.shapes
    lf.measure_flatness(model, [(torch.randn(4, 1, 8, 8), torch.arange(4) % 3)], layers="0")
    assert model.features is model.same is features
    assert model.shapes is shapes
    assert (features, shapes) == ({"of": "the user"}, [1])


COLLECTIONS = {
    "list": (lambda: [3, 1], lambda kept: kept.insert(0, 2)),
    "sorted": (lambda: [3, 1], lambda kept: kept.sort()),
    "dictionary": (lambda: {"a": 1}, lambda kept: kept.update(a=2)),
    "ordered dictionary": (lambda: OrderedDict(b=1, a=2), lambda kept: kept.move_to_end("b")),
    "default dictionary": (lambda: defaultdict(int, a=1), lambda kept: kept["b"]),
    "counter": (lambda: Counter("aab"), lambda kept: kept.update("bc")),
    "set": (lambda: {"a"}, lambda kept: kept.add("b")),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda kept: kept.append(3)),
    "tensors": (lambda: [torch.ones(2)], lambda kept: kept.append(torch.ones(3))),
    "nested": (lambda: {"a": [{1}]}, lambda kept: kept["a"][0].add(2)),
    "in a tuple": (lambda: (1, [2]), lambda kept: kept[1].append(3)),
    "in a named tuple": (lambda: Pair(["a"], 1), lambda kept: kept.names.clear()),
}


@guards("model/attributes.py", "type(value) in COLLECTIONS", "type(value) in (list, dict)", ids="counter")
@guards("model/attributes.py", "found[id(value)][1] if len(value) <= MOST_SEARCHED else ()", "()", ids="nested")
@guards("model/attributes.py", "or isinstance(value, tuple)", "", ids="in a tuple")
@pytest.mark.parametrize("name", COLLECTIONS)
def test_collections_get_their_entries_back(name):
    make, change = COLLECTIONS[name]
    changed = make()
    change(changed)
    assert str(changed) != str(make()), "seen if it were left"
    layer = nn.Identity()
    layer.kept = kept = make()
    with attributes_kept([layer]):
        change(layer.kept)
    assert layer.kept is kept
    assert type(kept) is type(make())
    assert str(kept) == str(make())


def test_a_collection_in_itself():
    layer = nn.Identity()
    layer.kept = [1]
    layer.kept.append(layer.kept)
    with attributes_kept([layer]):
        layer.kept.clear()
    assert layer.kept[0] == 1
    assert layer.kept[1] is layer.kept


@guards("model/attributes.py", "type(value) in COLLECTIONS", "isinstance(value, COLLECTIONS)")
def test_collections_of_own_types_are_left_alone():
    layer = nn.Identity()
    layer.kept = Words([1, 2])
    with attributes_kept([layer]):
        layer.kept.append(3)
    assert list.__repr__(layer.kept) == "[1, 2, 3]"


def test_tuples_in_tuples_are_searched_once():
    layer = nn.Identity()
    layer.kept = ([1],)
    for _ in range(60):
        layer.kept = (layer.kept, layer.kept)
    with attributes_kept([layer]):
        pass


@guards("model/attributes.py", "<= MOST_SEARCHED", "> -1")
def test_the_entries_of_large_collections_are_not_searched():
    layer = nn.Identity()
    layer.kept = [[index] for index in range(1001)]
    with attributes_kept([layer]):
        layer.kept.append(0)
        layer.kept[5].append(0)
    assert len(layer.kept) == 1001
    assert layer.kept[5] == [5, 0]


@guards("model/attributes.py", "len(value) <= most", "True")
def test_large_collections_are_left_alone():
    layer = nn.Identity()
    layer.large, layer.small = [1, 2, 3], [1, 2]
    with attributes_kept([layer], most=2):
        layer.large.append(4)
        layer.small.append(4)
    assert (layer.large, layer.small) == ([1, 2, 3, 4], [1, 2])


class BuiltInForward(nn.Module):
    """Changes itself in its first forward."""

    def __init__(self, build):
        super().__init__()
        self.net, self.built, self.build = network(), False, build

    def forward(self, x):
        if not self.built:
            self.build(self)
            self.built = True
        return self.net(x)


def head_made(module):
    module.net[4] = None if module.net[4] is None else nn.Linear(4, 3)


HARMLESS = {
    "hook": lambda module: module.net[1].register_forward_hook(lambda *args: args[-1] * 1.5),
    "hook before": lambda module: module.net[0].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,)),
    "buffer": lambda module: module.register_buffer("mask", torch.ones(3)),
    "buffer not saved": lambda module: module.register_buffer("mask", torch.ones(3), persistent=False),
    "module without weights": lambda module: setattr(module.net, "1", nn.LeakyReLU()),
    "parameter to come": lambda module: module.register_parameter("later", None),
    "module replaced": lambda module: setattr(module.net, "1", nn.Hardtanh()),
}
MEASURES = {
    "flatness": lf.measure_flatness,
    "lambda_max": lf.measure_lambda_max,
    "spectrum": lambda *args: lf.hessian_spectrum(*args, num_steps=3, num_probes=1),
    "landscape": lambda *args: lf.loss_landscape(*args, steps=3),
}


def tables(model):
    """What torch keeps in every module, in a form that can be compared."""
    names = vars(nn.Module()).keys()
    kept = [(name, value) for one in model.modules() for name, value in vars(one).items() if name in names]
    return [(name, list(value) if hasattr(value, "__iter__") else value) for name, value in kept]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", HARMLESS)
def test_what_the_first_forward_registers_is_taken_out_again(name, measure):
    model = BuiltInForward(HARMLESS[name])
    before, modules = tables(model), list(model.modules())
    MEASURES[measure](model, [BATCH])
    assert tables(model) == before
    assert list(model.modules()) == modules
    assert not model.built
    model(BATCH[0])
    assert tables(model) != before or list(model.modules()) != modules, "seen if it were left"


PARAMETERS = {
    "made": (lambda module: setattr(module, "scale", nn.Parameter(torch.ones(3))), "'scale'"),
    "made with a module": (lambda module: setattr(module.net, "5", nn.Linear(3, 3)), "'net.5.bias', 'net.5.weight'"),
    "deleted": (lambda module: delattr(module, "spare"), "'spare.bias', 'spare.weight'"),
}


@guards("model/copy.py", "== self._num_parameters", "!= None", ids="made-flatness")
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_forward_that_makes_parameters_is_refused_until_it_was_called(name, measure):
    build, names = PARAMETERS[name]
    model = BuiltInForward(build)
    model.spare = nn.Linear(2, 2)
    before = tables(model)
    with pytest.raises(lf.LayerSelectionError, match=rf"parameters \({names}\).*Call the model once before"):
        MEASURES[measure](model, [BATCH])
    assert tables(model) == before
    model(BATCH[0])
    MEASURES[measure](model, [BATCH])
