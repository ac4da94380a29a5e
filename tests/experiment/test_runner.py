"""One run with a double of the tracker: which records it makes, in which order, and with which final status."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine, Compose

from mnist_exp.errors import PrunedError
from mnist_exp.experiment.runner import Prepared, RunRequest, finalize, prepare, start_run, train
from mnist_exp.learning.evaluation import evaluate
from mnist_exp.settings import Recipe
from mnist_exp.storage import checkpoint, run_dir
from mnist_exp.storage.checkpoint import Checkpoint
from mnist_exp.tracking.base import RunInfo, Store, Tracker

RUN_ID = "0" * 32


class RecordingTracker(Tracker):
    """Collects (method, arguments) of every call, and the error that ends the run."""

    is_recording = True

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id)
        self.calls: list[tuple[str, Any]] = []
        for name in (name for name in vars(Tracker) if name.startswith(("log_", "set_"))):
            setattr(self, name, lambda *values, name=name: self.calls.append((name, values)))

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.calls.append(("end", kind))

    def names(self, method: str) -> list[Any]:
        """The last argument of each call of a method."""
        return [values[-1] for name, values in self.calls if name == method]


class RecordingStore(Store):
    def start(self, info: RunInfo, run_id: str | None = None) -> RecordingTracker:
        self.info, self.tracker = info, RecordingTracker(run_id or RUN_ID)
        return self.tracker


Prepare = Callable[..., tuple[RunRequest, Prepared, RecordingStore]]


@pytest.fixture
def prepared(composed, tmp_path: Path) -> Prepare:
    """Prepare a short run whose records go to a double."""

    def make(start: Checkpoint | None = None, **changes: Any) -> tuple[RunRequest, Prepared, RecordingStore]:
        settings = composed("data=digits", "~phases.train", "tracking=none", f"output_dir={tmp_path}")
        recipe = Recipe(settings, {"model": "se_cnn", "data": "digits"}, ["data=digits"])
        request = RunRequest(start or Checkpoint("", recipe), "the command", quiet=True, **changes)
        store = RecordingStore()
        return request, replace(prepare(request), store=store), store

    return make


def test_a_run_records_its_origin_its_progress_and_its_results_in_plain_data(prepared: Prepare, tmp_path: Path) -> None:
    request, parts, store = prepared()
    with start_run(request, parts) as recorder:
        train(request, parts, recorder)
        result = finalize(request, parts, recorder, evaluate(parts.model, parts.data.splits["test"]))
    assert (store.info.name, store.info.command) == ("se_cnn digits", "the command")
    assert store.info.tags["data"] == "digits"
    calls = store.tracker.calls
    texts = [values[1] for name, values in calls if name == "log_text"]
    assert {"config.yaml", "recipe.json", "provenance.json", "outcome.json"} <= set(texts)
    assert [values[1:] for name, values in calls if name == "log_dataset"] == [
        ("finetune", "finetune"),
        ("finetune", "validation"),
        ("test", "test"),
    ]
    assert [values[-1] for name, values in calls if name == "log_model"] == [tmp_path / RUN_ID / "model"]
    assert calls[-2][0] == "set_description"
    assert calls[-1] == ("end", None)
    assert result.metrics["test/accuracy"] == calls[-3][1][0]["test/accuracy"]
    assert run_dir.is_complete(tmp_path / RUN_ID)


def test_an_error_ends_the_run_and_leaves_it_resumable(prepared: Prepare, tmp_path: Path) -> None:
    request, parts, store = prepared()

    def fail() -> None:
        with start_run(request, parts) as recorder:
            train(request, parts, recorder)
            raise MemoryError

    with pytest.raises(MemoryError) as raised:
        fail()
    assert store.tracker.calls[-1] == ("end", MemoryError)
    assert f"resume={RUN_ID}" in raised.value.__notes__[0]
    assert checkpoint.load(tmp_path / RUN_ID / run_dir.CHECKPOINT).history
    assert not run_dir.is_complete(tmp_path / RUN_ID)


def test_a_resumed_run_keeps_its_id_and_repeats_no_training(prepared: Prepare, tmp_path: Path) -> None:
    request, parts, _ = prepared()
    with start_run(request, parts) as recorder:
        train(request, parts, recorder)
    saved = checkpoint.load(tmp_path / RUN_ID / run_dir.CHECKPOINT)
    request, parts, store = prepared(saved)
    with start_run(request, parts) as recorder:
        train(request, parts, recorder)
    assert store.tracker.run_id == RUN_ID
    assert [values[1] for name, values in store.tracker.calls if name == "log_metrics"] == [seen for seen, _ in saved.history]
    assert "resumed" in store.tracker.names("set_tags")[0]


def test_a_search_can_stop_a_run(prepared: Prepare, tmp_path: Path) -> None:
    request, parts, store = prepared(should_prune=lambda examples_seen, metrics: True)
    with pytest.raises(PrunedError), start_run(request, parts) as recorder:
        train(request, parts, recorder)
    assert store.tracker.calls[-1] == ("end", PrunedError)
    assert run_dir.is_complete(tmp_path / RUN_ID)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([], None),
        (["batch_size=1024"], None),
        (["data.subset=1000"], "phase train 2, phase finetune 10"),
        (["data.subset=1000"], " batch_size=512"),
        (["data.subset=1000", "phases.train.epochs=30"], None),
        (["~phases.train", "phases.finetune.epochs=2"], "phases.finetune.epochs=2"),
    ],
)
def test_a_run_of_few_steps_warns_and_names_the_keys(composed: Compose, overrides: list[str], key: str | None) -> None:
    """The default recipe does not, although its second phase takes ten steps."""
    parts = prepare(RunRequest(Checkpoint("", Recipe(composed("data=digits", "tracking=none", *overrides))), "", quiet=True))
    assert key in parts.warning if key and parts.warning else parts.warning == key


def test_a_sweep_warns_once(command_line: CommandLine, store: str) -> None:
    done = command_line("-m", "data=digits", "~phases.train", "seed=0,1,2", "hydra.launcher.processes=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("phases.finetune.batch_size=128") == 1


@pytest.mark.parametrize("threads", ["x", "", "0", "-3", "9" * 12])
def test_a_number_of_threads_that_cannot_be_is_ignored(prepared: Prepare, composed: Compose, threads: str) -> None:
    """A store or a checkpoint may contain any."""
    recipe = Recipe(composed("data=digits", "~phases.train", "tracking=none"), {"model": "se_cnn"}, [])
    _, parts, _ = prepared(Checkpoint("", recipe, {"threads": threads}))
    assert int(parts.software["threads"]) == torch.get_num_threads()
