"""Shifts of the study: images are distorted as their names say, and networks are measured on them."""

from dataclasses import replace
from io import StringIO
from itertools import product

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

import lightning_flatness as lf
from studies import distortions, measuring, shift
from studies.__main__ import main
from studies.claims import over_shifts
from studies.data import MEAN, STD, Data, black_of, cifar10, column, digits
from studies.families import DIGITS, cifar
from studies.networks import build
from studies.page import not_run, shift_section
from studies.running import Settings
from studies.tables import read_rows, write_rows
from studies.training import Run


def test_black_that_shifts_fill_in_is_that_of_the_data(tmp_path):
    for part in ("train", "test"):
        np.save(tmp_path / f"{part}_images.npy", np.zeros((2, 4, 4, 3), dtype=np.uint8))
        np.save(tmp_path / f"{part}_labels.npy", np.arange(2))
    assert torch.equal(cifar10(tmp_path).images, black_of("cifar10").expand(2, 3, 4, 4))
    assert float(digits().images.min()) == black_of("digits").item()


SHIFTED = [(kind, of) for of in (distortions.DIGITS, distortions.CIFAR) for kind in of]


@pytest.mark.parametrize(("kind", "of"), SHIFTED, ids=[kind for kind, _ in SHIFTED])
def test_shifted_images_differ_and_black_ones_are_black_but_for_noise(kind, of):
    black = black_of("cifar10")
    pixels = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = (pixels - column(MEAN)) / column(STD)
    other, dark = of[kind](images, black), of[kind](black.expand(5, 3, 8, 8), black)
    assert other.shape == images.shape
    assert float((other - images).abs().mean()) > 0.05
    assert torch.allclose(dark, black.expand(5, 3, 8, 8), rtol=0, atol=1e-6) == (kind != "noisy")


