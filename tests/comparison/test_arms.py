"""Which runs are paired, flagged or refused."""

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import SEEDS, TWO_MODELS, grid, record, scored

from mnist_exp.comparison.arms import (
    Arms,
    Jobs,
    Source,
    arrange,
    choose_metrics,
    compare_arms,
    compare_levels,
    differing_params,
)
from mnist_exp.comparison.statistics import compare
from mnist_exp.errors import UserError
from mnist_exp.tracking.base import RunRecord


def sweep(records: list[RunRecord], jobs: Jobs, factor: str | None = None, baseline: str | None = None) -> Arms:
    """The arms of a single sweep whose jobs were all defined at its start."""
    return arrange([Source("s", records, jobs, frozenset(jobs))], factor, baseline)


def refusal(function: Callable[..., object], *arguments: object) -> UserError:
    with pytest.raises(UserError) as error:
        function(*arguments)
    return error.value


def values(arms: Arms, arm: str) -> list[float]:
    return [run.metrics["test/accuracy"] for _, run in sorted(arms.runs[arm].items())]


def test_runs_are_paired_by_seed() -> None:
    arms = sweep(scored(TWO_MODELS, 0.02), TWO_MODELS, "model", "plain_cnn")
    assert list(arms.runs) == ["plain_cnn", "se_cnn"]
    assert arms.pairs("se_cnn") == [(("seed", seed),) for seed in SEEDS]
    found = compare_arms(arms, choose_metrics(arms, None))
    assert [row.metric for row in found] == ["test/accuracy", "test/loss", "model/parameters"]


def test_several_arms_are_corrected_for_their_number() -> None:
    jobs = grid(model=["a", "b", "c"], seed=SEEDS)
    chance = random.Random(1)
    records = [record(number, 0.9 + chance.gauss(0, 0.001) + (job["model"] == "b") / 1000) for number, job in jobs.items()]
    arms = sweep(records, jobs)
    assert (arms.factor, arms.baseline, arms.others) == ("model", "a", ["b", "c"])
    found = compare_arms(arms, ["test/accuracy"])
    for row in found:
        alone = compare(values(arms, row.arm), values(arms, "a"))
        assert row.values.p == pytest.approx(min(1, 2 * alone.p))
        assert row.values.interval.low < alone.interval.low
    uncorrected = compare(*(values(arms, arm) for arm in ("b", "a"))).min_detectable_effect
    assert found[0].values.min_detectable_effect > uncorrected, "the power is corrected, too"


def test_unfinished_missing_duplicated_and_unpaired_runs_are_flagged_and_left_out() -> None:
    records = scored(TWO_MODELS, 0.02)
    records[3] = record(3, 0.5, status="KILLED")
    del records[9]
    repeated = record(0, 0.95)
    records.append(RunRecord(**(vars(repeated) | {"run_id": "f" * 32, "started": 99})))
    arms = sweep(records, TWO_MODELS, "model", "plain_cnn")
    assert arms.pairs("se_cnn") == [(("seed", seed),) for seed in "012"]
    assert arms.runs["se_cnn"][(("seed", "0"),)].run_id == "f" * 32
    flags = "\n".join(arms.flags)
    for part in ("unfinished: run 3 is KILLED", "missing: job 9 (model=plain_cnn seed=4)", "duplicated: run 0"):
        assert part in flags
    assert "unpaired: model=plain_cnn seed=3 has no partner in model=se_cnn" in flags
    assert "unpaired: model=se_cnn seed=4 has no partner in model=plain_cnn" in flags


@pytest.mark.parametrize(
    ("factor", "baseline", "key", "value"),
    [
        ("optimizer", None, "--factor", "optimizer"),
        ("seed", None, "--factor", "seed"),
        ("model", "resnet", "--baseline", "resnet"),
    ],
)
def test_a_mistake_is_answered_with_the_valid_values(factor: str, baseline: str | None, key: str, value: str) -> None:
    error = refusal(sweep, scored(TWO_MODELS, 0), TWO_MODELS, factor, baseline)
    assert (error.key, error.value) == (key, value)
    assert ("se_cnn, plain_cnn" if baseline else "model") in error.expected


def test_several_factors_must_be_named() -> None:
    jobs = grid(model=["a", "b"], batch_size=["64", "128"], seed=SEEDS)
    error = refusal(sweep, scored(jobs, 0), jobs)
    assert error.key == "--factor"
    assert "model, batch_size" in str(error)


