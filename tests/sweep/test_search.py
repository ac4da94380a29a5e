from pathlib import Path

import pytest

from mnist_exp.sweep.search import make_pruning_callback, open_study


def test_another_process_can_continue_a_trial(tmp_path: Path) -> None:
    """`make_pruning_callback` depends on a private attribute of Optuna's frozen trials."""
    pytest.importorskip("optuna")
    study = open_study(tmp_path, seed=0, objective="val/accuracy")
    trials = [study.ask() for _ in range(8)]
    verdicts = []
    for trial in trials:
        should_prune = make_pruning_callback(tmp_path, trial.number, "val/accuracy")
        assert not should_prune(50, {"train/loss": 1.0})
        verdicts.append(should_prune(100, {"val/accuracy": 1 - trial.number / 10}))
        study.tell(trial.number, 1 - trial.number / 10)
    assert not verdicts[0]
    assert verdicts[-1], "below the median of the others at the same step"
    assert study.trials[-1].intermediate_values == {100: pytest.approx(0.3)}
