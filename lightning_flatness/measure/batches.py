"""Split batches in the formats that users give them in into inputs and targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_flatness.errors import BatchError
from lightning_flatness.model.generators import drawing, generators_kept
from lightning_flatness.model.isolation import random_states_kept

# Common names of entries of a batch that hold the inputs of a model, and its targets.
INPUTS = ("x", "input", "inputs", "image", "images", "img", "pixel_values", "data")
TARGETS = ("y", "target", "targets", "label", "labels")


@contextmanager
def paired_batches(model: nn.Module, batches: Iterable[Any]) -> Iterator[Iterator[tuple[Any, Tensor | None]]]:
    """Yield an iterator over the inputs and targets of batches, moved to the model's device.

    On leaving, random states are restored, so that every call reads the batches with the same random numbers. This
    includes generators of the loader, its sampler and its data set: a ``DataLoader`` draws a seed at each iteration.
    """
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    with random_states_kept(model), generators_kept(drawing(batches)):
        yield (split_batch(apply_to_collection(batch, Tensor, lambda tensor: tensor.to(device))) for batch in batches)


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """Return ``(inputs, targets)`` of a batch; a single tensor is taken as inputs without targets.

    A mapping, dataclass or named tuple must have exactly one entry named like inputs (``image``, ``x``, ...), exactly
    one named like targets (``label``, ``y``, ...), and no other tensor of two or more dimensions.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and (batch[1] is None or isinstance(batch[1], Tensor)):
        return batch[0], batch[1]
    pair = _named_pair(batch)
    if pair is not None:
        return pair
    raise BatchError(
        f"A batch is a {type(batch).__name__}"
        + (f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        + (f" with the entries {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else "")
        + "; expected (inputs, targets) with a tensor of targets, a tensor of inputs, or a mapping or dataclass with "
        "one entry like 'image' and one like 'label'. Reshape it, or give the callback batch_fn=, a function from a "
        "batch to (inputs, targets)."
    )


def targets_of(batch: Any) -> Tensor | None:
    """Return the targets of a batch: the second of a pair, or the one entry named like targets; None if in doubt.

    Example:
        >>> targets_of({"image": torch.zeros(2, 3), "mask": torch.ones(2, 3), "label": torch.tensor([0, 1])})
        tensor([0, 1])
    """
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        return batch[1] if len(batch) == 2 and isinstance(batch[1], Tensor) else None
    entries = _entries(batch)
    names = _tensors_named(entries, TARGETS)
    targets: Tensor | None = entries[names[0]] if len(names) == 1 else None
    return targets


def _entries(batch: Any) -> dict[Any, Any]:
    if is_dataclass(batch):
        return {field.name: getattr(batch, field.name) for field in fields(batch)}
    if hasattr(batch, "_fields"):
        return dict(batch._asdict())
    return dict(batch) if isinstance(batch, Mapping) else {}


def _tensors_named(entries: Mapping[Any, Any], names: Sequence[str]) -> list[Any]:
    """Return the keys of tensors with one of the names. A key of targets may also end with one (``gt_label``)."""
    ends = tuple(f"_{name}" for name in TARGETS if name in names and len(name) > 1)
    tensors = [key for key, value in entries.items() if isinstance(value, Tensor)]
    return [key for key in tensors if str(key).lower() in names or str(key).lower().endswith(ends)]


def _named_pair(batch: Any) -> tuple[Any, Tensor] | None:
    entries = _entries(batch)
    inputs, targets = _tensors_named(entries, INPUTS), _tensors_named(entries, TARGETS)
    if len(inputs) != 1 or len(targets) != 1:
        return None
    # Other entries, such as counts, are ignored; but a tensor of two or more dimensions may be another input.
    others = [value for key, value in entries.items() if key not in (*inputs, *targets)]
    if any(isinstance(value, Tensor) and value.ndim > 1 for value in others):
        return None
    return entries[inputs[0]], entries[targets[0]]
