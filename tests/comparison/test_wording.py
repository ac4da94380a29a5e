"""The headline, the notes below it, and the format of verdicts."""

import random
from dataclasses import replace

import pytest
from synthetic import TWO_MODELS, record

from mnist_exp.comparison import wording
from mnist_exp.comparison.arms import Arms, Row, Source, arrange, compare_arms
from mnist_exp.tracking.definition import Plan


def compared(better: float, noise: float, plan: Plan | None = None, margin: float | None = None) -> tuple[Arms, list[Row]]:
    chance = random.Random(0)
    records = [
        record(number, 0.98 + chance.gauss(0, noise) + (better if job["model"] == "se_cnn" else 0))
        for number, job in TWO_MODELS.items()
    ]
    arms = arrange([Source("s", records, TWO_MODELS, frozenset(TWO_MODELS), plan)], "model", "plain_cnn")
    return arms, compare_arms(arms, ["test/accuracy", "model/parameters"], margin)


@pytest.mark.parametrize(
    ("better", "noise", "verdict"),
    [
        (0.002, 0.0001, "higher by more than the margin"),
        (-0.002, 0.0001, "lower by more than the margin"),
        (0.0002, 0.00005, "higher, by less than the margin"),
        (0.0006, 0.0002, "higher"),
        (0.0, 0.0001, "equivalent"),
        (0.0, 0.002, "undecided"),
    ],
)
def test_every_verdict_follows_from_interval_and_margin(better: float, noise: float, verdict: str) -> None:
    arms, rows = compared(better, noise)
    assert wording.describe_verdict(rows[0]) == verdict
    headline = wording.headline(arms, rows)
    assert headline.startswith("In test/accuracy, against model=plain_cnn (9")
    assert headline.endswith("95 % intervals, n = 5 seeds, margin 0.05 points.")
    assert f"se_cnn {'undecided' if verdict == 'undecided' else f'is {verdict}'}: " in headline
    assert wording.table(rows)[1]["verdict"] == verdict


def test_a_margin_is_in_the_displayed_unit_and_belongs_to_the_first_metric() -> None:
    _, rows = compared(0.002, 0.0001, margin=0.5)
    assert rows[0].margin == pytest.approx(0.005)
    assert wording.describe_verdict(rows[0]) == "higher, by less than the margin"
    assert rows[1].margin is None
    assert wording.describe_verdict(rows[1]) == "equivalent", "the same number of parameters"


def test_advice_comes_from_margin_and_spread_alone() -> None:
    advice = [wording.power_notes(*compared(better, 0.0005)) for better in (0.0, 0.001, 0.01)]
    assert advice[0] == advice[1] == advice[2]
    assert "seeds detect the margin" in advice[0][0]
    assert "show equivalence if there is no difference" in advice[0][0]
    arms, rows = compared(0.001, 0.0005)
    (later,) = wording.power_notes(replace(arms, seeds_known=False), rows)
    assert "if all seeds had been defined before the first job, 5 seeds detect" in later
    assert "This wider interval needs more seeds." in later


def test_a_plan_is_confirmed_or_its_deviations_are_listed() -> None:
    plan = Plan("model", "plain_cnn", "test/accuracy", 0.05, 5)
    assert wording.plan_notes(*compared(0, 0.001, plan)) == ["As planned: the plan was stored before the first job."]
    (note,) = wording.plan_notes(*compared(0, 0.001, Plan("model", "se_cnn", "val/accuracy", 0.1, 20)))
    for part in ("baseline se_cnn planned", "metric val/accuracy planned, test/accuracy used", "margin 0.1 planned, 0.05 used"):
        assert part in note
    assert "seeds 20 planned, 5 used" in note
    assert wording.plan_notes(*compared(0, 0.001))[0].startswith("Explored: the sweep has no plan")
