"""FlatnessPenalty in a Trainer: the weights are those of a training step with the penalty, to the last bit."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.nn.utils.parametrizations import spectral_norm
from torch.testing import assert_close
from torch.utils.data import DataLoader

import lightning_flatness as lf
from tests.callbacks.command_lines import trainer_of
from tests.callbacks.lightning_modules import Classifier, Net, dataset, loaders
from tests.callbacks.penalised import (
    WEIGHTS,
    ByHand,
    ConvolutionAtTheEnd,
    WithLoss,
    fitted,
    weights_of,
)
from tests.guarding import guards


def frozen(part):
    net = Net()
    net.get_submodule(part).requires_grad_(False)
    return net


def with_ignored():
    data = dataset(32)
    data.tensors[1][::5] = -100
    return DataLoader(data, 8), loaders()[1]


def in_half(scale):
    return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))}


# name: network, options of the penalty, options of the loss, data, options of the Trainer
RUNS = {
    "plain": (Net, {}, {}, loaders, {}),
    "accumulation of 2": (Net, {}, {}, loaders, {"accumulate_grad_batches": 2}),
    "accumulation of 3": (Net, {}, {}, loaders, {"accumulate_grad_batches": 3}),
    "clipping": (Net, {}, {}, loaders, {"gradient_clip_val": 0.1}),
    "bf16-mixed": (Net, {}, {}, loaders, {"precision": "bf16-mixed"}),
    "bf16-true": (Net, {}, {}, loaders, {"precision": "bf16-true"}),
    "frozen head": (lambda: frozen("fc"), {}, {}, loaders, {}),
    "frozen convolutions": (lambda: frozen("conv2"), {}, {}, loaders, {}),
    "smoothing": (Net, {}, {"label_smoothing": 0.2}, loaders, {}),
    "weights": (Net, {}, {"class_weight": WEIGHTS, "label_smoothing": 0.2}, loaders, {}),
    "ignored": (Net, {}, {}, with_ignored, {}),
    "normalized": (Net, {"normalize": True}, {}, loaders, {}),
    "layer-wise": (Net, {"measure": "layerwise_flatness"}, {}, loaders, {}),
    "convolution": (ConvolutionAtTheEnd, {}, {}, loaders, {}),
}


@guards("callbacks/penalty.py", "added / trainer.accumulate_grad_batches", "added", ids="accumulation of 2")
@pytest.mark.parametrize("run", RUNS)
def test_weights_are_those_of_a_training_step_with_the_penalty(tmp_path, run):
    network, options, of_loss, data, trainer = RUNS[run]
    expected, actual, without = ByHand(network(), **options, **of_loss), *(WithLoss(network(), **of_loss) for _ in "ab")
    fitted(tmp_path, expected, data=data(), **trainer)
    given = of_loss if "class_weight" in of_loss else {}
    callback = lf.FlatnessPenalty(0.3, **options, **given)
    fitted(tmp_path, actual, callback, data=data(), **trainer)
    assert_close(weights_of(actual), weights_of(expected), rtol=0.0, atol=0.0)
    assert actual.training_steps == expected.training_steps == 8
    fitted(tmp_path, without, data=data(), **trainer)
    assert any(not torch.equal(one, weights_of(without)[name]) for name, one in weights_of(actual).items())


@guards("callbacks/penalty.py", "part if scaler is None else scaler.scale(part)", "part")
def test_the_penalty_is_scaled_like_the_loss_in_float16(tmp_path):
    expected, actual = ByHand(), Classifier()
    fitted(tmp_path, expected, **in_half(1024.0))
    fitted(tmp_path, actual, lf.FlatnessPenalty(0.3), **in_half(1024.0))
    assert_close(weights_of(actual), weights_of(expected), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        ({"warmup_steps": 5}, lambda step: 0.3 * min(1.0, step / 5)),
        ({"schedule": lambda step: 0.5**step}, lambda step: 0.3 * 0.5**step),
        ({"warmup_steps": 2, "schedule": lambda step: 1 + step}, lambda step: 0.3 * (1 + step) * min(1.0, step / 2)),
        ({"maximize": True}, -0.3),
    ],
    ids=["warm-up", "schedule", "both", "maximize"],
)
def test_the_strength_follows_the_optimizer_steps(tmp_path, options, by_hand):
    expected, actual = ByHand(strength=by_hand), Classifier()
    fitted(tmp_path, expected, accumulate_grad_batches=2)
    fitted(tmp_path, actual, lf.FlatnessPenalty(0.3, **options), accumulate_grad_batches=2)
    assert_close(weights_of(actual), weights_of(expected), rtol=0.0, atol=0.0)


def test_an_optimizer_that_runs_the_step_several_times(tmp_path):
    def lbfgs(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    expected, actual = (
        type(kind.__name__, (kind,), {"configure_optimizers": lbfgs})() for kind in (ByHand, Classifier)
    )
    fitted(tmp_path, expected, max_epochs=1)
    fitted(tmp_path, actual, lf.FlatnessPenalty(0.3), max_epochs=1)
    assert actual.training_steps == expected.training_steps > 8
    assert_close(weights_of(actual), weights_of(expected), rtol=0.0, atol=0.0)


COMPILED = {
    "torch.compile(net)": lambda module: setattr(module, "net", torch.compile(module.net, backend="aot_eager")),
    "net.compile()": lambda module: module.net.compile(backend="aot_eager"),
    "torch.compile(module)": lambda module: torch.compile(module, backend="aot_eager"),
}


@guards(
    "callbacks/penalty.py",
    'cls._stance = torch.compiler.set_stance("force_eager")',
    "import contextlib; self._eager = contextlib.nullcontext()",
)
@pytest.mark.slow
@pytest.mark.parametrize("form", COMPILED)
def test_compiled_networks_train_like_those_with_the_penalty_in_the_step(tmp_path, form):
    torch.compiler.reset()
    expected, actual = ByHand(), Classifier()
    fitted(tmp_path, expected)
    callback, compiled = lf.FlatnessPenalty(0.3), COMPILED[form](actual)
    fitted(tmp_path, actual if compiled is None else compiled, callback)
    assert_close(weights_of(actual), weights_of(expected), rtol=1e-6, atol=1e-6)
    fitted(tmp_path, actual, callback)  # a second fit goes on, with other hooks


@pytest.mark.slow
def test_code_that_was_compiled_without_the_callback_is_refused(tmp_path):
    torch.compiler.reset()
    module = Classifier()
    module.net.compile(backend="eager")
    fitted(tmp_path, module)
    with pytest.raises(
        lf.FlatnessError, match=r"did not see a call of 'net.fc' .* call torch.compiler.reset\(\) before the fit"
    ):
        fitted(tmp_path, module, lf.FlatnessPenalty())
    assert not hooks_of(module)
    torch.compiler.reset()
    fitted(tmp_path, module, lf.FlatnessPenalty())


# ------------------------------------------------------------------------------------------------------ what is logged


def test_what_is_logged_is_what_is_added(tmp_path):
    module = ByHand(strength=0.0)
    seen = []

    class Sees(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append(float(loss.detach()))

    options = {"max_epochs": 1, "accumulate_grad_batches": 2}
    trainer = fitted(tmp_path, module, Sees(), lf.FlatnessPenalty(0.3), Sees(), **options)
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    added = [2 * (after - before) for before, after in zip(seen[::2], seen[1::2], strict=True)]
    assert logged["penalty/loss"] == pytest.approx(sum(added) / 4, rel=1e-4)
    assert logged["penalty/relative_flatness"] == pytest.approx(sum(added) / 4 / 0.3, rel=1e-4)
    assert logged["penalty/strength"] == pytest.approx(0.3)


@guards(
    "callbacks/classifier.py",
    "self.computed[name] if name in self.computed else getattr",
    "getattr",
    ids="spectral norm",
)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "spectral norm"])
def test_strength_zero_only_logs(tmp_path, normed):
    plain, watched = Classifier(), Classifier()
    for module in (plain, watched) if normed else ():
        torch.manual_seed(0)
        spectral_norm(module.net.fc)  # writes to buffers whenever it computes the weight
    fitted(tmp_path, plain)
    trainer = fitted(tmp_path, watched, lf.FlatnessPenalty(0, measure="layerwise_flatness", prefix="watched"))
    assert_close(weights_of(watched), weights_of(plain), rtol=0.0, atol=0.0)
    assert float(trainer.callback_metrics["watched/layerwise_flatness"]) > 0
    assert float(trainer.callback_metrics["watched/loss"]) == 0.0


@pytest.mark.slow
def test_the_penalty_lowers_what_it_penalises(tmp_path):
    def flatness(*callbacks):
        module = Classifier()
        fitted(tmp_path, module, *callbacks, max_epochs=12)
        return lf.measure_flatness(module.net, [dataset(32).tensors], layers="classifier").relative_flatness

    without = flatness()
    assert flatness(lf.FlatnessPenalty(1.0)) < without / 2
    assert flatness(lf.FlatnessPenalty(0.1, maximize=True)) > 1.5 * without


def test_from_the_command_line(tmp_path):
    given = {"strength": 0.2, "warmup_steps": 3, "schedule": "math.exp", "class_weight": [1.0, 1.0, 2.0]}
    (callback,) = [
        callback
        for callback in trainer_of(tmp_path, {"FlatnessPenalty": given}, run=False).callbacks
        if isinstance(callback, lf.FlatnessPenalty)
    ]
    assert callback.strength_at(1) == pytest.approx(0.2 * 2.718281828 / 3)


# ------------------------------------------------------------------------------------------------------------- no trace


def hooks_of(module):
    return [name for name, part in module.named_modules() if part._forward_hooks or part._forward_pre_hooks]


def stance():
    return torch._dynamo.eval_frame._stance.stance


class FailsIn(Classifier):
    def __init__(self, step, error):
        super().__init__()
        self.step, self.error = step, error

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.training_steps == self.step:
            raise self.error
        return loss


@guards("callbacks.penalty:FlatnessPenalty.on_exception", returns=None)
@pytest.mark.parametrize("step", [1, 2, 6])
@pytest.mark.parametrize("error", [RuntimeError("the user's"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_nothing_is_left_when_training_raises(tmp_path, step, error):
    module, callback, before = FailsIn(step, error), lf.FlatnessPenalty(), stance()
    with pytest.raises((RuntimeError, SystemExit), match=None):
        fitted(tmp_path, module, callback)
    assert not hooks_of(module)
    assert not callback._recorder.calls
    assert stance() == before


@guards("callbacks.penalty:FlatnessPenalty.on_train_end", returns=None)
def test_nothing_is_left_after_the_fit_and_one_hook_within_it(tmp_path):
    hooks, kept, before = [], [], stance()

    class Sees(Callback):
        def on_train_batch_end(self, trainer, pl_module, *arguments):
            hooks.append(hooks_of(pl_module))
            kept.append(len(callback._recorder.calls))

        def on_validation_batch_end(self, trainer, pl_module, *arguments):
            kept.append(len(callback._recorder.calls))
            assert stance() == before

        def on_train_end(self, trainer, pl_module):
            hooks.append(hooks_of(pl_module))

    callback, module = lf.FlatnessPenalty(), Classifier()
    fitted(tmp_path, module, callback, Sees())
    assert hooks == [["net.fc"]] * 8 + [[]]
    assert not any(kept)
    assert stance() == before


@guards("callbacks.classifier:_Hook.__reduce__", body="return super().__reduce__()")
def test_copies_of_the_module_made_in_the_fit_do_not_hold_the_callback(tmp_path):
    copies = []

    class Copies(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            copies.append(pickle.loads(pickle.dumps(copy.deepcopy(pl_module.net))))

    fitted(tmp_path, Classifier(), Copies(), lf.FlatnessPenalty())
    x = dataset(4).tensors[0]
    assert len(copies) == 8
    assert copies[-1](x).shape == (4, 3)
    (hook,) = copies[-1].fc._forward_hooks.values()
    assert hook.recorder is None


def test_a_resumed_run_is_that_without_a_break(tmp_path):
    def penalty():
        return lf.FlatnessPenalty(0.3, warmup_steps=6)

    whole, first, second = (Classifier() for _ in range(3))
    data = DataLoader(dataset(32), 8), loaders()[1]
    for module in (whole, first, second):
        module.net.dropout.p = 0.0
    fitted(tmp_path, whole, penalty(), data=data)
    trainer = fitted(tmp_path, first, penalty(), data=data, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert not [key for key in torch.load(tmp_path / "half.ckpt")["callbacks"] if "Penalty" in key]
    fitted(tmp_path, second, penalty(), data=data, fit={"ckpt_path": tmp_path / "half.ckpt"})
    assert_close(weights_of(second), weights_of(whole), rtol=0.0, atol=0.0)
    fitted(tmp_path, Classifier(), data=data, fit={"ckpt_path": tmp_path / "half.ckpt"})  # without it


def test_a_callback_is_used_in_a_second_fit(tmp_path):
    callback = lf.FlatnessPenalty(0.3)
    fitted(tmp_path, Classifier(), callback)
    expected, actual = ByHand(), Classifier()
    fitted(tmp_path, expected)
    fitted(tmp_path, actual, callback)
    assert_close(weights_of(actual), weights_of(expected), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("batch_fn", "says"),
    [
        (lambda batch: batch[1], "returned a Tensor; it must return .inputs, targets., with None"),
        (lambda batch: (batch[0], batch[1].tolist()), "returned targets of type list; they must be a tensor"),
    ],
    ids=["targets alone", "list"],
)
def test_what_batch_fn_returns_is_checked(tmp_path, batch_fn, says):
    with pytest.raises(lf.BatchError, match=f"^FlatnessPenalty: batch_fn=... {says}[^.]*[.]$"):
        fitted(tmp_path, WithLoss(), lf.FlatnessPenalty(0.3, batch_fn=batch_fn))
