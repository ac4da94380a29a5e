"""Learning-rate schedules that torch lacks in this form: called with the optimizer and total_steps, stepped every batch."""

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR


def constant(optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Keep the optimizer's learning rate."""
    return LambdaLR(optimizer, lambda step: 1.0)


def cosine(optimizer: Optimizer, total_steps: int, min_factor: float) -> LambdaLR:
    """Lower the learning rate along half a cosine, from the optimizer's own to `min_factor` of it (Loshchilov, 2017)."""
    last = max(1, total_steps - 1)
    return LambdaLR(optimizer, lambda step: min_factor + (1 - min_factor) * (1 + math.cos(math.pi * min(1, step / last))) / 2)


def one_cycle(optimizer: Optimizer, total_steps: int, div_factor: float, final_div_factor: float, pct_start: float) -> OneCycleLR:
    """Raise each rate from its own / `div_factor` to its own, then lower it (Smith and Topin, 2018).

    torch's takes the peaks as arguments, one for all groups of parameters or a list, and moves the momentum unless told not to.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(
        optimizer,
        peaks,
        total_steps,
        pct_start=pct_start,
        cycle_momentum=False,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
    )


def step(optimizer: Optimizer, total_steps: int, milestones: Sequence[float], gamma: float) -> LambdaLR:
    """Multiply the learning rate by `gamma` at each of `milestones`, fractions of `total_steps`."""
    boundaries = [milestone * total_steps for milestone in milestones]
    return LambdaLR(optimizer, lambda step: gamma ** sum(step >= boundary for boundary in boundaries))
