"""Read batches in any of the formats that users have, and split them into inputs and targets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from lightning_flatness.checks import is_sequence
from lightning_flatness.errors import BatchError, FlatnessError, is_out_of_memory
from lightning_flatness.model.call import map_tensors, tensors_of
from lightning_flatness.model.generators import drawing, generators_kept
from lightning_flatness.model.isolation import random_states_kept

# Common names of the entries of a batch that hold the model's inputs. TARGETS below has the names for targets.
INPUTS = ("x", "input", "inputs", "image", "images", "img", "pixel_values", "data")
MOST_SHAPES = 3  # largest number of shapes that an error message lists
TARGETS = ("y", "target", "targets", "label", "labels")

REMEDY = "give a DataLoader, or a list of batches such as [(inputs, targets)]"
NO_SAMPLE = (
    "No sample was measured. Is the data set empty, are all targets ignored, or are the batches a generator that has "
    "been read already?"
)
NO_LOSS = "No sample was measured, so there is no loss. Is the data set empty, or are all targets ignored?"


@contextmanager
def paired_batches(model: nn.Module, batches: Iterable[Any]) -> Iterator[Iterator[tuple[Any, Tensor | None]]]:
    """Return a context manager that gives an iterator over pairs ``(inputs, targets)`` on the model's device.

    At the end, the context manager restores the random states, so that every call reads the batches with the same
    random numbers. It also restores the generators of the loader, the sampler and the data set, because a
    ``DataLoader`` draws a seed in every pass over the data.
    """
    batches = as_batches(batches)
    with random_states_kept(model), generators_kept(drawing(batches)):
        yield (moved(_pair(batch), model) for batch in batches)


def moved(pair: tuple[Any, Tensor | None], model: nn.Module) -> tuple[Any, Tensor | None]:
    """Return a pair ``(inputs, targets)`` with all tensors on the model's device."""
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    on_device: tuple[Any, Tensor | None] = map_tensors(pair, lambda tensor: tensor.to(device))
    return on_device


def with_targets(pairs: Iterable[tuple[Any, Tensor | None]]) -> Iterator[tuple[Any, Tensor]]:
    """Yield the pairs that have samples. Raise a :class:`BatchError` if a pair has no targets."""
    for inputs, targets in pairs:
        if targets is None:
            raise BatchError("A batch has no targets, which the loss needs; give pairs (inputs, targets).")
        if len(targets):
            yield inputs, targets


def check_rereadable(batches: Any, reason: str, argument: str = "batches") -> None:
    """Raise a :class:`BatchError` if ``batches`` is an iterator. ``reason`` says why it is read more than once."""
    if isinstance(batches, Iterator):
        raise BatchError(
            f"{argument} is a {type(batches).__name__}, which can be read only once, but {reason}. Give a DataLoader, "
            f"or list({argument})."
        )


def as_batches(batches: Any, argument: str = "batches") -> Iterable[Any]:
    """Return ``batches`` itself if it is an iterable of batches, or a list with one entry if it is a single batch.

    Raise a :class:`BatchError` if ``batches`` is neither, or if it may be both. ``argument`` is the name of
    ``batches`` in the message.

    Example:
        >>> images, labels = torch.zeros(6, 3, 8, 8), torch.zeros(6, dtype=torch.long)
        >>> len(as_batches((images, labels))), len(as_batches([images, images])), len(as_batches([(images, labels)]))
        (1, 2, 1)
    """
    if isinstance(batches, (str, bytes, PathLike)):
        raise BatchError(f"{argument}={batches!r} is a path or text, but batches are not read from files: {REMEDY}.")
    if isinstance(batches, (Tensor, *_arrays())):
        shape = f"of shape {tuple(cast(Tensor, batches).shape)}, which may be one batch of inputs or several"
        raise _unclear(argument, batches, shape, "for one batch without targets, give [inputs]")
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise _unclear(
            argument, batches, "a data set, whose items are samples", "DataLoader(dataset, batch_size=64) makes batches"
        )
    if isinstance(batches, Mapping) or hasattr(batches, "_fields") or not hasattr(batches, "__iter__"):
        return _single_with_names(batches, argument)
    # A Sequence that is not mutable may be a loader, which is not read here.
    return _of_sequence(batches, argument) if isinstance(batches, (tuple, MutableSequence)) else batches


def _single_with_names(batch: Any, argument: str) -> Iterable[Any]:
    """Return ``[batch]`` if ``batch`` is one batch with named entries (a mapping, dataclass or named tuple).

    Any other object with ``__getitem__`` counts as an iterable of batches, and is returned as it is. Raise a
    :class:`BatchError` for everything else, and for a batch in which no inputs and targets are found.
    """
    try:
        split_batch(batch)
    except BatchError:
        if isinstance(batch, (Mapping, tuple)) or is_dataclass(batch) or not hasattr(batch, "__getitem__"):
            raise _unclear(argument, batch, "not a list of batches", REMEDY) from None
        return cast(Iterable[Any], batch)
    return [batch]


