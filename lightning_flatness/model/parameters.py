"""Which parameters of a model are meant by names and patterns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_flatness.errors import FlatnessError, LayerSelectionError
from lightning_flatness.model.names import lies_in, plain_name


def choose_parameters(model: nn.Module, params: str | Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, by name, in the model's order; tied ones once.

    Args:
        model: any.
        params: names or glob patterns, or a list of them, of parameters or of modules (all parameters in them); None
            for all. Frozen parameters are left out.

    Raises:
        LayerSelectionError: a pattern matches nothing, or only what is frozen.
        FlatnessError: ``params`` are no names.

    Example:
        >>> list(choose_parameters(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)), ["0", "*.bias"]))
        ['0.weight', '0.bias', '2.bias']
    """
    patterns = [params] if isinstance(params, str) else ["*"] if params is None else params
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
                f"params={pattern!r} matches no parameter and no module that has some. There are: {_listed(named)}."
            )
        trainable = [p for _, p in matched if p.requires_grad and p.numel()]
        if not trainable:
            raise LayerSelectionError(
                f"All parameters that {'there are' if params is None else f'params={pattern!r} matches'} are frozen or "
                f"empty: {_listed(matched)}. Frozen parameters are left out; set requires_grad on those to measure."
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


def _listed(named: Sequence[tuple[str, nn.Parameter]]) -> str:
    names = [name for name, _ in named]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") if names else "none"
