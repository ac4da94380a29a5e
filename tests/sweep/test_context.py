"""The context that a sweep sets for its jobs is hidden from users, and cannot be set by them."""

import pytest
from conftest import CommandLine
from hydra import compose, initialize_config_dir

from mnist_exp.errors import UserError
from mnist_exp.overrides import parse
from mnist_exp.paths import CONF
from mnist_exp.tracking.definition import JobContext, parse_job_context

CONTEXT = JobContext("a" * 32, 3, "#0072B2", ["model", "seed"], "mnist", True)


def test_the_override_carries_the_context() -> None:
    (parsed,) = parse([CONTEXT.as_override()])
    value = parsed.value()
    assert isinstance(value, str)
    assert parse_job_context(value) == CONTEXT


@pytest.mark.parametrize("changes", [{"sweep_id": "../x"}, {"color": "red"}, {"number": "x"}, {"varied": None}])
def test_a_forged_context_is_refused(changes: dict) -> None:
    with pytest.raises(UserError, match="sweep_job is invalid"):
        parse_job_context(vars(CONTEXT) | changes)


def test_the_public_configuration_does_not_show_it() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config")
    assert "sweep_job" not in composed
    assert set(composed.sweep) == {"resume", "extend", "on_failure", "retries", "dry_run", "force"}


@pytest.mark.parametrize("flags", [(), ("-m",)], ids=["run", "sweep"])
def test_a_user_cannot_set_it(flags: tuple[str, ...], in_process: CommandLine, store: str) -> None:
    done = in_process(*flags, "data=digits", CONTEXT.as_override())
    assert done.returncode == 1
    assert "sweep_job is not a key of the configuration" in done.stderr
    for added in ("+sweep.id=abc", "++sweep.job=1", "+plan.seed=3"):
        done = in_process(*flags, "data=digits", added)
        assert done.returncode == 1
        assert f"{added.lstrip('+').partition('=')[0]} is not a key of the configuration" in done.stderr
