"""Compute the losses at those points of a landscape whose losses are not known yet."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError, LandscapeError
from lightning_flatness.measure.announcement import Announcement, Say
from lightning_flatness.measure.loss_sums import Origin, RepeatedBatches
from lightning_flatness.measure.progress import progress_bar
from lightning_flatness.measure.ranks import failed_ranks, gather, own_rank
from lightning_flatness.model.points import Points
from lightning_flatness.results import SETTINGS, LandscapeResult, number_of


def completed(
    result: LandscapeResult,
    points: Points,
    batches: RepeatedBatches,
    origin: Origin,
    chunk: int | None,
    progress: bool | None,
    say: Say | None,
) -> LandscapeResult:
    """Compute the losses at all points where ``result`` has no loss yet, and return the result with these losses.

    With ``batches.sync`` this is a collective: call it on every rank. ``chunk`` points are computed at once, or
    ``origin.chunk`` points if ``chunk`` is None. After an interrupt (Ctrl-C), return the result with the losses that
    were computed before the interrupt. If computing a point fails on any rank, raise a ``LandscapeError``. The
    ``result`` of this error has the losses at the points that all ranks have computed.
    """
    grid = torch.cartesian_prod(*result.coordinates).reshape(-1, len(result.coordinates))
    start = time.perf_counter()
    known = result.computed.flatten()
    outwards = _outwards(result.coordinates)
    missing = outwards[~known[outwards]]
    sums, done = torch.zeros(2, len(grid), dtype=torch.float64, device="cpu"), torch.zeros_like(known)
    failure: Exception | None = None
    with progress_bar(progress) as bar:
        task = bar.add_task("Landscape", total=len(grid), completed=int(known.sum()))
        announcement = _announcement(result, len(missing), say if own_rank(batches.sync) == 0 and bar.disable else None)
        announcement.begin()
        part_start = time.perf_counter()
        try:
            for part in missing.split(chunk or origin.chunk) if len(missing) else ():
                sums[:, part] = batches.at(points, grid[part], result.batch_norm == "recomputed", origin)
                if result.batch_norm == "kept" and result.update == "add":
                    for index in part[~grid[part].any(1)]:
                        origin.check(float(sums[0, index]))
                if not done.any():
                    announcement.after(len(part), time.perf_counter() - part_start)
                done[part] = True
                bar.update(task, advance=len(part))
        except KeyboardInterrupt:
            pass
        except Exception as error:
            failure = error
    ranks = gather((sums, done), batches.sync)
    new = torch.stack([done for _, done in ranks]).all(0)
    loss, correct = torch.stack([sums for sums, _ in ranks]).sum(0)
    losses = torch.where(new, loss / origin.sums.normalizer, result.losses.flatten())
    accuracies = result.accuracies
    if accuracies is not None:
        shares = torch.where(losses.isnan(), math.nan, correct / origin.sums.num_samples)
        accuracies = torch.where(new, shares, accuracies.flatten()).reshape(accuracies.shape)
    result = replace(
        result,
        losses=losses.reshape(result.losses.shape),
        accuracies=accuracies,
        computed=(known | new).reshape(result.computed.shape),
        seconds=result.seconds + time.perf_counter() - start,
    )
    failed = failed_ranks(failure, batches.sync)
    if failed:
        named = (f"rank {rank}: {message}" for rank, message in failed.items())
        reasons = "; ".join(named if len(ranks) > 1 else failed.values())
        raise LandscapeError(
            f"The landscape failed after {int(result.computed.sum())} of {len(grid)} points ({reasons}). The "
            "points computed so far are in the error's .result; give it as resume= to continue.",
            result,
        ) from failure
    return result


def _announcement(result: LandscapeResult, number: int, say: Say | None) -> Announcement:
    """Return an announcement of how many points will be computed (``number``), and of the passes for each point."""
    passes = "two passes" if result.batch_norm == "recomputed" else "a pass"
    samples = number_of(result.num_samples, "sample")
    parts = f"{number_of(number, 'point')}, each {passes} over {samples}"
    return Announcement("landscape", number, parts, "steps=, or fewer samples", say if number else None)


def resumed(result: LandscapeResult, earlier: LandscapeResult) -> LandscapeResult:
    """Return ``result`` with the losses and accuracies of ``earlier``, and the sum of both computing times.

    Raise a :class:`FlatnessError` if the two landscapes differ in settings, weights, axes, coordinates or data.
    """
    if not isinstance(earlier, LandscapeResult):
        raise FlatnessError(f"resume is a {type(earlier).__name__}; give the LandscapeResult of an earlier call.")
    different = [name for name in SETTINGS if getattr(result, name) != getattr(earlier, name)]
    same_points = [torch.equal(*pair) for pair in zip(result.coordinates, earlier.coordinates, strict=False)]
    if len(result.coordinates) != len(earlier.coordinates) or not all(same_points):
        different.append("coordinates")
    same_loss = math.isclose(result.origin_loss, earlier.origin_loss, rel_tol=1e-5, abs_tol=1e-12)
    both_nan = math.isnan(result.origin_loss) and math.isnan(earlier.origin_loss)
    if result.num_samples != earlier.num_samples or not (same_loss or both_nan):
        different.append("data")
    if same_loss and result.loss.partition(" #")[0] == earlier.loss.partition(" #")[0]:
        different = [name for name in different if name != "loss"]  # the hash changes where a loss counts its calls
    if different:
        meanings = {"fingerprint": "weights, axes, precision or batches"}
        named = ", ".join(meanings.get(name, name) for name in different)
        raise FlatnessError(f"resume= is another landscape; it differs in {named}. Use the same arguments.")
    accuracies = result.accuracies if earlier.accuracies is None else earlier.accuracies
    seconds = result.seconds + earlier.seconds
    return replace(result, losses=earlier.losses, computed=earlier.computed, accuracies=accuracies, seconds=seconds)


def _outwards(coordinates: Sequence[Tensor]) -> Tensor:
    """Return the indices of all points of the grid, ordered from the middle outwards."""
    offsets = [torch.linspace(-1, 1, len(axis), dtype=torch.float64, device="cpu") for axis in coordinates]
    distances = torch.cartesian_prod(*offsets).reshape(-1, len(offsets)).square().sum(1)
    return distances.round(decimals=9).argsort(stable=True)
