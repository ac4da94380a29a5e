"""Which runs pair, which are refused, and the verdict of each row."""

from collections import defaultdict
from itertools import pairwise
from random import Random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import SEEDS, TWO_MODELS, grid, scored, table

from mnist_exp.comparison import wording
from mnist_exp.comparison.pairs import MEAN, Comparison, Row, choose_metrics, compare, varied_keys
from mnist_exp.errors import UserError


def only(comparison: Comparison) -> Row:
    (row,) = comparison.rows
    return row


def refusal(runs: pd.DataFrame, *arguments: object) -> UserError:
    with pytest.raises(UserError) as error:
        compare(runs, *arguments)
    return error.value


@given(
    st.integers(2, 4),
    st.integers(2, 8),
    st.dictionaries(st.sampled_from(["batch_size", "optimizer.lr"]), st.integers(2, 3)),
    st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_each_row_has_the_differences_of_runs_that_differ_in_the_factor_alone(
    arms: int, seeds: int, others: dict[str, int], draw: int
) -> None:
    """Against a count by hand, in any order of the runs."""
    chance = Random(draw)
    choices = {key: [str(value) for value in range(count)] for key, count in others.items()}
    jobs = grid(model=[f"arm{number}" for number in range(arms)], **choices, seed=[str(seed) for seed in range(seeds)])
    values = {tuple(sorted(job.items())): chance.gauss(0.9, 0.01) for job in jobs}
    chance.shuffle(jobs)
    runs = table(jobs, lambda job: values[tuple(sorted(job.items()))])
    found = compare(runs, "model", "arm0")
    by_hand = defaultdict(list)
    for job in jobs:
        if job["model"] != "arm0":
            level = " ".join(f"{key}={job[key]}" for key in found.keys)
            other = values[tuple(sorted((job | {"model": "arm0"}).items()))]
            by_hand[job["model"], level].append(values[tuple(sorted(job.items()))] - other)
    rows = {(row.arm, row.level): row for row in found.rows if row.level != MEAN}
    assert rows.keys() == by_hand.keys()
    for name, differences in by_hand.items():
        assert rows[name].estimate.n == len(differences) == seeds
        assert rows[name].estimate.difference == pytest.approx(np.mean(differences), abs=1e-12)
    means = [row for row in found.rows if row.level == MEAN]
    assert len(means) == (arms - 1 if others else 0)
    for row in means:
        levels = [other.estimate.difference for other in found.rows if other.arm == row.arm and other.level != MEAN]
        assert row.estimate.difference == pytest.approx(np.mean(levels), abs=1e-12)


def test_accuracies_that_happen_to_be_constant_prove_nothing() -> None:
    """Two seeds of a small test set can agree by chance; the number of parameters cannot."""
    jobs = grid(model=["plain_cnn", "se_cnn"], seed=["0", "1"])
    runs = table(jobs, lambda job: 0.9917 if job["model"] == "se_cnn" else 0.9944)
    runs["model/parameters"] = [19_600.0, 19_600.0, 19_674.0, 19_674.0]
    row = only(compare(runs, "model"))
    assert (row.verdict, row.estimate.n) == ("undecided", 2)
    assert "no interval" in wording.format_difference(row)
    exact = only(compare(runs, "model", metrics=["model/parameters"]))
    assert (exact.verdict, wording.format_difference(exact)) == ("higher", "+74 (exact)")


@pytest.mark.parametrize("failure", [{"status": "DIVERGED"}, {"status": "FAILED"}, {"test/accuracy": np.nan}])
@pytest.mark.parametrize("arm", ["plain_cnn", "se_cnn"])
def test_the_survivors_of_an_arm_have_no_verdict(arm: str, failure: dict[str, object]) -> None:
    runs = scored(grid(model=["plain_cnn", "se_cnn"], seed=map(str, range(10))), better=0.01)
    failed = (runs["model"] == arm) & (runs["seed"].astype(int) < 5)
    assert only(compare(runs, "model")).verdict == "higher"
    runs.loc[failed, list(failure)] = list(failure.values())
    found = compare(runs, "model")
    row = only(found)
    assert (row.verdict, row.estimate.n, row.seeds) == ("incomplete", 5, 10)
    assert row.estimate.low > 0, "the interval of the remaining pairs is shown"
    assert f"5 of 10 seeds of {arm}" in " ".join(wording.notes(found))


def test_a_seed_that_only_one_arm_was_given_makes_the_row_incomplete() -> None:
    runs = scored(TWO_MODELS, better=0.01)
    assert only(compare(runs[runs.index != 2], "model")).verdict == "incomplete"


def test_opposite_effects_at_two_levels_are_no_equivalence() -> None:
    """+0.30 points at one batch size and -0.30 at another."""
    jobs = grid(model=["plain_cnn", "se_cnn"], batch_size=["64", "512"], seed=SEEDS)
    chance = Random(0)
    effect = {("se_cnn", "64"): 0.003, ("se_cnn", "512"): -0.003}
    found = compare(
        table(jobs, lambda job: 0.98 + effect.get((job["model"], job["batch_size"]), 0) + chance.gauss(0, 1e-5)), "model"
    )
    verdicts = {row.level: row.verdict for row in found.rows}
    assert verdicts == {"batch_size=64": "higher", "batch_size=512": "lower", MEAN: "undecided"}
    mean = next(row for row in found.rows if row.level == MEAN)
    assert -mean.margin < mean.estimate.low < mean.estimate.high < mean.margin
    assert wording.title(found) == "se_cnn is higher than plain_cnn at 1 of 2 batch sizes, lower at 1"


def test_a_level_that_failed_leaves_the_others_their_verdicts_and_no_mean() -> None:
    jobs = grid(model=["plain_cnn", "se_cnn"], batch_size=["64", "512"], seed=SEEDS)
    runs = scored(jobs, better=0.01)
    runs.loc[(runs["batch_size"] == "512") & (runs["seed"] == "0"), "status"] = "DIVERGED"
    assert {row.level: row.verdict for row in compare(runs, "model").rows} == {
        "batch_size=64": "higher",
        "batch_size=512": "incomplete",
    }


def extended(count: int, each: int, better: float, seed: int = 0) -> pd.DataFrame:
    """A sweep with several looks, each of which adds seeds."""
    runs = scored(grid(model=["plain_cnn", "se_cnn"], seed=map(str, range(count * each))), better, 0.002, seed)
    return runs.assign(look=runs["seed"].astype(int) // each + 1)


@pytest.mark.parametrize("better", [0.0, 0.001, 0.002])
def test_a_verdict_once_reached_stays(better: float) -> None:
    for seed in range(8):
        runs = extended(4, 5, better, seed)
        intervals = [only(compare(runs[runs["look"] <= look], "model")).estimate for look in range(1, 5)]
        for before, after in pairwise(intervals):
            assert before.low <= after.low
            assert after.high <= before.high


def test_an_arm_that_is_added_after_a_look_pays_for_it() -> None:
    jobs = grid(model=["plain_cnn", "b", "c"], seed=SEEDS)
    at_once = scored(jobs)
    later = at_once.assign(look=np.where(at_once["model"] == "c", 2, 1))
    width = {}
    for name, runs in (("at once", at_once), ("later", later)):
        width[name] = {row.arm: row.estimate.high - row.estimate.low for row in compare(runs, "model").rows}
    assert width["later"]["c"] > 1.5 * width["at once"]["c"]
    assert width["later"]["b"] < width["at once"]["b"], "at the first look it was alone"


def test_every_row_of_a_table_shares_the_error() -> None:
    """Levels, too: without a difference, a row errs as rarely as an arm among as many."""
    one = only(compare(scored(TWO_MODELS), "model"))
    jobs = grid(model=["plain_cnn", "se_cnn"], batch_size=["1", "2", "3"], seed=SEEDS)
    runs = pd.concat([scored(TWO_MODELS).assign(batch_size=size) for size in "123"], ignore_index=True)
    runs["digest"] = runs["model"] + runs["batch_size"]
    assert len(runs) == len(jobs)
    levels = [row for row in compare(runs, "model").rows if row.level != MEAN]
    assert all(row.estimate.low < one.estimate.low < one.estimate.high < row.estimate.high for row in levels)


def test_looks_without_a_pair_do_not_count() -> None:
    runs = extended(3, 1, 0.001)
    found = compare(runs, "model")
    assert found.looks == 2, "the first grid has one pair"


def test_one_seed_gives_a_table_without_an_interval() -> None:
    found = compare(scored(grid(model=["plain_cnn", "se_cnn"], seed=["0"])), "model")
    row = only(found)
    assert (row.verdict, row.estimate.n, row.estimate.has_interval) == ("undecided", 1, False)
    assert "1 more pair" in wording.format_difference(row)
    assert wording.means_table(found)[0]["test/accuracy"].startswith("9")
    without = table([{"model": "plain_cnn"}, {"model": "se_cnn"}], lambda job: 0.9)
    assert only(compare(without, "model")).estimate.n == 1, "the sweep varies no seed"


def test_three_clear_seeds_have_an_interval() -> None:
    jobs = grid(model=["plain_cnn", "se_cnn"], seed=["0", "1", "2"])
    row = only(compare(scored(jobs, better=-0.74, noise=0.005), "model"))
    assert row.verdict == "lower"
    assert row.estimate.has_interval


def test_all_pairs_of_arms_are_more_rows() -> None:
    runs = scored(grid(model=["a", "b", "c"], seed=SEEDS))
    assert [(row.arm, row.baseline) for row in compare(runs, "model", "b", all_pairs=True).rows] == [
        ("a", "b"),
        ("c", "b"),
        ("c", "a"),
    ]
    few, many = (compare(runs, "model", "b", all_pairs=all_pairs).rows[0].estimate for all_pairs in (False, True))
    assert few.difference == many.difference
    assert many.high - many.low > few.high - few.low


def test_of_runs_that_repeat_others_the_first_finished_one_counts() -> None:
    """The result of a look must not change when a further sweep repeats its jobs."""
    runs = scored(TWO_MODELS, better=0.01)
    again = scored(TWO_MODELS, better=-0.01).assign(look=2)
    found = compare(pd.concat([runs, again], ignore_index=True), "model")
    assert only(found).estimate.difference == pytest.approx(only(compare(runs, "model")).estimate.difference)
    assert found.repeated == len(TWO_MODELS)
    runs.loc[3, "status"] = "FAILED"
    assert only(compare(pd.concat([runs, again], ignore_index=True), "model")).is_complete


def test_runs_that_repeat_failed_ones_fill_the_look_that_lacked_them() -> None:
    """The survivors of the first look would else narrow the interval for good."""
    runs = scored(grid(model=["plain_cnn", "se_cnn"], seed=map(str, range(10))))
    worst = runs[runs["model"] == "se_cnn"].sort_values("test/accuracy").index[:6]
    failed = runs.copy()
    failed.loc[worst, "status"] = "FAILED"
    pooled = compare(pd.concat([failed, runs.assign(look=2)], ignore_index=True), "model")
    alone = only(compare(runs, "model")).estimate
    assert (only(pooled).estimate.low, only(pooled).estimate.high) == pytest.approx((alone.low, alone.high))


def test_the_mean_over_more_levels_is_another_quantity() -> None:
    effect = {"64": 0.003, "128": 0.003, "512": -0.004}
    chance = Random(0)
    jobs = grid(model=["plain_cnn", "se_cnn"], batch_size=list(effect), seed=SEEDS)
    runs = table(jobs, lambda job: 0.98 + (job["model"] == "se_cnn") * effect[job["batch_size"]] + chance.gauss(0, 1e-4))
    runs["look"] = np.where(runs["batch_size"] == "512", 2, 1)
    mean = compare(runs, "model").rows[-1]
    assert mean.level == MEAN
    assert mean.estimate.low < mean.estimate.difference < mean.estimate.high
    part = runs[(runs["batch_size"] != "512") | (runs["model"] == "plain_cnn")]
    found = compare(part, "model")
    assert all(row.level != MEAN for row in found.rows), "the arm lacks a level"
    assert "No row compares se_cnn with plain_cnn at batch_size=512" in " ".join(wording.notes(found))
    apart = runs[(runs["batch_size"] == "64") | (runs["seed"] > "2")]
    assert compare(apart[(apart["batch_size"] != "64") | (apart["seed"] <= "2")], "model").rows[-1].level != MEAN, (
        "no common seed"
    )


def test_runs_on_two_processors_do_not_pair() -> None:
    runs = scored(TWO_MODELS, better=0.01)
    runs.loc[0, "processor"] = "another"
    found = compare(runs, "model")
    assert (only(found).estimate.n, only(found).verdict) == (4, "higher")
    assert "1 of 5 pairs ran on two processors" in " ".join(wording.notes(found))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("torch", "3"),
        ("code", "other"),
        ("precision", "bfloat16"),
        ("threads", "2"),
        ("data", "digits"),
        ("digest/test", "other"),
    ],
)
def test_runs_that_differ_in_more_than_the_factor_are_not_compared(column: str, value: str) -> None:
    runs = scored(TWO_MODELS)
    runs.loc[7, column] = value
    error = refusal(runs, "model")
    assert error.key == column
    assert "model=se_cnn seed=2" in str(error)
    runs.loc[7, "status"] = "FAILED"
    assert compare(runs, "model").rows, "of runs without a result, nothing is compared"


