"""A tiny squeeze-excitation CNN on MNIST: composed by Hydra, recorded by MLflow."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# The repository that this package is used from; None for an installed copy, which brings its own conf/ along.
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "conf" / "config.yaml").is_file() else None
CONF = (CHECKOUT or PACKAGE) / "conf"
HOME = CHECKOUT or Path.cwd()  # where runs, the default store and downloaded data go
