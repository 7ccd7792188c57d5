"""Measures the classifiers of torchvision and some of timm, checks the numbers and writes docs/coverage.md.

    python benchmarks/coverage.py [--all] [--missing] [--only NAME ...] [--limit SECONDS]

Every model's result is added to runs/coverage.json, and the page is written anew, as soon as the model is done. --missing
goes on with an interrupted run; --only runs some models again. --all runs every size of torchvision's families, which
needs much memory and hours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import signal
import time
import warnings
from collections import Counter
from pathlib import Path

import timm
import torch
import torchvision
from rich.progress import Progress
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torchvision import models

import lightning_flatness as lf

ROOT = Path(__file__).parents[1]
PAGE, STORE = ROOT / "docs" / "coverage.md", ROOT / "runs" / "coverage.json"
SMALLEST = """alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t
    mnasnet0_5 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50
    resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_0 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_16 vit_b_32
    wide_resnet50_2""".split()
TIMM = """convmixer_768_32 convnext_atto dla34 dpn68 eca_nfnet_l0 ese_vovnet19b_dw ghostnet_100 hrnet_w18_small
    mobilenetv4_conv_small mobileone_s0 repvgg_a0 res2net50_26w_4s resnetv2_50 resnetv2_50x1_bit skresnet18
    tf_efficientnet_b0 tf_efficientnet_cc_b0_4e""".split()
TIMM_SIZED = """coatnet_nano_rw_224 levit_128s mixer_s32_224 resmlp_12_224 swin_tiny_patch4_window7_224
    vit_tiny_patch16_224 xcit_nano_12_p16_224""".split()
SIZES = {"inception_v3": 75, "vit_h_14": 56}  # 64 for all others
ROWS = 16  # filters of a layer whose rows of block traces are compared
LENGTH = 2000  # longest filter for which a row of the Hessian is computed


def build(name: str, library: str) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor], list[str]]:
    """A random model, a batch of two, and the names of the convolutions and linear layers in the order they run."""
    torch.manual_seed(0)
    size = SIZES.get(name, 64)
    if library == "timm":
        sized = {"img_size": size} if name in TIMM_SIZED else {}
        model = timm.create_model(name, pretrained=False, num_classes=10, **sized)
    elif name == "maxvit_t":  # its windows of 7 x 7 need images of 224
        model = models.MaxVit((size, size), 64, 2, [64, 128, 256, 512], [2, 2, 5, 2], 32, 0.2, num_classes=10)
    else:
        sized = {"image_size": size} if name.startswith("vit") else {}
        auxiliary = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
        model = models.get_model(name, weights=None, num_classes=10, **sized, **auxiliary)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # of normalisations, layer scales, biases
            if bool((parameter == parameter.flatten()[0]).all()):
                zero = float(parameter.flatten()[0]) == 0
                nn.init.normal_(parameter, 0, 0.1) if zero else nn.init.uniform_(parameter, 0.5, 1.5)
        norms = [module for module in model.modules() if isinstance(getattr(module, "running_var", None), torch.Tensor)]
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        model(torch.randn(8, 3, size, size).double())  # statistics of a network that has seen data
        for norm in norms:
            norm.eval()
            norm.running_mean += 0.1 * torch.randn_like(norm.running_mean) * norm.running_var.sqrt()
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.5, 1.5)
        batch = torch.randn(2, 3, size, size).double(), torch.tensor([3, 7])
        ran: dict[str, None] = {}
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
        layers = [(n, module) for n, module in model.named_modules() if isinstance(module, kinds)]
        handles = [m.register_forward_hook(lambda *_, n=n: ran.setdefault(n)) for n, m in layers]
        spread = float(model(batch[0]).std(1).mean())
        for handle in handles:
            handle.remove()
        model.get_submodule(list(ran)[-1]).weight.div_(spread)  # neither certain nor the same for all classes
    return model, batch, list(ran)


class Call:
    """The logits as a function of the kernels of some layers alone."""

    def __init__(self, model: nn.Module, layers: list[str]):
        fixed = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.kernels = [fixed[f"{layer}.weight"].clone().requires_grad_() for layer in layers]
        weights = dict(zip((f"{layer}.weight" for layer in layers), self.kernels, strict=True))
        self.logits = lambda x: functional_call(model, {**fixed, **weights}, (x,))


def curvature(logits: torch.Tensor) -> torch.Tensor:
    pi = logits.detach().softmax(-1)
    return torch.diag_embed(pi) - pi[..., :, None] * pi[..., None, :]


def jacobian_rows(model: nn.Module, x: torch.Tensor, filters: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Rows of the Gauss-Newton block traces: one backward pass for every sample and class."""
    call = Call(model, list(filters))
    rows = {layer: torch.zeros(()).double() for layer in filters}
    logits = call.logits(x)
    pi = logits.detach().softmax(1)
    for sample, p in enumerate(pi):
        root = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())
        assert torch.allclose(root @ root.T, curvature(logits)[sample], rtol=0, atol=1e-14)
        for column in root.T:
            # The sample stays in its batch: torch 2.15's BatchNorm2d has wrong gradients for some batches of one.
            u = torch.zeros_like(pi)
            u[sample] = column
            gradients = torch.autograd.grad(logits, call.kernels, u, retain_graph=True, allow_unused=True)
            for (layer, chosen), gradient in zip(filters.items(), gradients, strict=True):
                if gradient is not None:
                    rows[layer] = rows[layer] + gradient[chosen].flatten(1) @ gradient.flatten(1).T / len(x)
    return rows


