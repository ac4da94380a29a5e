"""One run: prepare, start, train, evaluate, finalize."""

import os
import re
import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import nn

from mnist_exp.console import Display, show_warning
from mnist_exp.errors import UserError
from mnist_exp.experiment.figures import run_figures
from mnist_exp.experiment.initial import load_initial, splits_used_before
from mnist_exp.experiment.recorder import Recorder, recording
from mnist_exp.experiment.summary import describe_run, parameters, recipe_name, result_rows, run_name, short_override
from mnist_exp.learning.data import Dataset
from mnist_exp.learning.evaluation import Evaluation, evaluate
from mnist_exp.learning.models import count_parameters, create_model
from mnist_exp.learning.training import Phase, choose_device, choose_precision, disable_malloc_trim, fit, prepare_phases
from mnist_exp.metrics import metric_of
from mnist_exp.nodes import build
from mnist_exp.overrides import command, key_of, section_of
from mnist_exp.settings import NEUTRAL, DataDescription, Settings, Trial
from mnist_exp.storage import run_dir
from mnist_exp.storage.checkpoint import Checkpoint
from mnist_exp.tracking import provenance
from mnist_exp.tracking.base import RunInfo, Store
from mnist_exp.tracking.tags import ARM, COLOR, DATA, JOB, OBJECTIVE, OVERRIDES, PARENT, RECIPE, RERUN_OF, RESUMED, SWEEP

MIN_STEPS = 50  # of the optimizer: a run that takes fewer gets a warning
ShouldPrune = Callable[[int, Mapping[str, float]], bool]  # called with examples seen and metrics


@dataclass(frozen=True)
class RunRequest:
    """A run that a command asks for.

    Args:
        start: The checkpoint to start from, with the recipe, whose settings are checked. That of a new run has no id; that of a
            repeated run has the software of the original run.
        command: The shell command to record.
        should_prune: Decides after each report whether a search stops the run early.
        in_search: Whether a search proposed the run, or the one that it repeats: it is not scored on test images.
        quiet: Whether to print warnings only.
    """

    start: Checkpoint
    command: str
    should_prune: ShouldPrune | None = None
    in_search: bool = False
    quiet: bool = False

    @property
    def settings(self) -> Settings:
        """The settings of the recipe."""
        return self.start.recipe.settings

    @property
    def examples_seen(self) -> int:
        """The examples that a resumed run has seen before."""
        return self.start.state["examples_seen"] if self.start.state else 0


