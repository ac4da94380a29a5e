"""The field's terms in plain American English: none of the words and names that the project has replaced."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUFFIXES = {".py", ".yaml", ".md", ".html", ".sh", ".toml", ".cff"}
TEXTS = [
    path
    for pattern in ("*", "mnist_exp/**/*", "hydra_plugins/*", "conf/**/*", "scripts/**/*", "tests/**/*", "docs/*")
    for path in sorted(ROOT.glob(pattern))
    if path.suffix in SUFFIXES and path not in (Path(__file__), ROOT / "CHANGELOG.md")
]
CODE = [path for path in TEXTS if path.suffix == ".py"]

# Words without any use in this project, and the words to use instead. A pattern without capitals matches in any case.
REPLACED = {
    r"told": "an active verb, job_overrides",
    r"insist\w*": "force",
    r"judg\w*": "decide, eval_split, tell_study",
    r"NoTracker": "NullTracker",
    r"NoTeacher": "Labels",
    r"unknowns": "power_notes",
    r"cautions": "caveats",
    r"wishes": "sweep_config",
    r"uninterrupted": "never interrupted, defer_signals",
    r"raise_interrupted": "install_signal_handlers",
    r"hopeless": "unpromising, should_prune",
    r"understood": "parse_outcome",
    r"painted": "colors",
    r"colour\w*": "color",
    r"anew": "again",
    r"begun": "started",
    r"mend(s|ed|ing)?": "fix",
    r"(go|goes|going|went|gone) on with": "continue, resume",
    r"beside": "besides, next to",
    r"whatever|whoever": "a noun",
    r"not suffice": "too little",
    r"is not valid": "is invalid",
    r"allowed (is|are)": "expected",
    r"behaviour|neighbour\w*|normalis\w*|optimis\w*|organis\w*|initialis\w*|centre|licence|labelled": "American spelling",
}
# Names that say too little. Some are fine as English words, so only definitions in code count.
NAMES = re.compile(
    "again|amount|aside|exported|follow|given|held|hold|idle|Original|place|said|saw|seal|Setting|shows|Stage|where"
)
TAGS = r"mlflow\.(?:note|source|parentRunId|runColor|runName|user|data|project|sharedViewState)\b"


@pytest.mark.parametrize("pattern", REPLACED, ids=str)
def test_a_replaced_word_is_gone(pattern: str) -> None:
    search = re.compile(rf"\b({pattern})\b", flags=re.IGNORECASE if pattern.islower() else 0)
    lines = [(path, *line) for path in TEXTS for line in enumerate(path.read_text().splitlines(), start=1)]
    found = [f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for path, number, line in lines if search.search(line)]
    assert not found, f"write {REPLACED[pattern]} instead:\n" + "\n".join(found)


def defined_names(path: Path) -> Iterator[tuple[int, str]]:
    """The names that a file defines, with their lines: functions, classes, arguments, variables and attributes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def test_a_replaced_name_is_not_defined() -> None:
    names = [(path, *name) for path in CODE for name in defined_names(path)]
    found = [f"{path.relative_to(ROOT)}:{line}: {name}" for path, line, name in names if NAMES.fullmatch(name)]
    assert not found, "\n".join(found)


def test_names_of_mlflow_stay_in_tracking() -> None:
    outside = [path for path in CODE if path.is_relative_to(ROOT / "mnist_exp") and path.parent.name != "tracking"]
    found = {(str(path.relative_to(ROOT)), tag) for path in outside for tag in re.findall(TAGS, path.read_text())}
    assert not found
