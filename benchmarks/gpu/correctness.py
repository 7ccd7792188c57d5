"""Compare numbers on a GPU with float64 on the CPU, and training with the callback with training without it.

Every check is a function that yields rows: dictionaries with a description ``what``, and numbers by name. If a case
fails, its row has the error instead of numbers. The arguments of a check are the device, whether sizes are small, and
the time at which it must stop.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_flatness as lf
from benchmarks import networks
from benchmarks.training import Classifier, loader_of, trainer_of

Row = dict[str, Any]
FAMILIES = (
    "resnet18",
    "resnext50_32x4d",
    "densenet121",
    "mobilenet_v2",
    "regnet_y_400mf",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "googlenet",
    "squeezenet1_1",
    "efficientnet_b0",
)


def tried(what: str, case: Callable[[], Row]) -> Row:
    """Run a case and return its row, or a row with the error if the case fails."""
    try:
        return {"what": what, **case()}
    except Exception as error:
        return {"what": what, "failed": f"{type(error).__name__}: {error}"[:600]}


def randomised(net: nn.Module, images: Tensor) -> nn.Module:
    """Set the running statistics of BatchNorm to those of ``images``, and scale logits to differ by about one."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    with torch.no_grad():
        net.train()(images)
        last = [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
        last.weight.div_(net.eval()(images).std(1).mean())
    return net


def torchvision_net(name: str, images: Tensor) -> nn.Module:
    from torchvision.models import get_model

    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return randomised(get_model(name, weights=None, num_classes=10, **options), images)


def compared(found: lf.FlatnessReport, expected: lf.FlatnessReport) -> Row:
    """Return the largest relative errors over all layers, and whether the labels ``exact`` are the same."""
    errors: dict[str, float] = {"trace": 0.0, "relative flatness": 0.0, "block traces": 0.0}
    pairs_of_layers = list(zip(found.layers.values(), expected.layers.values(), strict=True))
    for layer, reference in pairs_of_layers:
        pairs = {
            "trace": (layer.hessian_trace, reference.hessian_trace),
            "relative flatness": (layer.relative_flatness, reference.relative_flatness),
        }
        for key, (a, b) in pairs.items():
            errors[key] = max(errors[key], abs(a - b) / max(abs(b), 1e-300))
        a, b = layer.block_traces.cpu(), reference.block_traces.cpu()
        errors["block traces"] = max(errors["block traces"], float((a - b).abs().max() / b.abs().max()))
    same = all(layer.exact == reference.exact for layer, reference in pairs_of_layers)
    return {**errors, "same labels": same}


def on(net: nn.Module, batch: tuple[Tensor, Tensor], device: str, dtype: torch.dtype, **options: Any) -> Any:
    """Return ``measure_flatness`` of a copy of the network on this device and in this precision."""
    x, y = batch
    there = copy.deepcopy(net).to(device, dtype)
    return lf.measure_flatness(there, [(x.to(device, dtype), y.to(device))], **options)


def families(device: str, quick: bool, until: float) -> Iterator[Row]:
    batch = networks.images(4, 64)
    for name in FAMILIES[:2] if quick else FAMILIES:
        net = torchvision_net(name, batch[0])
        expected = on(net, batch, "cpu", torch.float64)
        for dtype in (torch.float64, torch.float32):
            what = f"{name}, last convolution, {str(dtype)[6:]}"
            yield tried(what, lambda: compared(on(net, batch, device, dtype), expected))  # noqa: B023


def all_layers(device: str, quick: bool, until: float) -> Iterator[Row]:
    torch.manual_seed(0)
    batch = networks.images(4 if quick else 16)
    net = randomised(networks.resnet20(), batch[0])
    expected = on(net, batch, "cpu", torch.float64, layers="all")
    for dtype in (torch.float64, torch.float32):
        what = f"ResNet-20, all {len(expected.layers)} layers, {str(dtype)[6:]}"
        yield tried(what, lambda: compared(on(net, batch, device, dtype, layers="all"), expected))  # noqa: B023


def tf32(device: str, quick: bool, until: float) -> Iterator[Row]:
    torch.manual_seed(0)
    batch = networks.images(8 if quick else 64)
    net = randomised(networks.resnet18(), batch[0])
    for layers in ("last", "classifier"):
        expected = on(net, batch, "cpu", torch.float64, layers=layers)
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
            what = f"ResNet-18, layers='{layers}', float32, TF32 {'allowed' if allowed else 'off'} by the user"
            row = tried(what, lambda: compared(on(net, batch, device, torch.float32, layers=layers), expected))  # noqa: B023
            kept = torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
            yield {**row, "flags as they were": kept}


def default_device(device: str, quick: bool, until: float) -> Iterator[Row]:
    torch.manual_seed(0)
    batch = networks.images(8, 16)
    net = randomised(networks.resnet20(depth=8), batch[0])
    expected = on(net, batch, "cpu", torch.float64)
    torch.set_default_device(device)
    net, (x, y) = net.to(device), (batch[0].to(device), batch[1].to(device))
    data = TensorDataset(batch[0].cpu(), batch[1].cpu())

    def fit(callback: L.Callback) -> Row:
        generator = torch.Generator(device)  # torch's random sampler needs a generator on the default device
        loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator)
        validation = DataLoader(data, batch_size=4)
        trainer_of(device, [callback], max_epochs=1).fit(Classifier(copy.deepcopy(net)), loader, validation)
        return {"ran": True}

    yield tried("measure_flatness", lambda: compared(lf.measure_flatness(net, [(x, y)]), expected))
    yield tried("measure_flatness, all layers", lambda: {"ran": bool(lf.measure_flatness(net, [(x, y)], layers="all"))})
    residual = {"layers": "all", "residual": "hutchinson"}
    yield tried("measure_flatness, residual", lambda: {"ran": bool(lf.measure_flatness(net, [(x, y)], **residual))})
    yield tried("measure_lambda_max", lambda: {"ran": bool(lf.measure_lambda_max(net, [(x, y)]))})
    yield tried(
        "hessian_spectrum",
        lambda: {"ran": bool(lf.hessian_spectrum(net, [(x, y)], num_steps=4, num_probes=1, top_k=1))},
    )
    yield tried("loss_landscape", lambda: {"ran": bool(lf.loss_landscape(net, [(x, y)], steps=3))})
    yield tried("FlatnessCallback", lambda: fit(lf.FlatnessCallback(summary=False)))
    yield tried("FlatnessCallback, train", lambda: fit(lf.FlatnessCallback(summary=False, data="train", max_samples=5)))
    yield tried("SpectrumCallback", lambda: fit(lf.SpectrumCallback(num_steps=4, num_probes=1, top_k=1, max_samples=8)))
    yield tried("LandscapeCallback", lambda: fit(lf.LandscapeCallback(steps=3, max_samples=8)))


