"""Tables of runs from CSV files: those that `compare --export` writes, and tables of one's own."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from mnist_exp.comparison.history import image_columns
from mnist_exp.errors import UserError
from mnist_exp.tracking.frame import DIGEST, FIRST, FIXED, NONE, SEED

MAX_BYTES = 100_000_000
DEFAULTS = {"sweep": "", "look": "1", **dict.fromkeys(FIXED, ""), "status": "FINISHED"}  # of absent columns


def read_tables(paths: Iterable[Path], metrics: Sequence[str] = ()) -> tuple[pd.DataFrame, list[str]]:
    """Return the runs in CSV files, and a note if columns are absent.

    A table needs a key, `seed`, and a metric: a column with a slash in its name, or one of `metrics`. Each file adds its looks to
    those of the files before.

    Raises:
        UserError: A file cannot be read, lacks a column, has other keys than the first, or a value that is no number where one is
            expected.
    """
    tables, looks = [], 0
    absent, common = dict[str, None](), set[str]()
    for path in paths:
        table = _read(path)
        absent |= {name: None for name in (*FIRST, *FIXED) if name not in table}
        table = table.assign(**{name: value for name, value in DEFAULTS.items() if name not in table})
        if named := set(metrics) & {*FIRST, *FIXED, SEED, *image_columns(table)}:
            raise UserError.invalid("--metric", min(named), "a column with numbers to compare")
        measured = [name for name in table if ("/" in name and not name.startswith(DIGEST)) or name in metrics]
        if SEED not in table or not measured:
            lacking = SEED if SEED not in table else "a metric, such as test/accuracy"
            raise UserError.invalid("--results", path, f"a table with a key, seed and a metric: it lacks {lacking}")
        for name in ("look", *measured):
            table[name] = _numbers(path, table[name])
        if not (table["look"] >= 1).all() or (table["look"] % 1 != 0).any():
            raise UserError.invalid("--results", path, "a column `look` of whole numbers from 1")
        table["look"] = table["look"].astype(int) + looks
        looks = max(looks, *table["look"])
        keys = {name for name in table if "/" not in name} - {*measured, *DEFAULTS, *image_columns(table)}
        common = common or keys
        if different := keys ^ common:
            expected = f"the keys of the first table; only one has {', '.join(sorted(different))}"
            raise UserError.invalid("--results", path, expected, "Export the sweeps together: compare A B --export.")
        tables.append(table)
    runs = pd.concat(tables, ignore_index=True)
    texts = [name for name in runs if not pd.api.types.is_numeric_dtype(runs[name])]
    runs[texts] = runs[texts].fillna("")
    runs[list(common)] = runs[list(common)].replace("", NONE)
    note = f"No {', '.join(absent)} in the table: absent values count as equal, and runs as finished, at one look for each file."
    return runs, [note] if absent else []


def _read(path: Path) -> pd.DataFrame:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError.invalid("--results", path, f"at most {MAX_BYTES:,} bytes")
        table = pd.read_csv(path, dtype=str, keep_default_na=False, compression=None)
    except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
        raise UserError.invalid("--results", path, f"a CSV file, such as one from --export: {error}") from error
    if table.empty or not isinstance(table.index, pd.RangeIndex):
        expected = "a table with at least one run, and with as many cells in each line as in the first"
        raise UserError.invalid("--results", path, expected)
    return table.loc[:, [not name.startswith("Unnamed: ") for name in table]]  # the index of a data frame


def _numbers(path: Path, texts: pd.Series) -> pd.Series:
    """Return a column of texts as numbers, empty ones as NaN; raises UserError."""
    numbers = pd.to_numeric(texts, errors="coerce")
    wrong = texts[numbers.isna() & ~texts.fillna("").str.lower().isin(["", "nan"])]
    if len(wrong):
        raise UserError.invalid(f"--results {path}, line {wrong.index[0] + 2}: {texts.name}", wrong.iloc[0], "a number")
    return numbers.astype(float)
