"""Start a module for `mlflow run`, which hands over all overrides as one word: project.py MODULE [FLAG ...] OVERRIDES."""

import shlex
import subprocess
import sys

*module_and_flags, overrides = sys.argv[1:]
sys.exit(subprocess.call([sys.executable, "-m", *module_and_flags, *shlex.split(overrides)]))
