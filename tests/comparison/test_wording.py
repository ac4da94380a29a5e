"""The title, the tables and the notes: the sentences that a reader takes away."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from synthetic import SEEDS, TWO_MODELS, grid, scored, table

from mnist_exp.comparison import wording
from mnist_exp.comparison.pairs import compare
from mnist_exp.comparison.statistics import error_of_look


@pytest.mark.parametrize(
    ("better", "noise", "verdict", "title"),
    [
        (0.002, 0.0001, "higher by more than the margin", "se_cnn is higher than plain_cnn by more than the margin"),
        (-0.002, 0.0001, "lower by more than the margin", "se_cnn is lower than plain_cnn by more than the margin"),
        (0.0006, 0.0002, "higher", "se_cnn is higher than plain_cnn"),
        (0.0, 0.0001, "equivalent", "se_cnn is equivalent to plain_cnn"),
        (0.0, 0.002, "undecided", "Undecided: no model is clearly better than plain_cnn"),
    ],
)
def test_every_verdict_follows_from_interval_and_margin(better: float, noise: float, verdict: str, title: str) -> None:
    found = compare(scored(TWO_MODELS, better, noise), "model")
    (line,) = wording.differences_table(found)
    assert line["verdict"] == verdict
    assert wording.title(found) == title
    assert list(line)[:2] == ["model", "verdict"], "visible on a phone"


def test_a_margin_is_in_the_displayed_unit() -> None:
    found = compare(scored(TWO_MODELS, 0.002, 0.0001), "model", margin=0.5)
    assert found.rows[0].margin == pytest.approx(0.005)
    assert wording.describe_verdict(found.rows[0]) == "higher"
    assert "margin 0.50 points" in wording.subtitle(found)


def test_an_interval_that_excludes_0_does_not_show_0() -> None:
    shifts = dict(zip(SEEDS, (-0.0001, 0.0001, 0, 0, 0), strict=True))
    half = stats.t.isf(error_of_look(1) / 2, 4) * stats.sem(list(shifts.values()))
    better = half + 0.00003  # the lower end is +0.003 points
    runs = table(TWO_MODELS, lambda job: 0.9 + (job["model"] == "se_cnn") * (better + shifts[job["seed"]]))
    (row,) = compare(runs, "model").rows
    assert wording.describe_verdict(row) == "higher"
    assert wording.format_difference(row).startswith("+0.01 points (+0.003 to +0.0")


def test_a_title_with_levels_counts_them() -> None:
    jobs = grid(model=["plain_cnn", "se_cnn"], batch_size=list("123456"), seed=SEEDS)
    runs = scored(jobs, noise=0.0005)
    runs.loc[(runs["model"] == "se_cnn") & (runs["batch_size"] < "3"), "test/accuracy"] += 0.02
    assert wording.title(compare(runs, "model")) == "se_cnn is higher than plain_cnn at 2 of 6 batch sizes, undecided at 4"
    assert wording.title(compare(runs, "batch_size")).startswith("Of 10 comparisons with batch_size=1, ")


def test_a_title_with_several_arms_names_each_verdict() -> None:
    runs = scored(grid(model=["plain_cnn", "wide", "se_cnn"], seed=SEEDS), better=0.01)
    assert wording.title(compare(runs, "model")) == "se_cnn is higher than plain_cnn by more than the margin; wide is undecided"
    assert "Of 3 comparisons of model" in wording.title(compare(runs, "model", all_pairs=True))
    one = compare(runs[runs["seed"] == "0"], "model")
    assert wording.title(one) == "No verdict on model yet: an interval needs two seeds"


def test_the_slope_of_the_error_rate_is_noted_at_each_complete_level() -> None:
    jobs = grid(model=["plain_cnn", "se_cnn"], batch_size=["64", "128", "512"], seed=SEEDS)
    power = {"plain_cnn": 0.25, "se_cnn": 0.5}
    runs = table(jobs, lambda job: 1 - 0.001 * (1 + int(job["seed"])) * int(job["batch_size"]) ** power[job["model"]])
    notes = " ".join(wording.notes(compare(runs, "batch_size")))
    assert re.search(r"model=plain_cnn, .* 0\.250 \(0\.250 to 0\.250; .* n = 5", notes)
    assert re.search(r"model=se_cnn, .* 0\.500 ", notes)
    assert "slope" not in " ".join(wording.notes(compare(runs, "model")))
    runs.loc[0, "status"] = "DIVERGED"
    notes = " ".join(wording.notes(compare(runs, "batch_size")))
    assert notes.count("slope") == 2, "of the other level alone: the note says slope twice"


def test_the_difference_between_processors_is_noted() -> None:
    runs = scored(grid(model=["plain_cnn", "se_cnn"], seed=map(str, range(8))))
    late = runs["seed"].isin(list("4567"))
    runs.loc[late, "processor"] = "other"
    runs.loc[late & (runs["model"] == "se_cnn"), "test/accuracy"] += 0.02
    found = compare(runs, "model")
    assert found.rows[0].estimate.n == 8
    (note,) = [note for note in wording.notes(found) if "Welch" in note]
    assert re.search(r"on cpu \(n = 4\), .* on other \(n = 4\): -[12]\.\d\d points \(-2\.\d\d to -1\.\d\d; ", note)
    assert "Welch" not in " ".join(wording.notes(compare(runs[late], "model")))


def test_the_causes_of_incomplete_rows_are_counted_in_each_arm() -> None:
    runs = scored(grid(optimizer=["sgd", "adam"], seed=map(str, range(10))))
    adam = runs["optimizer"] == "adam"
    runs.loc[adam & runs["seed"].isin(["1", "2"]), "status"] = "DIVERGED"
    runs.loc[adam & (runs["seed"] == "3"), "test/accuracy"] = np.inf
    runs.loc[~adam & (runs["seed"] == "4"), "status"] = "NOT STARTED"
    notes = wording.notes(compare(runs.drop(index=5), "optimizer"))
    assert notes[0] == "3 of 10 seeds of adam diverged, 0 of 10 of sgd."
    assert re.fullmatch(r"1 of 10 seeds of sgd did not finish, 0 of 10 of adam\. `.*sweep\.resume=s`", notes[1])
    assert notes[2].startswith("1 of 10 seeds of sgd have no job, 0 of 10 of adam.")
    assert wording.title(compare(runs, "optimizer")) == "adam is incomplete (6 of 10 pairs)"


def test_a_run_without_the_metric_has_not_diverged() -> None:
    runs = scored(TWO_MODELS)
    runs.loc[runs["model"] == "se_cnn", "test/accuracy"] = np.nan
    assert wording.notes(compare(runs, "model"))[0].startswith(
        "5 of 5 seeds of se_cnn have no test/accuracy, 0 of 5 of plain_cnn"
    )
    assert wording.differences_table(compare(runs, "model"))[0]["difference (95 %)"] == "-"


def test_a_key_may_have_the_name_of_a_column() -> None:
    runs = scored(TWO_MODELS)
    for key in ("n", "p", "verdict", "runs", "value", "level"):
        found = compare(runs.rename(columns={"model": key}), key)
        assert next(iter(wording.differences_table(found)[0].values())) == "se_cnn"
        assert list(wording.means_table(found)[0].values())[:2] == ["plain_cnn", "5"]


def needed(runs: pd.DataFrame) -> tuple[int | None, str]:
    found = wording.seeds_needed(compare(runs, "model"))
    assert found
    return found


def test_the_number_of_seeds_has_an_upper_bound_and_depends_on_spread_and_margin_alone() -> None:
    advice = [needed(scored(TWO_MODELS, better, 0.0007)) for better in (0.0, 0.0001, 0.0002)]
    assert advice[0] == advice[1] == advice[2]
    number, text = advice[0]
    least, most = re.search(r"(\d+) seeds \(at most (\d+), 80 % confidence\)", text).groups()
    assert number == int(least) < int(most)


def test_a_pilot_of_fewer_than_five_seeds_plans_nothing() -> None:
    few = grid(model=["plain_cnn", "se_cnn"], seed=["0", "1", "2"])
    assert needed(scored(few)) == (5, "Run at least 5 seeds to plan.")
    wild = needed(scored(TWO_MODELS, noise=0.5))
    assert (wild[0], "more than 10,000 seeds" in wild[1]) == (None, True)
    assert wording.seeds_needed(compare(scored(TWO_MODELS, 0.01), "model")) is None, "nothing is undecided"
    loss = compare(
        scored(TWO_MODELS).assign(**{"test/loss": scored(TWO_MODELS)["test/accuracy"]}), "model", metrics=["test/loss"]
    )
    assert "--margin" in wording.seeds_needed(loss)[1], "without a margin there is no plan"
    many = grid(model=["plain_cnn", "se_cnn"], seed=map(str, range(70)))
    enough = compare(
        table(many, lambda job: 0.9 + (job["model"] == "se_cnn") * (0.00025 + 0.0011 * (-1) ** int(job["seed"]))), "model"
    )
    assert enough.rows[0].verdict == "undecided"
    assert wording.seeds_needed(enough) is None, "more seeds than the number are there"
    equal = compare(scored(TWO_MODELS, noise=0), "model")
    assert (equal.rows[0].verdict, wording.seeds_needed(equal)) == ("undecided", None), "the same difference in all pairs"


def test_looks_that_contradict_each_other_are_noted() -> None:
    runs = scored(grid(model=["plain_cnn", "se_cnn"], seed=map(str, range(60))), noise=0.0005)
    late = runs["seed"].astype(int) >= 10
    runs.loc[runs["model"] == "se_cnn", "test/accuracy"] += np.where(late[runs["model"] == "se_cnn"], -0.01, 0.01)
    found = compare(runs.assign(look=late + 1), "model")
    assert found.rows[0].verdict == "undecided"
    assert "do not overlap" in wording.notes(found)[0]


def test_a_mean_outside_of_the_interval_makes_a_verdict_doubtful() -> None:
    """Five seeds that happen to agree, and fifteen that show nothing."""
    runs = scored(grid(model=["plain_cnn", "se_cnn"], seed=map(str, range(20))), noise=0.001)
    early = runs["seed"].astype(int) < 5
    lucky = early & (runs["model"] == "se_cnn")
    runs.loc[early, "test/accuracy"] = 0.9 + lucky * (0.001 + runs["seed"].astype(int) * 1e-4)
    found = compare(runs.assign(look=2 - early), "model")
    assert found.rows[0].verdict == "higher", "a verdict once reached stays"
    assert wording.differences_table(found)[0]["verdict"].endswith("doubtful")
    assert wording.title(found).endswith("but doubtful")
    assert "later seeds do not confirm" in wording.notes(found)[0]


def test_several_other_keys_are_one_column_of_levels() -> None:
    jobs = grid(model=["plain_cnn", "se_cnn"], batch_size=["64", "128"], lr=["1", "2"], seed=SEEDS)
    lines = wording.differences_table(compare(scored(jobs), "model"))
    assert [line["level"] for line in lines][::4] == ["batch_size=64 lr=1", "mean of the levels"]
    assert "at 4 of 4 settings" in wording.title(compare(scored(jobs, better=0.01), "model"))


def test_means_have_a_row_for_each_arm_at_each_level() -> None:
    runs = scored(grid(model=["plain_cnn", "se_cnn"], batch_size=["64", "128"], seed=SEEDS))
    runs["time/train_seconds"] = 3.5
    lines = wording.means_table(compare(runs, "model"))
    assert [(line["model"], line["batch_size"]) for line in lines] == [
        ("plain_cnn", "64"), ("plain_cnn", "128"), ("se_cnn", "64"), ("se_cnn", "128"),
    ]  # fmt: skip
    assert re.fullmatch(r"\d\d\.\d\d % \(0\.\d\d\)", lines[0]["test/accuracy"])
    assert lines[0]["time/train_seconds"] == "3.50 s (0.00)"
