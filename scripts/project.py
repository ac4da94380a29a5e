"""Start a module for `mlflow run`, which passes all overrides as one word: project.py MODULE [FLAG ...] OVERRIDES."""

import os
import shlex
import sys

*module_and_flags, overrides = sys.argv[1:]
if module_and_flags[0] != "mnist_exp.run":
    os.environ.pop("MLFLOW_RUN_ID", None)  # the run that MLflow has created is not for tests
# exec keeps the process, so that signals reach the run itself.
os.execv(sys.executable, [sys.executable, "-m", *module_and_flags, *shlex.split(overrides)])
