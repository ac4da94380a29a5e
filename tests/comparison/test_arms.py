"""Which runs are paired, flagged or refused."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import SEEDS, TWO_MODELS, grid, record, scored

from mnist_exp.comparison.arms import Arms, arrange, choose_metrics, compare_arms, differing_params
from mnist_exp.comparison.statistics import compare
from mnist_exp.comparison.wording import format_difference
from mnist_exp.errors import UserError
from mnist_exp.tracking.base import RunRecord


def values(arms: Arms, arm: str) -> list[float]:
    return [run.metrics["test/accuracy"] for _, run in sorted(arms.runs[arm].items())]


def test_runs_are_paired_by_seed() -> None:
    arms = arrange(scored(TWO_MODELS, 0.02), TWO_MODELS, "model", "plain_cnn")
    assert list(arms.runs) == ["plain_cnn", "se_cnn"]
    assert arms.pairs("se_cnn") == [(("seed", seed),) for seed in SEEDS]
    found = compare_arms(arms, choose_metrics(arms, None))
    assert [row.metric for row in found] == ["test/accuracy", "test/loss", "model/parameters"]


def test_several_arms_are_corrected_for_their_number() -> None:
    jobs = grid(model=["a", "b", "c"], seed=SEEDS)
    chance = random.Random(1)
    records = [record(number, 0.9 + chance.gauss(0, 0.001) + (job["model"] == "b") / 1000) for number, job in jobs.items()]
    arms = arrange(records, jobs, None, None)
    assert (arms.factor, arms.baseline, arms.others) == ("model", "a", ["b", "c"])
    found = compare_arms(arms, ["test/accuracy"])
    smaller, larger = sorted(row.values.p_t for row in found)
    assert sorted(row.p_t for row in found) == pytest.approx([min(1, 2 * smaller), max(2 * smaller, larger)])
    smaller, larger = sorted(row.values.p_sign_flip for row in found)
    assert sorted(row.p_sign_flip for row in found) == pytest.approx([min(1, 2 * smaller), max(2 * smaller, larger)])
    uncorrected = compare(*(values(arms, arm) for arm in ("b", "a"))).min_detectable_effect
    assert found[0].values.min_detectable_effect > uncorrected, "the power is corrected, too"


def test_unfinished_missing_duplicated_and_unpaired_runs_are_flagged_and_left_out() -> None:
    records = scored(TWO_MODELS, 0.02)
    records[3] = record(3, 0.5, status="KILLED")
    del records[9]
    repeated = record(0, 0.95)
    records.append(RunRecord(**(vars(repeated) | {"run_id": "f" * 32, "started": 99})))
    arms = arrange(records, TWO_MODELS, "model", "plain_cnn")
    assert arms.pairs("se_cnn") == [(("seed", seed),) for seed in "012"]
    assert arms.runs["se_cnn"][(("seed", "0"),)].run_id == "f" * 32
    flags = "\n".join(arms.flags)
    for part in ("unfinished: run 3 is KILLED", "missing: job 9 (model=plain_cnn seed=4)", "duplicated: run 0"):
        assert part in flags
    assert "unpaired: model=plain_cnn seed=3 has no partner in model=se_cnn" in flags
    assert "unpaired: model=se_cnn seed=4 has no partner in model=plain_cnn" in flags


MISTAKES = {
    "factor=optimizer is invalid: expected a key that the sweep varied besides the seed: model": {"factor": "optimizer"},
    "Seeds pair the runs of the arms": {"factor": "seed"},
    "baseline=resnet is invalid: expected an arm of model: se_cnn, plain_cnn": {"baseline": "resnet"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_answered_with_the_valid_values(message: str) -> None:
    arguments = {"factor": "model", "baseline": None} | MISTAKES[message]
    with pytest.raises(UserError, match=message):
        arrange(scored(TWO_MODELS, 0), TWO_MODELS, **arguments)


def test_several_factors_must_be_named() -> None:
    jobs = grid(model=["a", "b"], batch_size=["64", "128"], seed=SEEDS)
    with pytest.raises(UserError, match=r"factor=null is invalid: .* besides the seed: model, batch_size\. Add factor=KEY"):
        arrange(scored(jobs, 0), jobs, None, None)


def test_one_seed_is_refused() -> None:
    jobs = grid(model=["a", "b"], seed=["0"])
    with pytest.raises(
        UserError, match=r"No arm of model has two pairs .* with model=a, .* Sweep with 'seed=range\(0,5\)' or more"
    ):
        arrange(scored(jobs, 0), jobs, None, None)


def test_an_arm_that_did_not_finish_is_left_out_and_no_finished_arm_is_refused() -> None:
    jobs = grid(model=["a", "b", "c"], seed=SEEDS)
    records = [vars(item) | {"status": "FAILED" if int(item.tags["job_num"]) >= 10 else "FINISHED"} for item in scored(jobs, 0)]
    arms = arrange([RunRecord(**item) for item in records], jobs, None, None)
    assert arms.others == ["b"]
    assert "left out: model=c has 0 pairs of finished runs; expected at least two" in arms.flags
    failed = [RunRecord(**(item | {"status": "FAILED"})) for item in records]
    with pytest.raises(UserError, match=r"finish the sweep with sweep.resume=<its id>\.\n- unfinished: run 0 is FAILED"):
        arrange(failed, jobs, None, None)


def test_two_pairs_that_happen_to_agree_prove_nothing() -> None:
    jobs = grid(model=["a", "b"], seed=["0", "1"])
    records = [record(number, accuracy) for number, accuracy in enumerate((0.95, 0.96, 0.96, 0.97))]
    (row,) = compare_arms(arrange(records, jobs, None, None), ["test/accuracy"])
    assert not row.is_detected
    assert row.p_t == 0.5
    assert format_difference(row) == "+1.00 points (in all pairs, no interval)"


def test_validation_on_different_images_is_not_compared() -> None:
    records = scored(TWO_MODELS, 0)
    for number, item in enumerate(records):
        item.metrics["val/accuracy"] = 0.9
        item.digests["finetune"] = str(number % 5 + (number == 7))
    arms = arrange(records, TWO_MODELS, None, None)
    compare_arms(arms, ["test/accuracy"])
    with pytest.raises(UserError, match="run 7 and run 2 were validated on different images"):
        compare_arms(arms, ["val/accuracy"])
    for item in records:
        item.digests.clear()
    with pytest.raises(UserError, match=r"mnist \(not recorded by run 0\)"):
        arrange(records, TWO_MODELS, None, None)


def test_missing_metrics_and_metrics_without_finite_values_are_refused() -> None:
    records = scored(TWO_MODELS, 0)
    arms = arrange(records, TWO_MODELS, "model", None)
    with pytest.raises(UserError, match=r"metrics=f1 is invalid: .* every run has: model/parameters, test/accuracy, test/loss"):
        choose_metrics(arms, ["f1"])
    records[2] = record(2, math.nan)
    with pytest.raises(UserError, match=r"metrics=test/accuracy is invalid: .* finite values, but 1 of 10 runs, such as run 2"):
        choose_metrics(arrange(records, TWO_MODELS, "model", None), None)


def test_runs_on_different_data_are_not_compared() -> None:
    records = scored(TWO_MODELS, 0)
    records[7] = record(7, 0.9, digest="other")
    with pytest.raises(UserError, match=r"different data .* mnist \(d\): run 0; mnist \(other\): run 7"):
        arrange(records, TWO_MODELS, "model", None)


def test_configuration_differences_are_found() -> None:
    records = scored(TWO_MODELS, 0)
    for number, item in enumerate(records):
        item.params["model.se"] = "4" if number < 5 else "None"
    arms = arrange(records, TWO_MODELS, "model", "plain_cnn")
    assert differing_params(arms) == {"model.se": {"plain_cnn": "None", "se_cnn": "4"}}


@given(
    st.dictionaries(st.sampled_from(["batch_size", "seed", "lr"]), st.integers(2, 4), min_size=1),
    st.integers(2, 4),
    st.randoms(use_true_random=False),
)
def test_every_pair_differs_in_the_factor_alone(others: dict[str, int], arm_count: int, chance: random.Random) -> None:
    choices = {key: [str(value) for value in range(count)] for key, count in others.items()}
    jobs = grid(model=[f"arm{number}" for number in range(arm_count)], **choices)
    kept = [number for number in jobs if chance.random() < 0.8]
    records = [record(number, 0.5) for number in kept]
    chance.shuffle(records)
    try:
        arms = arrange(records, jobs, "model", None)
    except UserError:  # no arm has two pairs
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
