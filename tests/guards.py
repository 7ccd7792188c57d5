"""Take the guards of the package out, one at a time: every time a test must fail.

    python tests/guards.py                  all of them
    python tests/guards.py "random state"   those that have this in their description
    python tests/guards.py --table          the table of tests/README.md

A guard is a line or two that keep a user's training as it is, or a number right. Here each has a snippet of the source,
what stands there without the guard, and the test that sees it. Nothing is changed in place: package and tests are
copied to a temporary folder.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).parents[1]
PARTS = ("lightning_flatness", "tests", "pyproject.toml")
SECONDS = 600
TESTS_FAILED = 1  # pytest's exit code; 2 to 5 are errors of collection or usage, or that nothing ran


@dataclass(frozen=True)
class Guard:
    what: str
    file: str  # in lightning_flatness/
    before: str  # occurs once
    after: str  # what stands there without the guard
    test: str  # a pytest node in tests/, or a file and -k

    @property
    def path(self):
        return Path("lightning_flatness", self.file)

    @property
    def arguments(self):
        node, *expression = self.test.split(" -k ")
        return [f"tests/{node}", *(["-k", *expression] if expression else [])]

    def removed_from(self, source):
        """The source without the guard."""
        if source.count(self.before) != 1:
            raise ValueError(
                f"The guard '{self.what}' is out of date: its snippet occurs {source.count(self.before)} times in "
                f"{self.path}."
            )
        return source.replace(self.before, self.after)


NO_TRACE = "properties/test_no_trace.py::"
AS_IT_WAS = f"{NO_TRACE}test_everything_is_as_it_was"
IN_A_MODE = "model/test_isolation.py::test_numbers_do_not_depend_on_the_mode_around"
CALLBACK = "callbacks/test_flatness_callback.py::"
IDENTICAL = "callbacks/test_bit_identical.py::test_training_is_bit_identical"
SIDE_EFFECTS = "callbacks/test_side_effects.py::"
LOADERS = "callbacks/test_odd_loaders.py::"
STREAM = "callbacks/test_stream.py::"
ON_ERROR = "callbacks/test_on_error.py::"
STOPPING = "callbacks/test_flatness_stopping.py::"
METRIC = "measure/test_metric.py::"
LIVE = "callbacks/test_live.py::"
LIVE_PASS = "layers/test_live.py::"
EPOCHS = "callbacks/test_at_epochs.py::"
SPECTRUM = "callbacks/test_spectrum_callback.py::"
LANDSCAPE = "callbacks/test_landscape_callback.py::"
ROOTS = "callbacks/test_import_roots.py::"

ISOLATION = [
    Guard(
        "what a forward sets is taken away",
        "model/isolation.py",
        "                del now[name]\n",
        "                pass\n",
        f"{SIDE_EFFECTS}test_attributes_are_put_back_when_the_forward_fails",
    ),
    Guard(
        "a forward writes to copies of attributes",
        "model/isolation.py",
        "elif type(value) is list:",
        "elif False:",
        f"{SIDE_EFFECTS}test_forward_that_counts[val-2]",
    ),
    Guard(
        "generators of a model",
        "model/isolation.py",
        "stack.enter_context(generators_kept(model))",
        "pass",
        f"{SIDE_EFFECTS}test_network_with_generators_of_its_own[val-2]",
    ),
    Guard(
        "out of memory: halves",
        "layers/passes.py",
        "if not is_out_of_memory(error):",
        "if True:",
        "layers/test_parts.py::test_when_memory_runs_out_halves_are_measured",
    ),
    Guard(
        "changes in place are refused by name",
        "layers/passes.py",
        'if "modified by an inplace operation" in str(error):',
        "if False:",
        "layers/test_recording.py::test_inputs_that_are_changed_in_place_afterwards",
    ),
    Guard(
        "casts in the forward are refused by name",
        "layers/passes.py",
        'if not is_out_of_memory(error) and "type" in str(error) and self._is_cast:',
        "if False:",
        "properties/test_refusals.py::test_forward_that_casts_to_half_precision",
    ),
    Guard(
        "a random forward is refused",
        "layers/passes.py",
        "_certify_deterministic(self._execution.logits[start : start + rows], logits[:rows].detach())",
        "pass",
        "layers/test_recording.py::test_noise_in_the_forward_is_refused",
    ),
]

OBSERVATION = [
    Guard(
        "hooks are removed after an error",
        "layers/recording.py",
        "for handle in self._handles:",
        "for handle in self._handles if error[0] is None else ():",
        f"{AS_IT_WAS}[plain-tail_fails_when_observed]",
    ),
    Guard(
        "hooks that see what runs are removed after an error",
        "layers/selection.py",
        "    finally:\n        for handle in handles:\n            handle.remove()\n",
        "    except ZeroDivisionError:\n        pass\n    for handle in handles:\n        handle.remove()\n",
        f"{AS_IT_WAS}[plain-tail_fails]",
    ),
    Guard(
        "function modes of layers are left after an error",
        "layers/recording.py",
        "        while self._recorders:\n            self._stop_recording()\n",
        "",
        f"{AS_IT_WAS}[plain-layer_fails_when_observed]",
    ),
    Guard(
        "function mode of the model is left after an error",
        "layers/recording.py",
        "        self._watch.__exit__(None, None, None)",
        "        if error[0] is None:\n            self._watch.__exit__(None, None, None)",
        f"{AS_IT_WAS}[plain-tail_fails_when_observed]",
    ),
    Guard(
        "grad mode is put back",
        "layers/recording.py",
        "torch.set_grad_enabled(self._grad_mode)",
        "pass",
        "layers/test_recording.py::test_observing_puts_the_grad_mode_back",
    ),
    Guard(
        "activations in place write to a copy",
        "layers/recording.py",
        "return output.clone()",
        "return output",
        "properties/test_exactness.py::test_random_networks_match_the_autograd_hessian",
    ),
]

METRICS = [
    Guard(
        "sums out of place",
        "measure/metric.py",
        "self.block_traces = self.block_traces + block_traces.to(self.block_traces)",
        "self.block_traces += block_traces.to(self.block_traces)",
        f"{METRIC}test_created_and_reset_inside_inference_mode",
    ),
    Guard(
        "sums in float64",
        "measure/metric.py",
        "if self.block_traces.dtype != torch.float64:",
        "if False:",
        f"{METRIC}test_a_cast_that_torchmetrics_lets_through_is_refused_at_the_next_update",
    ),
    Guard(
        "what other ranks have measured",
        "measure/flatness.py",
        "gather((self.layers, self.left_out)) if layers]",
        "[(self.layers, self.left_out)] if layers]",
        f"{METRIC}test_a_rank_without_batches_reports_the_whole",
    ),
    Guard(
        "what an observer returns is not of inference mode",
        "layers/observer.py",
        "with torch.inference_mode(False):\n            if diagonal:",
        "if True:\n            if diagonal:",
        "layers/test_observer.py::test_under_inference_mode_it_is_the_same",
    ),
    Guard(
        "what an observer returns is its caller's",
        "layers/observer.py",
        "weight_gram=self.weight_gram.clone()",
        "weight_gram=self.weight_gram",
        "layers/test_observer.py::test_what_is_returned_may_be_written_to",
    ),
    Guard(
        "what lies there between batches is small",
        "functional/symmetric.py",
        "return torch.cat([symmetric[:, row : row + size, row:].flatten(1)",
        "return torch.cat([symmetric[:, row : row + size].flatten(1)",
        "layers/test_parts.py::test_between_batches_there_are_halves_of_symmetric_matrices",
    ),
    Guard(
        "a rank without batches",
        "measure/flatness.py",
        "if info.name in self._sums:",
        "if True:",
        f"{METRIC}test_a_rank_without_batches_reports_the_whole",
    ),
    Guard(
        "what one rank has labelled is labelled",
        "measure/flatness.py",
        "merged([layers[name] for layers, _ in found])",
        "found[0][0][name]",
        f"{METRIC}test_what_one_rank_has_labelled_is_labelled_on_all",
    ),
    Guard(
        "ranks with other layers are refused",
        "measure/flatness.py",
        "if layers.keys() != found[0][0].keys():",
        "if False:",
        f"{METRIC}test_ranks_that_measure_other_layers_are_refused",
    ),
    Guard(
        "reading a loader draws nothing",
        "measure/flatness.py",
        "stack.enter_context(random_states_kept(model))",
        "pass",
        f"{NO_TRACE}test_reading_a_loader_draws_nothing",
    ),
]

SAMPLES = [
    Guard(
        "samples that a DistributedSampler repeats",
        "callbacks/stream.py",
        "everything &= positions < shard.length",
        "pass",
        f"{STREAM}test_all_ranks_together_measure_every_sample_once",
    ),
    Guard(
        "max_samples over all ranks",
        "callbacks/stream.py",
        "share[positions[self._rank :: self._num_ranks]] = True",
        "share[positions] = True",
        f"{STREAM}test_ranks_share_the_samples_that_one_process_measures",
    ),
    Guard(
        "every class in its share",
        "callbacks/strata.py",
        "    if labels is None:\n        return order[:chosen]",
        "    if True:\n        return order[:chosen]",
        "callbacks/test_strata.py::test_every_class_has_its_share",
    ),
    Guard(
        "batches in an order of their own",
        "callbacks/stream.py",
        "        if not self._in_order:\n            return None\n",
        "",
        f"{STREAM}test_batches_in_an_order_of_their_own_are_all_measured_with_a_warning[even batches]",
    ),
    Guard(
        "batches of another size",
        "callbacks/stream.py",
        "        if rows != min(self._batch_size, own - before):\n            return None\n",
        "",
        f"{STREAM}test_a_collate_function_that_drops_samples",
    ),
    Guard(
        "a warning where samples are not known",
        "callbacks/stream.py",
        '                self._warn("their sizes',
        '                str("their sizes',
        f"{STREAM}test_batches_in_an_order_of_their_own_are_all_measured_with_a_warning",
    ),
    Guard(
        "a warning where loaders are combined",
        "callbacks/stream.py",
        '                self._warn("the loaders are combined")\n',
        "                pass\n",
        f"{LOADERS}test_combined_loaders_on_several_ranks_are_warned_of",
    ),
    Guard(
        "combined loaders",
        "callbacks/loaders.py",
        'return flat_loaders(loaders) if getattr(combined, "_mode", "sequential") == "sequential" else []',
        "return flat_loaders(loaders)",
        f"{LOADERS}test_combined_validation_loaders",
    ),
    Guard(
        "a first batch of known samplers only",
        "callbacks/loaders.py",
        "if not is_indexed(loader) or not keeps_order(loader) or type(sampler_of(loader)) not in known:",
        "if not is_indexed(loader) or not keeps_order(loader):",
        f"{LOADERS}test_samples_that_an_unknown_sampler_leaves_out_are_not_certified_on",
    ),
    Guard(
        "the user's loader is not iterated",
        "callbacks/subset.py",
        "self._loader = own_loader(loader, allowed[drawn][self._share].tolist())",
        "self._loader = loader",
        f"{CALLBACK}test_training_loader_is_iterated_by_the_trainer_alone",
    ),
    Guard(
        "random states while a subset is read",
        "callbacks/loaders.py",
        "with random_states_kept(model), generators_kept(",
        "with generators_kept(",
        f"{IDENTICAL}[augmentation-train]",
    ),
    Guard(
        "generators of data sets",
        "callbacks/loaders.py",
        "with random_states_kept(model), generators_kept(drawing(batches)):",
        "with random_states_kept(model):",
        f"{IDENTICAL}[data set with a generator-train]",
    ),
    Guard(
        "random states while other batches are read",
        "callbacks/loaders.py",
        "with random_states_kept(model), generators_kept(",
        "with generators_kept(",
        "callbacks/test_given_data.py::test_given_data_is_measured_without_a_trace[stream]",
    ),
    Guard(
        "random transforms draw the same in every epoch",
        "callbacks/loaders.py",
        "            _seed(index)\n",
        "",
        f"{CALLBACK}test_random_transforms_draw_the_same_in_every_epoch[0]",
    ),
    Guard(
        "samples that a sampler leaves out",
        "callbacks/subset.py",
        'indices = getattr(sampler, "indices", None)',
        "indices = None",
        f"{CALLBACK}test_samples_that_a_sampler_leaves_out_are_not_measured[sampler]",
    ),
    Guard(
        "a data set's order is that of its batches",
        "callbacks/loaders.py",
        "return keeps_order(loader) and isinstance(sampler, SequentialSampler)",
        "return isinstance(sampler, SequentialSampler)",
        f"{LOADERS}test_classes_of_batches_in_an_order_of_their_own",
    ),
    Guard(
        "a worker is let go after the first look",
        "callbacks/source.py",
        "        self._subset.restart(pl_module)  # lets go of a worker process\n",
        "",
        "callbacks/test_given_data.py::test_no_worker_runs_on_beside_training",
    ),
    Guard(
        "training data that is never trained on",
        "callbacks/subset.py",
        "if reads_in_order(loader) else math.inf",
        "if False else math.inf",
        f"{SIDE_EFFECTS}test_training_data_that_is_never_trained_on_is_not_measured",
    ),
    Guard(
        "a measured forward logs nothing",
        "callbacks/logged.py",
        "        attributes.update(dict.fromkeys(LOGGING, _nothing))\n",
        "        pass\n",
        f"{SIDE_EFFECTS}test_forward_that_logs[val-2]",
    ),
    Guard(
        "a module's own way to log is put back",
        "callbacks/logged.py",
        "            attributes.update(before)\n",
        "",
        f"{SIDE_EFFECTS}test_a_modules_own_way_to_log_is_put_back",
    ),
    Guard(
        "training data only in fit",
        "callbacks/flatness_callback.py",
        'if self._due and self._data_name == "train" and trainer.state.fn != "fit":',
        "if False:",
        f"{CALLBACK}test_training_data_is_not_measured_by_validate",
    ),
]

IN_TRAINING = [
    Guard(
        "the sanity check is not in the history",
        "callbacks/flatness_callback.py",
        "self._due = not trainer.sanity_checking and self._is_due(trainer)",
        "self._due = self._is_due(trainer)",
        f"{CALLBACK}test_sanity_check_is_not_in_the_history[2]",
    ),
    Guard(
        "logged before monitors look",
        "callbacks/flatness_callback.py",
        '''sees it in the same epoch."""
        self._finish(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
''',
        '''sees it in the same epoch."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module)
''',
        f"{CALLBACK}test_monitors_see_the_value_of_this_validation[{{}}-last]",
    ),
    Guard(
        "batches are measured while weights are averaged",
        "callbacks/flatness_callback.py",
        """            return
        self._advance(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
""",
        """            return
        self._later = [*getattr(self, "_later", []), (batch, batch_idx, dataloader_idx)]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for arguments in vars(self).pop("_later", []):
            self._advance(trainer, pl_module, *arguments)
""",
        f"{CALLBACK}test_averaged_weights_are_measured[last]",
    ),
    Guard(
        "every_n_epochs",
        "callbacks/flatness_callback.py",
        "return trainer.current_epoch == last or trainer.current_epoch - last >= self.every_n_epochs",
        "return True",
        f"{CALLBACK}test_every_n_epochs",
    ),
    Guard(
        "logged again after a resume",
        "callbacks/flatness_callback.py",
        "            self._log_again(trainer, pl_module)\n",
        "",
        "callbacks/test_random_trainers.py::test_resume_at_an_epoch_that_is_not_measured",
    ),
    Guard(
        "states in checkpoints by prefix",
        "callbacks/flatness_callback.py",
        'return f"FlatnessCallback[prefix={self.prefix}]"',
        'return "FlatnessCallback"',
        f"{CALLBACK}test_two_callbacks_with_different_prefixes",
    ),
    Guard(
        "the history is plain numbers",
        "callbacks/flatness_callback.py",
        "return None if logged is None else float(logged)",
        "return logged",
        f"{CALLBACK}test_history_is_plain_numbers",
    ),
    Guard(
        "a checkpoint's history only in fit",
        "callbacks/flatness_callback.py",
        'if self._stage in (None, "fit"):',
        "if True:",
        f"{CALLBACK}test_validating_a_checkpoint_leaves_the_history",
    ),
    Guard(
        "a second fit begins a new history",
        "callbacks/flatness_callback.py",
        "        if not self._restored:\n            self.history = []\n",
        "",
        f"{CALLBACK}test_second_fit_starts_a_new_history",
    ),
    Guard(
        "a fit after a resumed one begins a new history",
        "callbacks/flatness_callback.py",
        "        self._restored = False\n        self.report = None\n",
        "        self.report = None\n",
        f"{CALLBACK}test_a_fit_after_a_resumed_one_starts_a_new_history",
    ),
    Guard(
        "one layout of charts",
        "callbacks/flatness_callback.py",
        "if not any(callback._chart_laid_out for callback in callbacks):",
        "if True:",
        "callbacks/test_tensorboard.py::test_two_callbacks_are_both_in_the_charts",
    ),
    Guard(
        "accuracy that the module logs later",
        "callbacks/flatness_callback.py",
        "                self._accuracy_missing = True\n",
        "",
        f"{CALLBACK}test_history_without_validation_pairs_flatness_with_accuracy_of_the_epoch",
    ),
    Guard(
        "certified before training",
        "callbacks/flatness_callback.py",
        "None if self._certified else self._source.preview(trainer, pl_module)",
        "None",
        f"{CALLBACK}test_bad_model_is_refused_before_the_first_training_step[0-{{}}-val]",
    ),
    Guard(
        "the summary on rank zero only",
        "callbacks/flatness_callback.py",
        "and self._certified and trainer.is_global_zero:",
        "and self._certified:",
        f"{CALLBACK}test_summary_is_printed_on_rank_zero_only",
    ),
    Guard(
        "ranks have probes of their own",
        "measure/flatness.py",
        " + 1000 * own_rank()",
        "",
        f"{CALLBACK}test_ranks_have_probes_of_their_own",
    ),
    Guard(
        "data and model are let go at the end",
        "callbacks/flatness_callback.py",
        "        self._stage = None\n        self._let_go()\n",
        "        self._stage = None\n",
        f"{CALLBACK}test_data_and_model_are_let_go[train-Classifier]",
    ),
    Guard(
        "data and model are let go after an error",
        "callbacks/flatness_callback.py",
        "        self._let_go()\n        if isinstance(exception, KeyboardInterrupt)",
        "        if isinstance(exception, KeyboardInterrupt)",
        f"{CALLBACK}test_data_and_model_are_let_go[val-Failing]",
    ),
]

ERRORS = [
    Guard(
        "no rank raises alone",
        "callbacks/faults.py",
        'if num_ranks == 1 and self._on_error == "raise":',
        'if self._on_error == "raise":',
        f"{ON_ERROR}test_the_first_error_is_kept_for_all_ranks[raise]",
    ),
    Guard(
        "a process that is alone raises at once",
        "callbacks/faults.py",
        'if num_ranks == 1 and self._on_error == "raise":',
        "if False:",
        f"{ON_ERROR}test_alone_errors_are_raised_at_once",
    ),
    Guard(
        'on_error="warn"',
        "callbacks/faults.py",
        '        if self._on_error == "raise":\n            raise FlatnessError',
        "        if True:\n            raise FlatnessError",
        f"{ON_ERROR}test_an_error_of_another_rank_counts[warn]",
    ),
    Guard(
        "errors of all ranks",
        "callbacks/faults.py",
        "messages = gather(self._message)",
        "messages = [self._message]",
        f"{ON_ERROR}test_an_error_of_another_rank_counts",
    ),
    Guard(
        "the first error is kept",
        "callbacks/faults.py",
        'self._message = self._message or f"{kind}{error}"',
        'self._message = f"{kind}{error}"',
        f"{ON_ERROR}test_the_first_error_is_kept_for_all_ranks",
    ),
    Guard(
        "an error is settled once",
        "callbacks/faults.py",
        "        self.clear()\n        failed",
        "        failed",
        f"{ON_ERROR}test_the_first_error_is_kept_for_all_ranks",
    ),
    Guard(
        "a new fit tells a failure anew",
        "callbacks/flatness_callback.py",
        "        self._faults.forget()\n",
        "",
        f"{ON_ERROR}test_a_new_fit_tells_a_failure_anew",
    ),
    Guard(
        "a failure that lasts is told once",
        "callbacks/faults.py",
        "if message != self._warned:",
        "if True:",
        f"{ON_ERROR}test_training_goes_on_with_a_warning",
    ),
]

AT_EPOCHS = [
    Guard(
        "at epochs: what a forward logs is not logged",
        "callbacks/at_epochs.py",
        "with self._faults.kept(trainer.world_size), logging_muted(pl_module):",
        "with self._faults.kept(trainer.world_size):",
        f"{EPOCHS}test_what_a_forward_logs_is_not_logged",
    ),
    Guard(
        "at epochs: a trial before training",
        "callbacks/at_epochs.py",
        "self._try(trainer, find_network(pl_module, self.model), batches)",
        "pass",
        f"{SPECTRUM}test_unknown_parameters_are_refused_before_the_first_epoch",
    ),
    Guard(
        "at epochs: the history goes on after a resume",
        "callbacks/at_epochs.py",
        "if not self._restored:",
        "if True:",
        f"{EPOCHS}test_a_resumed_run_goes_on_with_the_history",
    ),
    Guard(
        "at epochs: the last values after a resume",
        "callbacks/at_epochs.py",
        "elif self.history and self.every_n_epochs is not None:",
        "elif False:",
        f"{SPECTRUM}test_a_resumed_run_where_nothing_is_due_has_the_last_values",
    ),
    Guard(
        "at epochs: averaged weights are measured once they are in place",
        "callbacks/at_epochs.py",
        "elif (not done or self._averaged(trainer)) and self._ready(final=True):",
        "elif not done and self._ready(final=True):",
        f"{SPECTRUM}test_weight_averaging",
    ),
    Guard(
        "at epochs: an error keeps what was computed",
        "callbacks/at_epochs.py",
        "                self._write_files(trainer, name, where)\n                raise",
        "                raise",
        f"{LANDSCAPE}test_an_error_at_a_point_keeps_what_was_computed",
    ),
    Guard(
        "at epochs: Ctrl-C while measuring ends the training",
        "callbacks/at_epochs.py",
        "if self._interrupted and not final:",
        "if False:",
        f"{LANDSCAPE}test_an_interrupt_in_training_ends_it_and_keeps_what_was_computed",
    ),
    Guard(
        "at epochs: Ctrl-C in training keeps the figures",
        "callbacks/at_epochs.py",
        'if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit":',
        "if False:",
        f"{EPOCHS}test_an_interrupted_run_keeps_what_it_has",
    ),
    Guard(
        "at epochs: no files in a trial run",
        "callbacks/at_epochs.py",
        'if getattr(trainer, "fast_dev_run", False):',
        "if False:",
        f"{EPOCHS}test_trial_run",
    ),
    Guard(
        "trajectory: weights are copied",
        "callbacks/trajectory.py",
        '.to("cpu", copy=True)',
        '.to("cpu")',
        f"{LANDSCAPE}test_the_trajectory_is_that_of_the_weights",
    ),
    Guard(
        "landscape: BatchNorm's modes are put back",
        "model/points.py",
        "            norm.training, norm.momentum = training, momentum",
        "            pass",
        "measure/test_landscape.py::test_recomputed_statistics",
    ),
    Guard(
        "landscape: what fails in vmap is taken point by point",
        "model/points.py",
        "                self._vectorized = False\n",
        "                raise\n",
        "measure/test_landscape.py::test_where_vmap_fails_points_are_taken_one_by_one",
    ),
    Guard(
        "generators of a loader that is read here",
        "measure/batches.py",
        "    with generators_kept(drawing(batches)):\n",
        "    if True:\n",
        "measure/test_spectrum.py::test_generators_of_a_loader_and_its_data_are_left_as_they_were",
    ),
    Guard(
        "spectrum: autocast is off",
        "measure/spectrum.py",
        "with random_states_kept(model), differentiable(model), torch.no_grad():",
        "with random_states_kept(model), torch.inference_mode(False), torch.no_grad():",
        "measure/test_spectrum_refusals.py::test_inference_mode_and_autocast_around_it",
    ),
    Guard(
        "landscape: a loss that changes between passes",
        "measure/landscape.py",
        "data.check(float(sums[0, index]))",
        "pass",
        "measure/test_landscape.py::test_a_loss_that_changes_between_passes_keeps_what_was_computed",
    ),
    Guard(
        "landscape: recomputed statistics are resumed on the same batches",
        "measure/landscape.py",
        'fingerprint=points.fingerprint(data.batch_sizes if batch_norm == "recomputed" else None),',
        "fingerprint=points.fingerprint(),",
        "measure/test_landscape.py::test_recomputed_statistics_are_resumed_on_the_same_batches",
    ),
    Guard(
        "spectrum: products are symmetric",
        "measure/spectrum.py",
        "if quadrature.asymmetry > 10 * math.sqrt(torch.finfo(dtype).eps):",
        "if False:",
        "measure/test_spectrum.py::test_weight_norm_is_named",
    ),
]

AROUND = [
    Guard(
        "TensorBoard loggers of both roots",
        "callbacks/tensorboard.py",
        'for root in ROOTS if f"{root}.loggers" in sys.modules]',
        'for root in ROOTS[:1] if f"{root}.loggers" in sys.modules]',
        f"{ROOTS}test_both_names_of_lightning[second-pytorch_lightning]",
    ),
    Guard(
        "no callback unless the environment asks",
        "callbacks/entry_point.py",
        'if os.environ.get(VARIABLE, "0") in ("", "0")',
        "if False",
        f"{ROOTS}test_no_callback_unless_the_environment_asks",
    ),
    Guard(
        "a callback of the user comes first",
        "callbacks/entry_point.py",
        "if any(isinstance(callback, FlatnessCallback) and callback is not self for callback in registered):",
        "if False:",
        f"{ROOTS}test_a_callback_of_the_user_comes_before_that_of_the_environment",
    ),
    Guard(
        "stopping: burn-in",
        "callbacks/flatness_stopping.py",
        "        if trainer.current_epoch < self.burn_in:\n            return\n",
        "",
        f"{STOPPING}test_burn_in_is_ignored[1]",
    ),
    Guard(
        "stopping: no value counts twice",
        "callbacks/flatness_stopping.py",
        "        if not self._is_new(trainer):\n            return\n",
        "",
        f"{STOPPING}test_a_stale_value_does_not_count",
    ),
    Guard(
        "stopping: a callback of its own in the next fit",
        "callbacks/flatness_stopping.py",
        "callback.num_measurements != self._seen",
        "callback.num_measurements > self._seen",
        f"{STOPPING}test_the_next_fit_may_have_another_callback",
    ),
    Guard(
        "stopping: mean over ranks",
        "callbacks/flatness_stopping.py",
        'trainer.strategy.reduce(value, reduce_op="mean").cpu()',
        "value.cpu()",
        f"{STOPPING}test_the_mean_over_ranks_counts",
    ),
    Guard(
        "stopping: ranks stop together",
        "callbacks/flatness_stopping.py",
        "if trainer.strategy.reduce_boolean_decision(stop, all=False):",
        "if stop:",
        f"{STOPPING}test_all_ranks_stop_with_one",
    ),
    Guard(
        "stopping: both have stalled",
        "callbacks/flatness_stopping.py",
        "stalled = min(",
        "stalled = max(",
        f"{STOPPING}test_stops_only_when_both_have_stalled",
    ),
    Guard(
        "stopping: values that are not finite",
        "callbacks/flatness_stopping.py",
        "if self.check_finite and not torch.isfinite(value)",
        "if False",
        f"{STOPPING}test_values_that_are_not_finite_stop_at_once[flatness-nan]",
    ),
    Guard(
        "stopping: the sanity check does not count",
        "callbacks/flatness_stopping.py",
        'if trainer.state.fn != "fit" or trainer.sanity_checking or',
        'if trainer.state.fn != "fit" or',
        f"{STOPPING}test_sanity_check_does_not_count[2]",
    ),
    Guard(
        "stopping: resume",
        "callbacks/flatness_stopping.py",
        'watched.best, watched.wait_count = kept["best"], kept["wait_count"]',
        "pass",
        f"{STOPPING}test_resume_equals_an_uninterrupted_run[10]",
    ),
    Guard(
        "stopping: the patience given now",
        "callbacks/flatness_stopping.py",
        "        self.patience = patience\n        for",
        "        for",
        f"{STOPPING}test_patience_of_a_resumed_run_is_the_one_given_now",
    ),
]

LIVE_FORWARDS = [
    Guard(
        "live: the network's forward is put back",
        "layers/live.py",
        '                del vars(module)["forward"]\n                vars(module).update(own)\n',
        "                pass\n",
        f"{LIVE}test_nothing_stays_after_a_batch[every batch]",
    ),
    Guard(
        "live: modes after an observed pass",
        "layers/live.py",
        "with torch.inference_mode(torch.is_inference_mode_enabled()), torch.no_grad():",
        "if True:",
        f"{LIVE_PASS}test_modes_are_put_back_where_a_layer_has_a_mode_of_its_own",
    ),
    Guard(
        "live: what fails with gradients runs again without",
        "layers/live.py",
        "self.seen.layers and isinstance(error, RuntimeError)",
        "False",
        f"{LIVE}test_forward_that_fails_with_gradients_on_some_batches_only",
    ),
    Guard(
        "live: an error of the user is theirs",
        "layers/live.py",
        '                self.reason = "the network raised an error"\n                raise\n',
        "                pass\n",
        f"{LIVE}test_error_that_is_caught",
    ),
    Guard(
        "live: one call in a batch",
        "layers/live.py",
        "if self._num_calls > 1:",
        "if False:",
        f"{LIVE}test_validation_step[CallsAgain]",
    ),
    Guard(
        "live: on the inputs of the batch",
        "layers/live.py",
        "not _are(self.inputs, arguments, keywords)",
        "False",
        f"{LIVE}test_validation_step[CallsOnOthersToo]",
    ),
    Guard(
        "live: one observation at a time",
        "layers/live.py",
        "        if Listener._observing:\n",
        "        if False:\n",
        f"{LIVE}test_two_callbacks_one_within_the_other",
    ),
    Guard(
        "live: one listener on a network",
        "layers/live.py",
        "if isinstance(module.forward, _Forward):",
        "if False:",
        f"{LIVE}test_two_callbacks",
    ),
    Guard(
        "live: not where gradients are recorded",
        "layers/live.py",
        "if torch.is_grad_enabled():",
        "if False:",
        f"{LIVE}test_validation_step_with_gradients",
    ),
    Guard(
        "live: not under autocast",
        "layers/live.py",
        "if any(map(torch.is_autocast_enabled, device_types)):",
        "if False:",
        f"{LIVE}test_validation_step[Autocast]",
    ),
    Guard(
        "live: not with other modes or hooks than tried",
        "layers/live.py",
        "if _state(self._model) != self._state:",
        "if False:",
        f"{LIVE}test_validation_step_with_dropout",
    ),
    Guard(
        "live: not in training mode",
        "layers/live.py",
        "        if module.training:\n",
        "        if False:\n",
        f"{LIVE}test_dropout_that_stays_in_training_mode",
    ),
    Guard(
        "live: outputs of the trial are bit-identical",
        "layers/live.py",
        "if len(found[0]) != len(found[1]) or not all(map(_identical, *found)):",
        "if False:",
        f"{LIVE}test_network_that_cannot_be_observed[AsksForGradients]",
    ),
    Guard(
        "live: outputs are in no graph",
        "layers/live.py",
        "if any(tensor.requires_grad for tensor in found[0]):",
        "if False:",
        f"{LIVE}test_network_that_cannot_be_observed[Embeddings]",
    ),
    Guard(
        "live: the trial leaves no graph behind",
        "layers/live.py",
        "            return None, KEEPS_TENSORS, []\n",
        "            pass\n",
        f"{LIVE}test_network_that_cannot_be_observed[KeepsInList]",
    ),
    Guard(
        "live: the trial leaves no graph in a buffer",
        "layers/live.py",
        "if model_copy.keeps_graph:",
        "if False:",
        f"{LIVE}test_network_that_cannot_be_observed[WritesBuffer]",
    ),
    Guard(
        "live: an output without classifier leaves the graph",
        "layers/live.py",
        "        if self.seen.classifier is not None:\n",
        "        if True:\n",
        f"{LIVE}test_network_that_can_be_observed[WithoutClassifier]",
    ),
    Guard(
        "live: the trial gives the same numbers",
        "layers/observer.py",
        "if not bool((one - other).norm() <= ROUNDINGS * torch.finfo(self._passes.dtype).eps * other.norm()):",
        "if False:",
        "layers/test_live_numbers.py::test_other_numbers_would_be_seen",
    ),
    Guard(
        "live: the graph ends before the classifier",
        "layers/recording.py",
        "tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)",
        "None",
        f"{LIVE}test_network_that_can_be_observed[KeepsEmbeddings]",
    ),
    Guard(
        "live: a leaf of what was made in inference mode",
        "layers/recording.py",
        "(returned.clone() if returned.is_inference() else returned.detach())",
        "returned.detach()",
        f"{LIVE}test_network_that_can_be_observed[Plain]",
    ),
    Guard(
        "live: no error of a hook of ours",
        "layers/recording.py",
        "        if not self.live:\n            return hook\n",
        "        if True:\n            return hook\n",
        "layers/test_live_numbers.py::test_errors_of_ours_do_not_reach_the_user",
    ),
    Guard(
        "live: weights of the time of the pass",
        "layers/recording.py",
        "kernel_sample(calls[0].weight) if self.live and calls else None",
        "None",
        f"{LIVE}test_validation_step[AveragesWeights]",
    ),
    Guard(
        "live: what was computed counts if all conditions hold",
        "layers/observer.py",
        "if all_hold():\n                    return found",
        "if True:\n                    return found",
        "layers/test_live_numbers.py::test_what_does_not_hold_is_named",
    ),
    Guard(
        "live: ignored targets",
        "functional/losses.py",
        "return None if holds(kept.all()) else kept",
        "return None",
        "layers/test_live_numbers.py::test_ignored_targets_do_not_count_when_observed",
    ),
    Guard(
        "live: a kernel that was written to",
        "layers/plan.py",
        "if not torch.equal(self._weight_gram(known[0].detach(), calls[0][1]), self.folded_grams[name]):",
        "if False:",
        "layers/test_live_numbers.py::test_a_kernel_that_is_written_to_is_known -k entry",
    ),
    Guard(
        "live: a kernel that was written to behind autograd's back",
        "layers/plan.py",
        "not same(observed.sample, self._samples[name])",
        "False",
        "layers/test_live_numbers.py::test_a_kernel_that_is_written_to_is_known -k behind",
    ),
    Guard(
        "live: a step that calls a part of the network",
        "layers/live.py",
        "        and found[2] is output\n",
        "",
        f"{LIVE}test_validation_step[CallsPart]",
    ),
    Guard(
        "a random forward is refused in parts",
        "layers/passes.py",
        "_certify_deterministic(self._execution.logits[:rows], logits_of(self._copy(inputs))[:rows].detach())",
        "pass",
        "layers/test_parts.py::test_what_is_random_or_of_the_batch_is_refused_in_parts",
    ),
    Guard(
        "classes that are left out are few",
        "functional/curvature.py",
        "kept = ordered.cumsum(0) >= tolerance * whole",
        "kept = ordered >= tolerance * whole",
        "functional/test_curvature.py::test_what_is_left_out_is_small_and_off_the_diagonal",
    ),
    Guard(
        "the class of a sure sample does not cancel",
        "functional/curvature.py",
        "w = w.scatter(1, top, 0.0)",
        "largest = 0 * largest",
        "functional/test_curvature.py::test_the_class_of_a_sure_sample_does_not_cancel",
    ),
    Guard(
        "the classifier's diagonal does not cancel",
        "functional/curvature.py",
        "return total - total.sum(1).diag()",
        "return (scaled.sum(0) - (scaled * self.center).sum(0)).diag() + total",
        "functional/test_closed_form.py::test_block_traces_of_the_classifier_keep_their_digits_for_sure_samples",
    ),
    Guard(
        "products that autograd needs are not overwritten",
        "functional/closed_form.py",
        "None if torch.is_grad_enabled() else like.new_empty(size)",
        "like.new_empty(size)",
        "functional/test_closed_form.py::test_it_can_be_differentiated",
    ),
    Guard(
        "the lower part of a symmetric matrix is filled",
        "functional/symmetric.py",
        "upper[:, below, rows] = upper[:, rows, below].mT",
        "pass",
        "functional/test_symmetric.py::test_the_lower_part_is_not_read",
    ),
    Guard(
        "what all classes of a chunk share is added",
        "functional/closed_form.py",
        "shared[:, rows, rest] += sums_of_floor",
        "pass",
        "functional/test_closed_form.py::test_chunks_of_many_classes_may_differ_in_what_classes_share",
    ),
    Guard(
        "a tail of other operations is certified anew",
        "layers/closed_form.py",
        "operations is not None and before.operations == operations",
        "operations is not None",
        "layers/certificates/test_tail.py::test_a_tail_that_becomes_another_is_certified_anew",
    ),
    Guard(
        "a tail is certified in full again and again",
        "layers/closed_form.py",
        "if before.batches < FULL_EVERY:",
        "if True:",
        "layers/certificates/test_tail.py::test_a_tail_is_certified_in_full_again_and_again",
    ),
    Guard(
        "whether the logits are affine is certified by numbers again and again",
        "layers/plan.py",
        "or self._parts % FULL_EVERY == 0 or",
        "or",
        "layers/certificates/test_affine.py::test_hooks_that_curve_later_are_noticed_in_the_end",
    ),
    Guard(
        "live: a pass of our own where the user's is of no use",
        "callbacks/live.py",
        "except (FlatnessError, RuntimeError) as error:",
        "except ZeroDivisionError as error:",
        f"{LIVE}test_validation_step[AveragesClassifier]",
    ),
    Guard(
        "live: batches are reshaped after the step only",
        "callbacks/flatness_callback.py",
        "        if source.why_not_live:\n",
        "        if False:\n",
        f"{LIVE}test_batches_that_are_reshaped",
    ),
    Guard(
        "live: copies of a network have its own forward",
        "layers/live.py",
        "return copy.deepcopy(self.__wrapped__, memo)",
        "return self",
        f"{LIVE}test_copies_and_files_of_a_network_have_nothing_of_ours",
    ),
    Guard(
        "live: files of a network have its own forward",
        "layers/live.py",
        'return getattr, (self._module, "forward")',
        "return _Forward, (self._listener, self._module)",
        f"{LIVE}test_copies_and_files_of_a_network_have_nothing_of_ours",
    ),
    Guard(
        "live: one sample is measured twice",
        "callbacks/live.py",
        "if num_rows(inputs, targets) < 2:",
        "if False:",
        f"{LIVE}test_one_sample_in_the_first_batch",
    ),
    Guard(
        "live: graphs kept later",
        "callbacks/live.py",
        "if not reason and alive() is not None:",
        "if False:",
        f"{LIVE}test_features_that_are_kept_later_are_told",
    ),
    Guard(
        "live: tensors are let go",
        "callbacks/live.py",
        "            self._heard.release()\n",
        "",
        f"{LIVE}test_nothing_is_alive_after_a_batch",
    ),
    Guard(
        "live: told once",
        "callbacks/live.py",
        "if reason != self._told:",
        "if True:",
        f"{LIVE}test_told_once_in_every_run",
    ),
    Guard(
        "live: let go with every batch",
        "callbacks/flatness_callback.py",
        "        self._live.let_go()  # a batch of which nothing is to be measured was listened to, too\n",
        "",
        f"{LIVE}test_nothing_stays_after_a_batch[no batch]",
    ),
]

GUARDS = [*ISOLATION, *OBSERVATION, *LIVE_FORWARDS, *METRICS, *SAMPLES, *IN_TRAINING, *ERRORS, *AT_EPOCHS, *AROUND]


def markdown(guards=GUARDS):
    """The table of the README."""
    rows = [f"| {guard.what} | `{guard.file}` | `{guard.test}` |" for guard in guards]
    return "\n".join(["| guard | where | test that goes red without it |", "|---|---|---|", *rows])


def copy_of_the_project(folder):
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder)


def pytest(folder, *arguments):
    """Exit code and output of pytest in a copy; None, if it does not end."""
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    environment |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return None, ""
    return found.returncode, found.stdout + found.stderr


def without(guard, folder):
    """What is wrong when the guard is taken out of a copy: nothing, if its test fails."""
    path = folder / guard.path
    source = path.read_text()
    try:
        path.write_text(guard.removed_from(source))
        code, printed = pytest(folder, "-x", *guard.arguments)
    except ValueError as error:
        return str(error)
    finally:
        path.write_text(source)
    if code == TESTS_FAILED:
        return ""
    if code is None:
        return f"The test does not end within {SECONDS} seconds."
    return "Its test passes without it." if code == 0 else f"pytest ends with {code}:\n{printed[-2000:]}"


def main():
    parser = argparse.ArgumentParser(description="Take guards out, one at a time, and see their tests fail.")
    parser.add_argument("names", nargs="*", help="parts of descriptions; all guards by default")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="tests at a time")
    parser.add_argument("--table", action="store_true", help="print the table of tests/README.md and stop")
    options = parser.parse_args()
    if options.table:
        sys.stdout.write(markdown() + "\n")
        return 0
    guards = [guard for guard in GUARDS if not options.names or any(name in guard.what for name in options.names)]
    if not guards:
        parser.error(f"No guard has {' or '.join(options.names)} in its description.")
    console = Console()
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as temporary, Progress(*columns, console=console) as progress:
        folders = queue.SimpleQueue()
        for job in range(options.jobs):
            folder = Path(temporary, str(job))
            folder.mkdir()
            copy_of_the_project(folder)
            folders.put(folder)

        task = progress.add_task("with all guards", total=None)
        code, printed = with_all_guards(folder, guards)
        if code != 0:
            console.print(f"With all guards in place the tests end with {code}.\n{printed[-6000:]}", markup=False)
            return 1
        progress.update(task, description="one taken out", total=len(guards))

        def work(guard):
            folder = folders.get()
            try:
                return without(guard, folder)
            finally:
                folders.put(folder)
                progress.advance(task)

        with ThreadPoolExecutor(options.jobs) as pool:
            wrong = list(pool.map(work, guards))

    table = Table(caption=f"{len(guards)} guards, {sum(map(bool, wrong))} of them not seen", caption_justify="left")
    for heading in ("guard", "where", "without it"):
        table.add_column(heading, overflow="fold")
    for guard, problem in zip(guards, wrong, strict=True):
        table.add_row(
            guard.what, guard.file, f"[red]{problem.splitlines()[0]}" if problem else "[green]red, as it must"
        )
    console.print(table)
    for guard, problem in zip(guards, wrong, strict=True):
        if problem:
            console.print(f"\n{guard.what} ({guard.test}): {problem}", markup=False)
    return int(any(wrong))


def with_all_guards(folder, guards):
    """Exit code and output of all named tests with nothing taken out; the first that is not zero."""
    plain = sorted({guard.arguments[0] for guard in guards if len(guard.arguments) == 1})
    chosen = sorted({tuple(guard.arguments) for guard in guards if len(guard.arguments) > 1})
    for arguments in [*([plain] if plain else []), *chosen]:
        code, printed = pytest(folder, *arguments)
        if code != 0:
            return code, printed
    return 0, ""


if __name__ == "__main__":
    sys.exit(main())
