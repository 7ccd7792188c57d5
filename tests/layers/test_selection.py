"""Which layers are measured, and what is said of names that fit none."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_flatness as lf
from tests.guarding import guards
from tests.refused import Net, X, Y, measure, refused


def test_no_convolution():
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 6), nn.ReLU(), nn.Linear(6, 4))
    refused(lf.LayerSelectionError, "layers='last': no convolution runs.*there are '1', '3'", net)
    refused(lf.LayerSelectionError, "no convolution .*and no nn.Linear", nn.Sequential(nn.Flatten(), nn.ReLU()))


def test_transposed_convolutions_do_not_count():
    net = nn.Sequential(nn.ConvTranspose2d(2, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    refused(lf.LayerSelectionError, "no convolution", net)


def test_no_linear_classifier():
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten())
    report = lf.measure_flatness(net, [(X, Y)])
    assert (report.layers["0"].method, report.exact) == ("gauss_newton", True)
    refused(lf.LayerSelectionError, "last layer that runs, '0', is not a linear layer that", net, layers="classifier")


def test_neither_a_convolution_nor_a_classifier():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return F.linear(x, 2 * self.kernel)

    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 6), nn.ReLU(), Doubled())
    refused(lf.LayerSelectionError, "no convolution runs in the forward. Name a layer.*there are '1', '3'", net)


def test_only_convolution_is_the_classifier():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 4, 1), nn.Flatten())
    refused(lf.LayerSelectionError, "no convolution runs before the classifier '1'.*there are '1'", net)


class Plainly(nn.Module):
    """Keeps modules in a plain list or dictionary."""

    def __init__(self, features, head=None):
        super().__init__()
        self.other, self.features, self.head = nn.Linear(2, 2), features, head or nn.Identity()

    def forward(self, x):
        (features,) = self.features.values() if isinstance(self.features, dict) else self.features
        return self.head(features(x))


@guards("layers/selection.py", "_unregistered(modules) or compiled", "compiled", ids="list")
@guards("layers/selection.py", 'f"{_unregistered(modules)}"', '""', ids="dict")
@pytest.mark.parametrize("kept", ["list", "dict", "tuple"])
def test_modules_that_are_not_registered(kept):
    features = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    keep = {"list": lambda net: [net], "dict": lambda net: {"a": net}, "tuple": lambda net: (net,)}[kept]
    told = f"modules in the {kept} 'features' are no submodules.*nn.ModuleList or nn.ModuleDict"
    net = Plainly(keep(features), nn.Linear(6, 4))
    refused(lf.LayerSelectionError, f"no convolution runs before the classifier 'head'.*{told}", net)
    refused(lf.LayerSelectionError, f"runs none of .*{told}", Plainly(keep(features.append(nn.Linear(6, 4)))))
    refused(lf.LayerSelectionError, "(?s)^(?!.*no submodules)", nn.Sequential(nn.Flatten(), nn.Linear(72, 4)))


def test_layer_that_never_runs():
    message = "does not run 'idle' on the first samples.*select only layers that run on all samples"
    refused(lf.LayerSelectionError, message, layers=["conv", "idle"])


def test_a_layer_that_runs_only_later_is_left_out():
    class Late(Net):
        def forward(self, x):
            extra = self.idle(self.stem(x)).mean((2, 3)) if x.mean() > 2 else 0
            return self.head(self.conv(self.stem(x)).relu().mean((2, 3)) + extra)

    report = measure(Late(), [(X, Y), (X + 5, Y)], layers="all")
    assert (list(report.layers), list(report.left_out)) == (["stem", "conv", "head"], ["idle"])
    assert "runs on later samples, but not on the first ones" in report.left_out["idle"]


@pytest.mark.parametrize(("pattern", "meant"), [("covn", "conv"), ("stemm", "stem"), ("features.3", "idle")])
def test_pattern_without_a_match(pattern, meant):
    refused(
        lf.LayerSelectionError, f"layers='{pattern}' matches no convolution.*Did you mean .*'{meant}'", layers=pattern
    )


@pytest.mark.parametrize(("pattern", "meant"), [("c", "net.c"), ("model.net.h", "net.h"), ("x.net.a", "net.a")])
def test_layers_of_the_same_last_name_are_meant_first(pattern, meant):
    net = nn.Sequential()
    parts = {"a": nn.Conv2d(2, 3, 1), "c": nn.Conv2d(3, 4, 3), "flat": nn.Flatten(), "h": nn.Linear(64, 4)}
    net.add_module("net", nn.Sequential(OrderedDict(parts)))
    refused(lf.LayerSelectionError, f"Did you mean '{meant}'", net, layers=pattern)


def test_one_pattern_of_several_without_a_match():
    refused(lf.LayerSelectionError, "layers='nothing.*' matches no convolution", layers=["conv", "nothing.*"])


@pytest.mark.parametrize("word", ["last", "classifier", "all"])
def test_words_in_a_list_are_names(word):
    message = f"no layer is named '{word}'. Give layers='{word}' by itself"
    refused(lf.LayerSelectionError, message, layers=["conv", word])


@pytest.mark.parametrize(("layer", "kind"), [("activation", "SiLU")])
def test_named_layer_is_no_convolution(layer, kind):
    refused(lf.LayerSelectionError, f"Layer '{layer}' is a {kind}, not a convolution", layers=layer)


def test_layer_that_runs_twice():
    class Twice(Net):
        def forward(self, x):
            return super().forward(x) + super().forward(x.flip(3))

    layer = lf.measure_flatness(Twice(), [(X, Y)]).layers["conv"]
    assert (layer.method, layer.exact) == ("gauss_newton", False)


@pytest.mark.parametrize("layers", ["", [], [""], None, 3, [3], ["conv", None]], ids=repr)
def test_empty_or_senseless_layers(layers):
    refused(lf.FlatnessError, "give 'last', 'all', 'classifier', or names or glob patterns", layers=layers)


class Applies(nn.Module):
    """conv - ReLU, what ``apply`` does with ``part`` or ``kernel``, pooling, a hidden layer, what ``head`` does."""

    def __init__(self, part, apply=lambda net, h: h, head=lambda net, g: net.fc(g)):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.hidden, self.fc = nn.Conv2d(2, 5, 3), nn.Linear(5, 6), nn.Linear(6, 4)
        self.part, self.kernel, self.apply_part, self.apply_head = (
            part and part(),
            nn.Parameter(torch.randn(5, 5)),
            apply,
            head,
        )

    def forward(self, x):
        return self.apply_head(self, self.hidden(self.apply_part(self, self.conv(x).relu()).relu().mean((2, 3))).relu())


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def one_kernel_for_each_sample(net, h):
    kernels = (net.kernel * h.mean((1, 2, 3)).view(-1, 1, 1)).reshape(-1, 5, 1, 1)
    return F.conv2d(h.reshape(1, -1, *h.shape[2:]), kernels, groups=len(h)).view(h.shape)


CONVOLUTIONS = {
    "unfold": (None, lambda net, h: (net.kernel @ h.flatten(2)).view(h.shape), "kernel"),
    "einsum": (None, lambda net, h: torch.einsum("nchw,oc->nohw", h, net.kernel), "kernel"),
    "normalised": (None, lambda net, h: (F.normalize(net.kernel) @ h.flatten(2)).view(h.shape), "kernel"),
    "tokens": (None, lambda net, h: (h.permute(0, 2, 3, 1).reshape(-1, 5) @ net.kernel).view(h.shape), "kernel"),
    "aten": (lambda: nn.Conv2d(5, 5, 1), lambda net, h: torch.ops.aten.conv2d(h, net.part.weight), "part"),
    "convolution": (
        lambda: nn.Conv2d(5, 5, 1),
        lambda net, h: torch.convolution(h, net.part.weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1),
        "part",
    ),
    "transposed": (lambda: nn.ConvTranspose2d(5, 5, 3), lambda net, h: net.part(h), "part"),
    "TorchScript": (lambda: torch.jit.script(nn.Conv2d(5, 5, 1)), lambda net, h: net.part(h), "part"),
    "dynamic": (None, one_kernel_for_each_sample, "forward"),
}
HEADS = {
    "transposed weight": (None, lambda net, g: g @ net.fc.weight.T, "fc"),
    "einsum": (None, lambda net, g: torch.einsum("nc,kc->nk", g, net.fc.weight), "fc"),
    "normalised": (None, lambda net, g: F.normalize(g) @ F.normalize(net.fc.weight).T, "fc"),
    "distances": (None, lambda net, g: torch.cdist(g, net.fc.weight), "fc"),
    "cosines": (None, lambda net, g: F.cosine_similarity(g[:, None], net.fc.weight, dim=2), "fc"),
    "repeated": (None, lambda net, g: F.linear(g, net.fc.weight.repeat(2, 1)), "forward"),
    "frozen and trained": (
        lambda: nn.Linear(6, 4).requires_grad_(False),
        lambda net, g: g @ (net.part.weight + net.fc.weight).T,
        "fc",
    ),
    "addmm": (Dense, lambda net, g: net.part(g), "part"),
    "TorchScript": (lambda: torch.jit.script(nn.Linear(6, 4)), lambda net, g: net.part(g), "part"),
}


@guards("layers.tracing:_Tracing._follow", returns=None)
@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning", "ignore:.*jit:FutureWarning")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_by_another_function_is_named(kind):
    part, apply, name = CONVOLUTIONS[kind]
    net = Applies(part, apply)
    refused(lf.LayerSelectionError, f"'last': '{name}' runs after 'conv'.*cannot be measured", net)
    report = lf.measure_flatness(net, [(X, Y)], layers="all")
    assert (list(report.layers), list(report.left_out)) == (["conv", "hidden", "fc"], [name])
    assert list(lf.measure_flatness(net, [(X, Y)], layers="classifier").layers) == ["fc"]


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning", "ignore:.*jit:FutureWarning")
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_by_another_function_is_named(kind):
    part, head, name = HEADS[kind]
    net = Applies(part, head=head)
    refused(lf.LayerSelectionError, f"'classifier': '{name}' runs after 'hidden'", net, layers="classifier")
    assert list(lf.measure_flatness(net, [(X, Y)], layers="all").left_out) == [name]
    assert list(lf.measure_flatness(net, [(X, Y)]).layers) == ["conv"]


USES = {
    "position embedding": (None, lambda net, h: h + net.kernel.T.flatten()[: h.shape[3]]),
    "product of activations": (None, lambda net, h: h @ h.mT),
    "product of kernels": (None, lambda net, h: h + (net.kernel @ net.kernel.T).sum()),
    "one query": (
        lambda: nn.Linear(5, 1),
        lambda net, h: h * (net.part.weight[None] @ h.flatten(2)).softmax(-1).view(len(h), 1, 4, 4),
    ),
    "expanded query": (
        lambda: nn.Linear(5, 1),
        lambda net, h: (
            h * (net.part.weight.expand(len(h), 1, 5) @ h.flatten(2)).softmax(-1).view(len(h), 1, *h.shape[2:])
        ),
    ),
    "frozen filter": (
        lambda: nn.Conv2d(1, 1, 2).requires_grad_(False),
        lambda net, h: F.conv2d(h, net.part.weight.expand(5, 1, 2, 2), groups=5),
    ),
    "filter like a weight": (None, lambda net, h: F.conv2d(h, net.kernel.new_ones(5, 1, 2, 2) / 4, groups=5)),
    "attention": (
        lambda: nn.MultiheadAttention(5, 1, batch_first=True),
        lambda net, h: net.part(*[h.flatten(2).mT] * 3)[0].mT.reshape(h.shape),
    ),
}


@pytest.mark.parametrize("kind", USES)
def test_other_uses_of_parameters_are_no_layers(kind):
    net = Applies(*USES[kind])
    assert list(lf.measure_flatness(net, [(X, Y)]).layers) == ["conv"]
    assert list(lf.measure_flatness(net, [(X, Y)], layers="classifier").layers) == ["fc"]


def test_a_deformable_convolution_is_named():
    ops = pytest.importorskip("torchvision.ops")
    net = Applies(lambda: ops.DeformConv2d(5, 5, 3), lambda net, h: net.part(h, h.new_zeros(len(h), 18, 2, 2)))
    refused(lf.LayerSelectionError, "'part' runs after 'conv'.*'weight' is applied by deform_conv2d, which", net)
    assert list(lf.measure_flatness(net, [(X, Y)], layers="all").left_out) == ["part"]


@pytest.mark.parametrize("trains", [True, False])
def test_a_frozen_projection_is_no_layer_unless_all_is_frozen(trains):
    net = Applies(*CONVOLUTIONS["unfold"][:2]).requires_grad_(trains)
    net.kernel.requires_grad_(False)
    if trains:
        assert list(lf.measure_flatness(net, [(X, Y)]).layers) == ["conv"]
        assert list(lf.measure_flatness(net, [(X, Y)], layers="all").layers) == ["conv", "hidden", "fc"]
    else:
        refused(lf.LayerSelectionError, "'last': 'kernel' runs after 'conv'", net)
