import pytest
import torch
from torch import nn

from mnist_exp.learning.training import make_scheduler
from mnist_exp.nodes import build

STEPS = 115


def test_muon_orthogonalizes_convolutions_and_leaves_the_others_to_adamw(composed) -> None:
    torch.manual_seed(0)
    convolution, linear, twin = nn.Conv2d(4, 8, 3), nn.Linear(8, 3), nn.Linear(8, 3)
    twin.load_state_dict(linear.state_dict())
    before = convolution.weight.detach().clone()
    node = composed("optimizer=muon").optimizer
    optimizer = build(node, "optimizer")([*convolution.parameters(), *linear.parameters()])
    for layer in (convolution, linear):
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
    twin.weight.grad, twin.bias.grad = linear.weight.grad, linear.bias.grad
    optimizer.step()
    torch.optim.AdamW(twin.parameters(), lr=node["adamw_lr"], betas=node["adamw_betas"], eps=1e-10, weight_decay=0).step()
    torch.testing.assert_close(linear.state_dict(), twin.state_dict())
    values = torch.linalg.svdvals((convolution.weight - before).flatten(1))
    assert values.tolist() == pytest.approx([node["lr"]] * 8, rel=0.4), "all directions of the update have about the same length"


def rates(node: dict, base: float) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base, momentum=0.9)
    scheduler = make_scheduler(build(node, "scheduler"), optimizer, STEPS)
    seen = []
    for _ in range(STEPS):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["momentum"] == 0.9, "the schedule must leave the momentum alone"
    return seen


def test_one_cycle_starts_at_02_peaks_at_04_and_ends_near_0(composed) -> None:
    node = composed().phases["train"]["scheduler"]
    seen = rates(node, 0.4)
    assert seen[0] == pytest.approx(0.2)
    assert max(seen) == pytest.approx(0.4, rel=1e-3)
    assert seen.index(max(seen)) == pytest.approx(0.3 * STEPS, abs=1)
    assert seen[-1] < 1e-4


def test_each_group_of_parameters_peaks_at_its_own_rate(composed) -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.02)]
    optimizer = torch.optim.SGD(groups)
    node = composed("optimizer=muon").phases["train"]["scheduler"]
    scheduler = build(node, "scheduler")(optimizer, total_steps=STEPS)
    seen = []
    for _ in range(STEPS):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    first, second = zip(*seen, strict=True)
    assert (max(first), max(second)) == (pytest.approx(0.1, rel=1e-3), pytest.approx(0.02, rel=1e-3))


def test_constant(composed) -> None:
    assert set(rates(composed("scheduler=constant").scheduler, 0.3)) == {0.3}


def test_cosine(composed) -> None:
    seen = rates(composed("scheduler=cosine").scheduler, 0.3)
    assert seen[0] == 0.3
    assert seen[STEPS // 2] == pytest.approx(0.15)
    assert seen[-1] == pytest.approx(0)
    assert seen == sorted(seen, reverse=True)


def test_step(composed) -> None:
    seen = rates(composed("scheduler=step").scheduler, 1.0)
    assert seen[0] == seen[57] == 1.0
    assert seen[58] == seen[86] == pytest.approx(0.1)
    assert seen[87] == seen[-1] == pytest.approx(0.01)