def test_an_arm_that_did_not_finish_is_left_out_and_no_finished_arm_is_refused() -> None:
    jobs = grid(model=["a", "b", "c"], seed=SEEDS)
    records = [vars(item) | {"status": "FAILED" if int(item.tags["job_num"]) >= 10 else "FINISHED"} for item in scored(jobs, 0)]
    arms = sweep([RunRecord(**item) for item in records], jobs)
    assert arms.others == ["b"]
    assert "left out: model=c has 0 seeds of finished runs; expected at least two" in arms.flags
    failed = [RunRecord(**(item | {"status": "FAILED"})) for item in records]
    assert "run 0 is FAILED" in str(refusal(sweep, failed, jobs))
    jobs = grid(model=["a", "b"], seed=["0"])
    assert "'seed=range(0,5)'" in str(refusal(sweep, scored(jobs, 0), jobs)), "one seed is too few"


def test_two_pairs_that_happen_to_agree_prove_nothing() -> None:
    jobs = grid(model=["a", "b"], seed=["0", "1"])
    records = [record(number, accuracy) for number, accuracy in enumerate((0.95, 0.96, 0.96, 0.97))]
    (row,) = compare_arms(sweep(records, jobs), ["test/accuracy"])
    assert row.verdict == "undecided"
    assert math.isnan(row.values.p)


def test_validation_on_different_images_is_not_compared() -> None:
    records = scored(TWO_MODELS, 0)
    for number, item in enumerate(records):
        item.metrics["val/accuracy"] = 0.9
        item.digests["validation"] = str(number % 5 + (number == 7))
    arms = sweep(records, TWO_MODELS)
    compare_arms(arms, ["test/accuracy"])
    error = str(refusal(compare_arms, arms, ["val/accuracy"]))
    assert "run 7" in error
    assert "run 2" in error
    for item in records:
        item.digests.clear()
    refusal(sweep, records, TWO_MODELS)


def test_missing_metrics_and_metrics_without_finite_values_are_refused() -> None:
    records = scored(TWO_MODELS, 0)
    error = refusal(choose_metrics, sweep(records, TWO_MODELS), ["f1"])
    assert (error.key, error.value) == ("--metric", "f1")
    assert "model/parameters, test/accuracy, test/loss" in error.expected
    records[2] = record(2, math.nan)
    assert "run 2" in str(refusal(choose_metrics, sweep(records, TWO_MODELS), None))


def test_runs_on_different_data_are_not_compared() -> None:
    records = scored(TWO_MODELS, 0)
    records[7] = record(7, 0.9, digest="other")
    assert "run 7" in str(refusal(sweep, records, TWO_MODELS))
    records = scored(TWO_MODELS, 0)
    for number, item in enumerate(records):
        item.digests["train"] = str(number % 5)
    sweep(records, TWO_MODELS)
    records[7].digests["train"] = "other"
    assert "run 7" in str(refusal(sweep, records, TWO_MODELS)), "the images that a pair was trained on"


def test_configuration_differences_are_found() -> None:
    records = scored(TWO_MODELS, 0)
    for number, item in enumerate(records):
        item.params["model.se"] = "4" if number < 5 else "None"
    arms = sweep(records, TWO_MODELS, "model", "plain_cnn")
    assert differing_params(arms) == {"model.se": {"plain_cnn": "None", "se_cnn": "4"}}


def test_several_factors_give_one_value_per_seed() -> None:
    jobs = grid(model=["a", "b"], lr=["1", "2"], seed=SEEDS)
    chance = random.Random(0)
    effect = {("b", "1"): 0.004, ("b", "2"): 0.002}
    records = [
        record(number, 0.9 + effect.get((job["model"], job["lr"]), 0) + chance.gauss(0, 1e-4)) for number, job in jobs.items()
    ]
    del records[3]  # model=a lr=1 seed=3
    arms = sweep(records, jobs, "model")
    (row,) = compare_arms(arms, ["test/accuracy"])
    assert row.values.n == 4, "seeds, not pairs"
    assert row.values.difference == pytest.approx(0.003, abs=2e-4)
    assert any("incomplete: seed 3 lacks runs of other settings" in flag for flag in arms.flags)
    levels = compare_levels(arms, "test/accuracy")
    assert [(level.key, level.level) for level in levels] == [("lr", "1"), ("lr", "2")]
    assert [level.difference for level in levels] == pytest.approx([0.004, 0.002], abs=2e-4)
    assert all(level.differs for level in levels)


def test_other_processors_code_or_configuration_do_not_pair() -> None:
    records = scored(TWO_MODELS, 0.02)
    records[0].tags["cpu"] = "another"
    arms = sweep(records, TWO_MODELS, "model", "plain_cnn")
    assert arms.seeds("se_cnn") == SEEDS[1:]
    assert any("incomplete: seed 0 ran on" in flag for flag in arms.flags)
    records[1].tags["torch"] = "2.0"
    assert "torch" in str(refusal(sweep, records, TWO_MODELS))
    records = scored(TWO_MODELS, 0.02)
    records[2].params["batch_size"] = "64"
    assert "batch_size" in str(refusal(sweep, records, TWO_MODELS))


