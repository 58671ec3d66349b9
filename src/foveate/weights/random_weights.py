"""Random weights that keep activations finite, so that any size can be timed.

Random weights generate noise, not images; what they cost is what trained ones cost.
"""

import math

import torch
from torch import nn

RANDOM_SEED = 20
"""Seed of all random weights: two machines time the same numbers."""


def fill_randomly(module: nn.Module, seed: int = RANDOM_SEED) -> None:
    """Fills every parameter: matrices normal over the root of their fan-in, norms one, biases zero."""
    devices = {parameter.device for parameter in module.parameters()}
    generators = {device: torch.Generator(device).manual_seed(seed) for device in devices}
    for name, parameter in module.named_parameters():
        if name.endswith("scale_mul_1H11"):
            parameter.data.fill_(math.log(4.0))
        elif parameter.dim() > 1:
            fan_in = parameter.numel() // parameter.shape[0]
            parameter.data.normal_(0.0, fan_in**-0.5, generator=generators[parameter.device])
        else:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
