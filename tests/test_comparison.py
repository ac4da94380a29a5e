"""Which runs are paired, what is flagged, what is refused, and what is said of the rest."""

import math
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnist_exp.comparison import Arms, amount, answer, arrange, choose_metrics, differing_params, rows, unknowns
from mnist_exp.errors import UserError
from mnist_exp.statistics import compare
from mnist_exp.tracking import Record

Jobs = dict[int, dict[str, str]]


def record(number: int, accuracy: float, status: str = "FINISHED", digest: str = "d", **metrics: float) -> Record:
    found = {"test/accuracy": accuracy, "test/loss": 1 - accuracy, "model/parameters": 100.0} | metrics
    tags = {"job_num": str(number), "data": "mnist"}
    return Record(f"{number:032x}", "1", f"run {number}", status, number, None, {"p": "1"}, found, tags, {"test": digest}, "")


def grid(**choices: list[str]) -> Jobs:
    jobs: list[dict[str, str]] = [{}]
    for key, values in choices.items():
        jobs = [job | {key: value} for job in jobs for value in values]
    return dict(enumerate(jobs))


def values(arms: Arms, arm: str) -> list[float]:
    return [run.metrics["test/accuracy"] for _, run in sorted(arms.runs[arm].items())]


SEEDS = [str(seed) for seed in range(5)]
TWO_MODELS = grid(model=["se_cnn", "plain_cnn"], seed=SEEDS)


def scored(jobs: Jobs, better: float, arm: str = "se_cnn") -> list[Record]:
    """Runs whose accuracy depends on the seed, and in `arm` is `better` than that, give or take a little."""
    chance = random.Random(0)
    return [
        record(number, 0.9 + int(job["seed"]) / 100 + (better + chance.gauss(0, 0.001) if job["model"] == arm else 0))
        for number, job in jobs.items()
    ]


def test_runs_are_paired_by_seed_and_the_answer_says_by_how_much_they_differ() -> None:
    arms = arrange(scored(TWO_MODELS, 0.02), TWO_MODELS, "model", "plain_cnn")
    assert list(arms.runs) == ["plain_cnn", "se_cnn"]
    assert arms.pairs("se_cnn") == [(("seed", seed),) for seed in SEEDS]
    found = rows(arms, choose_metrics(arms, None))
    assert [row.metric for row in found] == ["test/accuracy", "test/loss", "model/parameters"]
    said = answer(arms, found)
    assert said.startswith(
        "In test/accuracy, against model=plain_cnn (92.00 %): se_cnn is higher by 1.96 points (+1.84 to +2.09)"
    )
    assert said.endswith("95 % intervals, n = 5 pairs.")
    assert found[2].difference == "+0 (always)"
    assert not found[2].is_detected


def test_no_difference_is_said_to_be_none_and_what_the_pairs_can_show() -> None:
    arms = arrange(scored(TWO_MODELS, 0.0002), TWO_MODELS, "model", "plain_cnn")
    found = rows(arms, ["test/accuracy"])
    assert "se_cnn shows no detectable difference: " in answer(arms, found)
    shows, correction = unknowns(arms, found)
    assert re.fullmatch(r"se_cnn: n = 5 pairs can show differences of 0\.\d\d points or more \(power 80 %, level 5 %\)\.", shows)
    assert correction == "Seeds that are added after a look at the result need a correction: the intervals hold for one look."


@pytest.mark.parametrize("better", [0.0, 0.0001, 0.0002, 0.0005])
def test_no_number_of_further_seeds_is_derived_from_the_difference_that_was_seen(better: float) -> None:
    arms = arrange(scored(TWO_MODELS, better), TWO_MODELS, "model", "plain_cnn")
    said = " ".join(unknowns(arms, rows(arms, ["test/accuracy"])))
    assert "more seeds" not in said
    assert "seen here" not in said


def test_several_arms_are_corrected_for_their_number() -> None:
    jobs = grid(model=["a", "b", "c"], seed=SEEDS)
    chance = random.Random(1)
    records = [record(number, 0.9 + chance.gauss(0, 0.001) + (job["model"] == "b") / 1000) for number, job in jobs.items()]
    arms = arrange(records, jobs, None, None)
    assert (arms.factor, arms.baseline, arms.others) == ("model", "a", ["b", "c"])
    found = rows(arms, ["test/accuracy"])
    smaller, larger = sorted(row.values.p_t for row in found)
    assert sorted(row.p_t for row in found) == pytest.approx([min(1, 2 * smaller), max(2 * smaller, larger)])
    smaller, larger = sorted(row.values.p_sign_flip for row in found)
    assert sorted(row.p_sign_flip for row in found) == pytest.approx([min(1, 2 * smaller), max(2 * smaller, larger)])
    assert found[0].values.shows > compare(*(values(arms, arm) for arm in ("b", "a"))).shows, "the power is corrected, too"


def test_unfinished_missing_duplicated_and_unpaired_runs_are_flagged_and_left_out() -> None:
    records = scored(TWO_MODELS, 0.02)
    records[3] = record(3, 0.5, status="KILLED")
    del records[9]
    again = record(0, 0.95)
    records.append(Record(**(vars(again) | {"run_id": "f" * 32, "started": 99})))
    arms = arrange(records, TWO_MODELS, "model", "plain_cnn")
    assert arms.pairs("se_cnn") == [(("seed", seed),) for seed in "012"]
    assert arms.runs["se_cnn"][(("seed", "0"),)].run_id == "f" * 32
    flags = "\n".join(arms.flags)
    for part in ("unfinished: run 3 is KILLED", "missing: job 9 (model=plain_cnn seed=4)", "duplicated: run 0"):
        assert part in flags
    assert "unpaired: model=plain_cnn seed=3 has no partner in model=se_cnn" in flags
    assert "unpaired: model=se_cnn seed=4 has no partner in model=plain_cnn" in flags