def test_seeds_that_were_added_later_need_an_interval_that_is_valid_at_any_number() -> None:
    records, initial = scored(TWO_MODELS, 0.02), frozenset(number for number in TWO_MODELS if number % 5 < 3)
    arms = arrange([Source("s", records, TWO_MODELS, initial)], None, None)
    assert not arms.seeds_known
    assert "2 of 5 seeds" in arms.seeds_reason
    (row,) = compare_arms(arms, ["test/accuracy"])
    assert row.values.interval.anytime


def test_a_look_at_an_unfinished_sweep_and_settings_added_later_need_the_wider_interval() -> None:
    records = scored(TWO_MODELS, 0.02)
    killed = [*records[:4], record(4, 0.9, status="KILLED"), *records[5:]]
    arms = sweep(killed, TWO_MODELS)
    assert not arms.seeds_known
    assert sweep([*records[:4], record(4, 0.9, status="FAILED"), *records[5:]], TWO_MODELS).seeds_known
    jobs = grid(model=["se_cnn", "plain_cnn"], lr=["1", "2"], seed=SEEDS)
    initial = frozenset(number for number, job in jobs.items() if job["lr"] == "1")
    arms = arrange([Source("s", scored(jobs, 0.02), jobs, initial)], "model", None)
    assert not arms.seeds_known
    assert "10 jobs" in arms.seeds_reason


def test_a_key_that_only_some_jobs_set_has_the_default_in_the_others() -> None:
    jobs = dict(enumerate([{"lr": "2", "seed": seed} for seed in SEEDS] + [{"seed": seed} for seed in SEEDS]))
    arms = sweep([record(number, 0.9 + number / 1e4) for number in jobs], jobs)
    assert (arms.factor, list(arms.runs)) == ("lr", ["2", "default"])


def test_several_sweeps_are_pooled_and_an_added_arm_keeps_the_interval() -> None:
    jobs = grid(model=["se_cnn", "plain_cnn"], seed=["5", "6"])
    more = [RunRecord(**(vars(item) | {"run_id": f"{number + 50:032x}"})) for number, item in enumerate(scored(jobs, 0.02))]
    first = Source("s", scored(TWO_MODELS, 0.02), TWO_MODELS, frozenset(TWO_MODELS))
    more = [RunRecord(**(vars(item) | {"started": 100 + item.started})) for item in more]
    second = Source("t", more, jobs, frozenset(jobs))
    for sources in ([first, second], [second, first]):
        arms = arrange(sources, "model", "plain_cnn")
        assert sorted(arms.seeds("se_cnn")) == [*SEEDS, "5", "6"]
        assert not arms.seeds_known
    with_arm = Source("s", scored(TWO_MODELS, 0.02), TWO_MODELS, frozenset(number for number in TWO_MODELS if number < 5))
    assert arrange([with_arm], None, None).seeds_known, "an arm was added, not a seed"


@given(
    st.dictionaries(st.sampled_from(["batch_size", "lr"]), st.integers(2, 4)),
    st.integers(2, 4),
    st.randoms(use_true_random=False),
)
def test_every_pair_differs_in_the_factor_alone(others: dict[str, int], arm_count: int, chance: random.Random) -> None:
    choices = {key: [str(value) for value in range(count)] for key, count in (others | {"seed": 4}).items()}
    jobs = grid(model=[f"arm{number}" for number in range(arm_count)], **choices)
    kept = [number for number in jobs if chance.random() < 0.8]
    records = [record(number, 0.5) for number in kept]
    chance.shuffle(records)
    try:
        arms = sweep(records, jobs, "model", None)
    except UserError:  # no arm has two seeds
        return
    kept = [number for number in kept if jobs[number]["model"] in arms.runs]
    by_id = {item.run_id: int(item.tags["job_num"]) for item in records}
    seen = 0
    for arm in arms.others:
        for block in arms.pairs(arm):
            one, two = (jobs[by_id[arms.runs[name][block].run_id]] for name in (arm, arms.baseline))
            assert one | {"model": ""} == two | {"model": ""}
            assert (one["model"], two["model"]) == (arm, arms.baseline)
            seen += 1
        both = [{number for number in kept if jobs[number]["model"] == name} for name in (arm, arms.baseline)]
        blocks = [{tuple((jobs[number] | {"model": ""}).items()) for number in numbers} for numbers in both]
        assert len(arms.pairs(arm)) == len(blocks[0] & blocks[1])
    assert len(arms.records) == len(kept)
    assert seen <= len(kept) * arm_count
