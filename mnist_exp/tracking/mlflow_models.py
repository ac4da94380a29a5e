"""The file `MLmodel`, through which MLflow's own loader and server read a model of `models.py`."""

from pathlib import Path

import numpy as np
import yaml
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import add_to_model
from mlflow.types import Schema, TensorSpec

from mnist_exp.errors import UserError
from mnist_exp.settings import Settings
from mnist_exp.storage.run_dir import disk_error
from mnist_exp.tracking import models

MLMODEL = "MLmodel"  # MLflow's name
FILES = {models.WEIGHTS, models.SETTINGS, MLMODEL}
# With further keys, such as `code`, MLflow would import other files.
FLAVORS = {"python_function": {"loader_module": models.__name__}}
DOWNLOADED = "registered_model_meta"  # a file that MLflow adds to a registered model that it downloads


def write_mlmodel(folder: Path, settings: Settings) -> None:
    """Add the MLmodel to a model's folder; raises UserError if the disk refuses.

    Args:
        folder: The folder.
        settings: The settings of the model's run, with the description of the data.
    """
    data = settings.data_description
    assert data
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, data.channels, data.side, data.side))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(data.class_names)))]),
    )
    description = Model(signature=signature)
    add_to_model(description, loader_module=models.__name__)  # type: ignore[no-untyped-call]  # MLflow's
    try:
        description.save(str(folder / MLMODEL))
    except OSError as error:
        raise disk_error(folder, error) from error


def check_written_by_us(folder: Path) -> None:
    """Raise UserError on a damaged model, or on files or flavors that we do not write: MLflow could run them."""
    models.read_model(folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*")} - {DOWNLOADED}
    try:
        flavors = yaml.safe_load((folder / MLMODEL).read_bytes())["flavors"]
        flavors["python_function"].pop("python_version")
    except Exception as error:  # a forged file can fail anywhere within yaml
        raise UserError(f"{folder} is damaged: its {MLMODEL} is unreadable.") from error
    if files != FILES or flavors != FLAVORS:
        foreign = ", ".join(sorted(files - FILES)) or f"other flavors in {MLMODEL}"
        raise UserError(f"{folder} is not as this program writes a model: it contains {foreign}.", remedy="Promote another run.")
