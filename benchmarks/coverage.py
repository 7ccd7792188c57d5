"""Measure the classifiers of torchvision and some of timm, check the numbers, and write docs/coverage.md.

    python -m benchmarks.coverage [--all] [--missing] [--only NAME ...] [--limit SECONDS]

After every model, the results are written to runs/coverage.json, and the page is written again. --missing continues an
interrupted run. --all measures every size of torchvision's families, which takes hours and much memory.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import warnings
from collections import Counter
from pathlib import Path

import timm
import torch
import torchvision
from rich.progress import Progress
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torchvision import models

import lightning_flatness as lf

ROOT = Path(__file__).parents[1]
PAGE, STORE = ROOT / "docs" / "coverage.md", ROOT / "runs" / "coverage.json"
TORCHVISION = """alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t
    mnasnet0_5 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50
    resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_0 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_16 vit_b_32
    wide_resnet50_2"""
TIMM = """convmixer_768_32 convnext_atto dla34 dpn68 eca_nfnet_l0 ese_vovnet19b_dw ghostnet_100 hrnet_w18_small
    mobilenetv4_conv_small mobileone_s0 repvgg_a0 res2net50_26w_4s resnetv2_50 resnetv2_50x1_bit skresnet18
    tf_efficientnet_b0 tf_efficientnet_cc_b0_4e"""
TIMM_SIZED = """coatnet_nano_rw_224 levit_128s mixer_s32_224 resmlp_12_224 swin_tiny_patch4_window7_224
    vit_tiny_patch16_224 xcit_nano_12_p16_224"""  # these need img_size=, because they are made for one size of images
SIZES = {"inception_v3": 75, "vit_h_14": 56}  # image sizes; 64 for all other models
ROWS = 16  # number of filters of a layer whose rows of block traces are compared
SAME = 1e-9  # below this relative difference, the Hessian counts as equal to the Gauss-Newton matrix

HEAD = """# Coverage

Which layers of well-known classifiers can be measured, by which method, and how far the numbers are from the same
numbers computed in another way. Written by `make coverage`.
With {versions}.

Weights are random, with ten classes. BatchNorms have the statistics of random images, disturbed; affine weights, layer
scales and biases are random; logits differ by about one. Measured in float64 on two random images of 64x64 pixels, or
75x75 for Inception v3.

- *layers*: convolutions and linear layers that run as modules. "14 of 66": only 14 were measured under *all*, since all
  would have taken long: evenly spaced ones, the last and the classifier.
- *last*: what `layers="last"` chooses, and its error. A star: the layer computes its kernel; it is not compared.
- *all*: how many layers are exact, are the Gauss-Newton part only (*G.-N.*), or are refused; `layers="all"` leaves
  these out.
- *largest error*: of the last layer, the classifier and up to four others, evenly spaced.
- *s*: seconds on one thread, checks included.

An error is the largest difference of block traces over the largest block trace, for at most {rows} filters of a layer.
What is called exact is compared with the Hessian. If a random Hessian-vector product shows that this is the
Gauss-Newton matrix, Jacobians give it, by a backward pass for every sample and class; if not, double backward does, for
one or two filters. What is not exact is compared with the Gauss-Newton matrix.

