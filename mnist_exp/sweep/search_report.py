"""The report of a search: its best trial, its history and the importance of its keys, in one HTML file."""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import jinja2
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mnist_exp.metrics import best_first, format_metric, metric_of
from mnist_exp.tracking.base import COLORS, Answer, Store, report_name

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

FACTOR = "search"  # in place of the key that a comparison compares
STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
TEMPLATE = Path(__file__).with_name("search_report.html")


def publish(store: Store, run_id: str, study: "Study", objective: str) -> None:
    """Add the report to the parent of a search, unless no trial has finished.

    Args:
        store: The store.
        run_id: The parent.
        study: The trials.
        objective: The metric that decides.
    """
    from optuna.importance import get_param_importances
    from optuna.trial import TrialState

    done = study.get_trials(states=[TrialState.COMPLETE])
    if not done:
        return
    ranked = best_first(objective, done, lambda trial: trial.value)  # type: ignore[arg-type, return-value]  # it has finished
    others = [trial for trial in study.trials if trial.state != TrialState.COMPLETE]
    rows = [
        {"job": str(trial.number)}
        | {key: str(trial.params.get(key, "")) for key in study.best_params}
        | {
            objective: "" if trial.value is None else format_metric(objective, trial.value),
            "state": STATES.get(trial.state.name, "unfinished"),
        }
        for trial in (*ranked, *others)
    ]
    counts = Counter(row["state"] for row in rows)
    notes = [
        f"{len(rows)} trials: {', '.join(f'{count} {state}' for state, count in counts.items())}.",
        "The best of several trials looks better than it is: train it again with other seeds.",
    ]
    has_differences = len({trial.value for trial in done}) > 1
    shares = get_param_importances(study) if has_differences else {}
    if shares:
        listed = ", ".join(f"{key} {100 * share:.0f} %" for key, share in shares.items())
        notes.insert(0, f"Importance of the keys (PED-ANOVA): {listed}.")
    title = f"Best {objective}: {rows[0][objective]}, job {rows[0]['job']}"
    subtitle = ", ".join(f"{key}={value}" for key, value in ranked[0].params.items())
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    with TemporaryDirectory() as folder:
        report = Path(folder, report_name(FACTOR))
        picture = report.with_suffix(".png")
        draw(study.trials, shares, objective).savefig(picture, dpi=100)
        image = base64.b64encode(picture.read_bytes()).decode()
        report.write_text(template.render(title=title, subtitle=subtitle, notes=notes, image=image, rows=rows), encoding="utf-8")
        store.publish(run_id, Answer(FACTOR, title, subtitle, notes, report, picture))


def draw(trials: "Sequence[FrozenTrial]", shares: Mapping[str, float], objective: str) -> Figure:
    """Return the figure of the objective by trial and, if they differ, of the importance of the keys.

    Args:
        trials: The trials. A pruned one shows its last value.
        shares: The importance of each key, from 0 to 1.
        objective: The metric that decides.
    """
    figure, metric = Figure(figsize=(9 if shares else 5, 3.2), layout="constrained"), metric_of(objective)
    label = f"{objective} ({metric.unit})" if metric.unit else objective
    history = figure.add_subplot(1, 2 if shares else 1, 1, xlabel="job", ylabel=label)
    for state, marker in (("COMPLETE", "o"), ("PRUNED", "x")):
        points = {
            trial.number: trial.value * metric.scale for trial in trials if trial.state.name == state and trial.value is not None
        }
        history.plot(list(points), list(points.values()), marker, color=COLORS[0], label=STATES[state])
    history.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    if shares:
        importance = figure.add_subplot(1, 2, 2, xlabel="importance (%)")
        importance.barh(list(shares)[::-1], [100 * share for share in shares.values()][::-1], color=COLORS[0])
    return figure
