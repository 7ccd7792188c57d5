"""Products of curvlinops, where it is installed, on a ResNet-20: the largest eigenvalue and the trace."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf

curvlinops = pytest.importorskip("curvlinops")


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.branch = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        return (self.branch(x) + self.shortcut(x)).relu()


def resnet():
    torch.manual_seed(0)
    blocks, inputs = [nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()], 16
    for width in (16, 32, 64):
        for _ in range(3):
            blocks.append(Residual(inputs, width, 1 if inputs == width else 2))
            inputs = width
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


@pytest.mark.slow
def test_resnet20():
    net = resnet()
    x, y = torch.randn(10, 3, 16, 16), torch.randint(10, (10,))
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    operator = curvlinops.HessianLinearOperator(net, nn.CrossEntropyLoss(), list(net.parameters()), batches)
    result = lf.hessian_spectrum(net, batches, top_k=1, num_steps=1, num_probes=20)
    v = result.eigenvectors[0]
    assert_close(operator @ v, float(result.eigenvalues) * v, rtol=0, atol=3e-4 * float(result.eigenvalues))
    assert result.converged
    generator = torch.Generator().manual_seed(1)
    probes = torch.randint(2, (20, len(v)), generator=generator).float() * 2 - 1
    samples = torch.stack([probe @ (operator @ probe) for probe in probes]).double()
    error = (float(samples.var()) / 20 + result.trace_stderr**2) ** 0.5
    assert abs(float(samples.mean()) - result.trace) <= 4 * error
