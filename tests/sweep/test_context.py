"""The context that a sweep sets for its jobs is hidden from users, and cannot be set by them."""

from collections.abc import Callable

import pytest
from conftest import Compose

from mnist_exp.errors import UserError
from mnist_exp.overrides import JOB_KEY, parse
from mnist_exp.tracking.job_context import JobContext, parse_job_context

CONTEXT = JobContext("a" * 32, 3, "#0072B2", ["model", "seed"], "digits", False)


def test_the_override_carries_the_context() -> None:
    value = parse(CONTEXT.as_override()).value()
    assert isinstance(value, str)
    assert parse_job_context(value) == CONTEXT


@pytest.mark.parametrize("changes", [{"sweep_id": "../x"}, {"color": "red"}, {"number": "x"}, {"varied": None}])
def test_a_forged_context_is_refused(changes: dict) -> None:
    with pytest.raises(UserError):
        parse_job_context(vars(CONTEXT) | changes)


def test_the_configuration_does_not_show_it(composed: Compose) -> None:
    assert JOB_KEY not in composed().model_dump_json()


@pytest.mark.parametrize("flags", [(), ("-m",), ("-m", "hydra/sweeper=basic", "hydra/launcher=basic")])
@pytest.mark.parametrize("added", [CONTEXT.as_override(), "+sweep.id=abc", "++sweep.job=1"])
def test_a_user_cannot_set_it(refuse: Callable[..., str], flags: tuple[str, ...], added: str) -> None:
    assert added.lstrip("+").partition("=")[0] in refuse(*flags, "data=digits", "~phases.train", "tracking=none", added)
