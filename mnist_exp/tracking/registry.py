"""Trained models by name: those of runs, and MLflow's registry, in which one version carries an alias such as champion."""

import re
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from mnist_exp.errors import UserError
from mnist_exp.overrides import command
from mnist_exp.tracking.base import RunRecord
from mnist_exp.tracking.connection import first_line
from mnist_exp.tracking.housekeeping import logged_models
from mnist_exp.tracking.mlflow_store import MLflowStore, record_of
from mnist_exp.tracking.model_export import download_model, verify_model

PROMOTION = "promotion"  # tag of a version: incomplete until the alias points to it, then complete


@dataclass(frozen=True)
class ModelSource:
    """Where a model is.

    Args:
        address: A folder, or MLflow's `models:/...`.
        title: What people know the model by: its run, its registered name, or its folder.
        model_id: The id of the logged model, None for a folder.
        run_id: The run that trained it, None if unknown.
    """

    address: str
    title: str
    model_id: str | None = None
    run_id: str | None = None


def find_model(store: MLflowStore, text: str) -> ModelSource:
    """Return a model that a user names: a folder, a run's id or prefix, `latest`, `models:/NAME@ALIAS`, or `models:/ID`.

    Raises:
        UserError: There is no such model.
    """
    if text and Path(text).is_dir():
        return ModelSource(text, f"folder {text}")
    if not re.fullmatch("latest|[0-9a-fA-F]{6,32}|models:/.+", text):
        raise UserError(
            f"model {text} is invalid: expected a folder, the id of a run, latest, models:/NAME@ALIAS, models:/NAME/VERSION or "
            f"models:/ID. `{command('runs', 'list')}` lists the runs."
        )
    store.open()
    if not text.startswith("models:/"):
        return _of_run(store, text)
    name, _, alias = text.removeprefix("models:/").partition("@")
    try:
        if alias:
            version = store.client.get_model_version_by_alias(name, alias)
            return ModelSource(text, f"{name}@{alias}, version {version.version}", version.model_id, version.run_id)
        if re.fullmatch("m-[0-9a-f]{32}", name):
            run_id = store.client.get_logged_model(name).source_run_id
            return ModelSource(text, f"model {name} of run {(run_id or 'unknown')[:8]}", name, run_id)
        if "/" in name:
            version = store.client.get_model_version(*name.rsplit("/", 1))
            return ModelSource(text, name, version.model_id, version.run_id)
        return ModelSource(text, name)
    except MlflowException as error:
        raise UserError(f"model {text} is not in {store.uri}: {first_line(error)}") from error


def _of_run(store: MLflowStore, text: str) -> ModelSource:
    """Return the model of a run, or of the newest run that has one: a single run, or without any a job of a sweep."""
    if text == "latest":
        records = sorted(
            store.runs("attributes.status = 'FINISHED'"), key=lambda record: record.job is not None
        )  # keeps the order by time
    else:
        records = [record_of(store.get_run(store.resolve_id(text)))]
    for record in records:
        if models := logged_models(store, record):
            title = f"run {record.run_id[:8]}, {record.name}" + (f" on {record.data}" if record.data else "")
            return ModelSource(f"models:/{models[0].model_id}", title, models[0].model_id, record.run_id)
    problem = f"{store.uri} has no finished run with a model" if text == "latest" else "the run has no model"
    raise UserError(f"model {text}: {problem}. Train one with `{command('run')}`, or set MLFLOW_TRACKING_URI to its store.")


def find_champion(store: MLflowStore, name: str, alias: str) -> ModelVersion | None:
    """Return the version of a registered model that an alias points to, None without one."""
    store.open()
    try:
        return store.client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the model, or its alias
            return None
        raise UserError(f"{name}@{alias} cannot be read from {store.uri}: {first_line(error)}") from error


def verified_model(store: MLflowStore, record: RunRecord) -> ModelSource:
    """Return the model of a run after every file of it was checked; raises UserError if it is missing or was changed."""
    source = _of_run(store, record.run_id)
    verify_model(download_model(source.address))
    return source


def register(
    store: MLflowStore,
    source: ModelSource,
    name: str,
    alias: str,
    reason: str,
    tags: dict[str, str],
    before: ModelVersion | None,
) -> str:
    """Register a verified model and point the alias to it; return the number of the new version.

    The registry has no transactions. The alias is set last, after the version that it points to was read again.

    Args:
        store: The store.
        source: The model.
        name: The name of the registered model, created if missing.
        alias: The alias.
        reason: Why the model is promoted, for the version's description.
        tags: Further tags of the version.
        before: The version that the alias pointed to when the decision was made.

    Raises:
        UserError: The alias was moved in the meantime, or the store refuses.
    """
    client = store.client
    try:
        _create_name(client, name)
        details = {PROMOTION: "incomplete"} | tags
        version = client.create_model_version(
            name, source.address, source.run_id, details, description=reason, model_id=source.model_id
        )
        now = find_champion(store, name, alias)
        if (now.version if now else None) != (before.version if before else None):
            raise UserError(
                f"{name}@{alias} was moved by someone else in the meantime: version {version.version} was registered without the "
                "alias. Repeat the command to decide again."
            )
        client.set_registered_model_alias(name, alias, version.version)
        client.set_model_version_tag(name, version.version, PROMOTION, "complete")
    except MlflowException as error:
        raise UserError(f"{name} cannot be registered in {store.uri}: {first_line(error)}") from error
    return str(version.version)


def _create_name(client: MlflowClient, name: str) -> None:
    """Create a registered model unless it exists."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
