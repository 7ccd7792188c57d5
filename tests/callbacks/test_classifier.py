"""Which layer of a training step is the classifier, and what is refused."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F

import lightning_flatness as lf
from lightning_flatness.functional import flatness_penalty
from tests.callbacks.lightning_modules import CLASSES, Classifier, Net, dataset
from tests.callbacks.penalised import WEIGHTS, ByHand, Step, checkpointed, fitted, weights_of
from tests.guarding import guards


def mixed(module, x, y):
    """Mixup: the targets are mixed, and the loss still curves as cross-entropy does."""
    logits = module.net(0.7 * x + 0.3 * x.flip(0))
    return 0.7 * F.cross_entropy(logits, y) + 0.3 * F.cross_entropy(logits, y.flip(0))


def with_a_hidden_layer(module, x, y):
    hidden = F.relu(module.hidden(x.flatten(1)))
    return F.cross_entropy(module.net(hidden.view_as(x)), y)


def with_a_teacher(module, x, y):
    with torch.no_grad():
        teacher = module.net(x).softmax(1)
    return F.cross_entropy(module.net(x), 0.5 * teacher + 0.5 * F.one_hot(y, CLASSES))


def with_another_head(module, x, y):
    """Another linear layer runs last, with a loss of another kind."""
    features = module.features(x)
    return F.cross_entropy(module.net.fc(features), y) + module.other(features).square().mean()


STEPS = {
    "plain": lambda module, x, y: F.cross_entropy(module.net(x), y),
    "log-probabilities": lambda module, x, y: F.nll_loss(module.net(x).log_softmax(1), y),
    "a dictionary": lambda module, x, y: {"loss": F.cross_entropy(module.net(x), y), "more": 1},
    "smoothing": lambda module, x, y: F.cross_entropy(module.net(x), y, label_smoothing=0.3),
    "linear in the logits": lambda module, x, y: F.cross_entropy(module.net(x), y) + module.net.fc.weight.sum(),
    "a keyword": lambda module, x, y: F.cross_entropy(module.net.fc(input=module.features(x)), y),
    "mixed": mixed,
    "a hidden layer": with_a_hidden_layer,
    "a teacher": with_a_teacher,
    "another head": with_another_head,
    "checkpointed features": checkpointed,
}


class Finds(Callback):
    """Looks at what the penalty has found, before and after it."""

    def __init__(self, penalty):
        self.penalty, self.found = penalty, set()

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        self.found.add(self.penalty._classifier[0])


@pytest.mark.parametrize("step", STEPS)
def test_the_classifier_is_found(tmp_path, step):
    penalty = lf.FlatnessPenalty(0.3)
    finds = Finds(penalty)
    fitted(tmp_path, Step(STEPS[step]), penalty, finds, max_epochs=1)
    assert finds.found == {"net.fc"}


def is_compiled():
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(1))
    return len(graphs) == 1


@guards("callbacks/penalty.py", "if cls._stance is None:", "if True:")
def test_one_of_several_heads_is_named(tmp_path):
    def two_heads(module, x, y):
        features = module.features(x)
        return F.cross_entropy(module.net.fc(features), y) + F.cross_entropy(module.other(features), y)

    with pytest.raises(lf.FlatnessError, match=r"several layers, 'net.fc' and 'other'. Name one .* layers='other'"):
        fitted(tmp_path, Step(two_heads), lf.FlatnessPenalty())
    both = [
        lf.FlatnessPenalty(0.3, layers="net.fc", prefix="first"),
        lf.FlatnessPenalty(0.2, layers="other", prefix="second", check_loss=False),
    ]

    def by_hand(module, x, y):
        features = module.features(x)
        one, two = module.net.fc(features), module.other(features)
        first = 0.3 * flatness_penalty(features, one, module.net.fc.weight)
        second = 0.2 * flatness_penalty(features, two, module.other.weight)
        return F.cross_entropy(one, y) + F.cross_entropy(two, y) + first + second

    torch.manual_seed(1)
    expected = Step(by_hand)
    actual = Step(two_heads)
    actual.load_state_dict(copy.deepcopy(expected.state_dict()))
    fitted(tmp_path, expected, max_epochs=1)
    trainer = fitted(tmp_path, actual, *both, max_epochs=1)
    assert {"first/loss", "second/loss"} <= set(trainer.callback_metrics)
    assert is_compiled()  # two callbacks have run their first step uncompiled, and what compiles now is compiled
    for name, weight in weights_of(actual).items():
        torch.testing.assert_close(weight, weights_of(expected)[name], rtol=1e-5, atol=1e-6)


@guards("callbacks/penalty.py", "version == loss._version", "False", ids="1.0")
@pytest.mark.parametrize("strength", [1.0, 1e4])
def test_one_classifier_has_several_penalties(tmp_path, strength):
    """Of the loss that is checked, nothing is lost to rounding when earlier penalties are large."""

    def plain(module, x, y):
        return F.cross_entropy(module.net.fc(module.features(x)), y)

    def by_hand(module, x, y):
        features = module.features(x)
        logits = module.net.fc(features)
        first = strength * flatness_penalty(features, logits, module.net.fc.weight)
        second = flatness_penalty(features, logits, module.net.fc.weight, measure="layerwise_flatness")
        return F.cross_entropy(logits, y) + first + 0.3 * second

    torch.manual_seed(1)
    expected = Step(by_hand)
    actual = Step(plain)
    actual.load_state_dict(copy.deepcopy(expected.state_dict()))
    penalties = [
        lf.FlatnessPenalty(strength),
        lf.FlatnessPenalty(0, normalize=True, prefix="log"),
        lf.FlatnessPenalty(0.3, measure="layerwise_flatness", prefix="layer-wise"),
        lf.FlatnessPenalty(0, measure="layerwise_flatness", prefix="also"),
    ]
    options = {"max_epochs": 1, "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    fitted(tmp_path, expected, **options)
    fitted(tmp_path, actual, *penalties, **options)
    for name, weight in weights_of(actual).items():
        torch.testing.assert_close(weight, weights_of(expected)[name], rtol=1e-4, atol=1e-5)
    assert all(penalty._unpenalized is None for penalty in penalties)


def test_a_term_that_another_callback_adds_between_two_penalties_is_refused(tmp_path):
    class Adds(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            loss.add_(pl_module.logits.square().sum())

    def step(module, x, y):
        module.logits = module.net(x)
        return F.cross_entropy(module.logits, y)

    penalties = [lf.FlatnessPenalty(prefix="first"), Adds(), lf.FlatnessPenalty(prefix="second")]
    with pytest.raises(lf.FlatnessError, match="not mean cross-entropy"):
        fitted(tmp_path, Step(step), *penalties)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.normalize(self.weight))


def with_classifier(classifier):
    net = Net()
    net.fc = classifier
    return net


def twice(module, x, y):
    return F.cross_entropy(module.net(x), y) + F.cross_entropy(module.net(x.flip(0)), y)


def changed_in_place(module, x, y):
    return F.cross_entropy(module.net(x).div_(2), y)


def with_another_term(module, x, y):
    logits = module.net(x)
    return F.cross_entropy(logits, y) + 0.1 * logits.square().mean()


def of_class_weights(module, x, y):
    return F.cross_entropy(module.net(x), y, torch.tensor(WEIGHTS))


def infinite():
    layer = nn.Linear(5, CLASSES)
    layer.bias.data[0] = torch.inf
    return layer


# name: training step, network, options of the callback, message
REFUSED = {
    "squared error": (
        lambda module, x, y: F.mse_loss(module.net(x), F.one_hot(y, CLASSES).float()),
        None,
        {},
        "'net.fc': the loss is not mean cross-entropy of its output: their second derivatives differ by",
    ),
    "temperature": (lambda module, x, y: F.cross_entropy(module.net(x) / 2, y), None, {}, "check_loss=False penalises"),
    "in place": (changed_in_place, None, {}, "'net.fc': it does not return weight @ input"),
    "sum": (
        lambda module, x, y: F.cross_entropy(module.net(x), y, reduction="sum"),
        None,
        {},
        "not mean cross-entropy",
    ),
    "other term": (with_another_term, None, {}, "not mean cross-entropy"),
    "class weights": (of_class_weights, None, {}, "If your cross-entropy has options, give them to the callback"),
    "other class weights": (of_class_weights, None, {"class_weight": [1.0, 2.0, 2.0]}, "not mean cross-entropy"),
    "number of weights": (of_class_weights, None, {"class_weight": [1.0, 2.0]}, "class_weight has shape .* 3 classes"),
    "targets": (
        of_class_weights,
        None,
        {"class_weight": WEIGHTS, "batch_fn": lambda batch: (batch[0], None)},
        "depends on the targets. Give targets=. Give batch_fn=",
    ),
    "batch_fn": (None, None, {"batch_fn": lambda batch: batch["x"]}, "FlatnessPenalty: batch_fn= fails with TypeError"),
    "cosine": (None, lambda: with_classifier(Cosine(5, CLASSES)), {}, "does not return weight @ input"),
    "a function": (
        lambda module, x, y: F.cross_entropy(F.linear(module.features(x), module.net.fc.weight), y),
        None,
        {},
        r"must call an nn.Linear .*functional.flatness_penalty\(features, logits, weight\)",
    ),
    "twice": (twice, None, {}, "calls 'net.fc' 2 times"),
    "twice, not checked": (twice, None, {"check_loss": False}, "calls 'net.fc' 2 times"),
    "layers": (None, None, {"layers": "net.head"}, "layers='net.head' names no linear layer.*'net.fc'"),
    "NaN loss": (
        lambda module, x, y: F.cross_entropy(module.net(x), y) * torch.nan,
        None,
        {},
        "because the loss is nan",
    ),
    "NaN data": (
        lambda module, x, y: F.cross_entropy(module.net(x * torch.nan), y),
        None,
        {},
        "because the input of 'net.conv1' is not finite in the first training step",
    ),
    "infinite weight": (None, lambda: with_classifier(infinite()), {}, "the output of 'net.fc' is not finite"),
    "batches of one": (None, None, {"normalize": True}, "the batch has one sample. Use larger batches"),
}


@guards("layers.certificates.loss:why_not_cross_entropy", returns="", ids="squared error")
@guards("callbacks.classifier:_why_not_linear", returns="", ids="in place")
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_the_first_step(tmp_path, case):
    step, network, options, message = REFUSED[case]
    module = Step(step or STEPS["plain"], network and network())
    before = weights_of(module)
    data = torch.utils.data.DataLoader(dataset(8), 1 if case == "batches of one" else 8)
    with pytest.raises(lf.FlatnessError, match=message):
        fitted(tmp_path, module, lf.FlatnessPenalty(**options), data=[data], max_epochs=1, limit_val_batches=0)
    different = [name for name, value in weights_of(module).items() if not torch.equal(value, before[name])]
    assert all("norm" in name for name in different)  # only the statistics of BatchNorm: no step was taken


def test_a_loss_of_another_kind_can_be_taken(tmp_path):
    penalty = lf.FlatnessPenalty(0.3, check_loss=False)
    finds = Finds(penalty)
    fitted(tmp_path, Step(REFUSED["squared error"][0]), penalty, finds, max_epochs=1)
    assert finds.found == {"net.fc"}


def test_a_later_step_without_the_classifier_is_refused(tmp_path):
    def step(module, x, y):
        module.training_steps += 1
        return F.cross_entropy((module.other if module.training_steps == 3 else module.net.fc)(module.features(x)), y)

    with pytest.raises(lf.FlatnessError, match="did not see a call of 'net.fc' .* If some steps do not use"):
        fitted(tmp_path, Step(step), lf.FlatnessPenalty())


class Manual(Classifier):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@guards("callbacks/penalty.py", "if not pl_module.automatic_optimization:", "if False:")
def test_manual_optimization_is_refused_before_it_starts(tmp_path):
    module = Manual()
    with pytest.raises(lf.FlatnessError, match=r"Manual optimizes manually.*functional.flatness_penalty\("):
        fitted(tmp_path, module, lf.FlatnessPenalty())
    assert module.training_steps == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1}, "strength=-1 must be a finite number, at least 0. To avoid flat minima"),
        ({"strength": float("inf")}, "strength=inf"),
        ({"strength": True}, "strength=True"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be a whole number"),
        ({"measure": "hessian_trace"}, "measure='hessian_trace' is not known"),
        ({"layers": ["fc"]}, "must be 'classifier' or the name of one layer"),
        ({"label_smoothing": 2.0}, "label_smoothing=2.0 must be a number between 0 and 1"),
        ({"class_weight": [-1.0]}, "class_weight must contain one number for every class"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(lf.FlatnessError, match=message):
        lf.FlatnessPenalty(**options)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "often", torch.ones(2)], ids=str)
def test_a_schedule_without_a_finite_number_is_refused(value):
    with pytest.raises(lf.FlatnessError, match=r"^FlatnessPenalty: schedule\(3\)=.* must be a finite number"):
        lf.FlatnessPenalty(schedule=lambda step: value).strength_at(3)


def test_targets_that_a_function_finds(tmp_path):
    class OfThree(ByHand):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[1], batch[2]), batch_idx)

        def validation_step(self, batch, batch_idx):
            pass

    class Plain(OfThree):
        def training_step(self, batch, batch_idx):
            return of_class_weights(self, batch[1], batch[2])

    x, y = dataset(32).tensors
    data = [torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(32), x, y), 8)] * 2
    expected, actual = OfThree(class_weight=WEIGHTS), Plain()
    fitted(tmp_path, expected, data=data)
    penalty = lf.FlatnessPenalty(0.3, class_weight=WEIGHTS, batch_fn=lambda batch: (None, batch[2]))
    fitted(tmp_path, actual, penalty, data=data)
    torch.testing.assert_close(weights_of(actual), weights_of(expected), rtol=0.0, atol=0.0)
