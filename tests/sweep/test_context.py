"""The context that a sweep sets for its jobs is hidden from users, and cannot be set by them."""

from collections.abc import Callable

import pytest
from conftest import Call
from pydantic import ValidationError

from mnist_exp.overrides import JOB_KEY, parse
from mnist_exp.run import main
from mnist_exp.settings import JobContext

CONTEXT = JobContext(
    sweep_id="a" * 32,
    number=3,
    color="#0072B2",
    varied=["model", "optimizer@phases.finetune.optimizer"],
    objective="val/loss",
    data=None,
    in_search=False,
)


def test_the_override_carries_the_context() -> None:
    assert JobContext.model_validate(parse(CONTEXT.as_override()).value()) == CONTEXT


@pytest.mark.parametrize("changes", [{"sweep_id": "../x"}, {"color": "red"}, {"number": "x"}, {"varied": None}])
def test_a_forged_context_is_refused(changes: dict) -> None:
    with pytest.raises(ValidationError):
        JobContext.model_validate(CONTEXT.model_dump() | changes)


def test_the_configuration_does_not_show_it(call: Call) -> None:
    assert JOB_KEY not in call(main, "--cfg", "job").stdout


@pytest.mark.parametrize("flags", [(), ("-m",), ("-m", "hydra/sweeper=basic", "hydra/launcher=basic")])
@pytest.mark.parametrize("added", [CONTEXT.as_override(), "+sweep.id=abc", "++sweep.job=1"])
def test_a_user_cannot_set_it(refuse: Callable[..., str], flags: tuple[str, ...], added: str) -> None:
    assert added.lstrip("+").partition("=")[0] in refuse(*flags, "data=digits", "tracking=none", added)
