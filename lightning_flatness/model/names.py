"""Remove the additions of ``torch.compile`` from names, and choose parameters by patterns of names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_flatness.checks import plain
from lightning_flatness.errors import FlatnessError, LayerSelectionError

# The name of the submodule in which torch.compile wraps a module.
COMPILED = "_orig_mod"


def plain_name(name: str) -> str:
    """Return the name of a module or tensor without the parts that ``torch.compile`` adds.

    Example:
        >>> plain_name("net._orig_mod.conv1"), plain_name("net.conv1._orig_mod")
        ('net.conv1', 'net.conv1')
    """
    return ".".join(part for part in name.split(".") if part != COMPILED)


def lies_in(pattern: str, name: str) -> bool:
    """Return whether a name or glob pattern matches a tensor's name, or the name of a module that contains the tensor.

    Example:
        >>> lies_in("net", "net.conv1.weight"), lies_in("*.bias", "net.conv1.weight")
        (True, False)
    """
    parts = plain_name(name).split(".")
    return any(fits(plain_name(pattern), ".".join(parts[:end])) for end in range(1, len(parts) + 1))


def fits(pattern: str, name: str) -> bool:
    """Return whether a name or glob pattern matches ``name``, which must be a result of :func:`plain_name`."""
    return name == pattern or fnmatchcase(name, pattern)


def choose_parameters(model: nn.Module, params: str | Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Return the chosen parameters that require gradients, keyed by name, in the model's order.

    Tied parameters appear only once. ``params`` are names or glob patterns of parameters or modules. The name of a
    module chooses all its parameters, and None chooses all parameters of the model.
    """
    patterns = [params] if isinstance(params, str) else ["*"] if params is None else plain(params)
    if not isinstance(patterns, (list, tuple)) or not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise FlatnessError(
            f"params={params!r}: give None for all parameters, or names or glob patterns of parameters or modules."
        )
    named = [(plain_name(name), p) for name, p in model.named_parameters(remove_duplicate=False)]
    wanted: set[nn.Parameter] = set()
    for pattern in patterns:
        matched = [(name, p) for name, p in named if lies_in(pattern, name)]
        if not matched:
            raise LayerSelectionError(
                f"params={pattern!r} matches no parameter and no module with parameters. There are: {_names(named)}."
            )
        trainable = [p for _, p in matched if p.requires_grad and p.numel()]
        if not trainable:
            raise LayerSelectionError(
                f"Every parameter {'of the model' if params is None else f'that params={pattern!r} selects'} is frozen "
                f"or empty: {_names(matched)}. Frozen parameters are left out; set requires_grad=True to measure them."
            )
        wanted.update(trainable)
    first_names: dict[nn.Parameter, str] = {}
    for name, parameter in named:
        if parameter in wanted:
            first_names.setdefault(parameter, name)
    others = [name for parameter, name in first_names.items() if not parameter.is_floating_point()]
    if others:
        raise LayerSelectionError(f"Parameters {', '.join(others)} are not real numbers; leave them out with params=.")
    return {name: parameter for parameter, name in first_names.items()}


def _names(named: Sequence[tuple[str, nn.Parameter]]) -> str:
    return listed([name for name, _ in named])


def listed(names: Sequence[str], most: int = 20) -> str:
    """Return a text with the first ``most`` names, and the number of the other names.

    Example:
        >>> listed(["a", "b", "c"], most=2), listed([])
        ('a, b and 1 more', 'none')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"
