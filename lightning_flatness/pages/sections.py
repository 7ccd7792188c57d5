"""Turn results into sections of a page: tables, figures, and sentences on how to read them.

The numbers are shown with their errors, and with a label that says whether they are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_flatness import plots
from lightning_flatness.pages.parts import Figure, Head, Section, Table, drawn, table_of
from lightning_flatness.results import (
    Comparison,
    FlatnessReport,
    LandscapeResult,
    LayerInfo,
    SpectrumResult,
    number_of,
)
from lightning_flatness.results.comparison_tables import decision_table, measures_table, reading
from lightning_flatness.results.rank_correlation import correlation_table
from lightning_flatness.results.spectrum import MATRICES
from lightning_flatness.results.tables import METHODS, precision_of, sentence_of
from lightning_flatness.results.texts import measured, named, samples_of

UNITS = "in units of the loss"
MUCH = 0.5  # the page warns if a tenth of the samples contributes more than this share of relative flatness
# Columns of the table of a training run: keys in the records of its history, and headings.
HISTORY = {
    "accuracy": "accuracy",
    "loss": "loss",
    "relative_flatness": "rel. flatness",
    "normalized_relative_flatness": "normalised",
    "hessian_trace": "Hessian trace",
    "weight_norm": "‖W‖",
}
READING = (
    "Lower is flatter: the loss changes less when the weights of the layer change. In spite of its name, "
    "relative flatness is a sharpness, too.",
    "Relative flatness weights the Hessian of the loss by the layer's weights, so that rescaling the layer does not "
    "change it. It is a sum over all pairs of filters w_s and w_t. Each term is ⟨w_s, w_t⟩ times the trace of the "
    "pair's block of the Hessian (Petzka et al. 2021, arXiv 2001.00939). Neuron-wise: only the terms with s = t.",
    "Normalised: relative flatness after every channel that the layer reads is scaled to standard deviation one over "
    "samples. Compare networks by this measure: rescaling channels does not change it if the network's function stays "
    "the same. Such a rescaling may change the Hessian trace and plain relative flatness.",
    "The curvature is the trace of the second derivative of the loss with respect to the logits, without any weights; "
    "it is high where predictions are unsure. Relative flatness is divided by the curvature, or by the loss, to reduce "
    "the effect of either. Neither ratio makes networks of different training loss comparable.",
    "± is one standard error over samples: the typical distance to the value on very many samples of the same kind. "
    "It says nothing about other training seeds. Two numbers differ clearly if their difference is more than two "
    "standard errors of the difference. The norm of weights ‖W‖ has no error; the error of the neuron-wise measure is "
    "not known.",
    "Exact means that a number equals, up to rounding, the number from the full Hessian on these samples. This is the "
    "Hessian of the loss with respect to the layer's weights. A number that is not exact is labelled, with the reason. "
    "(est. ± ...) is the standard error of an estimate.",
    "A number alone says little: it depends on the layer, the loss and the data. Look at the losses and ‖W‖ beside it.",
)
READING_OF_SPECTRA = (
    "An eigenvalue λ of the Hessian says how strongly the loss curves along its direction; the trace is the sum of "
    "all. Smaller is flatter. Beside an eigenvalue stands its residual r: the matrix has an eigenvalue within ± r. "
    "Eigenvalues and trace change when weights are rescaled, so they compare epochs of one run rather than networks.",
)
READING_OF_GAUSS_NEWTON = (
    "The Gauss-Newton matrix is the part of the Hessian that remains if the network is replaced by its linearisation "
    "in the weights.",
)
READING_OF_LANDSCAPES = (
    "A landscape shows the mean loss at weights around those of the network, which are at the origin. A wide valley "
    "looks flat along these directions. There are as many directions as weights, and others may look different.",
)
EQUAL_LOSS = (
    "Anything from networks of different training loss: these numbers follow how far training has come. Compare at "
    "equal training loss."
)
NOT_TO_CONCLUDE = (
    "That a flatter network generalises better. In published work flatness goes with generalisation among CNNs for "
    "images, and hardly among transformers (Andriushchenko et al. 2023, arXiv 2302.07011). In the study of this "
    "package (digits, equal training loss), once label noise was held fixed, a number without a Hessian did as well.",
    "That the network as a whole is flat: the numbers describe the measured layers, each by itself or summed.",
)


def reading_of(results: Sequence[Any], has_history: bool) -> tuple[str, ...]:
    """Return sentences that explain how to read ``results`` and, if ``has_history``, the history of a run."""
    is_flatness = has_history or any(isinstance(one, (FlatnessReport, Comparison)) for one in results)
    matrices = {one.matrix for one in results if isinstance(one, SpectrumResult)}
    return (
        *(READING if is_flatness else ()),
        *(READING_OF_SPECTRA if matrices else ()),
        *(READING_OF_GAUSS_NEWTON if "gauss_newton" in matrices else ()),
        *(READING_OF_LANDSCAPES if any(isinstance(one, LandscapeResult) for one in results) else ()),
    )


def cautions_of(results: Sequence[Any], has_history: bool) -> tuple[str, ...]:
    """Return sentences on what must not be concluded from ``results``, or from a history if ``has_history``.

    The cautions of comparisons come first, and then the sentences that hold for all results.
    """
    known = [caution for one in results if isinstance(one, Comparison) for caution in one.cautions]
    about_loss = () if any(caution.kind.startswith("train_loss") for caution in known) else (EQUAL_LOSS,)
    is_flatness = has_history or any(isinstance(one, (FlatnessReport, Comparison)) for one in results)
    always = NOT_TO_CONCLUDE if is_flatness else NOT_TO_CONCLUDE[:1]
    return (*(caution.sentence for caution in known), *about_loss, *always)


def section_of(name: str, result: Any) -> Section:
    """Return the section of a page about one result; ``name`` is the name of the network, and may be empty."""
    ending = f": {name}" if name else ""
    if isinstance(result, Comparison):
        return _comparison(result)
    if isinstance(result, FlatnessReport):
        return _report(f"Flatness of layers{ending}", result)
    if isinstance(result, SpectrumResult):
        matrix = MATRICES[result.matrix]
        figures, notes = drawn(lambda: plots.plot_density(result), f"Spectral density of the {matrix}{ending}.")
        return Section(f"Spectrum of the {matrix}{ending}", (), (table_of(result.table()),), figures, notes)
    if isinstance(result, LandscapeResult):
        return _landscape(f"Loss landscape{ending}", result)
    return Section(f"{type(result).__name__}{ending}", (), (table_of(result.table()),))


def summary_of(name: str, result: Any) -> tuple[str, ...]:
    """Return sentences with the main numbers of a result, for the summary at the top of the page."""
    who = f"{name}: " if name else ""
    if isinstance(result, Comparison):
        return (result.verdict,)
    if isinstance(result, FlatnessReport):
        return (f"{who}{_report_sentence(result)}",)
    samples = number_of(result.num_samples, "sample") if hasattr(result, "num_samples") else ""
    if isinstance(result, SpectrumResult):
        size = number_of(result.num_parameters, "parameter")
        numbers = [f"largest eigenvalue {float(value):.4g}" for value in result.eigenvalues[:1]]
        if result.num_probes:
            numbers.append(f"trace {measured(result.trace, standard_error=result.trace_stderr)}")
        return (f"{who}{MATRICES[result.matrix]} of {size}, over {samples}: {', '.join(numbers)}.",)
    if isinstance(result, LandscapeResult):
        lowest = f"{result.lowest_loss:.4g} at the lowest point that was tried"
        return (f"{who}the loss is {result.origin_loss:.4g} at the weights, and {lowest}, over {samples}.",)
    return ()


def history_section(history: Sequence[Mapping[str, Any]]) -> Section:
    """Return the section with a figure and a table of the history of a training run.

    The section names the layers and data of the history, because reports on the same page may be about other layers or
    other data.
    """
    figures, notes = drawn(lambda: plots.plot_history(history), "Accuracy and flatness over the epochs of the run.")
    shown = {key: heading for key, heading in HISTORY.items() if any(record.get(key) is not None for record in history)}
    heads = (Head("epoch", True), *(Head(heading, True) for heading in shown.values()), Head("exact"))
    rows = tuple(
        (str(record.get("epoch", "")), *(_recorded(record, key) for key in shown), _is_exact(record))
        for record in history
    )
    table = Table(heads, rows, "±: standard error over samples.", "All numbers of the run", folded=True)
    last = history[-1]
    facts = {
        "Data": samples_of(last["num_samples"], last.get("data")) if "num_samples" in last else "",
        "Layers": named(last.get("layers", ())),
        "Measured": f"{len(history)} times" if len(history) > 1 else "once",
    }
    shown_facts = tuple((name, text) for name, text in facts.items() if text)
    return Section("The run, epoch by epoch", shown_facts, (table,), figures, notes)


def _recorded(record: Mapping[str, Any], key: str) -> str:
    value, error = record.get(key), record.get(f"{key}_error")
    return "-" if value is None else measured(float(value), math.nan if error is None else float(error))


def _is_exact(record: Mapping[str, Any]) -> str:
    return {None: "not known", True: "yes", False: "no"}[record.get("exact")]


def _comparison(result: Comparison) -> Section:
    """Return the section with the tables and figures of a comparison.

    The section leaves out the verdict and the cautions, because the top of the page shows these.
    """
    tables = [table_of(decision_table(result, has_caption=False), reading(result)), table_of(measures_table(result))]
    loss = "loss" if all(math.isnan(row.train_loss) for row in result.models.values()) else "train_loss"
    shown = ("normalized_relative_flatness", loss)  # more panels would be too small
    caption = f"Normalised relative flatness and {'training ' * (loss == 'train_loss')}loss of every model."
    figures, notes = drawn(lambda: plots.plot_comparison(result, shown), caption)
    if result.correlations:
        tables.append(table_of(correlation_table(result.correlations, result.outcome_name)))
        gap, more = drawn(lambda: plots.plot_gap(result), f"Normalised flatness and {result.outcome_name}.")
        figures, notes = (*figures, *gap), (*notes, *more)
    return Section("Comparison", (), tuple(tables), figures, notes)


def _report(title: str, report: FlatnessReport) -> Section:
    layers = report.layers.values()
    infos = [layer.info for layer in layers]
    deviation = max((info.deviation for info in infos), default=0.0)
    facts = {
        "Data": samples_of(report.num_samples, report.data),
        "Loss": f"{report.loss_name or 'loss'}, mean {report.shown('loss')}",
        "Accuracy": report.shown("accuracy"),
        "Layer" + "s" * (len(infos) > 1): named(map(_described, infos)),
        "Exact": _exactness(report),
        "Method": ", ".join(dict.fromkeys(METHODS[info.method] for info in infos)),
        "Checked against autograd": f"largest relative deviation {deviation:.0e}" if deviation else "no deviation",
        "Precision": precision_of(infos) if report.precision in ("bfloat16", "float16") else report.precision,
    }
    tenths = [layer.largest_tenth for layer in layers if not math.isnan(layer.largest_tenth)]
    if tenths:
        facts["Concentration"] = _concentration(max(tenths), len(tenths))
    if report.left_out:
        facts["Left out"] = "; ".join(report.left_out.values())
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()
    if len(layers) > 1:
        figures, notes = drawn(lambda: plots.plot_layers(report), "Relative flatness of the measured layers.")
    return Section(title, tuple(facts.items()), (table_of(report.table()),), figures, notes)


def _described(info: LayerInfo) -> str:
    weights = number_of(info.patch_length, "weight")
    return f"{info.name} ({info.kind}, {number_of(info.num_filters, 'filter')} of {weights})"


def _concentration(share: float, layers: int) -> str:
    """Return a text on the share of relative flatness that comes from the tenth of samples with the largest values."""
    where = " in one of the layers" if layers > 1 else ""
    doubt = "; so a few samples decide the number, and its standard error is rough" if share > MUCH else ""
    return f"one tenth of the samples contributes {100 * share:.0f} % of relative flatness{where}{doubt}"


def _landscape(title: str, result: LandscapeResult) -> Section:
    is_line = len(result.axes) == 1
    draw = plots.plot_line if is_line else plots.plot_contour
    caption = f"Mean loss on a {'line' if is_line else 'plane'} through the weights."
    figures, notes = drawn(lambda: draw(result), caption, filled=not is_line)
    return Section(title, (), (), figures, notes, points=tuple(str(result).splitlines()))


def _report_sentence(report: FlatnessReport) -> str:
    names = list(report.layers)
    where = f"layer {names[0]}" if len(names) == 1 else f"{number_of(len(names), 'layer')} (the sum)"
    numbers = f"relative flatness of {where} is {report.shown('relative_flatness')}"
    if not math.isnan(report.normalized_relative_flatness):
        numbers += f", normalised {report.shown('normalized_relative_flatness')}"
    exact = _exactness(report).removeprefix("yes" if report.exact else "no")
    return (
        f"{numbers} ({UNITS}), over {samples_of(report.num_samples, report.data)}. "
        f"{'Exact' if report.exact else 'Not exact'}{exact}"
    )


def _exactness(report: FlatnessReport) -> str:
    inexact = [layer.info for layer in report.layers.values() if not layer.exact]
    if not inexact:
        return "yes: these are the numbers of the full Hessian of the loss with respect to each layer's weights."
    texts = dict.fromkeys(sentence_of(info).partition(": ")[2] for info in inexact)
    count = f" for {len(inexact)} of {len(report.layers)} layers" if len(inexact) < len(report.layers) else ""
    return f"no{count}: {'; '.join(texts)}."
