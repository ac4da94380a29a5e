"""Connects to an MLflow store, and tells a store that is unreachable from one that refuses."""

import logging
import os
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from mnist_exp.errors import UserError, first_line
from mnist_exp.signals import defer_signals
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.base import DeniedError, StoreLostError, StoreUnavailableError
from mnist_exp.tracking.views import VIEW_PREFIX, describe_experiment, fixed_views, view_tag

Result = TypeVar("Result")
REFUSALS = (
    "INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "BAD_REQUEST", "PERMISSION_DENIED", "UNAUTHENTICATED",
)  # fmt: skip
_denied: dict[tuple[str, str], MlflowException] = {}  # the errors of experiments whose tags this process may not set


def check_uri(uri: str) -> str:
    """Return an address with a relative SQLite path made absolute; raises UserError if it is not supported."""
    if not uri.startswith(("sqlite:///", "http://", "https://")):
        raise UserError.invalid(
            "uri",
            uri,
            "sqlite:////absolute/path.db, or http(s)://host:port of an MLflow server",
            "Set it with tracking.uri=... or MLFLOW_TRACKING_URI. Unset both for the default, or use tracking=none.",
        )
    path = uri.removeprefix("sqlite:///")
    return uri.rstrip("/") if path == uri else f"sqlite:///{Path(path).absolute()}"


def connect(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """Return a client of the store at `uri` and the id of `experiment`; create the database and the experiment if missing.

    A lock file next to a SQLite database prevents several first runs from creating it at once.

    Raises:
        StoreUnavailableError: The store does not answer.
        UserError: The store cannot be used, with the remedy.
    """
    for noisy in ("urllib3", "mlflow.store.db.utils"):  # they log every failed attempt; the last one raises an error anyway
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    try:
        if not uri.startswith("sqlite:"):
            return _open_experiment(uri, experiment, artifact_location=None)
        database = Path(uri.removeprefix("sqlite:///"))
        with FileLock(f"{database}.lock"):
            return _open_experiment(uri, experiment, (database.parent / "mlartifacts").as_uri())
    except (MlflowException, SQLAlchemyError, OSError, ValueError) as error:
        if "out-of-date database schema" in str(error):
            raise UserError(_upgrade_advice(uri)) from error
        raise denial(error) or StoreUnavailableError(
            f"tracking.uri={uri} (MLFLOW_TRACKING_URI) cannot be opened: {first_line(error)}\n"
            "Expected a SQLite file in a writable folder, or a tracking server that answers. Start the server, choose another "
            "store, or use tracking=none."
        ) from error


def _open_experiment(uri: str, experiment: str, artifact_location: str | None) -> tuple[MlflowClient, str]:
    mlflow.set_tracking_uri(uri)
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is not None and found.lifecycle_stage == "deleted":
        raise UserError(
            f"tracking.experiment={experiment} was deleted in {uri}. Restore it with "
            f"`{_restore_experiment(uri, found.experiment_id)}`, or choose another name."
        )
    if found is None:
        with suppress(MlflowException):  # a server has no lock file: another process may have been first
            client.create_experiment(experiment, artifact_location)
        found = client.get_experiment_by_name(experiment)
    if found is None:
        raise StoreUnavailableError(f"{uri} does not create the experiment {experiment}. May you write to it?")
    experiment_id = str(found.experiment_id)
    with suppress(MlflowException):  # from a server that does not allow it: everything else works without them
        shown = {VIEW_PREFIX + key: view_tag(view) for key, view in fixed_views().items()}
        for name, value in {**shown, tag.DESCRIPTION: describe_experiment()}.items():
            if name not in found.tags:
                tag_experiment(client, experiment_id, name, value)
    return client, experiment_id


def tag_experiment(client: MlflowClient, experiment_id: str, name: str, value: str) -> None:
    """Set a tag of an experiment; a server that has denied it to this process is not asked again.

    Raises:
        MlflowException: The store is unreachable or refuses.
    """
    place = client.tracking_uri, experiment_id
    if place in _denied:
        raise _denied[place]
    try:
        client.set_experiment_tag(experiment_id, name, value)
    except MlflowException as error:
        if denial(error):
            _denied[place] = error
        raise


def retry(operation: Callable[[], Result], uri: str, patience: float) -> Result:
    """Return the result of `operation`, repeated for up to `patience` seconds while the store at `uri` is unreachable.

    Raises:
        StoreLostError: The store refuses, or is still unreachable.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            with defer_signals():
                return operation()
        except UserError:
            raise
        except Exception as error:  # servers, databases and disks raise exceptions of their own
            if is_refusal(error) or time.monotonic() > deadline:
                raise denial(error) or StoreLostError(f"{uri} failed: {first_line(error)}") from error
        time.sleep(1)


def is_refusal(error: BaseException | None) -> bool:
    """Return whether the store has answered, and would refuse the same request again."""
    # If two processes record one data set at once, one of them violates a constraint; its next attempt finds the data set.
    return getattr(error, "error_code", None) in REFUSALS and "unique constraint" not in str(error).lower()


def denial(error: Exception) -> DeniedError | None:
    """Return the error to raise if a server does not accept the user (401) or does not allow a request (403), else None."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    answers = {
        "UNAUTHENTICATED": f"does not accept the user '{user}' with this password. Set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD to your account on the server.",
        "PERMISSION_DENIED": f"does not allow this to the user '{user}': {first_line(error)}. Ask its administrator for the "
        "permission EDIT, or MANAGE to delete runs.",
    }
    answer = answers.get(getattr(error, "error_code", ""))
    problem = f"{mlflow.get_tracking_uri()} {answer}"
    return DeniedError(problem, key="MLFLOW_TRACKING_USERNAME", value=user) if answer else None


def terminate(client: MlflowClient, run_id: str, status: str) -> None:
    """Set the final status of a run, not before its start: clocks can be set back."""
    started = client.get_run(run_id).info.start_time
    client.set_terminated(run_id, status, max(started, int(time.time() * 1000)))


def restore_command(client: MlflowClient, uri: str, experiment_id: str, run_id: str) -> str:
    """Return the command that restores a deleted run, or its experiment if that was deleted."""
    with suppress(MlflowException):
        if client.get_experiment(experiment_id).lifecycle_stage == "deleted":
            return _restore_experiment(uri, experiment_id)
    return f"MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow runs restore --run-id {run_id}"


def gc_command(uri: str) -> str:
    """Return the command that removes the artifacts of deleted runs for good."""
    database = "DATABASE   (on the server)" if uri.startswith("http") else shlex.quote(uri)
    return f"MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow gc --backend-store-uri {database}"


def _restore_experiment(uri: str, experiment_id: str) -> str:
    return f"MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow experiments restore --experiment-id {experiment_id}"


def _upgrade_advice(uri: str) -> str:
    path = uri.removeprefix("sqlite:///")
    backup = shlex.join(["cp", path, f"{path}.backup"])
    return (
        f"tracking.uri={uri} (MLFLOW_TRACKING_URI) has the database schema of another version of MLflow than "
        f"{mlflow.__version__}. Make a backup, then upgrade: `{backup} && {shlex.join(['mlflow', 'db', 'upgrade', uri])}`. "
        "If a newer MLflow wrote it, install that version instead."
    )
