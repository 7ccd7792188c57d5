"""Count, select, duplicate and compare samples, and check which tensors of a batch have a row for every sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.errors import BatchError
from lightning_flatness.model.call import as_call, map_tensors, tensors_of
from lightning_flatness.model.logits import certify_deterministic, differ


def num_rows(inputs: Any, targets: Tensor | None = None) -> int:
    """Return the number of samples in a batch.

    This is the length of the targets if they are given and the inputs are not one tensor. Otherwise it is the largest
    first dimension of the inputs.
    """
    if targets is not None and targets.ndim and not isinstance(inputs, Tensor):
        return targets.shape[0]
    return max((tensor.shape[0] if tensor.ndim else 1 for tensor in tensors_of(inputs)), default=1)


def take(batch: Any, rows: slice, num_samples: int) -> Any:
    """Return the samples ``rows`` of a batch; a single sample is returned twice (see :meth:`SampleTensors.take`).

    Tensors whose length is not ``num_samples`` are returned as they are.

    Example:
        >>> import torch
        >>> take({"image": torch.zeros(5, 3), "scale": torch.ones(1)}, slice(0, 2), 5)["image"].shape
        torch.Size([2, 3])
    """
    return SampleTensors().narrowed(batch, num_samples).take(batch, rows)


def is_reordered(one: Tensor, other: Tensor) -> bool:
    """Return whether a tensor has the rows of another tensor in another order.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> is_reordered(rows.flip(0), rows), is_reordered(rows.flip(1), rows)
        (True, False)
    """
    if one is other or one.is_nested or other.is_nested:
        return False
    is_dense = one.layout is other.layout is torch.strided
    is_alike = is_dense and (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape)
    if not is_alike or not one.ndim or not one.numel():
        return False
    rows, others = (tensor.detach().reshape(len(tensor), -1) for tensor in (one, other))
    some, other_some = (tensor[:, :: max(1, tensor.shape[1] // 1024)] for tensor in (rows, others))  # for speed
    is_moved = (some != other_some).any(1)
    first = some.index_select(0, is_moved.int().argmax().reshape(1))  # the first moved row, found without waiting
    if not bool(is_moved.any() & (other_some == first).all(1).any()):
        return False
    in_bytes = (tensor.cpu().contiguous().view(torch.uint8) for tensor in (rows, others))  # for any dtype
    distinct = (torch.unique(tensor, dim=0, return_counts=True) for tensor in in_bytes)
    return all(map(torch.equal, *distinct))


@dataclass(frozen=True)
class SampleTensors:
    """Records which tensors of a model's inputs have a row for every sample; all samples share the other tensors.

    The first dimension of a tensor does not show this: a shared table may happen to have as many rows as there are
    samples. So a tensor must have had the right number of rows in every batch. If the inputs consist of several
    tensors, :meth:`certified` also runs the model on some rows of a batch alone. It then compares the logits of these
    rows with their logits in the whole batch.
    """

    has_rows: tuple[bool, ...] | None = None  # for each tensor in the inputs; None before the first batch
    is_certified: bool = False  # whether ``certified`` has checked ``has_rows``, or the inputs are a single tensor
    is_pair_certified: bool = False  # whether ``certified_pair`` has checked a batch of one sample

    def narrowed(self, inputs: Any, samples: int) -> SampleTensors:
        """Return a record of which tensors have a row for every sample, in all batches so far and in ``inputs``.

        ``samples`` is the number of samples in ``inputs``. If the number of tensors has changed, only ``inputs`` count.
        """
        now = tuple(tensor.ndim > 0 and tensor.shape[0] == samples for tensor in tensors_of(inputs))
        if self.has_rows is None or len(now) != len(self.has_rows):
            return SampleTensors(now, is_certified=_is_single(inputs))
        both = tuple(before and row for before, row in zip(self.has_rows, now, strict=True))
        return self if both == self.has_rows else SampleTensors(both, is_certified=_is_single(inputs))

    def take(self, inputs: Any, rows: slice | Tensor) -> Any:
        """Return the samples ``rows`` of a batch.

        A single sample is returned twice, because torch's BatchNorm can have wrong gradients for one sample on a CPU.
        """
        kinds = iter(self.has_rows or ())

        def of_tensor(tensor: Tensor) -> Tensor:
            if not next(kinds):
                return tensor
            part = _cut(tensor, rows)
            return torch.cat([part, part]) if len(part) == 1 else part

        return map_tensors(inputs, of_tensor)

    def chosen(self, inputs: Any, targets: Tensor | None, mask: Tensor) -> tuple[Any, Tensor | None]:
        """Return the inputs and targets of the samples for which ``mask`` is True."""
        kinds = iter(self.has_rows or ())
        cut = map_tensors(inputs, lambda tensor: _cut(tensor, mask.to(tensor.device)) if next(kinds) else tensor)
        return cut, targets if targets is None else targets[mask.to(targets.device)]

    def certified(self, inputs: Any, rows: slice | Tensor, logits_of: Callable[[Any], Tensor]) -> SampleTensors:
        """Return this record, marked as certified. Raise an error if samples of a batch do not run independently.

        The samples ``rows`` must have the same logits when they run alone and in the whole batch, up to rounding.
        ``logits_of`` runs the model and returns its logits. If this record is certified already, nothing runs.
        """
        if self.is_certified:
            return self
        with torch.no_grad():
            whole, alone = logits_of(inputs), logits_of(self.take(inputs, rows))
            expected = whole[rows] if len(whole[rows]) > 1 else whole[rows].expand(2, -1)
            if alone.shape != expected.shape or differ(alone, expected):
                certify_deterministic(whole, logits_of(inputs))
                raise BatchError(self._not_separable(inputs))
        return replace(self, is_certified=True)

    def certified_pair(self, inputs: Any, logits_of: Callable[[Any], Tensor]) -> SampleTensors:
        """Return this record, marked as certified for batches of one sample, which run as pairs of equal samples.

        ``inputs`` have one sample. Raise an error if the pair has other logits than the sample has by itself. If this
        record is marked already, nothing runs.
        """
        if self.is_pair_certified:
            return self
        with torch.no_grad():
            pair = logits_of(self.take(inputs, slice(0, 1)))
            try:
                alone = logits_of(inputs)
            except Exception:  # e.g. of a forward that squeezes; the pair runs, and is the sample in other batches
                return replace(self, is_pair_certified=True)
            if len(alone) == 1 and len(pair) == 2 and differ(pair, alone.expand(2, -1)):
                certify_deterministic(alone, logits_of(inputs))
                raise BatchError(OTHER_AS_A_PAIR)
        return replace(self, is_pair_certified=True)

    def _not_separable(self, inputs: Any) -> str:
        if not any(self.has_rows or ()):
            call = as_call(inputs)
            kinds = dict.fromkeys(type(entry).__name__ for entry in (*call.arguments, *call.keywords.values()))
            return (
                f"No tensor in the inputs of the network ({', '.join(kinds)}) has a row for every sample, so "
                "samples cannot be measured in parts, or with max_samples=. Only tensors in tuples, lists, mappings "
                "and dataclasses are found. Let the network take a tensor with a row for every sample, e.g. "
                "torch.stack(images) instead of a list of images. In a callback, batch_fn= can make these inputs."
            )
        named = zip(_names(inputs), tensors_of(inputs), self.has_rows or (), strict=True)
        found = ", ".join(f"{name} of shape {tuple(tensor.shape)}" for name, tensor, has_rows in named if has_rows)
        return (
            f"When only some rows of {found} are taken, the logits of these samples differ from their logits in the "
            "whole batch. Perhaps all samples share one of these inputs (a table, prompts, a context), and it happens "
            "to have as many rows as there are samples. If so, bind it to the model by model.forward = "
            "functools.partial(model.forward, context=context), and leave it out of the batches (in a callback, with "
            "batch_fn=). If the samples depend on each other, no sample has a loss of its own, and the network cannot "
            "be measured."
        )


OTHER_AS_A_PAIR = (
    "A batch has one sample, which is measured as a pair of equal samples, and the network gives this pair other "
    "logits. So its logits depend on the number of samples in a batch, e.g. because the forward takes a standard "
    "deviation over the batch. Give batches of several samples (drop_last=True, another max_samples=), or let the "
    "forward treat every sample by itself."
)


def _cut(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """Return some rows of a tensor; raise a :class:`BatchError` for a sparse or nested tensor."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise BatchError(
            f"The inputs have a sparse or nested tensor ({tensor.layout}), from which single samples cannot be taken. "
            "Give dense tensors. In a callback, batch_fn= can convert them."
        )
    return tensor[rows]


def _is_single(inputs: Any) -> bool:
    """Return whether ``inputs`` pass one tensor to a model and nothing else."""
    call = as_call(inputs)
    return len(call.arguments) + len(call.keywords) == len(tensors_of(call)) == 1


def _names(inputs: Any) -> list[str]:
    """Return a name for each of the tensors in ``inputs``, e.g. ``inputs[1]``."""
    call = as_call(inputs)
    entries = [*enumerate(call.arguments), *call.keywords.items()]
    return [f"inputs[{key!r}]" for key, entry in entries for _ in tensors_of(entry)]