def _of_sequence(batches: Sequence[Any], argument: str) -> Iterable[Any]:
    """Return a sequence of batches unchanged. If it is one pair ``(inputs, targets)``, return a list of this pair.

    The tensors in a list are batches of inputs if all have the same dtype and number of dimensions. Two tensors are a
    pair if the second one, the targets, has one or two dimensions and as many rows as the inputs. Raise a
    :class:`BatchError` if both rules apply, or neither.
    """
    tensors = [part for part in batches if isinstance(part, Tensor)]
    if len(batches) == 2 and isinstance(batches[0], Tensor) and batches[1] is None:
        return [tuple(batches)]
    if len(tensors) < len(batches):
        # Batches with and without targets may be mixed, if all inputs have the same dtype and number of dimensions.
        inputs = (part[0] if is_sequence(part) and len(part) else part for part in batches)
        if any(isinstance(part, (Tensor, *_arrays())) for part in batches) and not _are_alike(inputs):
            what = f"of {_kinds(batches)}, which looks like one batch"
            raise _unclear(argument, batches, what, f"{REMEDY}, whose inputs and targets are torch tensors")
        return batches
    if len(batches) < 2:
        return batches
    first, second = tensors[:2]
    alike = _are_alike(tensors)
    is_pair = len(batches) == 2 and first.ndim > 0 and second.ndim in (1, 2) and len(first) == len(second)
    if is_pair and not alike:
        return [tuple(batches)]
    if is_pair or not alike or isinstance(batches, tuple):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors[:MOST_SHAPES])
        what = (
            f"of {len(tensors)} tensors ({shapes}{', ...' * (len(tensors) > MOST_SHAPES)}), which may be one batch or "
            "several"
        )
        raise _unclear(argument, batches, what, "for batches without targets, give [(inputs, None), ...]")
    return batches


def _are_alike(inputs: Iterable[Any]) -> bool:
    """Return whether all inputs are tensors of the same dtype and number of dimensions."""
    kinds = {(part.ndim, part.dtype) if isinstance(part, Tensor) else None for part in inputs}
    return len(kinds) == 1 and None not in kinds


def _arrays() -> tuple[Any, ...]:
    """Return a tuple with the class of NumPy's arrays, or an empty tuple if NumPy was not imported."""
    numpy = sys.modules.get("numpy")
    return () if numpy is None else (numpy.ndarray,)


def _kinds(parts: Iterable[Any]) -> str:
    """Return the names of the types of ``parts``, each of them once, separated by commas."""
    return ", ".join(dict.fromkeys(type(part).__name__ for part in parts))


def _unclear(argument: str, batches: Any, what: str, remedy: str) -> BatchError:
    """Return an error that says what the argument ``batches`` is (``what``) and what to give instead (``remedy``)."""
    also = "" if remedy.startswith(REMEDY) else f"{REMEDY}; "
    return BatchError(f"{argument} is a {type(batches).__name__}, {what}: {also}{remedy}.")


