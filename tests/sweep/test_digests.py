"""Which jobs a resumed or extended sweep runs: those whose configuration no finished run of the sweep has."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from conftest import Call, CommandLine
from mlflow import MlflowClient

from mnist_exp import compare, runs
from mnist_exp.composing import compose_recipe
from mnist_exp.overrides import combinations
from mnist_exp.settings import Settings
from mnist_exp.tracking.base import RunInfo
from mnist_exp.tracking.mlflow_store import MLflowStore
from mnist_exp.tracking.provenance import software

BASE = ("data=digits", "~phases.train")
Store = Callable[..., str]
Change = Callable[[Settings], Settings]


@pytest.fixture
def sweep(store: str, tmp_path: Any) -> Store:
    """Store a stopped sweep, each child as (job number, overrides, changes of its settings, status), and return its id."""

    def store_sweep(*grids: tuple[str, ...], children: Any = (), status: str = "KILLED", **tags: str) -> str:
        opened = MLflowStore(store, "mnist_exp")
        jobs = {job for grid in grids for job in combinations(grid)}
        recorded = {
            "sweep_jobs": str(len(jobs)),
            "sweeper": "grid",
            "grids": json.dumps(grids),
            "output_dir": str(tmp_path / "outputs"),
        }
        parent = opened.start(RunInfo("sweep", "", recorded | software() | tags))
        for number, overrides, change, ended in children:
            recipe = compose_recipe(*overrides)
            info = {"sweep_id": parent.run_id, "job_num": str(number), "overrides": " ".join(overrides), **software()}
            child = opened.start(RunInfo(f"job {number}", "", info))
            child.log_text(replace(recipe, settings=change(recipe.settings)).as_json(), "recipe.json")
            opened.client.set_terminated(child.run_id, ended)
        opened.client.set_terminated(parent.run_id, status)
        return parent.run_id

    return store_sweep


def same(settings: Settings) -> Settings:
    return settings


def without_subset(settings: Settings) -> Settings:
    """As an older version recorded it, which had no such key."""
    return settings.model_copy(update={"data": {key: value for key, value in settings.data.items() if key != "subset"}})


def planned(in_process: CommandLine, *overrides: str) -> list[str]:
    """What a dry run says of each job."""
    done = in_process("-m", *overrides, "sweep.dry_run=true")
    assert done.returncode == 0, done.stderr
    return re.findall(r"^│ +\d+ │ (\w+)", done.stdout, re.MULTILINE)


def test_a_sweep_that_has_finished_is_left_as_it_is(sweep: Store, store: str, in_process: CommandLine) -> None:
    """Among the rest its answer: no job runs that could change it."""
    grid = (*BASE, "seed=0,1")
    children = [(number, (*BASE, f"seed={number}"), same, "FINISHED") for number in (0, 1)]
    tags = {"answer": "plain_cnn is lower", "mlflow.note.content": "the answer"}
    parent = sweep(grid, children=children, status="FINISHED", **tags)
    done = in_process("-m", f"sweep.resume='{parent}'")
    assert done.returncode == 0, done.stderr
    assert parent in done.stdout
    run = MlflowClient(store).get_run(parent)
    assert run.info.status == "FINISHED"
    assert tags.items() <= run.data.tags.items()


def test_a_finished_sweep_records_an_extension_that_runs_kept_apart_complete(
    sweep: Store, store: str, in_process: CommandLine
) -> None:
    apart = ("none", (*BASE, "seed=1"), same, "FINISHED")
    parent = sweep(
        (*BASE, "seed=0"),
        children=[(0, (*BASE, "seed=0"), same, "FINISHED"), apart],
        status="FINISHED",
        answer="old",
        **{"answer.seed": "old"},
    )
    done = in_process("-m", "hydra/launcher=basic", f"sweep.extend='{parent}'", "seed=1")  # starts no processes
    assert done.returncode == 0, done.stderr
    tags = MlflowClient(store).get_run(parent).data.tags
    assert (tags["sweep_jobs"], len(json.loads(tags["grids"])), tags["answer"]) == ("2", 2, "")
    assert tags["answer.seed"] == "", "answers from fewer jobs no longer hold"
    assert planned(in_process, f"sweep.resume='{parent}'") == ["skip", "skip"]


def test_a_job_is_its_configuration_whatever_its_number(sweep: Store, in_process: CommandLine) -> None:
    grid = (*BASE, "phases.finetune.batch_size=64,128", "seed=0,1")
    done = [(7, (*BASE, "seed=1", "phases.finetune.batch_size=64"), without_subset, "FINISHED")]
    sweep(grid, children=[*done, (0, (*BASE, "phases.finetune.batch_size=128", "seed=0"), same, "FAILED")])
    assert planned(in_process, "sweep.resume=latest") == ["run", "skip", "run", "run"]
    assert planned(in_process, "sweep.resume=latest", *grid) == ["run", "skip", "run", "run"], "the same command line again"
    assert planned(in_process, "sweep.extend=latest", "seed=1,2") == ["run", "skip", "run", "run", "run", "run"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda settings: settings.model_copy(update={"batch_size": 64}), "batch_size=64"),
        (lambda settings: settings.model_copy(update={"data": settings.data | {"subset": 100}}), "data.subset=100"),
        (lambda settings: settings.model_copy(update={"rerun": "a" * 32}), "sweep.force"),
    ],
)
def test_a_finished_run_of_another_configuration_is_not_lost(
    sweep: Store, in_process: CommandLine, store: str, change: Change, key: str
) -> None:
    grid = (*BASE, "phases.finetune.batch_size=64,128")
    sweep(grid, children=[(0, (*BASE, "phases.finetune.batch_size=64"), change, "FINISHED")])
    refused = in_process("-m", "sweep.resume=latest", "sweep.dry_run=true")
    assert refused.returncode == 1
    assert key in refused.stderr
    assert planned(in_process, "sweep.resume=latest", "sweep.force=true") == ["run", "run"]
    (child,) = [run for run in MLflowStore(store, "mnist_exp").runs() if run.job == 0]
    MlflowClient(store).set_tag(child.run_id, "job_num", "none")
    assert planned(in_process, "sweep.resume=latest") == ["run", "run"], "it is kept apart already"


def test_a_run_that_was_kept_apart_is_a_job_again_with_its_configuration(
    sweep: Store, in_process: CommandLine, store: str
) -> None:
    sweep((*BASE, "save_every=5,6"), children=[(0, (*BASE, "save_every=6"), same, "FINISHED")])
    (child,) = [run for run in MLflowStore(store, "mnist_exp").runs() if run.job == 0]
    MlflowClient(store).set_tag(child.run_id, "job_num", "none")
    assert planned(in_process, "sweep.resume=latest") == ["run", "skip"]


def test_extensions_add_each_grid_once(sweep: Store, in_process: CommandLine, store: str) -> None:
    seeds = [(*BASE, "seed=0"), (*BASE, "seed=1")]
    sweep(*seeds)
    done = in_process("-m", "sweep.extend=latest", "seed=2", "sweep.dry_run=true")
    assert done.returncode == 0, done.stderr
    assert planned(in_process, "sweep.extend=latest", "seed=2") == ["run"] * 3


def test_a_rerun_is_the_same_job_however_its_id_is_typed(sweep: Store, in_process: CommandLine, store: str) -> None:
    sweep(BASE, children=[(0, BASE, same, "FINISHED")], status="FINISHED")
    (run,) = [run for run in MLflowStore(store, "mnist_exp").runs() if run.job == 0]
    child = (0, BASE, lambda settings: settings.model_copy(update={"rerun": run.run_id}), "FINISHED")
    again = sweep((f"rerun={run.run_id}",), children=[child])
    assert planned(in_process, f"sweep.resume={again}", f"rerun='{run.run_id[:8]}'") == ["skip"]


@pytest.mark.parametrize("name", ["code", "torch"])
def test_other_software_is_refused(sweep: Store, in_process: CommandLine, store: str, name: str) -> None:
    parent = sweep(BASE, children=[(0, BASE, same, "KILLED")])
    MlflowClient(store).set_tag(parent, name, "other")
    for key in ("sweep.resume=latest", "sweep.extend=latest"):
        refused = in_process("-m", key, *(["seed=5"] if "extend" in key else []), "sweep.dry_run=true")
        assert refused.returncode == 1
        assert f"{name} was other" in refused.stderr
    assert in_process("-m", "sweep.resume=latest", "sweep.force=true", "sweep.dry_run=true").returncode == 0


@pytest.mark.parametrize("grids", [None, "{}"])
def test_a_sweep_of_another_version_is_shown_but_not_continued(
    sweep: Store, in_process: CommandLine, call: Call, store: str, grids: str | None
) -> None:
    run_id = sweep(BASE, children=[(0, BASE, same, "FINISHED")])
    client = MlflowClient(store)
    client.delete_tag(run_id, "grids") if grids is None else client.set_tag(run_id, "grids", grids)
    messages = {in_process("-m", f"sweep.{key}={run_id}").stderr for key in ("resume", "extend")}
    messages |= {call(main, run_id).stderr for main in (compare.main,)}
    assert len(messages) == 1
    assert run_id in messages.pop()
    assert run_id[:8] in call(runs.main, "list").stdout
    assert call(runs.main, "show", run_id).returncode == 0


def test_overrides_that_a_tag_cannot_hold_are_refused_at_once(in_process: CommandLine, tmp_path: Any, store: str) -> None:
    refused = in_process("-m", *BASE, "seed=" + ",".join(map(str, range(2000))))
    assert refused.returncode == 1
    assert "8,000" in refused.stderr
    assert not MLflowStore(store, "mnist_exp").runs(), "nothing is recorded"


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        (("save_every=5",), ("save_every=6",), True),
        (("model.parameter_limit=null",), (), True),
        (("batch_size=64",), ("batch_size=65",), False),
        (
            ("+phase@phases.b=finetune", "+phase@phases.a=finetune"),
            ("+phase@phases.a=finetune", "+phase@phases.b=finetune"),
            False,
        ),
        (("data.root=/a",), ("data.root=/b",), True),
        (("model=se_cnn",), (), True),
    ],
)
def test_the_digest(first: tuple[str, ...], second: tuple[str, ...], equal: bool) -> None:
    one, other = (compose_recipe(*overrides).settings for overrides in (first, second))
    assert (one.digest() == other.digest()) is equal
    assert one.digest(["save_every"]) != compose_recipe(*first, "save_every=7").settings.digest(["save_every"])
