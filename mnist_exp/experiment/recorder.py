"""All that a run leaves behind: its lock, records, checkpoint, figures, model and final status."""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from torch import nn

from mnist_exp.errors import DivergedError, PrunedError, ResumableError
from mnist_exp.learning.data import Dataset
from mnist_exp.learning.evaluation import Evaluation
from mnist_exp.learning.training import Report
from mnist_exp.overrides import command, quoted
from mnist_exp.signals import Interrupted, defer_signals
from mnist_exp.storage import checkpoint, run_dir
from mnist_exp.storage.checkpoint import Checkpoint
from mnist_exp.tracking.base import OUTCOME, RECIPE, RunInfo, Store, Tracker
from mnist_exp.tracking.provenance import ORIGIN, PATCH, uncommitted


class Recorder:
    """Records one run while it lasts. `recording` opens it.

    Args:
        tracker: Of the run.
        folder: The run's own folder.
        initial: The checkpoint that the run starts from; before the first step, one without state.
        started: The reading of `time.perf_counter` when the run started, less the time that it has taken before.
        run_context: Sets the final status when closed.
    """

    def __init__(self, tracker: Tracker, folder: Path, initial: Checkpoint, started: float, run_context: ExitStack) -> None:
        self.tracker = tracker
        self.folder = folder
        self.history = list(initial.history)  # (examples seen, metrics)
        self.phase_starts = dict(initial.phase_starts)  # examples seen, by phase
        self.seconds = defaultdict(float, initial.seconds)  # of training, by phase
        self._initial, self._started, self._run_context = initial, started, run_context

    @property
    def elapsed(self) -> float:
        """Seconds of the whole run."""
        return time.perf_counter() - self._started

    def log_setup(self, params: Mapping[str, object], data: Dataset, uses: Iterable[tuple[str, str]]) -> None:
        """Record the configuration, the data with its uses as (split, context), and the history of a resumed run."""
        recipe = self._initial.recipe
        self.tracker.log_params(params)
        self.tracker.log_text(yaml.safe_dump(recipe.settings.model_dump(mode="json"), sort_keys=False), "config.yaml")
        self.tracker.log_text(recipe.as_json(), RECIPE)
        for split, context in uses:
            self.tracker.log_dataset(data, split, context)
        for examples_seen, metrics in self.history:
            self.tracker.log_metrics(metrics, examples_seen)

    def log_origin(self, origin: Mapping[str, Any]) -> None:
        """Record where a new run comes from, with the uncommitted changes of the code, and save its first checkpoint."""
        self.tracker.log_text(json.dumps(origin, indent=1), ORIGIN)
        if patch := uncommitted():
            self.tracker.log_text(patch, PATCH)
        self.save_checkpoint(None)

    def log_report(self, report: Report) -> None:
        """Record a report of training; with a state, also save a checkpoint."""
        if report.phase not in self.seconds:
            self.phase_starts[report.phase] = self.history[-1][0] if self.history else 0
        self.history.append((report.examples_seen, report.metrics))
        self.seconds[report.phase] += report.seconds
        self.tracker.log_metrics(report.metrics, report.examples_seen)
        for name, figure in report.figures.items():
            self.tracker.log_figure(figure, f"pictures/{report.phase}_{name}.png")
        if report.state is not None:
            self.save_checkpoint(report.state)
            self.tracker.flush()

    def save_checkpoint(self, state: Any) -> None:
        """Save a checkpoint with the given state of training."""
        progress = {"state": state, "history": self.history, "seconds": dict(self.seconds), "elapsed": self.elapsed}
        checkpoint.save(self.folder, replace(self._initial, phase_starts=self.phase_starts, **progress))

    def prune(self) -> None:
        """End the run early: nothing is left to do for it."""
        run_dir.mark_complete(self.folder)
        objective = self._initial.recipe.settings.objective
        raise PrunedError(f"pruned at {self.history[-1][0]:,} examples: others have a better {objective}")

    def log_figures(self, drawn: Iterable[tuple[str, Figure]]) -> None:
        """Record each figure as `pictures/NAME.png`; without a record, none is drawn from the iterable."""
        if self.tracker.is_recording:  # drawing takes as long as half an epoch
            for name, figure in drawn:
                self.tracker.log_figure(figure, f"pictures/{name}.png")

    def log_outcome(self, split: str, evaluation: Evaluation) -> None:
        """Record the history, the size of `split` and the mistakes in it as (index, label, prediction), for comparisons."""
        scored = {"split": split, "size": len(evaluation.labels), "mistakes": evaluation.mistakes}
        self.tracker.log_text(json.dumps({"history": self.history} | scored), OUTCOME)

    def log_model(self, model: nn.Module, name: str, metrics: Mapping[str, float]) -> None:
        """Record the last checkpoint, and the model with the metrics that scored it."""
        self.tracker.log_file(self.folder / run_dir.CHECKPOINT)
        self.tracker.log_model(name, model, self._initial.recipe.settings, metrics, self.folder / "model")

    def finish(self, results: dict[str, float], description: str) -> None:
        """Record the results of the whole run, and that it has finished."""
        self.tracker.log_results(results)
        self.tracker.set_description(description)
        with defer_signals():  # finished in the store and on the disk, or in neither
            self._run_context.close()
            run_dir.mark_complete(self.folder)


@contextmanager
def recording(store: Store, info: RunInfo, initial: Checkpoint, started: float) -> Iterator[Recorder]:
    """Start the run, or resume the one that `initial` has the id of, and yield its recorder.

    Args:
        store: For the records. A job of a sweep waits for a store that is unreachable: it would only fail, and so would the next.
        info: The name, command and tags of the run.
        initial: The checkpoint to start from; an empty `run_id` starts a new run. The caller has locked the folder of a run that
            is resumed.
        started: As in `Recorder`.
    """
    settings = initial.recipe.settings
    in_sweep, output_dir = settings.sweep_job is not None, settings.output_dir
    with ExitStack() as lock, ExitStack() as run_context:  # the lock outlasts the final status
        store.open(wait=in_sweep)  # may take long and be interrupted
        with defer_signals():  # a run that has started must get a final status
            tracker = run_context.enter_context(store.start(info, initial.run_id or None))
        folder = output_dir / tracker.run_id
        if not initial.run_id:
            lock.enter_context(run_dir.lock_run(folder))
        lock.enter_context(_noting_the_end(folder, in_sweep=in_sweep))
        if not in_sweep:
            store.reap(output_dir)
        yield Recorder(tracker, folder, replace(initial, run_id=tracker.run_id), started, run_context)


@contextmanager
def _noting_the_end(folder: Path, *, in_sweep: bool) -> Iterator[None]:
    """Mark a run that diverges, and add the command that resumes the run to an error from outside that leaves it unfinished."""
    try:
        yield
    except DivergedError:
        run_dir.mark_diverged(folder)
        raise
    except (Interrupted, ResumableError, MemoryError, RuntimeError) as error:
        if not in_sweep and not run_dir.is_complete(folder):  # a sweep's own message says how to resume its jobs
            error.add_note(f"`{command('run', f'resume={quoted(folder.name)}')}` resumes the run.")
        raise