"""
COLUMNS = "model|layers|last|method|exact|error|all: exact|G.-N.|refused|why|largest error|s"
METHODS = {"closed_form": "closed form", "gauss_newton": "Gauss-Newton"}
Batch = tuple[Tensor, Tensor]


def build(name: str, library: str) -> tuple[nn.Module, Batch, list[str]]:
    """Build a random model and a batch; return them with the names of convolutions and linear layers that run.

    The names are in the order in which the layers run.
    """
    torch.manual_seed(0)
    size = SIZES.get(name, 64)
    if library == "timm":
        options = {"img_size": size} if name in TIMM_SIZED.split() else {}
        model = timm.create_model(name, pretrained=False, num_classes=10, **options)
    elif name == "maxvit_t":  # windows of 2 x 2, because its windows of 7 x 7 need images of 224 x 224
        model = models.MaxVit((size, size), 64, 2, [64, 128, 256, 512], [2, 2, 5, 2], 32, 0.2, num_classes=10)
    else:
        options = {"image_size": size} if name.startswith("vit") else {}
        options |= {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
        model = models.get_model(name, weights=None, num_classes=10, **options)
    model = model.double().eval()
    batch = torch.randn(2, 3, size, size).double(), torch.tensor([3, 7])
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    ran: dict[str, None] = {}
    with torch.no_grad():
        for parameter in model.parameters():  # constant ones belong to normalisations, layer scales and biases
            first = float(parameter.flatten()[0])
            if bool((parameter == first).all()):
                nn.init.uniform_(parameter, 0.5, 1.5) if first else nn.init.normal_(parameter, 0, 0.1)
        norms = [module for module in model.modules() if isinstance(getattr(module, "running_var", None), Tensor)]
        for norm in norms:
            norm.train().momentum = 1.0
        model(torch.randn(8, 3, size, size).double())
        for norm in norms:
            norm.eval().running_mean += 0.1 * torch.randn_like(norm.running_mean) * norm.running_var.sqrt()
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.5, 1.5)
        layers = [(layer, module) for layer, module in model.named_modules() if isinstance(module, kinds)]
        handles = [m.register_forward_hook(lambda *_, n=layer: ran.setdefault(n)) for layer, m in layers]
        spread = float(model(batch[0]).std(1).mean())
        for handle in handles:
            handle.remove()
        model.get_submodule(list(ran)[-1]).weight.div_(spread)  # logits that differ by about one: no sure predictions
    return model, batch, list(ran)


def logits_and_kernels(model: nn.Module, x: Tensor, layers: list[str]) -> tuple[Tensor, list[Tensor]]:
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    kernels = {f"{layer}.weight": weights[f"{layer}.weight"].clone().requires_grad_() for layer in layers}
    return functional_call(model, weights | kernels, (x,)), list(kernels.values())


def jacobian_rows(model: nn.Module, x: Tensor, filters: dict[str, list[int]]) -> dict[str, Tensor]:
    """Compute rows of the Gauss-Newton block traces of several layers, by a backward pass for each sample and class.

    ``filters`` holds, for every layer, the indices of the rows.
    """
    rows = {layer: torch.zeros(()).double() for layer in filters}
    logits, kernels = logits_and_kernels(model, x, list(filters))
    pi = logits.detach().softmax(1)
    for sample, p in enumerate(pi):
        root = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())
        for column in root.T:
            # The sample is not taken out of its batch: torch 2.15's BatchNorm2d has wrong gradients for some batches of
            # one sample.
            u = torch.zeros_like(pi).index_put_((torch.tensor(sample),), column)
            gradients = torch.autograd.grad(logits, kernels, u, retain_graph=True)
            for (layer, chosen), gradient in zip(filters.items(), gradients, strict=True):
                rows[layer] = rows[layer] + gradient[chosen].flatten(1) @ gradient.flatten(1).T / len(x)
    return rows


def curved_part(model: nn.Module, batch: Batch, layer: str) -> float | None:
    """Compute ``|Hv - Gv| / |Hv|`` for a random ``v``, the Hessian ``H`` and the Gauss-Newton matrix ``G`` of a layer.

    Returns None if torch does not implement the second derivative of an operation.
    """
    logits, (kernel,) = logits_and_kernels(model, batch[0], [layer])
    v, u, pi = torch.randn_like(kernel), torch.zeros_like(logits, requires_grad=True), logits.detach().softmax(1)
    try:
        (gradient,) = torch.autograd.grad(cross_entropy(logits, batch[1]), kernel, create_graph=True)
        (hv,) = torch.autograd.grad(gradient, kernel, v, retain_graph=True)
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        return None
    (back,) = torch.autograd.grad(logits, kernel, u, create_graph=True)
    (jv,) = torch.autograd.grad(back, u, v, retain_graph=True)
    (gv,) = torch.autograd.grad(logits, kernel, pi * (jv - (pi * jv).sum(1, keepdim=True)) / len(logits))
    return float((hv - gv).norm() / hv.norm().clamp_min(1e-300))


def hessian_rows(model: nn.Module, batch: Batch, layer: str, chosen: list[int]) -> Tensor:
    """Compute rows of the Hessian's block traces, by a double backward pass for every weight of the chosen filters."""
    logits, (kernel,) = logits_and_kernels(model, batch[0], [layer])
    (gradient,) = torch.autograd.grad(cross_entropy(logits, batch[1]), kernel, create_graph=True)
    rows = torch.zeros(len(chosen), len(kernel)).double()
    for row, s in zip(rows, chosen, strict=True):
        for d, entry in enumerate(gradient[s].flatten()):
            row += torch.autograd.grad(entry, kernel, retain_graph=True)[0].flatten(1)[:, d]
    return rows


