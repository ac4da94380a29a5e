"""One run: prepare, begin, train, score, finish."""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mnist_exp.config import bind, build, digest
from mnist_exp.console import Display
from mnist_exp.errors import UserError
from mnist_exp.experiment.figures import run_figures
from mnist_exp.experiment.recorder import Recorder, recording
from mnist_exp.experiment.summary import dataset_info, describe_run, parameters, result_rows, run_name, shorten
from mnist_exp.learning.evaluation import Evaluation, evaluate
from mnist_exp.learning.models import count_parameters
from mnist_exp.learning.seeds import derive_seed
from mnist_exp.learning.training import Phase, choose_device, choose_precision, fit, keep_freed_memory, prepare_phases
from mnist_exp.overrides import is_neutral, key_of
from mnist_exp.storage import run_dir
from mnist_exp.storage.checkpoint import Checkpoint
from mnist_exp.tracking import provenance
from mnist_exp.tracking.base import RunInfo, Store
from mnist_exp.tracking.definition import JobContext
from mnist_exp.tracking.tags import ARM, CONFIG_HASH, DATA, DIFFERS, JOB, OVERRIDES, RERUN_OF, RESUMED, SWEEP
from mnist_exp.tracking.views import artifact_path

if TYPE_CHECKING:
    from torch import nn

    from mnist_exp.learning.data import Dataset

ShouldPrune = Callable[[int, Mapping[str, float]], bool]  # called with examples seen and metrics


@dataclass(frozen=True)
class RunRequest:
    """A run that a command asks for.

    Args:
        config: The resolved and validated configuration.
        choices: The option of each group.
        overrides: The overrides of the command line.
        command: The shell command to record.
        checkpoint: The checkpoint to resume from.
        digests: Digests that splits of the data must have.
        threads: The number of torch's threads, which affects the last bits of a result; None for the default.
        job: The context of a job of a sweep.
    """

    config: dict[str, Any]
    choices: dict[str, str]
    overrides: list[str]
    command: str
    checkpoint: Checkpoint | None = None
    digests: dict[str, str] = field(default_factory=dict)
    threads: int | None = None
    job: JobContext | None = None


@dataclass(frozen=True)
class Prepared:
    """The parts of a run, built from its configuration."""

    model: "nn.Module"
    phases: list[Phase]
    data: "Dataset"
    precision: torch.dtype
    device: torch.device
    parameter_count: int
    store: Store
    output_dir: Path
    software: dict[str, str]
    display: Display
    started: float

    @property
    def eval_split(self) -> str:
        """The split that the run is scored on: `test`, or the validation split of data without one."""
        return "test" if "test" in self.data.splits else self.data.validation


@dataclass(frozen=True)
class Outcome:
    """The id of a finished run, and (examples seen, metrics) of every report and of its end."""

    run_id: str
    history: list[tuple[int, dict[str, float]]]

    @property
    def last(self) -> dict[str, float]:
        """The last value of each metric."""
        return {key: value for _, metrics in self.history for key, value in metrics.items()}

    @property
    def points(self) -> dict[str, dict[int, float]]:
        """The values of each metric by examples seen."""
        points: dict[str, dict[int, float]] = defaultdict(dict)
        for examples_seen, metrics in self.history:
            for key, value in metrics.items():
                points[key][examples_seen] = value
        return points


def run(request: RunRequest, make_should_prune: Callable[[], ShouldPrune] | None = None) -> Outcome:
    """Train, score and record one run.

    Args:
        request: The run.
        make_should_prune: Returns the function that a search uses to stop the run early.

    Raises:
        UserError: Before anything is recorded, if the configuration, data, output folder or store cannot be used.
    """
    prepared = prepare(request)
    with begin(request, prepared) as recorder:
        train(request, prepared, recorder, make_should_prune() if make_should_prune else None)
        evaluation = score(request, prepared, recorder)
        return finish(request, prepared, recorder, evaluation)


