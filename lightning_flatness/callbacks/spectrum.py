"""The callback that measures the spectrum of the Hessian of a network while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_flatness.callbacks.base import Record
from lightning_flatness.callbacks.data.sources import Samples
from lightning_flatness.callbacks.epoch_end import EpochEndCallback
from lightning_flatness.callbacks.labels import known
from lightning_flatness.callbacks.lightning_imports import LightningModule, Trainer
from lightning_flatness.measure.spectrum import SpectrumOptions, spectrum_of
from lightning_flatness.plots import plot_density, plot_eigenvalues
from lightning_flatness.results import SpectrumResult

CRITERIA = ("r_e", "k_hn", "c_t")
LOGGED = ("lambda_max", "trace", "trace_stderr", *CRITERIA, "exact", "seconds")


class SpectrumCallback(EpochEndCallback):
    """A callback that measures the spectrum of the Hessian after a fit and, on request, after every n-th epoch.

    It computes the largest eigenvalues, the trace, the spectral density, and Gabdullin's criteria of generalization
    ``r_e``, ``K_Hn`` and ``C_t``. It logs ``{prefix}/lambda_max`` and, with the same prefix, ``trace``,
    ``trace_stderr``, ``r_e``, ``k_hn``, ``c_t``, ``exact`` and ``seconds``. ``exact`` is 1 if the eigenvalues have
    converged and the matrix is the Hessian, and 0 otherwise.

    At the end of every n-th epoch, callbacks such as ``ModelCheckpoint`` can monitor these keys. At the end of the fit,
    only the loggers get them. Figures show the density, and the eigenvalues over the epochs. Every result is written to
    a file ``epoch=...-step=....npz``, which :meth:`SpectrumResult.load <lightning_flatness.SpectrumResult.load>` reads.

    Training with this callback is bit-identical to training without it, with few exceptions: ``docs/limits.md``,
    "Random numbers and side effects".

    At the end of the fit, the callback measures the final weights. If a callback such as Lightning's
    ``StochasticWeightAveraging`` or ``WeightAveraging`` puts averages into the network when training ends, the final
    weights are these averages. The order of the callbacks in the list does not matter.

    Args:
        data: ``"train"`` or ``"val"`` for a fixed random subset of the training or validation data, which a separate
            loader reads; or your own ``DataLoader`` or list of batches, of which every rank measures a part. The
            network is in evaluation mode. All samples stay in memory during a measurement.
        max_samples: number of samples over all ranks; by default 512, or all samples of a given loader or list.
            With a loader that has ``batch_size=None``, it is a number of batches.
        every_n_epochs: measure also after the first epoch, and after every n-th epoch from then on; None to measure
            only after the fit.
        params: names or glob patterns of parameters or modules; None for all parameters.
            :func:`~lightning_flatness.hessian_spectrum` explains this argument and the following ones up to ``dtype``.
        loss: name, module or function of the loss.
        label_smoothing: label smoothing of the cross-entropy.
        class_weight: class weights of the cross-entropy.
        ignore_index: target value that the cross-entropy ignores.
        matrix: ``"hessian"`` or ``"gauss_newton"``.
        top_k: number of largest eigenvalues to compute.
        num_steps: number of Lanczos steps for every random probe vector.
        num_probes: number of random probe vectors; with 0, only the eigenvalues are computed.
        exponent: exponent ``n`` of the criterion ``K_Hn``.
        tolerance: accepted residual ``‖H v - λ v‖`` of an eigenvalue ``λ``, relative to ``|λ|``.
        max_products: largest number of Hessian-vector products for the eigenvalues.
        seed: seed of the random probe vectors.
        dtype: floating-point type of the computation.
        prefix: prefix of the logged keys. Several callbacks in one Trainer need different prefixes.
        model: name of the LightningModule's attribute that is the network, e.g. ``"net"``, or a function that takes the
            LightningModule and returns the network; by default the network that the first validation step calls, or the
            first training step if there is no validation.
        batch_fn: function that takes a batch and returns ``(inputs, targets)``.
        folder: folder for the files; by default a new folder named ``prefix`` in the folder of the run. Loggers that
            store files get the files, too.
        eigenvectors: write the eigenvectors to the files, too: ``top_k`` vectors with one entry per parameter.
        figures: ``"auto"`` to give figures to every logger that takes figures, and to write PNG files for the other
            loggers; ``"files"`` for PNG files only; False for none. See ``docs/loggers.md``.
        figures_every: draw after every n-th measurement, and at the end; None to draw only at the end.
        on_error: ``"raise"``, or ``"warn"`` to go on training after an error.

    Attributes:
        history: one record for every measurement of a fit, saved in checkpoints. A record is a dict with ``epoch``,
            ``step`` and the logged values (None if unknown). ``r_e_std`` and so on are standard deviations over the
            probes. ``residuals`` has one entry for each of the ``eigenvalues``, which
            :func:`~lightning_flatness.plots.plot_eigenvalues` draws. ``data``, ``num_samples``, ``matrix``,
            ``num_probes`` and ``num_steps`` say what was measured, and how.
        result: the latest measurement, a :class:`~lightning_flatness.SpectrumResult`.

    Raises:
        FlatnessError: An argument is invalid, or the network or data cannot be measured (checked before training).

    Source:
        Gabdullin 2024 (arXiv 2412.10146) and 2025 (arXiv 2504.17618) for the criteria; Ghorbani, Krishnan and Xiao 2019
        (arXiv 1901.10159) for the density.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[SpectrumCallback()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        data: Literal["val", "train"] | Iterable[Any] = "train",
        max_samples: int | None = None,
        every_n_epochs: int | None = None,
        params: str | list[str] | None = None,
        # Function types come first, since a command line uses the first type that fits.
        loss: Callable[[Tensor, Tensor], Tensor] | nn.Module | str = "cross_entropy",
        label_smoothing: float = 0.0,
        class_weight: list[float] | None = None,
        ignore_index: int = -100,
        matrix: Literal["hessian", "gauss_newton"] = "hessian",
        top_k: int = 5,
        num_steps: int = 30,
        num_probes: int = 4,
        exponent: float = 0.5,
        tolerance: float | None = None,
        max_products: int = 500,
        seed: int = 0,
        dtype: Literal["float32", "float64"] | None = None,
        prefix: str = "spectrum",
        model: Callable[[Any], Any] | str | None = None,
        batch_fn: Callable[[Any], tuple[Any, Tensor | None]] | None = None,
        folder: str | None = None,
        eigenvectors: bool = False,
        figures: bool | Literal["auto", "files"] = "auto",
        figures_every: int | None = 1,
        on_error: Literal["raise", "warn"] = "raise",
    ) -> None:
        shared = (data, max_samples, prefix, model, batch_fn, figures, figures_every, on_error)
        super().__init__("spectrum", every_n_epochs, folder, *shared)
        self._options = SpectrumOptions(
            loss=loss,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            ignore_index=ignore_index,
            params=params,
            matrix=matrix,
            top_k=top_k,
            num_steps=num_steps,
            num_probes=num_probes,
            exponent=exponent,
            tolerance=tolerance,
            max_products=max_products,
            seed=seed,
            dtype=dtype,
        )
        self.eigenvectors = eigenvectors
        self.result: SpectrumResult | None = None
        self._stored: SpectrumResult | None = None  # of the measurement in progress
        self._is_told = False  # whether a warning has said that eigenvalues have not converged

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new history, and warn if gradients are clipped."""
        self.result, self._is_told = None, False
        super().on_fit_start(trainer, pl_module)
        if trainer.gradient_clip_val:
            rank_zero_warn(
                f"SpectrumCallback: gradients are clipped (gradient_clip_val={trainer.gradient_clip_val}). Where "
                "gradients are changed, r_e, K_Hn and C_t do not indicate generalization (Gabdullin 2025, arXiv "
                "2504.17618). Eigenvalues, trace and density stay valid."
            )

    def _try(self, trainer: Trainer, network: nn.Module, batches: list[Samples]) -> None:
        one_product = replace(self._options, top_k=0, num_steps=1, num_probes=1)
        spectrum_of(network, batches, one_product, progress=False, sync=True, say=None)

    def _compute(self, trainer: Trainer, network: nn.Module, batches: list[Samples], progress: bool | None) -> Record:
        say = self._say if self.result is None else None  # print the expected effort once in a run
        result = self._stored = spectrum_of(network, batches, self._options, progress, True, say)
        if not result.converged and not self._is_told:
            self._is_told = True
            rank_zero_warn(
                f"SpectrumCallback: the eigenvalues have not converged, and '{self.prefix}/exact' is 0 (the largest "
                f"residual is {float(result.residuals.max()):.2g}). Increase max_products=."
            )
        values = result.eigenvalues.tolist()
        return {
            "data": self._data_name,
            "num_samples": result.num_samples,
            "matrix": result.matrix,
            "exact": result.matrix == "hessian" and result.converged,
            "lambda_max": values[0] if values else None,
            **{name: float(getattr(result, name)) if result.num_probes else None for name in ("trace", *CRITERIA)},
            "trace_stderr": known(result.trace_stderr),
            **{f"{name}_std": known(result.spread[name]) for name in CRITERIA},
            "kind": result.kind,
            "eigenvalues": values,
            "residuals": result.residuals.tolist(),
            "lowest_ritz_value": float(result.ritz_values.min()) if result.num_probes else None,
            "num_steps": result.num_steps,
            "num_probes": result.num_probes,
            "loss": result.loss,
            "loss_name": result.loss_name,
            "weight_norm": result.weight_norm,
            "converged": result.converged,
            "seconds": result.seconds,
        }

    def _accept(self) -> None:
        self.result = self._stored

    def _logged(self, record: Record) -> dict[str, float]:
        return {name: float(record[name]) for name in LOGGED if record.get(name) is not None}

    def _write(self, stem: Path) -> list[Path]:
        result = self._stored
        assert result is not None
        kept = result if self.eigenvectors else replace(result, eigenvectors=result.eigenvectors[:0])
        return [kept.save(f"{stem}.npz")]

    def _figures(self) -> dict[str, Any]:
        assert self.result is not None
        probed = self.result.num_probes > 0
        figures = {"density": plot_density(self.result, data=self._data_name)[0]} if probed else {}
        if len(self.history) > 1:
            figures["eigenvalues"] = plot_eigenvalues(self.history, data=self._data_name)[0]
        return figures
