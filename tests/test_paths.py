"""A path is a path, whatever characters it has; and data on this machine need no cache."""

import json
import shutil

import datasets
import pytest

from d2mora.cli import main
from d2mora.data import DataConfig, data_path, read_rows, survey
from d2mora.evaluate import test_rows as rows_to_grade
from d2mora.recipe import load_recipe
from d2mora.toy import toy_base, toy_rows

SMALL = ["data.tasks=[boolq]", "training.max_steps=1", "training.warmup_steps=0", "training.disable_tqdm=true"]
SMALL += ["training.per_device_train_batch_size=4", "training.save_strategy=steps", "training.save_steps=1"]
NAMES = "v? run[1] v* {a,b} ~ ~nobody 50% x::y hf: toy- - null [1] é a'b\"c &x !x $HOME \\".split() + ["a #b", "a: b"]


def data_folder(folder, rows=32):
    "A folder of one task."
    (folder / "boolq").mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"boolq/{split}.json").write_text(json.dumps(toy_rows("toy", "boolq", split, rows)))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_is_read_and_nothing_beside_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for beside in ("v1", "v2", "run1", "a", "b", "HOME"):
        data_folder(tmp_path / beside, 16)
    data_folder(tmp_path / name)
    for path in (name, str(tmp_path / name)):
        assert load_recipe("demo", [f"data.path={path}"]).data.path == str(tmp_path / name)
        config = DataConfig(path, ["boolq"])
        assert len(read_rows(config)) == 32 == len(rows_to_grade(config, None, None)["boolq"])


def test_a_run_may_have_such_names_throughout_and_needs_no_cache(tmp_path, monkeypatch):
    "Base, data, run and export: trained, graded and exported, while the cache of `datasets` cannot be written to."
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file/hf")
    data, base, run, out = (tmp_path / f"{what}? run[1] #b::%20" for what in ("data", "base", "run", "out"))
    data_folder(data)
    shutil.copytree(toy_base(), base)
    words = [f"base={base}", f"data.path={data}", "data.validation_rows=4", *SMALL]
    assert main(["train", "demo", *words, "--output", str(run)]) == 0
    assert main(["evaluate", str(run), "--limit", "4"]) == 0
    assert json.loads((run / "evaluation-choice.json").read_text())["tasks"]["boolq"]["n"] == 4
    assert main(["export", str(run), str(out), "--rows", "4", "--limit", "4", "--merge"]) == 0
    assert main(["evaluate", str(out), "--data", str(data), "--limit", "4"]) == 0


def test_a_tilde_is_the_home_folder_unless_there_is_such_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(data_folder(tmp_path / "home/data").parent))
    monkeypatch.chdir(tmp_path)
    for path in (data_path(DataConfig("~/data")), load_recipe("demo", ["data.path=~/data"]).data.path):
        assert path == str(tmp_path / "home/data")
    monkeypatch.setenv("D2MORA_DATA", "~/data")
    assert data_path(DataConfig()) == str(tmp_path / "home/data")
    data_folder(tmp_path / "~/data", 8)
    assert len(read_rows(DataConfig(load_recipe("demo", ["data.path=~/data"]).data.path, ["boolq"]))) == 8
    monkeypatch.delenv("D2MORA_DATA")
    with pytest.raises(ValueError, match="D2MORA_DATA"):
        data_path(DataConfig())


def test_other_files_in_a_tasks_folder_are_left_alone(tmp_path):
    config = DataConfig(str(data_folder(tmp_path / "data")), ["boolq"])
    (tmp_path / "data/boolq/test.json").rename(tmp_path / "data/boolq/test.json.old")
    (tmp_path / "data/boolq/test.jsonl").write_text("")
    assert survey(read_rows(config), config)["boolq"]["in_test"] == 0