def hessian_less_gauss_newton(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], layer: str) -> float | None:
    """``|Hv - Gv| / |Hv|`` for a random ``v``, by autograd; None where there is no second derivative in torch."""
    call = Call(model, [layer])
    (kernel,) = call.kernels
    v, logits = torch.randn_like(kernel), call.logits(batch[0])
    try:
        (gradient,) = torch.autograd.grad(cross_entropy(logits, batch[1]), kernel, create_graph=True)
        (hv,) = torch.autograd.grad(gradient, kernel, v, retain_graph=True)
        u = torch.zeros_like(logits, requires_grad=True)
        (back,) = torch.autograd.grad(logits, kernel, u, create_graph=True)
        (jv,) = torch.autograd.grad(back, u, v, retain_graph=True)
        (gv,) = torch.autograd.grad(logits, kernel, (curvature(logits) @ jv[..., None])[..., 0] / len(logits))
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        return None
    return float((hv - gv).norm() / hv.norm().clamp_min(1e-300))


def hessian_rows(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], layer: str, chosen: list[int]):
    """Rows of the Hessian's block traces: one double backward for every entry of the filter."""
    call = Call(model, [layer])
    (kernel,) = call.kernels
    (gradient,) = torch.autograd.grad(cross_entropy(call.logits(batch[0]), batch[1]), kernel, create_graph=True)
    rows = torch.zeros(len(chosen), len(kernel)).double()
    for row, s in zip(rows, chosen, strict=True):
        for d, entry in enumerate(gradient[s].flatten()):
            row += torch.autograd.grad(entry, kernel, retain_graph=True)[0].flatten(1)[:, d]
    return rows


