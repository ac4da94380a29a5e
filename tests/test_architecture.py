import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mnist_exp"
ENTRY_POINTS = {"run", "runs", "compare"}
ONLY = {
    "mlflow": {"tracking"},
    "hydra": {"run", "compare", "command_line", "config", "overrides", "sweep", "workers", "search"},
    "optuna": {"search"},
    "rich": {"console"},
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_each_library_is_imported_where_it_belongs() -> None:
    for path in PACKAGE.glob("*.py"):
        for library, allowed in ONLY.items():
            used = any(name.split(".")[0] == library for name in imports(path))
            assert not used or path.stem in allowed, f"{path.name} imports {library}"


def test_imports_run_one_way() -> None:
    modules = {path.stem: imports(path) for path in PACKAGE.glob("*.py")}
    siblings = {name: {other for other in modules if f"mnist_exp.{other}" in used} - {name} for name, used in modules.items()}
    assert not any(ENTRY_POINTS & used for used in siblings.values()), "nothing imports an entry point"
    while siblings:
        leaves = {name for name, used in siblings.items() if not used & siblings.keys()}
        assert leaves, f"a circle of imports among {sorted(siblings)}"
        siblings = {name: used for name, used in siblings.items() if name not in leaves}