def _pair(batch: Any) -> tuple[Any, Tensor | None]:
    """Return ``(inputs, targets)`` of a batch; raise an error if the targets have no dimension for samples."""
    inputs, targets = split_batch(batch)
    if targets is not None and targets.ndim == 0:
        raise BatchError(
            "Targets have shape (), so a batch seems to be one sample of a data set. Targets must be class indices of "
            "shape (samples,), or rows of numbers. DataLoader(dataset, batch_size=64) makes batches."
        )
    return inputs, targets


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """Return ``(inputs, targets)`` of a batch; a single tensor counts as inputs without targets.

    So does a list of one tensor, such as the batches of a ``DataLoader`` of ``TensorDataset(inputs)``.
    Two entries are inputs and targets, in this order unless a named tuple names them otherwise. A mapping, a dataclass
    or a longer named tuple must have exactly one entry named like inputs (``image``, ``x``, ...) and one
    named like targets (``label``, ``y``, ...). It must have no other tensor of two or more dimensions. If the targets
    have a longer name, such as ``gt_label``, there must be no other vector of whole numbers.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if is_sequence(batch) and not hasattr(batch, "_fields") and len(batch) == 1 and isinstance(batch[0], Tensor):
        return batch[0], None
    pair = _pair_in_order(batch)
    if pair is not None and (pair[1] is None or isinstance(pair[1], Tensor)):
        return pair
    pair = _named_pair(batch)
    if pair is not None:
        return pair
    raise BatchError(
        f"A batch is {described(batch)}; expected (inputs, targets) with a tensor as targets, or one tensor "
        "of inputs. A mapping or dataclass needs one entry named like 'image' and one named like 'label'. Change the "
        "batches, or give the callback batch_fn=, a function from a batch to (inputs, targets)."
    )


def described(batch: Any) -> str:
    """Return a text that names the type of a batch, and its keys or the types of its entries.

    Example:
        >>> described({"pix": torch.zeros(2), "species": 3}), described((torch.zeros(2), 3))
        ("a dict with the entries 'pix', 'species'", 'a tuple of length 2 (Tensor, int)')
    """
    in_order = is_sequence(batch)
    named = {} if in_order and not hasattr(batch, "_fields") else entries_of(batch)
    return (
        f"a {type(batch).__name__}"
        + (f" of length {len(batch)} ({_kinds(batch)})" if in_order else "")
        + (f" with the entries {', '.join(map(repr, named))}" if named else "")
    )


def called(batch_fn: Callable[[Any], Any], batch: Any) -> Any:
    """Return what the user's ``batch_fn=`` returns for a batch.

    If the call fails, raise a :class:`BatchError` that describes the batch. Errors of this package, and errors because
    of too little memory, are raised unchanged.
    """
    try:
        return batch_fn(batch)
    except Exception as error:
        if isinstance(error, FlatnessError) or is_out_of_memory(error):
            raise
        raise BatchError(
            f"batch_fn= fails with {type(error).__name__}: {error}. A batch is {described(batch)}. Change batch_fn= so "
            "that it takes such a batch."
        ) from error


def targets_of(batch: Any) -> Tensor | None:
    """Return the targets of a batch: the targets of a pair, or the only tensor that is named like targets.

    Return None if there is no such entry, or if it is not a tensor.

    Example:
        >>> targets_of({"image": torch.zeros(2, 3), "mask": torch.ones(2, 3), "label": torch.tensor([0, 1])})
        tensor([0, 1])
    """
    pair = _pair_in_order(batch)
    if pair is not None:
        return pair[1] if isinstance(pair[1], Tensor) else None
    entries = entries_of(batch)
    names = _tensors_named(entries, TARGETS)
    targets: Tensor | None = entries[names[0]] if len(names) == 1 else None
    return targets


def rivals_of(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch that may be its targets instead of the tensor that :func:`targets_of` returns.

    In a pair, these are vectors and matrices among several tensors in the first entry, as in ``((images, labels),
    indices)``. In a batch whose targets have a longer name, such as ``domain_label``, these are other vectors of whole
    numbers.
    """
    entries = entries_of(batch)
    if is_sequence(batch) and not hasattr(batch, "_fields"):
        inputs = tensors_of(batch[0]) if targets_of(batch) is not None else []
        return [tensor for tensor in inputs if tensor.ndim in (1, 2)] if len(inputs) > 1 else []
    names = _tensors_named(entries, TARGETS)
    if len(names) != 1 or str(names[0]).lower() in TARGETS:
        return []
    others = [value for name, value in entries.items() if name != names[0] and isinstance(value, Tensor)]
    return [value for value in others if value.ndim == 1 and not value.is_floating_point()]


def entries_of(batch: Any) -> dict[Any, Any]:
    """Return the entries of a batch in a dict. Its keys are names, or positions for a sequence."""
    if is_dataclass(batch):
        return {field.name: getattr(batch, field.name) for field in fields(batch)}
    if hasattr(batch, "_fields"):
        return dict(batch._asdict())
    if is_sequence(batch):
        return dict(enumerate(batch))
    return dict(batch) if isinstance(batch, Mapping) else {}


def _tensors_named(entries: Mapping[Any, Any], names: Sequence[str]) -> list[Any]:
    """Return the keys of the tensors whose key is one of the ``names``.

    A name of targets, such as ``label``, also matches longer keys, such as ``gt_label``.
    """
    ends = tuple(f"_{name}" for name in TARGETS if name in names and len(name) > 1)
    tensors = [key for key, value in entries.items() if isinstance(value, Tensor)]
    return [key for key in tensors if str(key).lower() in names or str(key).lower().endswith(ends)]


def _pair_in_order(batch: Any) -> tuple[Any, Any] | None:
    """Return the entries of a sequence of two as ``(inputs, targets)``, or None for any other batch.

    The entries are in this order, unless the names of a named tuple say that the targets come first.
    """
    if not is_sequence(batch) or len(batch) != 2:
        return None
    entries = entries_of(batch)
    first, second = entries
    is_turned = _tensors_named(entries, TARGETS) == [first] or _tensors_named(entries, INPUTS) == [second]
    return (batch[1], batch[0]) if is_turned else (batch[0], batch[1])


def _named_pair(batch: Any) -> tuple[Any, Tensor] | None:
    """Return the entry that is named like inputs and the entry that is named like targets.

    Return None unless there is exactly one of each, and no other tensor of two or more dimensions. Also return None if
    other tensors may be the targets.
    """
    entries = entries_of(batch)
    inputs, targets = _tensors_named(entries, INPUTS), _tensors_named(entries, TARGETS)
    if len(inputs) != 1 or len(targets) != 1 or rivals_of(batch):
        return None
    # Other entries, such as counts, are ignored; but a tensor of two or more dimensions may be another input.
    others = [value for key, value in entries.items() if key not in (*inputs, *targets)]
    if any(isinstance(value, Tensor) and value.ndim > 1 for value in others):
        return None
    return entries[inputs[0]], entries[targets[0]]