def row_error(found: torch.Tensor, expected: torch.Tensor, chosen: list[int]) -> float:
    """Largest difference over largest number expected; pairs of filters in different groups are left out."""
    per_group = found.shape[1]
    worst = scale = 0.0
    for s, row in zip(chosen, expected.expand(len(chosen), found.shape[0] * per_group), strict=True):
        start = s - s % per_group
        row = row[start : start + per_group]
        worst = max(worst, float((found[s // per_group, s % per_group] - row).abs().max()))
        scale = max(scale, float(row.abs().max()))
    return worst / scale if scale else worst


def compare(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], layers: dict[str, lf.LayerFlatness]) -> dict:
    """Error of every layer: of the exact ones against the Hessian, of the others against the Gauss-Newton matrix."""
    plain = {name: layer for name, layer in layers.items() if layer.info.kernel == "parameter"}
    filters = {}
    for name, layer in plain.items():
        s = layer.info.num_filters
        filters[name] = sorted({i * (s - 1) // (ROWS - 1) for i in range(ROWS)})
    rows = jacobian_rows(model, batch[0], filters) if filters else {}
    results = {name: {"error": None} for name in layers}
    for name, layer in plain.items():
        found, chosen, expected = layer.block_traces, filters[name], rows[name]
        apart = hessian_less_gauss_newton(model, batch, name)
        if layer.exact and apart is not None and apart > 1e-9:  # curved
            if layer.info.patch_length > LENGTH:
                results[name] = {"error": apart, "apart": apart}
                continue
            chosen = chosen[len(chosen) // 2 :][: 2 if layer.info.patch_length < 400 else 1]
            expected = hessian_rows(model, batch, name, chosen)
        results[name] = {"error": row_error(found, expected, chosen), "apart": apart}
    return results


def measure(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], layers: str | list[str]):
    """A report and no reason, or no report and the reason."""
    try:
        return lf.measure_flatness(model, [batch], layers=layers), ""
    except lf.FlatnessError as error:
        return None, str(error)
    except TimeoutError:
        raise
    except Exception as error:  # what this script is to find
        return None, f"CRASH {type(error).__name__}: {error}"


def measure_all(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], names: list[str], layers: str | list[str]):
    """Measure, and again without the layer that was refused, until what is left is measured."""
    names, refused = list(names), {}
    report, reason = measure(model, batch, layers)
    while report is None:
        found = re.search(r"[Ll]ayer '([^']+)'", reason)
        if found is None or found[1] not in names:
            return None, {**refused, **dict.fromkeys(names, reason)}
        names.remove(found[1])
        refused[found[1]] = reason
        if not names:
            break
        report, reason = measure(model, batch, names)
    return report, refused


@contextlib.contextmanager
def time_limit(seconds: int):
    def stop(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def run(name: str, library: str, limit: int) -> dict:
    """All that the page says of one model."""
    start = time.perf_counter()
    model, batch, names = build(name, library)
    row = {"library": library, "layers": len(names), "of": len(names), "notes": {}}
    row["versions"] = ", ".join(f"{m.__name__} {m.__version__}" for m in (lf, torch, torchvision, timm))
    reports = {kind: measure(model, batch, kind) for kind in ("last", "classifier")}
    for kind, (report, reason) in reports.items():
        found = {} if report is None else dict(report.layers)
        checks = compare(model, batch, found)
        row[kind] = [
            {"layer": n, "method": x.method, "exact": x.exact, "reason": x.info.reason, "kernel": x.info.kernel}
            | checks[n]
            for n, x in found.items()
        ]
        row["notes"] |= {} if report else {kind: reason}
    try:
        with time_limit(limit):
            everything, refused = measure_all(model, batch, names, "all")
    except TimeoutError:
        model, batch, names = build(name, library)
        names = names[:: max(1, len(names) // 12)]
        everything, refused = measure_all(model, batch, names, names)
        row["of"] = len(names)
    layers = {} if everything is None else dict(everything.layers)
    row["exact"] = sum(x.exact for x in layers.values())
    row["inexact"] = dict(Counter(x.info.reason for x in layers.values() if not x.exact))
    row["effective"] = sum(x.info.kernel == "effective" for x in layers.values())
    row["refused"] = refused
    sample = [list(layers)[i * (len(layers) - 1) // 3] for i in range(4)] if layers else []
    row["checks"] = [
        {"layer": n, "exact": layers[n].exact} | check
        for n, check in compare(model, batch, {n: layers[n] for n in sample}).items()
    ]
    row["seconds"] = time.perf_counter() - start
    return row


HEAD = """# Coverage

Which layers of well-known classifiers can be measured, by which method, and how far the numbers are from ones computed in
another way. Written by `make coverage` ({versions}).

Every model has random weights and ten classes. The statistics of its BatchNorms are those of random images, disturbed; affine
weights, layer scales and biases are random; the last weights are scaled until logits differ by about one. It is measured in
float64 on two random images of 64x64 pixels (75x75 for Inception v3).

- *layers*: convolutions and linear layers that run as modules.
- *last layer*: what `layers="last"` chooses, its method, whether the number is the Hessian's, and its error. A star: the layer
  computes its kernel, which the check here does not follow.
- *exact*, *G.-N.*, *refused*: the layers under `layers="all"` whose number is the Hessian's, is its Gauss-Newton part only, or
  cannot be had. `layers="all"` itself is an error where a layer is refused; here it is left out and the rest measured. Where
  all layers would take more than {limit} s, some evenly spaced ones are measured: "of 14".
- *largest error*: of the last layer, the classifier, and up to four others, evenly spaced.
- *s*: seconds for the row, checks included, on one thread.

An error is the largest difference between block traces, relative to the largest. An exact number is compared with the
Hessian: a random Hessian-vector product tells whether the Hessian is the Gauss-Newton matrix, then Jacobians give its block
traces, one backward pass for every sample and class; if not, double backward gives them, one pass for every weight of a
filter. Other numbers are compared with the Gauss-Newton matrix by Jacobians. For {rows} filters of a layer at most, one or
two by double backward.

"""


def brief(reason: str) -> str:
    """The reason without names and remedies."""
    if reason.startswith("CRASH"):
        return reason.splitlines()[0][:150]
    return re.split(r"[;(]|\. |\.$", re.sub(r"^Layer '[^']+'( \(\w+\))?:? ", "", reason))[0].strip()


def checked(row: dict) -> list[dict]:
    return [check for check in row["last"] + row["classifier"] + row["checks"] if check["error"] is not None]


def worst(checks: list[dict]) -> str:
    return f"{max(check['error'] for check in checks):.0e}" if checks else ""


def line(name: str, row: dict) -> str:
    if "failed" in row:
        return f"| {name} | | {row['failed']} | | | | | | | | | |"
    (last,) = row["last"] or [None]
    if last is None:
        cells = ["", brief(row["notes"]["last"]), "", ""]
    else:
        star = "*" if last["kernel"] == "effective" else ""
        method = {"closed_form": "closed form", "gauss_newton": "Gauss-Newton"}[last["method"]]
        cells = [
            f"`{last['layer']}`{star}",
            method,
            "yes" if last["exact"] else "no",
            worst(checked({**row, "classifier": [], "checks": []})),
        ]
    why = Counter(row["inexact"]) + Counter(brief(reason) for reason in row["refused"].values())
    reasons = [f"{reason} ({count})" for reason, count in why.most_common()]
    reasons += [f"classifier: {brief(row['notes']['classifier'])}"] if "classifier" in row["notes"] else []
    reasons += [f"kernel computed ({row['effective']})"] if row["effective"] else []
    of = "" if row["of"] == row["layers"] else f" of {row['of']}"
    counts = [f"{row['exact']}{of}", sum(row["inexact"].values()), len(row["refused"])]
    cells = [name, row["layers"], *cells, *counts, "; ".join(reasons), worst(checked(row)), f"{row['seconds']:.0f}"]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def totals(rows: list[dict]) -> str:
    lasts = [last for row in rows for last in row["last"]]
    checks = [check for row in rows for check in checked(row)]
    exact = [check for check in checks if check["exact"]]
    other = [check for check in checks if not check["exact"]]
    crashes = sum("CRASH" in reason for row in rows for reason in [*row["notes"].values(), *row["refused"].values()])
    cautious = sum(check["apart"] is not None and check["apart"] < 1e-9 for check in other)
    return (
        f"**Totals.** {len(rows)} models. The last layer is exact in {sum(x['exact'] for x in lasts)}, by the closed form in "
        f"{sum(x['method'] == 'closed_form' for x in lasts)}; Gauss-Newton only in {sum(not x['exact'] for x in lasts)}; "
        f"refused in {len(rows) - len(lasts)}. The classifier is exact in "
        f"{sum(x['exact'] for row in rows for x in row['classifier'])}. Of {sum(row['of'] for row in rows):,} layers measured "
        f"{sum(row['exact'] for row in rows):,} are exact, {sum(sum(row['inexact'].values()) for row in rows):,} "
        f"Gauss-Newton only, {sum(len(row['refused']) for row in rows):,} refused. Largest error of {len(exact)} exact "
        f"numbers compared: {worst(exact)}; of {len(other)} others: {worst(other)}. {cautious} of these are called not exact "
        f"although the Hessian is the Gauss-Newton matrix. Crashes: {crashes}. "
        f"{sum(row['seconds'] for row in rows) / 60:.0f} minutes.\n\n"
    )


def write_page(rows: dict[str, dict], limit: int) -> None:
    good = [row for row in rows.values() if "failed" not in row]
    versions = "; ".join(sorted({row["versions"] for row in good}))
    text = HEAD.format(versions=versions, limit=limit, rows=ROWS) + totals(good)
    for library in ("torchvision", "timm"):
        text += (
            f"## {library}\n\n| model | layers | last layer | method | exact | error | exact | G.-N. | refused | why "
        )
        text += "| largest error | s |\n|---|--:|---|---|---|--:|--:|--:|--:|---|--:|--:|\n"
        text += "".join(line(n, row) + "\n" for n, row in sorted(rows.items()) if row["library"] == library) + "\n"
    PAGE.write_text(text.rstrip() + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every size of torchvision's families")
    parser.add_argument("--missing", action="store_true", help="only models that have no result yet")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--limit", type=int, default=60, help="seconds for all layers of a model")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    every = models.list_models(module=models)
    libraries = dict.fromkeys(every if options.all else SMALLEST, "torchvision") | dict.fromkeys(
        TIMM + TIMM_SIZED, "timm"
    )
    if options.only:
        libraries = {n: "torchvision" if n in every else "timm" for n in options.only}
    rows = json.loads(STORE.read_text()) if STORE.exists() else {}
    libraries = {n: library for n, library in libraries.items() if not (options.missing and n in rows)}
    STORE.parent.mkdir(exist_ok=True)
    with Progress() as progress:
        task = progress.add_task("", total=len(libraries))
        for name, library in libraries.items():
            progress.update(task, description=name)
            try:
                rows[name] = run(name, library, options.limit)
            except (TypeError, RuntimeError, ValueError, AssertionError) as error:
                rows[name] = {"library": library, "failed": f"does not run: {type(error).__name__}: {error}"[:150]}
            STORE.write_text(json.dumps(rows, indent=1))
            write_page(rows, options.limit)
            progress.console.print(line(name, rows[name]), markup=False, soft_wrap=True)
            progress.advance(task)


if __name__ == "__main__":
    main()
