"""Add the finished seeds of a sweep to the table of a study.

    python scripts/studies.py docs/studies/se_vs_plain.csv [SWEEP] [KEY=VALUE ...]

A study trains in blocks of seeds, on whatever machine is free. The first sweep is the whole preset, stopped at will; further ones
name the seeds that are left: `'seed=range(1150,1300)'`. A seed is added when all its runs of the sweep have ended, so that both
runs of a pair come from one machine. The others stay in the table as NOT STARTED: `compare` calls its rows incomplete until all
are there. All blocks are one look, because the preset fixes the number of seeds. KEY=VALUE adds a column, such as rule=scaled.
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


def block(sweep: str, labels: dict[str, str]) -> pd.DataFrame:
    """Return the runs of a sweep with their mistakes; those of seeds that have not ended are NOT STARTED."""
    runs = read(io.StringIO(frame(sweep, images=True).to_csv(index=False)))
    for position, (key, value) in enumerate(labels.items(), start=2):  # before the other keys
        runs.insert(position, key, value)
    kept = ["look", *labels, *varied_keys(runs), SEED]
    ended = runs["status"].isin(["FINISHED", "DIVERGED"]).groupby(runs[SEED]).transform("all")
    runs.loc[~ended, [name for name in runs if name not in kept]] = ""
    runs.loc[~ended, "status"] = NOT_STARTED
    return runs


def merged(table: pd.DataFrame, added: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return a table whose rows that did not start are replaced by those of a block; other rows of the block follow."""
    rows = pd.concat([table, added[table.columns]])
    rows["order"] = rows.groupby(keys, sort=False).ngroup()
    started = rows[rows["status"] != NOT_STARTED]
    return pd.concat([started, rows]).drop_duplicates(keys).sort_values("order", kind="stable").drop(columns="order")


def main() -> None:
    """Parse the command line and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, metavar="CSV")
    parser.add_argument("sweep", nargs="?", default="latest", metavar="SWEEP")
    parser.add_argument("labels", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    labels = dict(label.split("=", 1) for label in arguments.labels)
    table = block(arguments.sweep, labels)
    if arguments.table.exists():
        table = merged(read(arguments.table), table, [*labels, *varied_keys(table), SEED])
    table.to_csv(arguments.table, index=False)
    print(f"{arguments.table}: {table['status'].value_counts().to_dict()}")


if __name__ == "__main__":
    main()
