"""Run one of the four commands ``measure``, ``compare``, ``spectrum`` and ``landscape``."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lightning_flatness.cli.arguments import Command
from lightning_flatness.cli.building import read_config
from lightning_flatness.cli.checkpoints import Checkpoint, read_checkpoint
from lightning_flatness.cli.session import Session

DEFAULT_KEPT = 512  # number of samples for a spectrum or a landscape, unless --max-samples is given


@dataclass(frozen=True)
class Outcome:
    """The results of a command.

    ``results`` maps the name of each network to its result. ``comparison`` is the result of the command ``compare``,
    and None for the other commands. ``history`` has the records that the training run has saved in the checkpoint.
    ``details`` say how the results were computed (files, seed, device). ``notes`` are warnings for the user.
    """

    results: Mapping[str, Any]
    comparison: Any = None
    history: Sequence[Mapping[str, Any]] = ()
    details: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def run(command: Command) -> Outcome:
    """Run a command and return its results.

    Raises:
        UsageError: the command line is wrong.
        FlatnessError: a checkpoint cannot be read, or the network cannot be measured on the data.
    """
    checkpoints = [read_checkpoint(path, command.trust) for path in command.checkpoints]
    session = Session(command, read_config(command.config))
    own = {"spectrum": _spectrum, "landscape": _landscape}.get(command.name)
    if own is not None:
        return _one(session, checkpoints[0], own(session))
    return _one(session, checkpoints[0]) if command.name == "measure" else _compare(session, checkpoints)


Measure = Callable[[nn.Module, Sequence[Any]], Any]


def _one(session: Session, checkpoint: Checkpoint, function: Measure | None = None) -> Outcome:
    """Return the outcome for one network: its flatness, or the result of ``function`` for the network and batches."""
    command = session.command
    model = session.model_of(checkpoint)
    # This import must come after model_of, which imports the user's classes. They decide whether this package uses
    # lightning.pytorch or pytorch_lightning.
    from lightning_flatness.cli.consumers import Kept

    name = names_of([checkpoint.path])[0]
    if function is None:
        found = session.visit(model, command.split, _flatness(session), command.max_samples, "Flatness")
    else:
        found = session.visit(model, command.split, Kept(function), command.max_samples or DEFAULT_KEPT)
    details = _details(session, [checkpoint], [found])
    return Outcome({name: found.result}, None, checkpoint.history, details, session.notes)


def _compare(session: Session, checkpoints: Sequence[Checkpoint]) -> Outcome:
    import lightning_flatness as lf
    from lightning_flatness.cli.consumers import MeanLoss

    command = session.command
    names = names_of([checkpoint.path for checkpoint in checkpoints])
    found, losses = {}, {}
    for name, checkpoint in zip(names, checkpoints, strict=True):
        model = session.model_of(checkpoint)
        found[name] = session.visit(model, command.split, _flatness(session), command.max_samples, name)
        if command.split == "val" and not command.no_train_loss:
            loss = MeanLoss(session.loss)
            losses[name] = session.visit(model, "train", loss, None, f"{name}, training loss")
    reports = {name: one.result for name, one in found.items()}
    same_samples = len({one.data_hash for one in found.values()}) == 1
    if not same_samples:
        session.notes.append("The networks were not given the same inputs: see the hash of the data of each.")
    comparison = lf.compare(reports, train_losses=losses or None, same_samples=same_samples)
    details = _details(session, checkpoints, list(found.values()))
    return Outcome(reports, comparison, (), details, session.notes)


def _flatness(session: Session) -> Any:
    from lightning_flatness.cli.consumers import Flatness

    command = session.command
    chosen = [name.strip() for part in command.layers or ["last"] for name in part.split(",") if name.strip()]
    layers = chosen[0] if len(chosen) == 1 else chosen
    options = {"layers": layers, "loss": session.loss, "strict": command.strict, "dtype": command.dtype}
    return Flatness(command.split, {**options, "seed": session.seed})


def _spectrum(session: Session) -> Measure:
    from lightning_flatness.measure.spectrum import hessian_spectrum

    command = session.command
    return lambda network, batches: hessian_spectrum(
        network,
        batches,
        loss=session.loss,
        top_k=command.top_k,
        num_steps=command.steps,
        num_probes=command.probes,
        dtype=command.dtype,
        seed=session.seed,
        progress=session.show,
    )


def _landscape(session: Session) -> Measure:
    from lightning_flatness.measure.landscape import loss_landscape

    command = session.command
    return lambda network, batches: loss_landscape(
        network,
        batches,
        loss=session.loss,
        axes=[command.axes] if command.line else [command.axes] * 2,
        steps=command.steps,
        span=command.span,
        dtype=command.dtype,
        seed=session.seed,
        progress=session.show,
    )


def _details(session: Session, checkpoints: Sequence[Checkpoint], found: Sequence[Any]) -> dict[str, str]:
    names = names_of([one.path for one in checkpoints])
    files = {
        f"Checkpoint {name}" if len(checkpoints) > 1 else "Checkpoint": f"{one.path}, SHA-256 {one.digest[:16]}"
        for name, one in zip(names, checkpoints, strict=True)
    }
    return {
        **files,
        "Model": _joined(names, session.classes),
        **session.details,
        "Hash of the data": _joined(names, [one.data_hash for one in found]),
        "Seed of the measurement": str(session.seed),
        "Device": found[-1].device,
        "Command": "lightning-flatness " + shlex.join(session.command.words),
    }


def _joined(names: Sequence[str], texts: Sequence[str]) -> str:
    """Return the text that all networks have in common, or each network's name and text if the texts differ."""
    return texts[0] if len(set(texts)) == 1 else ", ".join(map(": ".join, zip(names, texts, strict=True)))


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return a short, distinct name for every file.

    The name is the file's stem. If some stems are equal, the names are ``folder/stem``, or whole paths if some of these
    are equal, too. If some paths are equal, all names are paths with numbers.

    Example:
        >>> names_of([Path("runs/a/last.ckpt"), Path("runs/b/last.ckpt")])
        ['a/last', 'b/last']
        >>> names_of([Path("a.ckpt"), Path("a.ckpt")])
        ['a.ckpt (1)', 'a.ckpt (2)']
    """
    for name in (lambda path: path.stem, lambda path: f"{path.parent.name}/{path.stem}", str):
        names = [name(path) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({index})" for index, path in enumerate(paths, start=1)]
