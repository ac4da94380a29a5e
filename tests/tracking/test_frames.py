import pytest
from benchmarks.compare import make_sweep

from mnist_exp.api import frame
from mnist_exp.errors import UserError


def test_a_frame_has_a_row_for_each_run_and_numbers_as_recorded(store: str) -> None:
    sweep = make_sweep(store, ("se_cnn", "plain_cnn"), seeds=2)
    table = frame()
    assert len(table) == 4
    assert list(table["model"]) == ["se_cnn"] * 2 + ["plain_cnn"] * 2
    assert list(table["seed"]) == [0, 1, 0, 1]
    assert table["seed"].dtype.kind == "i"
    assert set(table["status"]) == {"FINISHED"}
    assert table["test/accuracy"].between(0.9, 1).all()
    assert frame(sweep[:8]).equals(table)


def test_an_unknown_sweep_is_refused(store: str) -> None:
    with pytest.raises(UserError):
        frame("abcdef")
