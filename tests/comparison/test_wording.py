"""The headline, the notes below it, and the format of verdicts."""

import random

import pytest
from synthetic import TWO_MODELS, record

from mnist_exp.comparison import wording
from mnist_exp.comparison.arms import Arms, Row, Source, arrange, compare_arms


def compared(better: float, noise: float, margin: float | None = None) -> tuple[Arms, list[Row]]:
    chance = random.Random(0)
    records = [
        record(number, 0.98 + chance.gauss(0, noise) + (better if job["model"] == "se_cnn" else 0))
        for number, job in TWO_MODELS.items()
    ]
    arms = arrange([Source("s", records, TWO_MODELS, frozenset(TWO_MODELS))], "model", "plain_cnn")
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
