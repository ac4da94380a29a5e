"""Command: score a stored model on a data set, and record the result: python -m mnist_exp.evaluate latest --data mnist."""

import argparse
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from mnist_exp import cli
from mnist_exp.console import show_lines, show_pairs
from mnist_exp.errors import Mark, UserError
from mnist_exp.metrics import EVALUATION, format_metric
from mnist_exp.nodes import build, marked
from mnist_exp.overrides import command, quoted
from mnist_exp.settings import DataDescription, Settings
from mnist_exp.tracking import provenance
from mnist_exp.tracking.base import ModelSource, RunInfo
from mnist_exp.tracking.tags import DATA, MODEL, TRAINED_BY

if TYPE_CHECKING:
    from mnist_exp.learning.data import Dataset
    from mnist_exp.learning.evaluation import Evaluation

NO_NAME = r"[^-\w. ]"  # what the name of a metric must not contain


def main() -> None:
    """Run the command line."""
    with cli.reported_errors():
        arguments = cli.parse(parser())
        evaluate(arguments)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = cli.parser("evaluate", "Score a stored model on a data set, and record the result as a run.")
    result.add_argument(
        "model", nargs="?", default="latest", metavar="MODEL", help="a run, its start, latest, models:/NAME@ALIAS, or a folder"
    )
    result.add_argument("--data", metavar="OPTION", help="an option of conf/data/ (default: that of conf/config.yaml)")
    result.add_argument("--data-root", metavar="FOLDER", help="the folder of its files")
    return result


def evaluate(arguments: argparse.Namespace) -> None:
    """Score the model on the test images of the data, show and record the result."""
    from mnist_exp.learning import evaluation
    from mnist_exp.serving.classifier import load_from

    chosen = [f"data={quoted(arguments.data)}"] if arguments.data else []
    settings = cli.default_settings(*chosen)
    if arguments.data_root:
        places = marked(settings.data, "data", Mark.LOCATION)
        if not places:
            raise UserError.invalid("--data-root", arguments.data_root, "nothing, because this data set has no folder")
        settings = cli.default_settings(*chosen, f"data.{places[0]}={quoted(arguments.data_root)}")
    classifier = load_from(settings, arguments.model)
    data = build(settings.data, "data", seed=0)
    own = DataDescription(**data.description)
    if (own.shape, own.class_names) != (classifier.data.shape, classifier.data.class_names):
        expected = f"data with the images and classes of the model, {classifier.data.shape}, {classifier.data.class_names}"
        remedy = f"Found {own.shape}, {own.class_names}. For other sizes or colors, write an option, conf/data/NAME.yaml."
        raise UserError.invalid("--data", data.name, expected, remedy)
    result = evaluation.evaluate(classifier.model, data.splits[data.eval_split])
    options = {"--data": arguments.data, "--data-root": arguments.data_root}
    typed = [word for option, value in options.items() if value for word in (option, value)]
    repeat = command("evaluate", classifier.source.address, *typed)
    warnings = [text for text in (classifier.warning, data.warning) if text]
    if data.eval_split != "test" and classifier.data.may_have_trained_on(own, data.eval_split):
        warnings.append(f"The model may have been trained on these images: its own run did not keep them for {data.eval_split}.")
    show_lines([f"Model: {classifier.summary}"])
    record(settings, classifier.source, data, result, warnings, repeat)


def measures(evaluation: "Evaluation", class_names: Sequence[str]) -> dict[str, float]:
    """Return the metrics of an evaluation, among them the accuracy on each class, by names that no run's metric has."""
    matrix = evaluation.confusion_matrix.double()  # (classes, classes), by label and prediction
    counts = matrix.sum(1)
    by_class = {
        f"{EVALUATION}class_{re.sub(NO_NAME, '_', name)}/accuracy": float(matrix[label, label] / counts[label])
        for label, name in enumerate(class_names)
        if counts[label] > 0
    }
    return {f"{EVALUATION}{name}": value for name, value in evaluation.metrics.items()} | by_class


def record(
    settings: Settings,
    source: ModelSource,
    data: "Dataset",
    evaluation: "Evaluation",
    warnings: Sequence[str],
    repeat: str,
) -> None:
    """Record the result as a run that is linked to the model, its data and its training run; show it.

    Args:
        settings: The settings, with the store.
        source: The model's origin.
        data: The data set.
        evaluation: The result on its `eval_split`.
        warnings: What to know about the result.
        repeat: The command that repeats the evaluation.
    """
    from mnist_exp.experiment.figures import confusion_matrix

    store, trained = cli.find_store(settings), None
    if source.run_id:
        with suppress(UserError):  # the run was deleted, its model was not
            trained = store.get_run(source.run_id)
    split, results = data.eval_split, measures(evaluation, data.class_names)
    tags = provenance.git_tags() | provenance.software() | provenance.process_tags(settings.output_dir)
    tags |= {DATA: data.name, MODEL: source.address} | ({TRAINED_BY: source.run_id} if source.run_id else {})
    rows = {name: format_metric(name, value) for name, value in results.items()} | {
        "data": f"{data.name}, {split}, n = {len(data.splits[split]):,}"
    }
    name = f"evaluate {trained.params.get('model', trained.name) if trained else source.title} on {data.name}"
    with store.start(RunInfo(name, repeat, tags)) as tracker:
        tracker.log_dataset(data, split, "evaluate")
        if source.model_id:
            tracker.use_model(source.model_id)
        tracker.log_results(results)
        tracker.log_figure(
            confusion_matrix(evaluation, data.class_names, f"{data.name}, {split}"), "pictures/confusion_matrix.png"
        )
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        link = store.link(source.run_id) if source.run_id else ""
        model = f"[{source.title}]({link})" if link else source.title
        of = f"**Evaluation** of {model} on {rows['data']}."
        tracker.set_description("\n\n".join([of, *warnings, f"| | |\n| --- | --- |\n{table}"]))
    show_pairs("Results", rows)
    show_lines([*warnings, store.ui_hint(tracker.run_id)])


if __name__ == "__main__":
    main()
