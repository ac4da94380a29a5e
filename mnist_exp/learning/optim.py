"""Optimizers and learning-rate schedules that torch does not offer in this form.

Like torch's own, an optimizer takes the parameters. A schedule takes the optimizer and the phase's number of steps, and is
advanced after every step.
"""

import math
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from mnist_exp.learning.arguments import is_number, is_sequence, require


def muon(
    params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float, adamw_lr: float, adamw_betas: tuple[float, float]
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
    for name, rate in {"lr": lr, "adamw_lr": adamw_lr}.items():
        require(is_number(rate, 0) and rate > 0, name, rate, "a number > 0")
    require(is_number(momentum, 0) and momentum < 1, "momentum", momentum, "a number >= 0 and < 1")
    require(is_number(weight_decay, 0), "weight_decay", weight_decay, "a number >= 0")
    is_pair = is_sequence(adamw_betas) and len(adamw_betas) == 2
    is_valid = is_pair and all(is_number(beta, 0) and beta < 1 for beta in adamw_betas)
    require(is_valid, "adamw_betas", adamw_betas, "two numbers >= 0 and < 1")
    from pytorch_optimizer import Muon  # most of a second, for this optimizer only

    params = list(params)
    convolutions = {"params": [parameter for parameter in params if parameter.ndim == 4], "lr": lr, "momentum": momentum}
    others = {"params": [parameter for parameter in params if parameter.ndim != 4], "lr": adamw_lr, "betas": tuple(adamw_betas)}
    return Muon([convolutions | {"weight_decay": weight_decay, "use_muon": True}, others | {"use_muon": False}])


def constant(optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Keep the optimizer's learning rate."""
    return LambdaLR(optimizer, lambda step: 1.0)


def cosine(optimizer: Optimizer, total_steps: int, min_factor: float) -> LambdaLR:
    """Lower the learning rate along half a cosine.

    Args:
        optimizer: Its learning rate is the starting point.
        total_steps: Number of steps until the end point.
        min_factor: End point as a fraction of the starting point, 0 to 1.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, equation 5, without restarts.
    """
    require(is_number(min_factor, 0, 1), "min_factor", min_factor, "a number from 0 to 1")
    last = max(1, total_steps - 1)
    return LambdaLR(optimizer, lambda step: min_factor + (1 - min_factor) * (1 + math.cos(math.pi * min(1, step / last))) / 2)


def one_cycle(optimizer: Optimizer, total_steps: int, div_factor: float, final_div_factor: float, pct_start: float) -> OneCycleLR:
    """Raise the learning rate of each parameter group to its peak, then lower it.

    Torch's own class takes the peaks as an argument and, by default, changes the momentum, too.

    Args:
        optimizer: The learning rate of each group is its peak.
        total_steps: Number of steps of the whole cycle.
        div_factor: Start at the peak divided by this.
        final_div_factor: End at the start divided by this.
        pct_start: Fraction of the steps spent rising, between 0 and 1.

    Source: Smith and Topin, Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates, 2018.
    """
    for name, factor in {"div_factor": div_factor, "final_div_factor": final_div_factor}.items():
        require(is_number(factor, 0) and factor > 0, name, factor, "a number > 0")
    require(is_number(pct_start, 0, 1) and 0 < pct_start < 1, "pct_start", pct_start, "a number between 0 and 1")
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
    """Multiply the learning rate by a factor at each milestone.

    Args:
        optimizer: Its learning rate is the starting point.
        total_steps: Number of steps of the phase.
        milestones: Fractions of `total_steps`, 0 to 1.
        gamma: The factor, above 0, at most 1.
    """
    is_list = is_sequence(milestones) and all(is_number(milestone, 0, 1) for milestone in milestones)
    require(is_list, "milestones", milestones, "a list of numbers from 0 to 1, fractions of the phase")
    require(is_number(gamma, 0, 1) and gamma > 0, "gamma", gamma, "a number > 0 and <= 1")
    boundaries = [milestone * total_steps for milestone in milestones]
    return LambdaLR(optimizer, lambda step: gamma ** sum(step >= boundary for boundary in boundaries))