def prepare(request: RunRequest) -> Prepared:
    """Build all parts of the run; raises UserError if one cannot be built."""
    config, saved = request.config, request.checkpoint
    started = time.perf_counter() - (saved.elapsed if saved else 0.0)
    if not {"model", "data"} <= request.choices.keys():
        raise UserError("The stored recipe does not name the options of the groups model and data.")
    keep_freed_memory()
    torch.set_num_threads(request.threads or _default_threads())
    device = choose_device(config["device"])
    precision = choose_precision(config["precision"], device)
    bind(config)
    configs = {name: build(node, f"phases.{name}") for name, node in config["phases"].items()}
    data = build(config["data"], "data", seed=config["seed"]).to(device)
    _check_data(request, data)
    with torch.device("meta"):  # count the parameters before memory is allocated
        parameter_count = count_parameters(build(config["model"], "model", **data.shape), config["parameter_limit"])
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config["seed"], "weights"))
        model = build(config["model"], "model", **data.shape).to(device)
    phases = prepare_phases(model, configs, data, Path(config["output_dir"]))
    store = build(config["tracking"], "tracking")
    output_dir = run_dir.make_folder(Path(config["output_dir"]))
    software = provenance.software() | {"threads": str(torch.get_num_threads())}
    totals = {phase.name: data.splits[phase.config.split].epoch_size * phase.config.epochs for phase in phases}
    examples_seen = saved.state["examples_seen"] if saved and saved.state else 0
    display = Display(totals, examples_seen, quiet=request.job is not None)
    return Prepared(model, phases, data, precision, device, parameter_count, store, output_dir, software, display, started)


@cache  # before the first run changes it
def _default_threads() -> int:
    return torch.get_num_threads()


def _check_data(request: RunRequest, data: "Dataset") -> None:
    """Raise UserError if the run or its sweep was started with other data."""
    found = {name: split.digest for name, split in data.splits.items()}
    expected = request.checkpoint.digests if request.checkpoint else request.digests
    if any(found.get(name) != digest for name, digest in expected.items()):
        raise UserError(
            f"The data differs from the original run's: expected {expected}, found {found}. "
            "Set MNIST_ROOT (or data.root) to the data that the run was started with, or start a new run."
        )
    if request.config.get("shape", data.shape) != data.shape:
        raise UserError(f"shape={request.config['shape']} is invalid: expected {data.shape} with this data, or no such key.")
    if request.job and request.job.data not in (None, data.name):
        raise UserError(
            f"The sweep was started with {request.job.data}, but the data here is {data.name}. Set MNIST_ROOT to the data of "
            "the sweep, or continue with sweep.force=true."
        )


def begin(request: RunRequest, prepared: Prepared) -> AbstractContextManager[Recorder]:
    """Warn about what is unusual; return the recorder, which starts the run in the store."""
    data, saved = prepared.data, request.checkpoint
    changes = _changes(request, prepared)
    if changes:
        prepared.display.warn(f"The environment differs from the original run's: {changes}. The results may differ.")
    if data.notice:
        prepared.display.warn(data.notice)
    digests = {name: split.digest for name, split in data.splits.items()}
    # The shape lets others rebuild the model without the data.
    recipe = (request.config | {"shape": data.shape}, request.choices, request.overrides, digests, prepared.software)
    progress = (saved.history, saved.seconds, saved.elapsed) if saved else ([], {}, 0.0)
    job = asdict(request.job) if request.job else None
    initial = Checkpoint(saved.run_id if saved else "", *recipe, None, *progress, job)
    return recording(prepared.store, _run_info(request, prepared), prepared.output_dir, initial, prepared.started)


def _changes(request: RunRequest, prepared: Prepared) -> str:
    """Return how the environment differs from that of the resumed run."""
    now = prepared.software
    before = request.checkpoint.software if request.checkpoint else now
    return "; ".join(f"{name} was {before.get(name)}, is {value}" for name, value in now.items() if before.get(name) != value)


