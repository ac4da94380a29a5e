"""Runs, sweeps and models in MLflow."""

import os

# MLflow reads some of these when it is imported.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the default of 7 waits four minutes for a dead server
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds; the default of 120 outlasts the time that a worker has to end
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would cut through the progress bars
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