def test_sweeps_whose_arms_differ_in_their_settings_are_not_pooled() -> None:
    runs = scored(TWO_MODELS)
    runs.loc[7, "digest"] = "another"
    assert refusal(runs, "model").key == "digest"


def test_pairs_have_the_same_training_and_validation_images() -> None:
    runs = scored(TWO_MODELS)
    runs["digest/train"] = runs["seed"]  # the split depends on the seed
    compare(runs, "model")
    runs.loc[7, "digest/train"] = "other"
    assert refusal(runs, "model").key == "digest/train"
    runs = scored(TWO_MODELS).assign(**{"val/accuracy": 0.9, "digest/validation": SEEDS * 2})
    runs.loc[7, "digest/validation"] = "other"
    compare(runs, "model")
    assert "validation" in refusal(runs, "model", None, ["val/accuracy"]).key


@pytest.mark.parametrize(
    ("arguments", "key", "expected"),
    [
        (("optimizer",), "--factor", "model"),
        (("seed",), "--factor", "model"),
        (("model", "resnet"), "--baseline", "plain_cnn, se_cnn"),
        (("model", None, ["f1"]), "--metric", "test/accuracy"),
    ],
)
def test_a_mistake_is_answered_with_the_valid_values(arguments: tuple[object, ...], key: str, expected: str) -> None:
    error = refusal(scored(TWO_MODELS), *arguments)
    assert error.key == key
    assert expected in error.expected


