"""Projections of the loss's curvature: columns, a floor, and what is left out."""

import sys

import pytest
import torch
from torch.testing import assert_close

from lightning_flatness.functional import ClassCurvature, DenseCurvature
from tests.guarding import guards

MODULE = sys.modules["lightning_flatness.functional.curvature"]


def random_curvature(kind, samples, classes, scale=1.0):
    if kind == "dense":
        matrices = torch.randn(samples, classes, classes, dtype=torch.float64)
        matrices = matrices + matrices.mT
        return DenseCurvature.of(matrices), matrices
    pi = torch.softmax(scale * torch.randn(samples, classes, dtype=torch.float64), dim=1)
    if kind == "diagonal":
        return ClassCurvature(pi), torch.diag_embed(pi)
    c = torch.rand(samples, 1, dtype=torch.float64) + 0.5
    return ClassCurvature(c * pi, pi), c[:, None] * (torch.diag_embed(pi) - pi[:, :, None] * pi[:, None, :])


def assembled(curvature, matrix, projection):
    columns, counts, signs, floor, rest, _ = projection
    signed = columns if signs is None else columns * signs[:, :, None]
    assert not any(bool(c[count:].any()) for c, count in zip(columns, counts, strict=True))
    actual = columns.mT @ signed
    if floor is not None:
        actual = actual + floor[:, None, None] * (matrix.T @ matrix)
    return actual if rest is None else actual + torch.diag_embed(rest)


@pytest.mark.parametrize("kind", ["softmax", "diagonal", "dense"])
@pytest.mark.parametrize("classes", [2, 5, 127, 128, 150])  # from 128 on the floor is taken apart
def test_projection_is_vt_lambda_v(monkeypatch, kind, classes):
    monkeypatch.setattr(MODULE, "WORTHWHILE", 2.0)  # a floor, although no class is left out
    curvature, matrices = random_curvature(kind, 3, classes)
    V = torch.randn(classes, 6, dtype=torch.float64)
    centred = curvature.centred(V)
    expected = V.T @ matrices @ V
    projections = [curvature.project(centred), curvature.project(centred, torch.ones(3, 6).double(), 1e-300)]
    for projection in projections:
        assert_close(assembled(curvature, centred, projection), expected, rtol=1e-10, atol=1e-12)
    assert_close(curvature.diagonal(centred), expected.diagonal(dim1=1, dim2=2), rtol=1e-10, atol=1e-12)
    floors = [projection.floor is not None for projection in projections]
    assert floors == [False, classes >= 128 and kind != "dense"]


@guards("functional/curvature.py", "ordered.cumsum(0) >= tolerance * whole", "ordered >= tolerance * whole")
@pytest.mark.parametrize("kind", ["softmax", "diagonal"])
@pytest.mark.parametrize("scale", [2.0, 8.0])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
def test_what_is_left_out_is_small_and_off_the_diagonal(monkeypatch, kind, scale, tolerance):
    monkeypatch.setattr(MODULE, "WORTHWHILE", 2.0)  # one class that goes is enough
    torch.manual_seed(1)
    curvature, matrices = random_curvature(kind, 4, 200, scale)
    V, scales = torch.randn(200, 6, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64)
    centred = curvature.centred(V)
    projection = curvature.project(centred, scales, tolerance)
    assert max(projection.counts) < 200, "nothing was left out"
    expected = V.T @ matrices @ V
    actual = assembled(curvature, centred, projection)
    diagonal = expected.diagonal(dim1=1, dim2=2)
    assert_close(actual.diagonal(dim1=1, dim2=2), diagonal, rtol=1e-10, atol=1e-12)
    # Entries scaled as in the closed form, where scales are the diagonal of a positive matrix, here of rank one.
    roots = scales.sqrt()
    error = (actual - expected) * roots[:, :, None] * roots[:, None, :]
    bound = tolerance * (diagonal * scales).sum()
    assert 0 < float(torch.linalg.svdvals(error).sum()) <= 2 * bound


def test_where_hardly_any_class_can_go_all_are_taken():
    curvature, _ = random_curvature("softmax", 3, 200)
    projection = curvature.project(torch.randn(200, 6).double(), torch.ones(3, 6).double(), 1e-9)
    assert projection.counts == [200] * 3
    assert projection.floor is projection.rest is None


@guards("functional/curvature.py", "w = w.scatter(1, top, 0.0)", "largest = 0 * largest")
def test_the_class_of_a_sure_sample_does_not_cancel():
    """Its part is nothing beside its square, and may go beside an unsure sample; the diagonal stays as it is."""
    torch.manual_seed(1)
    logits = torch.randn(2, 200, dtype=torch.float64)
    logits[0, 3] += 40
    pi = torch.softmax(logits, dim=1)
    curvature, V = ClassCurvature(pi, pi), 3 + torch.randn(200, 6, dtype=torch.float64)
    centred, scales = curvature.centred(V), torch.tensor([[1e7], [1.0]], dtype=torch.float64).expand(2, 6)
    projection = curvature.project(centred, scales, 1e-6)
    actual = assembled(curvature, centred, projection).diagonal(dim1=1, dim2=2)
    assert projection.counts[0] < 10
    assert_close((actual * scales).sum(), (curvature.diagonal(centred) * scales).sum(), rtol=1e-13, atol=0)


def test_a_sure_sample_keeps_few_columns_beside_an_unsure_one():
    torch.manual_seed(1)
    unsure, sure = torch.randn(200, dtype=torch.float64), 40 * torch.randn(200, dtype=torch.float64)
    pi = torch.softmax(torch.stack([unsure, sure]), dim=1)
    V = torch.randn(200, 6, dtype=torch.float64)
    counts = ClassCurvature(pi, pi).project(V, torch.ones(2, 6).double(), 1e-6).counts
    assert counts[0] > 150
    assert counts[1] < 20


@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0])
def test_columns_are_a_factor(classes, scale):
    curvature, matrices = random_curvature("softmax", 6, classes, scale)
    assert curvature.num_columns == classes - 1
    factor = torch.stack([curvature.column(index) for index in range(classes - 1)], dim=2)
    assert_close(factor @ factor.mT, matrices, rtol=1e-10, atol=1e-15)
    units = torch.eye(classes, dtype=torch.float64)
    factor = torch.stack([curvature.factor(unit.expand(6, -1)) for unit in units], dim=2)
    assert_close(factor @ factor.mT, matrices, rtol=1e-10, atol=1e-15)


def test_single_precision_does_not_leave_out_what_rounding_hides():
    # All but 1e-8 of the mass in one class: its part is zero in exact numbers, and not in float32.
    classes, tolerance = 200, 1e-2
    pi = torch.full((1, classes), 1e-8 / (classes - 1), dtype=torch.float64)
    pi[0, 0] = 1 - 1e-8
    torch.manual_seed(0)
    V, scales = 1 + torch.randn(classes, 6), torch.rand(1, 6)
    curvature = ClassCurvature(pi, pi)
    centred = curvature.centred(V)
    rest = curvature.project(centred, scales, tolerance).rest
    left_out = 0.0 if rest is None else float((rest * scales).sum())
    assert left_out <= tolerance * float((curvature.diagonal(centred.double()) * scales).sum())
