"""The layers of the package, the homes of its libraries, and the size of its parts."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mnist_exp"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the top: a room may import those of lower layers, and itself.
LAYERS = [
    {"run", "compare", "runs", "ui", "predict", "evaluate", "draw"},
    {"experiment", "sweep", "comparison", "serving"},
    {"tracking", "console", "cli"},
    {"storage", "config"},
    {"learning"},
    {"overrides"},
    {"metrics", "redaction", "signals", "errors"},
]
ONLY = {  # the rooms that may import a library
    "mlflow": {"tracking"},
    "hydra": {"run", "compare", "evaluate", "cli", "config", "overrides", "sweep"},
    "optuna": {"sweep"},
    "rich": {"console"},
    "fastapi": {"serving"},
    "matplotlib": {"experiment", "comparison"},
}
PRIVATE = {  # private names of libraries that the package uses: a comment at each gives the reason, a test fails if it changes
    "_return_value": "sweep/jobs.py",
    "_trial_id": "sweep/search.py",
}


def room(path: Path) -> str:
    """The folder of a file, or its name if it is at the top of the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


@cache
def imported(path: Path) -> frozenset[str]:
    """Every module that a file imports, in any form: at its top, inside functions, relative, or by import_module."""
    package = ".".join(["mnist_exp", *path.relative_to(PACKAGE).parts[:-1]])
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return frozenset(names)


def rooms_imported(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported(path)]
    rooms = {path.stem if path.suffix else path.name for path in PACKAGE.iterdir()}
    return {name[1] for name in parts if name[0] == "mnist_exp" and len(name) > 1} & rooms - {"__init__"}


@pytest.mark.parametrize(
    "code",
    [
        "import mnist_exp.run",
        "from mnist_exp import run",
        "from mnist_exp.run import main",
        "from . import run",
        "from .run import main",
        "def f():\n    from mnist_exp import run",
        "import importlib\nimportlib.import_module('mnist_exp.run')",
    ],
)
def test_every_form_of_import_is_seen(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: code)
    assert "run" in {name.split(".")[1] for name in imported.__wrapped__(PACKAGE / "x.py") if "." in name}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        assert not rooms_imported(path)
        return
    (layer,) = [number for number, rooms in enumerate(LAYERS) if room(path) in rooms]
    allowed = set.union(set(), *LAYERS[layer + 1 :]) | {room(path)}
    if room(path) == "learning":
        allowed = {"learning", "errors"}
    assert rooms_imported(path) <= allowed


def test_every_room_belongs_to_a_layer() -> None:
    rooms = {room(path) for path in FILES} - {"__init__"}
    assert rooms == set.union(*LAYERS)
    assert len(list(PACKAGE.glob("*.py"))) <= 16


def test_no_circles_within_a_room() -> None:
    modules = {".".join(["mnist_exp", *path.relative_to(PACKAGE).with_suffix("").parts]): imported(path) for path in FILES}
    siblings = {name: {other for other in modules if other in used} - {name} for name, used in modules.items()}
    while siblings:
        leaves = {name for name, used in siblings.items() if not used & siblings.keys()}
        assert leaves, f"a circle of imports among {sorted(siblings)}"
        siblings = {name: used for name, used in siblings.items() if name not in leaves}


@pytest.mark.parametrize("library", ONLY)
def test_each_library_has_one_home(library: str) -> None:
    users = {room(path) for path in FILES if any(name.split(".")[0] == library for name in imported(path))}
    assert users <= ONLY[library]


def definitions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            assert node.end_lineno is not None
            limit = 200 if isinstance(node, ast.ClassDef) else 60
            yield f"{path.name}: {node.name} has more than {limit} lines", node.end_lineno - node.lineno + 1 - limit


def test_no_function_over_60_lines_and_no_class_over_200() -> None:
    assert [problem for path in FILES for problem, excess in definitions(path) if excess > 0] == []


def test_private_names_of_libraries_are_few_and_each_has_one_place() -> None:
    found = set()
    for path in FILES:
        tree = ast.parse(path.read_text())
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr)]
        foreign = [node for node in attributes if ast.unparse(node.value) != "self"]
        found |= {(node.attr, str(path.relative_to(PACKAGE))) for node in foreign}
        assert not any("._internal" in name for name in imported(path)), f"{path} imports a private module"
    assert found == set(PRIVATE.items())