def test_images_are_shifted_as_their_names_say():
    black, of = black_of("cifar10"), distortions.CIFAR
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(of["moved"](images, black)[:, :, 4:], images[:, :, :4])
    assert torch.equal(distortions.moved(images, black, 1, 2)[:, :, 1:, 2:], images[:, :, :-1, :-2])
    coarse, corners = of["coarse"](images, black), [images[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    for i, j in product((0, 1), (0, 1)):
        assert torch.allclose(coarse[:, :, i::2, j::2], sum(corners) / 4, rtol=0, atol=1e-6)
    assert torch.allclose(of["faint"](images, black).mean((2, 3)), images.mean((2, 3)), rtol=0, atol=1e-6)
    assert of["faint"](images, black).std() < 0.7 * images.std()
    white = torch.full((1, 3, 8, 8), 2.0)
    small = distortions.small(white, black, 2.0)
    assert torch.allclose(small[:, :, 3:5, 3:5], white[:, :, 3:5, 3:5])
    assert torch.equal(small[:, :, [0, -1]], black.expand(1, 3, 2, 8))


def small_shifts(**changes):
    """Return shifts of two tiny networks, which are trained one by one."""
    centre = replace(DIGITS, train_size=20, width=2, depth=2, batch_size=10, epochs=2)
    some = tuple(replace(centre, name=name, learning_rate=rate) for name, rate in (("a", 0.05), ("b", 0.1)))
    family = replace(cifar(), data="digits", configurations=some, epochs=(1, 2), losses=())
    kinds = {kind: distortions.CIFAR[kind] for kind in ("moved", "faint")}
    options = {"part": "shift-cifar", "snapshot": "epoch 1", "distortions": kinds, "measured": 10, "trains": False}
    return shift.Shifts(**options | {"family": family, "configurations": some} | changes)


@pytest.fixture
def shifting(tmp_path, monkeypatch):
    """Data that shifts are measured on, settings, and a console that keeps what it prints."""
    images = torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 10
    data = Data(images[:20], labels[:20], images[20:], labels[20:])
    monkeypatch.setattr(shift, "load", lambda *_: data)
    monkeypatch.setattr(measuring, "STEPS", 2)
    return data, Settings(results=tmp_path / "results", work=tmp_path), Console(file=StringIO())


@pytest.mark.filterwarnings("ignore")
def test_shifts_are_measured_on_kept_weights(shifting):
    data, settings, console = shifting
    of = small_shifts()
    run = Run(of.family, of.configurations[1:], data)
    run.train(settings.saved(of.family, 1))
    shift.run(of, settings, console)
    rows = {(row["name"], row["shift"]): row for row in read_rows(settings.results / "shift-cifar.csv")}
    assert set(rows) == {("b", "clean"), ("b", "moved"), ("b", "faint")}
    model = build(of.configurations[1], 1).eval()
    model.load_state_dict(run.snapshots[0].state)
    black = torch.full((1, 1, 1, 1), -0.5)
    shifted = {kind: distort(data.test_images, black) for kind, distort in of.distortions.items()}
    for kind, images in ({"clean": data.test_images} | shifted).items():
        row = rows["b", kind]
        assert float(row["loss"]) == pytest.approx(float(cross_entropy(model(images), data.test_labels)), rel=1e-5)
        report = lf.measure_flatness(model, [(images[:10], data.test_labels[:10])], progress=False)
        assert float(row["relative_flatness"]) == pytest.approx(report.relative_flatness, rel=1e-5)
    assert "no weights at epoch 1 of 1 of 2 networks (a)" in console.file.getvalue()


def test_shifts_without_weights_say_which_command_makes_them(shifting, monkeypatch):
    _, settings, console = shifting
    monkeypatch.setattr(Run, "train", lambda *_: pytest.fail("trained"))
    arguments = ["--work", str(settings.work), "--results", str(settings.results), "--device", "cpu"]
    monkeypatch.setattr("studies.__main__.Console", lambda: console)
    main(["shift-cifar", *arguments])
    said = console.file.getvalue()
    assert f"python -m studies cifar --keep-weights --work {settings.work}" in said
    assert "12 of 12 networks" in said
    assert "leaves out" not in said
    write_rows(settings.results / "cifar-configurations.csv", [shift.of_cifar().configurations[0].row()])
    main(["shift-cifar", *arguments])
    assert "leaves out networks that are in" in console.file.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_shifts_of_the_digits_train_again(shifting):
    _, settings, console = shifting
    shift.run(small_shifts(part="shift", trains=True, distortions={}), settings, console)
    assert {row["name"] for row in read_rows(settings.results / "shift.csv")} == {"a", "b"}
    assert not console.file.getvalue()


def test_shifts_have_their_networks():
    assert [len(of().configurations) for of in shift.PARTS.values()] == [12, 12]
    assert {c.arm for c in shift.of_cifar().configurations} == set(shift.ARMS)
    assert all(of().snapshot in of().family.snapshots for of in shift.PARTS.values())


def test_shifts_of_cifar_are_analysed_and_written(tmp_path):
    of = shift.of_cifar()
    assert "`shift-cifar`: 0 of 12 networks have been measured" in not_run(tmp_path)
    random = np.random.default_rng(0)
    rows = [
        {"name": c.name, "shift": kind, "error": error} | dict.fromkeys(shift.MEASURES, 5 * error + base)
        for c, base in zip(of.configurations, random.normal(size=12), strict=True)
        for kind, error in zip(of.kinds, random.random(len(of.kinds)), strict=True)
    ]
    write_rows(tmp_path / "shift-cifar.csv", [*rows, rows[0] | {"name": "other"}])  # not on all images
    found = shift.analyse(tmp_path, of)
    taus = {row["measure"]: row for row in read_rows(tmp_path / "shift-cifar-taus.csv")}
    for measure, (_, sign) in shift.MEASURES.items():
        assert float(taus[measure]["over_shifts"]) == float(taus[measure]["over_networks"]) == sign
    assert (taus["r_e"]["networks"], taus["r_e"]["shifts"]) == ("12", "7")
    assert "shift-cifar" not in not_run(tmp_path)
    section = shift_section(of, found, tmp_path)
    assert section.startswith("## CIFAR-10 drawn otherwise\n\n12 of the star's networks")
    assert "| r_e, whole network | 1.00 [1.00, 1.00] | 1.00 (1.00 to 1.00) |" in section
    assert (tmp_path / "shift-cifar.png").exists()
    said = over_shifts({"shift": found, "shift-cifar": found})
    assert said.count("τ over shifts: r_e, whole network 1.00") == 1
    assert said.count("τ over shifts of CIFAR-10: r_e, whole network 1.00") == 1
