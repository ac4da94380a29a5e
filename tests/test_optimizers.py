import pytest
import torch
from torch import nn

from mnist_exp.config import build


def test_muon_orthogonalises_convolutions_and_leaves_the_rest_to_adamw(composed) -> None:
    torch.manual_seed(0)
    convolution, linear, twin = nn.Conv2d(4, 8, 3), nn.Linear(8, 3), nn.Linear(8, 3)
    twin.load_state_dict(linear.state_dict())
    before = convolution.weight.detach().clone()
    node = composed("optimizer=muon")["optimizer"]
    optimizer = build(node, "optimizer")([*convolution.parameters(), *linear.parameters()])
    for layer in (convolution, linear):
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
    twin.weight.grad, twin.bias.grad = linear.weight.grad, linear.bias.grad
    optimizer.step()
    torch.optim.AdamW(twin.parameters(), lr=node["adamw_lr"], betas=node["adamw_betas"], eps=1e-10, weight_decay=0).step()
    torch.testing.assert_close(linear.state_dict(), twin.state_dict())
    values = torch.linalg.svdvals((convolution.weight - before).flatten(1))
    assert values.tolist() == pytest.approx([node["lr"]] * 8, rel=0.4), "all directions of the update are about as long"