MISTAKES = {
    "did not vary in this sweep: those that did are model": {"factor": "optimizer"},
    "seeds pair the runs of the arms": {"factor": "seed"},
    "is not an arm of model: its arms are se_cnn, plain_cnn": {"baseline": "resnet"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_answered_by_what_there_is(message: str) -> None:
    arguments = {"factor": "model", "baseline": None} | MISTAKES[message]
    with pytest.raises(UserError, match=message):
        arrange(scored(TWO_MODELS, 0), TWO_MODELS, **arguments)


def test_several_factors_must_be_named() -> None:
    jobs = grid(model=["a", "b"], batch_size=["64", "128"], seed=SEEDS)
    with pytest.raises(UserError, match="factor must be named: beside the seed, the sweep varied model, batch_size"):
        arrange(scored(jobs, 0), jobs, None, None)


def test_one_seed_says_nothing() -> None:
    jobs = grid(model=["a", "b"], seed=["0"])
    with pytest.raises(
        UserError, match=r"No arm of model has two pairs .* with model=a, .* Sweep with 'seed=range\(0,5\)' or more"
    ):
        arrange(scored(jobs, 0), jobs, None, None)


def test_an_arm_that_did_not_finish_is_left_out_and_no_arm_that_did_is_said() -> None:
    jobs = grid(model=["a", "b", "c"], seed=SEEDS)
    records = [vars(item) | {"status": "FAILED" if int(item.tags["job_num"]) >= 10 else "FINISHED"} for item in scored(jobs, 0)]
    arms = arrange([Record(**item) for item in records], jobs, None, None)
    assert arms.others == ["b"]
    assert "left out: model=c has 0 pairs of finished runs, and fewer than two say nothing" in arms.flags
    failed = [Record(**(item | {"status": "FAILED"})) for item in records]
    with pytest.raises(UserError, match=r"finish the sweep with sweep.resume=<its id>\.\n- unfinished: run 0 is FAILED"):
        arrange(failed, jobs, None, None)


def test_two_pairs_that_happen_to_agree_prove_nothing() -> None:
    jobs = grid(model=["a", "b"], seed=["0", "1"])
    records = [record(number, accuracy) for number, accuracy in enumerate((0.95, 0.96, 0.96, 0.97))]
    (row,) = rows(arrange(records, jobs, None, None), ["test/accuracy"])
    assert not row.is_detected
    assert row.p_t == 0.5
    assert row.difference == "+1.00 points (in all pairs, no interval)"


def test_validation_on_different_images_is_not_compared() -> None:
    records = scored(TWO_MODELS, 0)
    for number, item in enumerate(records):
        item.metrics["val/accuracy"] = 0.9
        item.digests["finetune"] = str(number % 5 + (number == 7))
    arms = arrange(records, TWO_MODELS, None, None)
    rows(arms, ["test/accuracy"])
    with pytest.raises(UserError, match="run 7 and run 2 were validated on different images"):
        rows(arms, ["val/accuracy"])
    for item in records:
        item.digests.clear()
    with pytest.raises(UserError, match=r"mnist \(not recorded by run 0\)"):
        arrange(records, TWO_MODELS, None, None)


def test_metrics_that_are_not_there_or_not_numbers() -> None:
    records = scored(TWO_MODELS, 0)
    arms = arrange(records, TWO_MODELS, "model", None)
    with pytest.raises(UserError, match=r"not every run has f1; what all have is model/parameters, test/accuracy, test/loss"):
        choose_metrics(arms, ["f1"])
    records[2] = record(2, math.nan)
    with pytest.raises(UserError, match="test/accuracy is not a finite number in 1 of 10 runs, such as run 2"):
        choose_metrics(arrange(records, TWO_MODELS, "model", None), None)


def test_runs_on_different_data_are_not_compared() -> None:
    records = scored(TWO_MODELS, 0)
    records[7] = record(7, 0.9, digest="other")
    with pytest.raises(UserError, match=r"different data .* mnist \(d\): run 0; mnist \(other\): run 7"):
        arrange(records, TWO_MODELS, "model", None)


def test_what_differs_in_the_configuration_is_found() -> None:
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
        for setting in arms.pairs(arm):
            one, two = (jobs[by_id[arms.runs[name][setting].run_id]] for name in (arm, arms.baseline))
            assert one | {"model": ""} == two | {"model": ""}
            assert (one["model"], two["model"]) == (arm, arms.baseline)
            seen += 1
        both = [{number for number in kept if jobs[number]["model"] == name} for name in (arm, arms.baseline)]
        settings = [{tuple((jobs[number] | {"model": ""}).items()) for number in numbers} for numbers in both]
        assert len(arms.pairs(arm)) == len(settings[0] & settings[1])
    assert len(arms.records) == len(kept)
    assert seen <= len(kept) * arm_count


def test_amounts_carry_their_unit() -> None:
    assert amount("test/accuracy", 0.98604) == "98.60 %"
    assert amount("val/accuracy", -0.0021, signed=True, is_difference=True) == "-0.21 points"
    assert amount("test/accuracy", -0.00001, signed=True, is_difference=True) == "+0.00 points"
    assert amount("time/total_seconds", 3.456) == "3.46 s"
    assert amount("model/parameters", 19674) == "19,674"
    assert amount("test/loss", math.nan) == "-"
