"""Tables of runs from CSV files."""

import gzip
from pathlib import Path

import pandas as pd
import pytest
from synthetic import TWO_MODELS, scored

from mnist_exp.comparison.pairs import compare, varied_keys
from mnist_exp.comparison.tables import read_tables
from mnist_exp.errors import UserError

OWN = "model,seed,test/accuracy\nplain,0,0.97\nplain,1,0.98\nnull,0,0.975\nnull,1,0.986\n"


def written(folder: Path, *texts: str) -> list[Path]:
    paths = [folder / f"{number}.csv" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return paths


def test_a_table_of_one_s_own_needs_a_key_a_seed_and_a_metric(tmp_path: Path) -> None:
    runs, notes = read_tables(written(tmp_path, OWN))
    found = compare(runs, "model")
    assert [(row.arm, row.estimate.n, row.verdict) for row in found.rows] == [("null", 2, "undecided")], "null is a name"
    assert "status" in notes[0]
    bare, _ = read_tables(written(tmp_path, OWN.replace("test/accuracy", "accuracy")), ["accuracy"])
    assert compare(bare, "model", metrics=["accuracy"]).rows[0].estimate == found.rows[0].estimate


def test_an_exported_table_gives_the_same_comparison(tmp_path: Path) -> None:
    runs = scored(TWO_MODELS)
    runs.loc[3, "status"] = "DIVERGED"
    runs.to_csv(tmp_path / "runs.csv", index=False)
    again, notes = read_tables([tmp_path / "runs.csv"])
    assert notes == []
    assert compare(again, "model").rows == compare(runs, "model").rows


def test_the_index_of_a_data_frame_is_no_key(tmp_path: Path) -> None:
    runs, _ = read_tables(written(tmp_path, ",model,seed,test/accuracy\n0,a,0,0.9\n1,b,0,0.8\n"))
    assert varied_keys(runs) == ["model"]


def with_mistakes(folder: Path) -> Path:
    (path,) = written(folder, OWN)
    runs = pd.read_csv(path, dtype=str, keep_default_na=False)
    wrong = [round((1 - float(accuracy)) * 1000) for accuracy in runs["test/accuracy"]]
    runs.assign(size="1000", mistakes=[" ".join(map(str, range(count))) for count in wrong]).to_csv(path, index=False)
    return path


def test_mistakes_give_an_interval_for_new_images(tmp_path: Path) -> None:
    runs, _ = read_tables([with_mistakes(tmp_path)])
    (row,) = compare(runs, "model", new_images=True).rows
    assert row.estimate.new_images is not None
    assert row.estimate.new_images[0] <= row.estimate.low < row.estimate.high <= row.estimate.new_images[1]
    assert compare(runs, "model").rows[0].estimate.low == row.estimate.low
    runs["digest/test"] = ["", "a", "a", ""]  # of a pooled table of one's own
    assert compare(runs, "model", new_images=True).rows == [row]
    runs.loc[0, "digest/test"] = "b"
    with pytest.raises(UserError):
        compare(runs, "model", new_images=True)


@pytest.mark.parametrize(
    ("column", "value"),
    [*(("size", text) for text in ("900", "x", "", "9" * 5000)), *(("mistakes", text) for text in ("7", "x y", "9" * 5000))],
)
def test_mistakes_that_contradict_the_accuracy_are_refused(tmp_path: Path, column: str, value: str) -> None:
    runs, _ = read_tables([with_mistakes(tmp_path)])
    runs.loc[1, column] = value
    with pytest.raises(UserError) as error:
        compare(runs, "model", new_images=True)
    assert error.value.key == "--images"


def test_the_columns_of_mistakes_are_no_metrics(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_tables([with_mistakes(tmp_path)], ["test/accuracy", "size"])
    assert error.value.key == "--metric"


def test_size_is_a_key_in_a_table_without_mistakes(tmp_path: Path) -> None:
    runs, _ = read_tables(written(tmp_path, OWN.replace("model", "size")))
    assert varied_keys(runs) == ["size"]
    with pytest.raises(UserError) as error:
        compare(runs, "size", new_images=True)
    assert "mistakes" in str(error.value)


def test_tables_with_other_keys_are_not_pooled(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_tables(written(tmp_path, OWN, OWN.replace("model", "optimizer")))
    assert "model, optimizer" in str(error.value)
    with pytest.raises(UserError) as error:
        read_tables(written(tmp_path, OWN), ["seed"])
    assert error.value.key == "--metric"


def test_a_compressed_table_is_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "runs.csv.gz").write_bytes(gzip.compress(OWN.encode()))
    with pytest.raises(UserError):
        read_tables([tmp_path / "runs.csv.gz"])


def test_an_empty_value_of_a_key_is_a_value(tmp_path: Path) -> None:
    runs, _ = read_tables(written(tmp_path, "opt,drop,seed,test/accuracy\na,,0,0.98\na,,1,0.981\na,x,0,0.985\na,x,1,0.9855\n"))
    assert compare(runs, "drop").baseline == "none"


def test_each_further_table_is_a_look(tmp_path: Path) -> None:
    further = OWN.replace(",0,", ",2,").replace(",1,", ",3,")
    runs, _ = read_tables(written(tmp_path, OWN, further))
    assert sorted(runs["look"]) == [1] * 4 + [2] * 4
    assert compare(runs, "model").rows[0].estimate.n == 4


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "CSV"),
        ("model,seed,test/accuracy\n", "at least one run"),
        ("model,test/accuracy\na,0.9\n", "lacks seed"),
        ("model,seed\na,0\n", "a metric"),
        ("model,seed,test/accuracy\na,0,0.9\nb,0,good\n", "line 3: test/accuracy good"),
        ("model,seed,look,test/accuracy\na,0,first,0.9\n", "look first"),
        ("a,b\n1,2,3,4\n5\n", "as many cells"),
        ("model,seed,test/accuracy\na,0,0.9\nb,0,0.9,4,5\n", "CSV"),
        ("\x00\xff", "CSV"),
        ("model,seed,test/accuracy\na,0,1,x\n", "as many cells"),
        ("model,seed,look,test/accuracy\na,0,1.7,0.9\n", "whole numbers"),
        ("model,seed,look,test/accuracy\na,0,inf,0.9\n", "whole numbers"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path: Path, text: str, part: str) -> None:
    (path,) = written(tmp_path, "")
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as error:
        read_tables([path])
    assert str(path) in str(error.value)
    assert part in str(error.value)
