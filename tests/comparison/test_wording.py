"""The headline, the notes below it, and the format of numbers."""

import math
import re

import pytest
from synthetic import TWO_MODELS, scored

from mnist_exp.comparison.arms import arrange, choose_metrics, compare_arms
from mnist_exp.comparison.wording import format_difference, format_metric, headline, power_notes


def test_the_headline_states_by_how_much_the_arms_differ() -> None:
    arms = arrange(scored(TWO_MODELS, 0.02), TWO_MODELS, "model", "plain_cnn")
    found = compare_arms(arms, choose_metrics(arms, None))
    text = headline(arms, found)
    assert text.startswith(
        "In test/accuracy, against model=plain_cnn (92.00 %): se_cnn is higher by 1.96 points (+1.84 to +2.09)"
    )
    assert text.endswith("95 % intervals, n = 5 pairs.")
    assert format_difference(found[2]) == "+0 (always)"
    assert not found[2].is_detected


def test_no_difference_is_reported_as_not_detectable_with_the_minimum_detectable_effect() -> None:
    arms = arrange(scored(TWO_MODELS, 0.0002), TWO_MODELS, "model", "plain_cnn")
    found = compare_arms(arms, ["test/accuracy"])
    assert "se_cnn shows no detectable difference: " in headline(arms, found)
    effect, correction = power_notes(arms, found)
    expected = r"se_cnn: minimum detectable effect 0\.\d\d points at n = 5 pairs \(power 80 %, level 5 %\)\."
    assert re.fullmatch(expected, effect)
    assert correction == "Adding seeds after a look at the result requires a correction: the intervals are valid for one look."


@pytest.mark.parametrize("better", [0.0, 0.0001, 0.0002, 0.0005])
def test_no_number_of_further_seeds_is_derived_from_the_observed_difference(better: float) -> None:
    arms = arrange(scored(TWO_MODELS, better), TWO_MODELS, "model", "plain_cnn")
    text = " ".join(power_notes(arms, compare_arms(arms, ["test/accuracy"])))
    assert "more seeds" not in text
    assert "seen here" not in text


def test_formatted_metrics_carry_their_unit() -> None:
    assert format_metric("test/accuracy", 0.98604) == "98.60 %"
    assert format_metric("val/accuracy", -0.0021, signed=True, is_difference=True) == "-0.21 points"
    assert format_metric("test/accuracy", -0.00001, signed=True, is_difference=True) == "+0.00 points"
    assert format_metric("time/total_seconds", 3.456) == "3.46 s"
    assert format_metric("model/parameters", 19674) == "19,674"
    assert format_metric("test/loss", math.nan) == "-"
