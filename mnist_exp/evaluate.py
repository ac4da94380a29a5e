"""Command: score a stored model on a data set and record the result: python -m mnist_exp.evaluate model=latest data=mnist."""

import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mnist_exp import CONF
from mnist_exp.cli import run_command
from mnist_exp.config import as_list, build, own_keys
from mnist_exp.errors import UserError
from mnist_exp.metrics import EVALUATION, format_metric
from mnist_exp.overrides import command, is_location, key_of, quoted
from mnist_exp.signals import install_signal_handlers

if TYPE_CHECKING:
    from mnist_exp.learning.data import Dataset
    from mnist_exp.learning.evaluation import Evaluation
    from mnist_exp.serving import Classifier
    from mnist_exp.tracking.mlflow_store import MLflowStore

KEYS = {"model", "data", "tracking"}


def main() -> None:
    """Run the command line; a user's mistake ends with a message and status 1."""
    sys.argv[1:] = [as_address(argument) for argument in sys.argv[1:]]
    run_command(task, multirun=False)


def as_address(argument: str) -> str:
    """Return an argument with the key `address` instead of `model`: that is a group of Hydra's, and names may need quotes."""
    key, equals, value = argument.partition("=")
    return f"address={quoted(value)}" if key == "model" and equals else argument


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def task(composed: DictConfig) -> None:
    """Score the model on the test images of the data, show and record the result."""
    install_signal_handlers()
    from mnist_exp.learning.evaluation import evaluate
    from mnist_exp.serving.classifier import load_from
    from mnist_exp.tracking.mlflow_store import MLflowStore

    overrides = as_list(HydraConfig.get().overrides.task)
    config = own_keys(composed, overrides, KEYS, ids={"address"})
    store = build(config["tracking"], "tracking")
    if not isinstance(store, MLflowStore):
        raise UserError("tracking=none stores no models: set MLFLOW_TRACKING_URI to the store that does.")
    classifier = load_from(store, str(config["address"]))
    data = build(config["data"], "data", seed=0)
    split = "test" if "test" in data.splits else data.validation
    refuse_other_shape(classifier, data)
    evaluation = evaluate(classifier.model, data.splits[split])
    typed = [override for override in overrides if not is_location(override) and key_of(override) != "address"]
    repeat = command("evaluate", f"model={config['address']}", *typed)
    record(store, classifier, data, split, evaluation, repeat, warning(store, classifier, data, split))


def refuse_other_shape(classifier: "Classifier", data: "Dataset") -> None:
    """Raise UserError unless the data has the model's images and classes."""
    if data.shape != classifier.shape:
        raise UserError(
            f"data={data.name} has {data.shape}, but the model expects {classifier.shape}. Choose data of that shape."
        )


def warning(store: "MLflowStore", classifier: "Classifier", data: "Dataset", split: str) -> str:
    """Return a warning if the images are not those that were asked for, or may have been trained on; or an empty text."""
    from mnist_exp.tracking.mlflow_store import record_of

    notice = data.notice or ""  # MNIST is missing, and other images took its place
    digests: dict[str, str] = {}
    if run_id := classifier.source.run_id:
        with suppress(UserError):  # the run was deleted, its model was not
            digests = record_of(store.get_run(run_id)).digests
    if split == "test" or digests.get(split) == data.splits[split].digest:
        return notice
    return f"{notice} The model may have been trained on these images: its own run did not keep them for {split}.".strip()


def measures(evaluation: "Evaluation") -> dict[str, float]:
    """Return the metrics of an evaluation, among them the accuracy on each class, by names that no run's metric has."""
    matrix = evaluation.confusion_matrix.double()  # (classes, classes), by label and prediction
    counts = matrix.sum(1)
    by_class = {
        f"{EVALUATION}class_{label}/accuracy": float(matrix[label, label] / counts[label])
        for label in range(len(matrix))
        if counts[label] > 0
    }
    return {f"{EVALUATION}{name}": value for name, value in evaluation.metrics.items()} | by_class


def record(
    store: "MLflowStore",
    classifier: "Classifier",
    data: "Dataset",
    split: str,
    evaluation: "Evaluation",
    repeat: str,
    caution: str,
) -> None:
    """Record the result as a run that is linked to the model, its data and its training run; show it."""
    from mnist_exp.console import show_lines, show_pairs
    from mnist_exp.experiment.summary import dataset_info
    from mnist_exp.tracking import provenance
    from mnist_exp.tracking.base import RunInfo
    from mnist_exp.tracking.tags import DATA, MODEL, TRAINED_BY

    found, source = measures(evaluation), classifier.source
    tags = provenance.git_tags() | provenance.software() | {DATA: data.name, MODEL: source.address}
    tags |= {TRAINED_BY: source.run_id} if source.run_id else {}
    rows = {name: format_metric(name, value) for name, value in found.items()} | {
        "data": f"{data.name}, {split}, n = {len(data.splits[split]):,}"
    }
    store.open()
    with store.start(RunInfo(f"evaluate {source.title}: {data.name}, {split}", repeat, tags)) as tracker:
        tracker.log_dataset(dataset_info(data, split, "evaluate"))
        if source.model_id:
            tracker.use_model(source.model_id)
        tracker.log_results(found)
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        trained = f"\n\nThe model was trained by [this run]({store.link(source.run_id)})." if source.run_id else ""
        tracker.set_description("\n\n".join(filter(None, [caution, f"| | |\n| --- | --- |\n{table}{trained}"])))
    show_pairs(f"Model: {source.title}", rows)
    show_lines([*filter(None, [caution]), f"Open it in the MLflow UI: {tracker.ui_command()}"])


if __name__ == "__main__":
    main()
