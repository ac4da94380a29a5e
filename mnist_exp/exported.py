"""The exported model's folder: written aside, sealed with its checksums and its configuration, renamed; checked when read.

It holds an exported graph, for MLflow's own loaders and for serving, and the weights alone, for ours. Reading a graph runs
expressions that it contains, so ours reads none: it builds the architecture from the sealed configuration. The checksums find
damage; they are no signature, since whoever changes a file can write new ones.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_exp.config import build, check
from mnist_exp.errors import UserError
from mnist_exp.output import sync, unwritable
from mnist_exp.redaction import redact_all

if TYPE_CHECKING:
    from torch import nn

FORMAT_VERSION = 2
SEAL = "mnist_exp.json"
WEIGHTS = "weights.pt"
GRAPH = "data/model.pt2"  # where MLflow keeps a model's graph
FILES = {
    "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "input_example.json", "serving_input_example.json",
    GRAPH, WEIGHTS, SEAL,
}  # fmt: skip
LARGEST = 50_000_000  # bytes of a file; ours have some 100,000
# The MLmodel that we write. What it lacks, above all `code`, would have MLflow import files of the folder.
FLAVORS: dict[str, dict[str, Any]] = {
    "python_function": {
        "config": {"device": None},
        "data": "data",
        "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
        "loader_module": "mlflow.pytorch",
        "pickle_module_name": "mlflow.pytorch.pickle_module",
        "python_version": ...,  # any text
    },
    "pytorch": {"code": None, "model_data": "data", "pytorch_version": ...},
}
DESCRIPTION = {
    "is_signature_from_type_hint", "mlflow_version", "model_id", "model_size_bytes", "model_uuid", "prompts",
    "saved_input_example_info", "signature", "type_hint_from_example", "utc_time_created",
}  # fmt: skip


def save(folder: Path, model: "nn.Module", config: dict[str, Any], write_graph: Callable[[Path], object]) -> None:
    """Put a model with its graph, its weights and its configuration in the place of `folder`, once all is on the disk.

    write_graph: fills a new folder with MLflow's files. Raises UserError if the disk refuses.
    """
    import torch

    aside = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        write_graph(aside)
        torch.save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, aside / WEIGHTS)
        seal = {"format_version": FORMAT_VERSION, "sha256": _digests(aside), "config": redact_all(config)}
        (aside / SEAL).write_text(json.dumps(seal, indent=2))
        for path in (*aside.rglob("*"), aside):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        aside.replace(folder)
        sync(folder.parent)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise unwritable(folder, error) from error


def load(folder: Path) -> "nn.Module":
    """Return the model in `folder`, built from its configuration and filled with its weights, in evaluation mode.

    No graph, pickle or code of the folder is read. Raises UserError that says what is wrong with the folder.
    """
    import torch

    from mnist_exp.models import count_parameters

    config = verify(folder)
    check(config)
    with torch.device("meta"):  # counted before any memory is taken
        count_parameters(build(config["model"], "model"))
    model: nn.Module = build(config["model"], "model")
    try:
        weights = torch.load(io.BytesIO((folder / WEIGHTS).read_bytes()), map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
    except Exception as error:  # only a forged file comes here, and it can fail anywhere within torch
        raise UserError(f"{folder / WEIGHTS} does not hold the weights of this model: {type(error).__name__}.") from error
    return model.eval()


def verify(folder: Path) -> dict[str, Any]:
    """Return the configuration of the model in `folder`; raises UserError that says what is wrong with the folder."""
    try:
        seal = json.loads(_read(folder / SEAL))
        version, noted, config = seal["format_version"], seal["sha256"], seal["config"]
        if not isinstance(noted, dict) or not isinstance(config, dict):
            raise TypeError
    except OSError as error:
        raise UserError(f"{folder} is not a model exported by this program: {SEAL} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} is damaged: its {SEAL} cannot be understood.") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder} has format version {version}: this program reads {FORMAT_VERSION}. Use the version that wrote it."
        )
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_plain = path.is_dir() if name == "data" else name in FILES and path.is_file()
        if path.is_symlink() or not is_plain or (path.is_file() and path.stat().st_size > LARGEST):
            raise UserError(f"{folder} is not a model exported by this program: {name!r} is no part of one.")
    there = _digests(folder)  # what the seal names is never opened: it could name anything
    for name in sorted(there.keys() | noted.keys()):
        if there.get(name) != noted.get(name):
            what = "was changed" if name in there and name in noted else "is missing" if name in noted else "was added"
            raise UserError(f"{folder} was changed after it was written: {name!r} {what}.")
    for name in sorted(FILES - {SEAL} - there.keys()):
        raise UserError(f"{folder} is not a model exported by this program: {name!r} is missing.")
    _check_description(folder)
    return dict(config)


def _check_description(folder: Path) -> None:
    """Raise UserError if `MLmodel` holds more than we write: MLflow does what it says."""
    import yaml

    try:
        described = yaml.safe_load(_read(folder / "MLmodel"))
        flavors = described.pop("flavors")
        foreign = [key for key in described if key not in DESCRIPTION]
        for name in flavors.keys() | FLAVORS.keys():
            there, expected = flavors.get(name, {}), FLAVORS.get(name, {})
            for key in there.keys() | expected.keys():
                value = there.get(key)
                if not (isinstance(value, str) if expected.get(key) is ... else key in expected and value == expected[key]):
                    foreign.append(f"flavors.{name}.{key}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{folder} is damaged: its MLmodel cannot be understood.") from error
    if foreign:
        raise UserError(
            f"{folder} is not a model exported by this program: {sorted(map(str, foreign))[0]} in its MLmodel is foreign."
        )


def _read(path: Path) -> bytes:
    """Return the content of a text file of a model's folder, which no honest one makes large."""
    if path.is_symlink() or path.stat().st_size > 1_000_000:
        raise ValueError
    return path.read_bytes()


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in `folder` but the seal, by its path within."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name != SEAL}
