"""Parameters by name and pattern."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from tests.spectra import convolutional, dense_hessian, quick


def test_parameters_by_name_and_pattern():
    model, x, y = convolutional()
    for params, names in {
        "conv2": ["conv2.weight", "conv2.bias"],
        "conv?": ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"],
        "*.bias": ["conv1.bias", "norm.bias", "conv2.bias", "head.bias"],
        ("head", "norm.weight"): ["norm.weight", "head.weight", "head.bias"],
    }.items():
        result = quick(model, [(x, y)], params=params, top_k=4)
        assert list(result.parameters) == names
        exact = torch.linalg.eigvalsh(dense_hessian(model, x, y, names=names)).flip(0)[:4]
        assert_close(result.eigenvalues, exact, rtol=1e-8, atol=1e-12)
        norm = math.sqrt(sum(float(model.get_parameter(name).square().sum()) for name in names))
        assert_close(result.weight_norm, norm)
        assert {k: v.shape for k, v in result.eigenvector(1).items()} == dict(result.parameters)
        assert_close(torch.cat([v.flatten() for v in result.eigenvector(1).values()]), result.eigenvectors[1])


def test_parameters_without_entries_are_named():
    model = nn.Linear(2, 3)
    model.z = nn.Parameter(torch.zeros(0))
    with pytest.raises(lf.LayerSelectionError, match="frozen or empty: z"):
        lf.hessian_spectrum(model, [(torch.zeros(1, 2), torch.tensor([0]))], params="z")