def test_new_images_in_levels_their_mean_and_later_looks() -> None:
    """An arm is right where the baseline is wrong on ten images of a level, for all seeds."""
    runs = scored(grid(model=["a", "b"], lr=["1", "2"], seed=map(str, range(6))), noise=0)
    chance = Random(0)
    for row, run in runs.iterrows():
        first = 0 if run["model"] == "a" else 10
        wrong = [*range(first, first + 20), *chance.sample(range(100, 1000), 5 + int(run["seed"]) + chance.randrange(3))]
        runs.loc[row, ["size", "mistakes"]] = ["1000", " ".join(map(str, wrong))]
        runs.loc[row, "test/accuracy"] = 1 - len(wrong) / 1000
    runs.loc[runs["seed"].astype(int) > 3, "look"] = 2
    found = compare(runs, "model", new_images=True)
    assert [row.level for row in found.rows] == ["lr=1", "lr=2", MEAN]
    for row in found.rows:
        low, high = row.estimate.new_images or (0.0, 0.0)
        assert low < row.estimate.low < row.estimate.high < high
        assert (high - low) / 2 > 2 * np.sqrt(20) / 1000 * 0.95, "20 images on which the arms always differ, at two sigma or more"


def test_arms_that_share_no_level_are_named() -> None:
    jobs = [*grid(model=["a", "b"], lr=["1"], seed=SEEDS), *grid(model=["c"], lr=["2"], seed=SEEDS)]
    found = compare(scored(jobs), "model")
    assert [row.arm for row in found.rows] == ["b"]
    assert "No row compares c with a at lr=1, lr=2" in " ".join(wording.notes(found))
    assert refusal(scored(jobs[5:]), "model").key == "--factor"


def test_a_sweep_without_a_finished_run_has_nothing_to_compare() -> None:
    runs = scored(TWO_MODELS).drop(columns="test/accuracy")
    assert "sweep.resume" in refusal(runs, "model").remedy


def test_data_and_precision_are_keys_where_the_sweep_varies_them() -> None:
    runs = scored(TWO_MODELS)
    assert varied_keys(runs.assign(precision=["float32", "bfloat16"] * 5)) == ["model"]
    swept = runs.drop(columns="precision")
    swept.insert(2, "precision", ["fp32", "bf16"] * 5)
    assert varied_keys(swept) == ["precision", "model"]


def test_the_objective_comes_first_of_the_usual_metrics() -> None:
    runs = scored(TWO_MODELS).assign(**{"test/loss": 0.1, "test/f1": 0.9, "val/f1": 0.9, "time/train_seconds": 1.0})
    assert choose_metrics(runs, None, "val/f1") == ["test/f1", "test/accuracy", "test/loss", "time/train_seconds"]
    assert choose_metrics(runs, None, "val/other") == ["test/accuracy", "test/loss", "time/train_seconds"]
    assert choose_metrics(runs, ["test/loss"], "val/f1") == ["test/loss"]