def live(device: str, quick: bool, until: float) -> Iterator[Row]:
    torch.manual_seed(0)
    x, y = networks.images(64 if quick else 256)
    net = randomised(networks.resnet18(), x)
    expected = on(net, (x, y), "cpu", torch.float64)
    for precision in ("32-true", "bf16-mixed", "16-mixed", "bf16-true"):
        for compiled in (False,) if precision != "bf16-mixed" else (False, True):

            def case() -> Row:
                reports, logged = [], []
                for observe in (True, False):
                    callback = lf.FlatnessCallback(summary=False, live=observe)
                    model = Classifier(copy.deepcopy(net), compiled)  # noqa: B023
                    trainer = trainer_of(device, [callback], precision=precision)  # noqa: B023
                    logged.append(trainer.validate(model, DataLoader(TensorDataset(x, y), 64), verbose=False)[0])
                    reports.append(callback.report)
                own, observed = (compared(report, expected) for report in reversed(reports))
                return {
                    "live against own": compared(reports[0], reports[1])["relative flatness"],
                    "own against float64": own["relative flatness"],
                    "live against float64": observed["relative flatness"],
                    "stated deviation": max(layer.info.deviation for layer in reports[0].layers.values()),
                    "validation's loss unchanged": logged[0]["val_loss"] == logged[1]["val_loss"],
                }

            yield tried(f"ResNet-18, {precision}{', compiled' * compiled}", case)