def _run_info(request: RunRequest, prepared: Prepared) -> RunInfo:
    config, job = request.config, request.job
    shown = [override for override in request.overrides if not is_neutral(override)]
    tags = {
        **provenance.git_tags(),
        **prepared.software,
        **provenance.machine_tags(prepared.device),
        **provenance.process_tags(prepared.output_dir),
        DATA: prepared.data.name,
        CONFIG_HASH: digest(config),
        OVERRIDES: " ".join(request.overrides),
    }
    if job:
        shown = [override for override in shown if key_of(override) in job.varied]
        arm = " ".join(shorten(override, request.choices) for override in shown if key_of(override) != "seed")
        tags |= {SWEEP: job.sweep_id, JOB: str(job.number), DIFFERS: " ".join(shown), ARM: arm or request.choices["model"]}
    if config["rerun"]:
        tags[RERUN_OF] = config["rerun"]
    name = run_name(request.choices, shown, prepared.data.name)
    return RunInfo(name, request.command, tags, job.sweep_id if job else None, job.color if job else None)


def train(request: RunRequest, prepared: Prepared, recorder: Recorder, should_prune: ShouldPrune | None) -> None:
    """Record the origin of the run, then train it through its phases."""
    config, saved, data = request.config, request.checkpoint, prepared.data
    resumed = None
    if saved:
        examples_seen = saved.state["examples_seen"] if saved.state else 0
        changes = _changes(request, prepared)
        note = f"at {examples_seen:,} examples" + (f"; {changes}" if changes else "")
        resumed = provenance.process_tags(prepared.output_dir) | {RESUMED: note}
    uses = [(phase.config.split, phase.name) for phase in prepared.phases] + [(data.validation, "validation")]
    actual = {"precision": str(prepared.precision).removeprefix("torch."), "device": prepared.device.type, "data": data.name}
    recorder.log_origin(parameters(config, request.choices) | actual, [dataset_info(data, *use) for use in uses], resumed)
    with prepared.display:
        for report in fit(
            prepared.model,
            prepared.phases,
            data,
            seed=config["seed"],
            precision=prepared.precision,
            save_every=config["save_every"],
            resume_from=saved.state if saved else None,
        ):
            prepared.display.update(report.phase, report.examples_seen, report.metrics)
            recorder.log_report(report.phase, report.examples_seen, report.seconds, report.metrics, report.state)
            if should_prune and should_prune(report.examples_seen, report.metrics):
                recorder.prune()


def score(request: RunRequest, prepared: Prepared, recorder: Recorder) -> Evaluation:
    """Score the trained model, once; record its figures, its mistakes and the model.

    The jobs of a sweep share most of their recipe: they do not repeat the figures of it.
    """
    data, split = prepared.data, prepared.eval_split
    if split == "test":
        recorder.tracker.log_dataset(dataset_info(data, "test", "test"))
    evaluation = evaluate(prepared.model, data.splits[split])
    config = request.config
    recorder.log_figures(
        run_figures(evaluation, split, data, prepared.phases, recorder.history, config["seed"], with_recipe=request.job is None)
    )
    recorder.log_outcome(split, evaluation.mistakes)
    name = f"{request.choices['model']}-{data.name}"
    recorder.log_model(prepared.model.eval(), data.splits[split].images[:2].cpu().numpy(), name)
    return evaluation


def finish(request: RunRequest, prepared: Prepared, recorder: Recorder, evaluation: Evaluation) -> Outcome:
    """Record the results and the final status, and show them."""
    results = {f"time/{phase}_seconds": seconds for phase, seconds in recorder.seconds.items()}
    results["model/parameters"] = prepared.parameter_count
    if prepared.eval_split == "test":
        results |= {f"test/{name}": value for name, value in evaluation.metrics.items()}
    results["time/total_seconds"] = recorder.elapsed
    outcome = Outcome(recorder.tracker.run_id, [*recorder.history, (0, results)])
    rows = result_rows(outcome.last, prepared.data)
    picture = artifact_path(outcome.run_id, "pictures/worst_mistakes.png")
    recorder.finish(results, describe_run(rows, request.overrides, prepared.data.notice, picture))
    rows |= {"run": outcome.run_id, "checkpoint": os.path.relpath(recorder.folder / run_dir.CHECKPOINT)}
    prepared.display.results(rows, recorder.tracker.ui_command(), recorder.tracker.use_commands())
    return outcome
