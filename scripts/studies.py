"""Add the finished seeds of a sweep to the table of a study.

    python scripts/studies.py docs/studies/se_vs_plain.csv [SWEEP] [--where KEY=VALUE] [--label KEY=VALUE ...]

A study trains in blocks of seeds, on one machine or several. The first sweep is the whole preset, which may be interrupted.
Further ones name the seeds that are left: `'seed=range(1150,1300)'`. A seed is added when all its runs of the sweep have
ended, on one processor. The others stay in the table as NOT STARTED: `compare` calls its rows incomplete until all are there.
All blocks are one look, because the preset fixes the number of seeds.
"""

import argparse
import io
from pathlib import Path

import pandas as pd

from mnist_exp.api import frame
from mnist_exp.comparison.pairs import varied_keys
from mnist_exp.tracking.frame import NOT_STARTED, SEED


def read(source: Path | io.StringIO) -> pd.DataFrame:
    """Return a table as text, as it is in the file."""
    return pd.read_csv(source, dtype=str, keep_default_na=False)


def ended_seeds(runs: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return a table in which the runs of seeds that have not ended on one processor are NOT STARTED."""
    seeds = runs.groupby(SEED)
    ended = seeds["status"].transform(lambda status: status.isin(["FINISHED", "DIVERGED"]).all()).astype(bool)
    ended &= seeds["processor"].transform("nunique") == 1
    runs.loc[~ended, [name for name in runs if name not in ("look", *keys)]] = ""
    runs.loc[~ended, "status"] = NOT_STARTED
    return runs


def chosen(runs: pd.DataFrame, key: str, value: str) -> pd.DataFrame:
    """Return the jobs with a value of a key.

    Raises:
        SystemExit: There are none.
    """
    if key not in runs or not (runs[key] == value).any():
        raise SystemExit(f"No job has {key}={value}.")
    return runs[runs[key] == value].copy()


def merged(table: pd.DataFrame, added: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return a table whose rows that did not start are replaced by those of a block; other rows of the block follow.

    Raises:
        SystemExit: The tables have different columns, such as those of keys that only one of the sweeps varies.
    """
    if different := set(table) ^ set(added):
        raise SystemExit(f"Only one of table and block has the columns {', '.join(sorted(different))}.")
    rows = pd.concat([table, added], ignore_index=True)
    rows["order"] = rows.groupby(keys, sort=False).ngroup()
    started = rows[rows["status"] != NOT_STARTED]
    kept = pd.concat([started, rows]).drop_duplicates(keys).sort_values("order", kind="stable")
    return kept.drop(columns="order").reset_index(drop=True)


def main() -> None:
    """Parse the command line and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, metavar="CSV")
    parser.add_argument("sweep", nargs="?", default="latest", metavar="SWEEP")
    parser.add_argument("--where", metavar="KEY=VALUE", help="add only the jobs with this value of a key")
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="add a column, such as rule=scaled")
    arguments = parser.parse_args()
    runs = read(io.StringIO(frame(arguments.sweep, images=True).to_csv(index=False)))
    keys = [*varied_keys(runs), SEED]
    runs = ended_seeds(runs, keys)
    if arguments.where:
        runs = chosen(runs, *arguments.where.partition("=")[::2])
    for key, value in (label.partition("=")[::2] for label in arguments.label):
        runs.insert(2, key, value)
        keys.append(key)
    if arguments.table.exists():
        runs = merged(read(arguments.table), runs, keys)
    runs.to_csv(arguments.table, index=False)
    print(f"{arguments.table}: {runs['status'].value_counts().to_dict()}")


if __name__ == "__main__":
    main()