def weights_after(device: str, net: nn.Module, callbacks: list[Any], compiled: bool, **options: Any) -> str:
    L.seed_everything(0, verbose=False)
    model = Classifier(copy.deepcopy(net), compiled)
    loaders = loader_of(192, shuffle=True), loader_of(96)
    trainer_of(device, callbacks, max_epochs=2, deterministic="warn", **options).fit(model, *loaders)
    hashed = hashlib.sha256()
    for value in model.state_dict().values():
        hashed.update(value.detach().float().cpu().numpy().tobytes())
    return hashed.hexdigest()[:12]


def identical(device: str, quick: bool, until: float) -> Iterator[Row]:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    net = networks.resnet20(depth=8)
    for precision in ("32-true", "bf16-mixed", "16-mixed", "bf16-true"):
        for compiled in (False, True):

            def case() -> Row:
                options = {"compiled": compiled, "precision": precision}  # noqa: B023
                plain = [weights_after(device, net, [], **options) for _ in range(2)]
                callbacks = [lf.FlatnessCallback(summary=False), lf.FlatnessCallback(data="train", prefix="train")]
                callbacks += [lf.FlatnessCallback(layers="all", prefix="all", max_samples=32)]
                return {
                    "without, twice": plain[0] == plain[1],
                    "with as without": weights_after(device, net, callbacks, **options) == plain[0],
                }

            yield tried(f"ResNet-8, two epochs, {precision}{', compiled' * compiled}", case)


def synchronisations(device: str, quick: bool, until: float) -> Iterator[Row]:
    from benchmarks.observed import forward, observed

    torch.manual_seed(0)
    for name, net, classes in (("ResNet-18", networks.resnet18(), 10), ("ResNet-50", networks.resnet50(), 1000)):
        x, y = networks.images(16, 32, classes)
        net = randomised(net, x).to(device)
        x, y = x.to(device), y.to(device)

        def counted(call: Callable[[], object]) -> int:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                call()
                torch.cuda.set_sync_debug_mode("default")
            return sum("synchroniz" in str(warning.message) for warning in caught)

        def case() -> Row:
            step = observed(net, (x, y))  # noqa: B023
            step()
            return {
                "forward pass alone": counted(lambda: forward(net, x)),  # noqa: B023
                **{f"observed, batch {number}": counted(step) for number in (2, 3, 4)},
                "own pass": counted(lambda: lf.measure_flatness(net, [(x, y)])),  # noqa: B023
            }

        yield tried(f"{name}, {classes} classes, waits for the device in a batch", case)


def products(device: str, quick: bool, until: float) -> Iterator[Row]:
    torch.manual_seed(0)
    x, y = networks.images(32, 16)
    net = randomised(networks.resnet20(depth=8), x).double()
    cpu, there = (net, [(x.double(), y)]), (copy.deepcopy(net).to(device), [(x.double().to(device), y.to(device))])

    def eigenvalue(model: nn.Module, batches: Any) -> float:
        return float(next(iter(lf.measure_lambda_max(model, batches).values())).lambda_max)

    def case(function: Callable[..., float]) -> Callable[[], Row]:
        return lambda: {"relative error": abs(function(*there) / function(*cpu) - 1)}

    yield tried("λ_max of the last convolution, float64", case(eigenvalue))
    yield tried(
        "λ_max of the whole network, float64",
        case(
            lambda *a: float(
                lf.hessian_spectrum(
                    *a, num_steps=10, num_probes=1, top_k=1, tolerance=1e-6, max_products=60
                ).eigenvalues[0]
            )
        ),
    )
    yield tried(
        "a plane of the loss landscape, float64", case(lambda *a: float(lf.loss_landscape(*a, steps=3).losses.sum()))
    )
