"""The study on real rows in a short form: rows, base, and the comparison with its losses on test rows."""

import json
import sys
from pathlib import Path

import pytest

from d2mora import compare
from d2mora.data import DataConfig, encode, plain, read_task
from d2mora.evaluate import load_target
from d2mora.tasks import TASKS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import real_base
import real_study

SHORT = "--tokens 24576 --vocabulary 400 --rows 220 --test-rows 6 --hidden 32 --layers 1".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory, shared):
    "Few real rows as files; a test row stands among the train rows, too."
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        (folder / task).mkdir()
        tests = []
        for split in ("test", "train") if task != "hellaswag" else ("test",):
            rows = read_task(str(shared / "data"), task, split).remove_columns(["task", "row"]).to_list()
            tests = rows if split == "test" else tests
            kept = tests[:8] if split == "test" else rows[:120] + tests[:1]
            (folder / task / f"{split}.json").write_text(json.dumps(kept))
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
    words += " training.max_steps=2 training.per_device_train_batch_size=4 training.warmup_steps=1 --seeds 0"
    words += f" --output {folder}/study --results {folder}/result.json --limit 4 --methods lora,d2mora --workers 1"
    real_study.main([*words.split(), "training.learning_rate=1e-5"])
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
        ids, start = model.dummy_inputs["input_ids"].new_tensor(coded["input_ids"]), coded["graded_from"][0]
        answer = ids.clone()
        answer[:, :start] = -100
        assert got["row"] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)
        total = model(input_ids=ids, labels=answer).loss.item() * (ids.shape[1] - start)
        assert got["answer"] == pytest.approx(total, rel=1e-4)
