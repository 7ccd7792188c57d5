"""Classifiers of torchvision with random weights whose logits differ by about one."""

import torch
from torch import nn

from tests.networks import randomise_statistics

PIECEWISE_LINEAR = (
    "resnet18", "resnext50_32x4d", "densenet121", "mobilenet_v2", "regnet_y_400mf", "shufflenet_v2_x0_5", "mnasnet0_5",
    "googlenet", "squeezenet1_1",
)  # fmt: skip
CURVED = ("efficientnet_b0",)


def random_model(name, samples=2):
    """A model of ten classes in evaluation mode and a batch ``(x, y)``, both in float64."""
    from torchvision import models  # the tests that use it are skipped without torchvision

    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    model = models.get_model(name, weights=None, num_classes=10, **options)
    model = randomise_statistics(model).double().eval()
    x = torch.randn(samples, 3, 64, 64).double()
    with torch.no_grad():  # so that the model is neither certain nor finds all classes alike
        spread = float(model(x).std(1).mean())
        last = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
        last.weight.div_(spread)
    return model, (x, torch.tensor([3, 7]) if samples == 2 else torch.arange(samples) % 10)
