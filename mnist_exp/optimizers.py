"""Optimizers that torch lacks in this form: called with the parameters."""

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer


def muon(
    params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float, adamw_lr: float, adamw_betas: tuple[float, float]
) -> Optimizer:
    """Orthogonalise the updates of convolutions, as matrices (out, in * height * width); leave all else to AdamW.

    lr, momentum, weight_decay: of the convolutions; adamw_lr, adamw_betas: of the rest, which does not decay.
    Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024; pytorch-optimizer's implementation.
    """
    from pytorch_optimizer import Muon  # most of a second, for this optimizer only

    params = list(params)
    convolutions = {"params": [parameter for parameter in params if parameter.ndim == 4], "lr": lr, "momentum": momentum}
    rest = {"params": [parameter for parameter in params if parameter.ndim != 4], "lr": adamw_lr, "betas": tuple(adamw_betas)}
    return Muon([convolutions | {"weight_decay": weight_decay, "use_muon": True}, rest | {"use_muon": False}])
