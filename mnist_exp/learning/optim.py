"""Optimizers and LR schedules missing from torch.

Like torch's own, an optimizer takes the parameters, and a schedule takes the optimizer; it is advanced after every step. It gets
the phase's number of steps as `total_steps`.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated

from annotated_types import Interval
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from mnist_exp.errors import Fraction, NonNegative, Positive, Share


def muon(
    params: Iterable[Tensor],
    lr: Positive,
    momentum: Fraction,
    weight_decay: NonNegative,
    adamw_lr: Positive,
    adamw_betas: tuple[Fraction, Fraction],
) -> Optimizer:
    """Return an optimizer that orthogonalizes the updates of convolutions and leaves all other parameters to AdamW.

    Args:
        params: Parameters; the weight of a convolution counts as a matrix (out, in * height * width).
        lr: Learning rate of the convolutions.
        momentum: Momentum of the convolutions.
        weight_decay: Weight decay of the convolutions; the others do not decay.
        adamw_lr: Learning rate of the others.
        adamw_betas: AdamW's decay rates of the two moments.

    Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024; pytorch-optimizer's implementation.
    """
    from pytorch_optimizer import Muon  # most of a second, for this optimizer only

    params = list(params)
    convolutions = {"params": [parameter for parameter in params if parameter.ndim == 4], "lr": lr, "momentum": momentum}
    others = {"params": [parameter for parameter in params if parameter.ndim != 4], "lr": adamw_lr, "betas": tuple(adamw_betas)}
    return Muon([convolutions | {"weight_decay": weight_decay, "use_muon": True}, others | {"use_muon": False}])


def cosine(optimizer: Optimizer, total_steps: int, min_factor: Share) -> LambdaLR:
    """Lower the learning rate along half a cosine.

    Args:
        optimizer: Its learning rate is the starting point.
        total_steps: Number of steps until the end point.
        min_factor: End point as a fraction of the starting point.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, equation 5, without restarts.
    """
    last = max(1, total_steps - 1)
    return LambdaLR(optimizer, lambda step: min_factor + (1 - min_factor) * (1 + math.cos(math.pi * min(1, step / last))) / 2)


def one_cycle(
    optimizer: Optimizer,
    total_steps: int,
    div_factor: Positive,
    final_div_factor: Positive,
    pct_start: Annotated[float, Interval(gt=0, lt=1)],
) -> OneCycleLR:
    """Raise the learning rate of each parameter group to its peak, then lower it.

    Torch's own class takes the peaks as an argument and, by default, changes the momentum, too.

    Args:
        optimizer: The learning rate of each group is its peak.
        total_steps: Number of steps of the whole cycle.
        div_factor: Start at the peak divided by this.
        final_div_factor: End at the start divided by this.
        pct_start: Fraction of the steps spent rising.

    Source: Smith and Topin, Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates, 2018.
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


def step(
    optimizer: Optimizer, total_steps: int, milestones: Sequence[Share], gamma: Annotated[float, Interval(gt=0, le=1)]
) -> LambdaLR:
    """Multiply the learning rate by a factor at each milestone.

    Args:
        optimizer: Its learning rate is the starting point.
        total_steps: Number of steps of the phase.
        milestones: Fractions of `total_steps`.
        gamma: The factor.
    """
    boundaries = [milestone * total_steps for milestone in milestones]
    return LambdaLR(optimizer, lambda step: gamma ** sum(step >= boundary for boundary in boundaries))