@dataclass(frozen=True)
class Prepared:
    """The parts of a run, built from its settings."""

    model: nn.Module
    phases: list[Phase]
    data: Dataset
    description: DataDescription
    precision: torch.dtype
    device: torch.device
    store: Store
    software: dict[str, str]
    changed: str  # how the environment differs from that of a resumed or repeated run
    warning: str | None  # about the data or the number of steps
    display: Display
    started: float


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Args:
        run_id: Its id.
        history: (examples seen, metrics) of every report and of its end.
        model: The trained model, in evaluation mode.
        evaluation: Its logits on the split that scores it, and the labels.
        warning: A warning about the data or the number of steps, None without one.
    """

    run_id: str
    history: list[tuple[int, dict[str, float]]]
    model: nn.Module
    evaluation: Evaluation
    warning: str | None = None

    @property
    def metrics(self) -> dict[str, float]:
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


def run(request: RunRequest) -> RunResult:
    """Train, evaluate and record one run.

    Raises:
        UserError: Before anything is recorded, if the settings, data, output folder or store cannot be used.
    """
    prepared = prepare(request)
    with start_run(request, prepared) as recorder:
        train(request, prepared, recorder)
        evaluation = evaluate(prepared.model, prepared.data.splits[prepared.data.eval_split])
        return finalize(request, prepared, recorder, evaluation)


def prepare(request: RunRequest) -> Prepared:
    """Build all parts of the run; raises UserError if one cannot be built."""
    settings, saved = request.settings, request.start
    started = time.perf_counter() - saved.elapsed
    disable_malloc_trim()
    threads = saved.software.get("threads", "")  # their number affects the last bits of a result
    torch.set_num_threads(int(threads) if re.fullmatch(r"[1-9]\d{0,3}", threads) else _default_threads())
    software = provenance.software() | {"threads": str(torch.get_num_threads())}
    now = {name: text for name, text in (software | provenance.git_tags()).items() if name in saved.software}
    if changed := provenance.differences(saved.software, now):
        show_warning(f"The environment differs from the original run's: {changed}. The results may differ.")
    run_dir.ensure_writable_dir(settings.output_dir)
    # The nodes: all are checked before the data are read.
    configs = Trial().try_out(settings)
    store = build(settings.tracking, "tracking")
    data: Dataset = build(settings.data, "data", seed=settings.seed)
    stored = settings.data_description  # of a run that is resumed or repeated
    if stored:
        data.check_digests(stored.digests)
    description = DataDescription(**data.description)  # also of images that the run must not see
    if request.in_search:
        data = data.without_test()
    if settings.sweep_job and settings.sweep_job.data not in (None, data.name):
        raise UserError(
            f"The sweep was started with {settings.sweep_job.data}, but the data here is {data.name}.",
            key="data",
            remedy="Name the folder of the sweep's data, or continue with sweep.force=true.",
        )
    # What trains.
    device = choose_device(settings.device)
    make_model = partial(build, settings.model, "model", **data.shape)
    model = create_model(make_model, settings.seed)
    if settings.init:  # a checkpoint has the weights that it led to
        before = stored.before if saved.state and stored else load_initial(model, settings, store)
        description = description.model_copy(update={"before": before})
    used = splits_used_before(description, data, settings.init)
    model, data = model.to(device), data.to(device)
    phases = prepare_phases(model, configs, data, settings.output_dir, used)
    leaked = [data.validation for phase in phases if phase.targets.saw_validation_split]
    trained_on = sorted({*leaked, *(phase.config.split for phase in phases)})
    description = description.model_copy(update={"trained_on": trained_on})
    totals = {phase.name: data.splits[phase.config.split].epoch_size * phase.config.epochs for phase in phases}
    epochs = {phase.name: phase.config.epochs for phase in phases}
    display = Display(totals, epochs, request.examples_seen, settings.objective, quiet=request.quiet)
    precision = choose_precision(settings.precision, device)
    warnings = [data.warning, None if settings.init else _too_few_steps(phases)]  # a trained model may need few
    warning = "\n".join(filter(None, warnings)) or None
    return Prepared(model, phases, data, description, precision, device, store, software, changed, warning, display, started)


def _too_few_steps(phases: Sequence[Phase]) -> str | None:
    """Return a warning if all phases together are short; one of them, such as `finetune`, may be short by design."""
    steps = {phase.name: phase.steps_per_epoch * phase.config.epochs for phase in phases}
    if sum(steps.values()) >= MIN_STEPS:
        return None
    counts = ", ".join(f"phase {name} {count}" for name, count in steps.items())
    first = phases[0]  # from random weights: it has the most to learn
    batch_size = "batch_size" if first.name == "train" else f"phases.{first.name}.batch_size"
    return (
        f"The run takes only {sum(steps.values())} steps of the optimizer ({counts}): the model may learn little. Lower "
        f"{batch_size}={first.config.batch_size}, or raise phases.{first.name}.epochs={first.config.epochs}."
    )


@cache  # before the first run changes it
def _default_threads() -> int:
    return torch.get_num_threads()


def start_run(request: RunRequest, prepared: Prepared) -> AbstractContextManager[Recorder]:
    """Return the recorder, which starts the run in the store."""
    recipe = request.start.recipe
    if prepared.warning:
        _warn_once(prepared.warning)
    # The description lets others use the model without the data; a resumed or repeated run looks for the data where they were.
    settings = request.settings.model_copy(update={"data_description": prepared.description})
    initial = replace(request.start, recipe=replace(recipe, settings=settings), software=prepared.software)
    return recording(prepared.store, _run_info(request, prepared), initial, prepared.started)


@cache  # a process runs many jobs of a sweep
def _warn_once(warning: str) -> None:
    show_warning(warning)


def _run_info(request: RunRequest, prepared: Prepared) -> RunInfo:
    settings, choices, job = request.settings, request.start.recipe.choices, request.settings.sweep_job
    shown = [override for override in request.start.recipe.overrides if section_of(override) not in NEUTRAL]
    tags = {
        **provenance.git_tags(),
        **prepared.software,
        **provenance.machine_tags(prepared.device),
        **provenance.process_tags(settings.output_dir),
        DATA: prepared.data.name,
        OVERRIDES: shlex.join(request.start.recipe.overrides),
        OBJECTIVE: settings.objective,
        RECIPE: recipe_name(request.start.recipe),
    }
    if job:
        shown = [override for override in shown if key_of(override) in job.varied]
        arm = " ".join(short_override(override, choices) for override in shown if key_of(override) != "seed")
        tags |= {SWEEP: job.sweep_id, PARENT: job.sweep_id, JOB: str(job.number), ARM: arm or choices["model"], COLOR: job.color}
    if settings.rerun:
        tags[RERUN_OF] = settings.rerun
    name = run_name(choices, shown, prepared.data.name)
    return RunInfo(name, request.command, tags)


def train(request: RunRequest, prepared: Prepared, recorder: Recorder) -> None:
    """Record the setup of the run, then train it through its phases."""
    settings, start, data = request.settings, request.start, prepared.data
    uses = [(phase.config.split, phase.name) for phase in prepared.phases] + [(data.validation, "validation")]
    actual = {"precision": str(prepared.precision).removeprefix("torch."), "device": prepared.device.type, "data": data.name}
    recorder.log_setup(parameters(start.recipe) | actual, data, uses)
    if start.run_id:
        note = f"at {request.examples_seen:,} examples" + (f"; {prepared.changed}" if prepared.changed else "")
        recorder.tracker.set_tags(provenance.process_tags(settings.output_dir) | {RESUMED: note})
    else:
        recorder.log_origin(provenance.origin(request.command, prepared.device))
    with prepared.display:
        for report in fit(
            prepared.model,
            prepared.phases,
            data,
            seed=settings.seed,
            precision=prepared.precision,
            save_every=settings.save_every,
            resume_from=start.state,
        ):
            ended = report.state is not None and report.state["ended"]
            prepared.display.update(report.phase, report.examples_seen, report.metrics, report.epoch, ended=ended)
            recorder.log_report(report)
            if request.should_prune and request.should_prune(report.examples_seen, report.metrics):
                recorder.prune()


def finalize(request: RunRequest, prepared: Prepared, recorder: Recorder, evaluation: Evaluation) -> RunResult:
    """Record the figures, the model, the results and the final status, and show the results.

    The jobs of a sweep share most of their recipe: they do not repeat the figures of it.
    """
    data, split, recipe = prepared.data, prepared.data.eval_split, request.start.recipe
    seed, with_recipe = request.settings.seed, request.settings.sweep_job is None
    curves = recorder.history, recorder.phase_starts
    recorder.log_figures(run_figures(evaluation, split, data, prepared.phases, *curves, seed, with_recipe=with_recipe))
    recorder.log_outcome(split, evaluation)
    results = {f"time/{phase}_seconds": seconds for phase, seconds in recorder.seconds.items()}
    results["model/parameters"] = count_parameters(prepared.model)
    if split == "test":
        recorder.tracker.log_dataset(data, "test", "test")
        metrics = {f"test/{name}": value for name, value in evaluation.metrics.items()}
        results |= metrics
    else:  # a later phase may have trained on these images
        measured = {name: value for _, values in recorder.history for name, value in values.items()}
        metrics = {name: value for name, value in measured.items() if name.startswith("val/")}
    objective = metric_of(request.settings.objective)
    metrics = dict(sorted(metrics.items(), key=lambda item: metric_of(item[0]) != objective))
    recorder.log_model(prepared.model.eval(), f"{recipe.choices.get('model', 'model')}-{data.name}", metrics)
    results["time/total_seconds"] = recorder.elapsed
    result = RunResult(recorder.tracker.run_id, [*recorder.history, (0, results)], prepared.model, evaluation, prepared.warning)
    rows = result_rows(result.metrics, data)
    picture = prepared.store.link(result.run_id, "pictures/worst_mistakes.png")
    recorder.finish(results, describe_run(rows, recipe.overrides, prepared.warning, picture))
    rows |= {"run": result.run_id, "checkpoint": os.path.relpath(recorder.folder / run_dir.CHECKPOINT)}
    use_commands = {}
    if recorder.tracker.is_recording:
        model = ("--model", result.run_id[:8])
        use_commands["Classify a picture with it"] = command("predict", *model, "FILE")
        if data.preparation == "handwriting":
            use_commands["Draw digits for it"] = command("draw", *model)
    prepared.display.results(rows, prepared.store.ui_hint(result.run_id), use_commands)
    return result