def row_error(actual: Tensor, expected: Tensor, chosen: list[int]) -> float:
    """Compute the largest difference between rows of block traces, relative to the largest expected entry.

    ``actual`` is ``(groups, filters, filters)`` with the filters of a group; ``expected`` has a row of all filters for
    every chosen filter. Pairs of filters from different groups are not compared.
    """
    size = actual.shape[1]
    expected = torch.stack([row.unflatten(0, (-1, size))[s // size] for s, row in zip(chosen, expected, strict=True)])
    difference = torch.stack([actual[s // size, s % size] for s in chosen]) - expected
    return float(difference.abs().max() / expected.abs().max().clamp_min(1e-300))


def checked(model: nn.Module, batch: Batch, layers: dict[str, lf.LayerFlatness]) -> list[dict]:
    plain = {name: x.info.num_filters - 1 for name, x in layers.items() if x.info.kernel == "parameter"}
    filters = {name: sorted({i * last // (ROWS - 1) for i in range(ROWS)}) for name, last in plain.items()}
    rows = jacobian_rows(model, batch[0], filters) if filters else {}
    records = []
    for name, x in layers.items():
        record = {"layer": name, "method": x.method, "exact": x.exact, "kernel": x.info.kernel, "error": None}
        if name in plain:
            expected, chosen = rows[name], filters[name]
            record["apart"] = apart = curved_part(model, batch, name)
            if x.exact and apart is not None and apart > SAME:
                chosen = chosen[len(chosen) // 2 :][: 2 if x.info.patch_length < 400 else 1]
                expected = hessian_rows(model, batch, name, chosen)
            record["error"] = row_error(x.block_traces, expected, chosen)
        records.append(record)
    return records


def measure(
    model: nn.Module, batch: Batch, layers: str | list[str]
) -> tuple[dict[str, lf.LayerFlatness], str, dict[str, str]]:
    """Measure layers; return the measured layers, the error message (else empty), and reasons for layers left out."""
    try:
        report = lf.measure_flatness(model, [batch], layers=layers)
        return dict(report.layers), "", dict(report.left_out)
    except lf.FlatnessError as error:
        return {}, str(error), {}
    except Exception as error:  # this script must report crashes, so it catches them all
        return {}, f"CRASH {type(error).__name__}: {error}", {}


def measure_all(
    model: nn.Module, batch: Batch, names: list[str], every: bool
) -> tuple[dict[str, lf.LayerFlatness], dict[str, str]]:
    """Measure layers; if a layer is refused, measure again without it. Return measured layers and refusals."""
    refused: dict[str, str] = {}
    while left := [name for name in names if name not in refused]:
        layers, reason, left_out = measure(model, batch, "all" if every and not refused else left)
        if layers:
            return layers, refused | left_out
        named = re.search(r"Layer '([^']+)'", reason)
        refused |= {named[1]: reason} if named and named[1] in left else dict.fromkeys(left, reason)
    return {}, refused


def run(name: str, library: str, limit: int) -> dict:
    start = time.perf_counter()
    model, batch, names = build(name, library)
    row = {"library": library, "layers": len(names), "notes": {}}
    row["versions"] = ", ".join(f"{m.__name__} {m.__version__}" for m in (lf, torch, torchvision, timm))
    for kind in ("last", "classifier"):
        layers, reason, _ = measure(model, batch, kind)
        row[kind] = checked(model, batch, layers)
        row["notes"] |= {kind: reason} if reason else {}
    wanted = {*names[:: max(1, len(names) // 12)], *(x["layer"] for kind in ("last", "classifier") for x in row[kind])}
    some, begin = [name for name in names if name in wanted], time.perf_counter()
    layers, refused = measure_all(model, batch, some, some == names)
    if len(some) < len(names) and (time.perf_counter() - begin) * len(names) / len(some) < limit:
        some = names
        layers, refused = measure_all(model, batch, some, some == names)
    inexact = Counter(x.info.reason for x in layers.values() if not x.exact)
    row |= {"of": len(some), "exact": len(layers) - inexact.total(), "inexact": inexact, "refused": refused}
    row["effective"] = sum(x.info.kernel == "effective" for x in layers.values())
    sample = [list(layers)[i * (len(layers) - 1) // 3] for i in range(4)] if layers else []
    row["checks"] = checked(model, batch, {layer: layers[layer] for layer in sample})
    return row | {"seconds": time.perf_counter() - start}


def brief(reason: str) -> str:
    """Shorten an error message to its reason, without the layer's name and the remedy."""
    reason = re.sub(r"^Layer '[^']+'( \(\w+\))?:? ", "", reason.splitlines()[0])
    return reason[:150] if reason.startswith("CRASH") else re.split(r"[;(]|\. |\.$", reason)[0].strip()


def worst(checks: list[dict]) -> str:
    errors = [check["error"] for check in checks if check["error"] is not None]
    return f"{max(errors):.0e}" if errors else ""


def line(name: str, row: dict) -> str:
    notes = {kind: brief(reason) for kind, reason in row["notes"].items()}
    last = ["", notes.get("last", ""), "", ""]
    for x in row["last"]:
        star = "*" if x["kernel"] == "effective" else ""
        last = [f"`{x['layer']}`{star}", METHODS[x["method"]], "yes" if x["exact"] else "no", worst([x])]
    why = Counter(row["inexact"]) + Counter(brief(reason) for reason in row["refused"].values())
    why += Counter({"kernel computed": row["effective"]})  # adding drops zeros
    reasons = [f"{reason} ({count})" for reason, count in why.most_common()]
    reasons += [f"classifier: {notes['classifier']}"] if "classifier" in notes else []
    layers = row["layers"] if row["of"] == row["layers"] else f"{row['of']} of {row['layers']}"
    counts = [row["exact"], sum(row["inexact"].values()), len(row["refused"]), "; ".join(reasons)]
    cells = [name, layers, *last, *counts, worst(row["last"] + row["classifier"] + row["checks"])]
    return f"| {' | '.join(map(str, cells))} | {row['seconds']:.0f} |\n"


def totals(rows: list[dict]) -> str:
    last, classifier = ([x for row in rows for x in row[kind]] for kind in ("last", "classifier"))
    checks = [x for row in rows for x in row["last"] + row["classifier"] + row["checks"] if x["error"] is not None]
    exact, other = ([x for x in checks if x["exact"] is wanted] for wanted in (True, False))
    unclaimed = sum(x["apart"] is not None and x["apart"] < SAME for x in other)
    unchecked = sum(x["apart"] is None for x in exact)
    crashes = sum("CRASH" in reason for row in rows for reason in [*row["notes"].values(), *row["refused"].values()])
    closed = sum(x["method"] == "closed_form" for x in last)
    sums = [sum(row["exact"] for row in rows), sum(sum(row["inexact"].values()) for row in rows)]
    return f"""**Totals.** {len(rows)} models.

- Last layer: {sum(x["exact"] for x in last)} exact, {closed} of them by closed form; {len(rows) - len(last)} refused.
- Classifier: {sum(x["exact"] for x in classifier)} exact; {len(rows) - len(classifier)} refused.
- All: {sums[0]} exact, {sums[1]} Gauss-Newton only, {sum(len(row["refused"]) for row in rows)} refused.
- Largest error of {len(exact)} exact numbers compared: {worst(exact)}; {unchecked} without second derivatives in torch.
- Largest error of {len(other)} others: {worst(other)}; {unclaimed} of them are the Hessian's, though not called exact.
- Crashes: {crashes}. Time: {sum(row["seconds"] for row in rows) / 60:.0f} minutes.

"""


def write_page(rows: dict[str, dict]) -> None:
    versions = "; ".join(sorted({row["versions"] for row in rows.values()}))
    text = HEAD.format(versions=versions, rows=ROWS) + totals(list(rows.values()))
    for library in ("torchvision", "timm"):
        text += f"## {library}\n\n| {' | '.join(COLUMNS.split('|'))} |\n|{'---|' * len(COLUMNS.split('|'))}\n"
        text += "".join(line(n, row) for n, row in sorted(rows.items()) if row["library"] == library) + "\n"
    PAGE.write_text(text.rstrip() + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every size of torchvision's families")
    parser.add_argument("--missing", action="store_true", help="only models that have no result yet")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these models")
    parser.add_argument("--limit", type=int, default=60, help="seconds for all layers of a model, else some of them")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    every = models.list_models(module=models)
    names = options.only or [*(every if options.all else TORCHVISION.split()), *TIMM.split(), *TIMM_SIZED.split()]
    rows = json.loads(STORE.read_text()) if STORE.exists() else {}
    names = [name for name in names if not (options.missing and name in rows)]
    STORE.parent.mkdir(exist_ok=True)
    with Progress() as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            rows[name] = run(name, "torchvision" if name in every else "timm", options.limit)
            STORE.write_text(json.dumps(rows, indent=1))
            write_page(rows)
            progress.console.print(line(name, rows[name]).strip(), markup=False, soft_wrap=True)
            progress.advance(task)
    write_page(rows)


if __name__ == "__main__":
    main()
