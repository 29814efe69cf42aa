"""The study on real rows in a short form: base, rows and comparison from start to result file, and on from where they stopped."""

import json
import sys
from pathlib import Path
from statistics import mean

import pytest

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


def study(folder, words, results="result.json", output="study"):
    "Run the study on few rows; its result file."
    training = "training.max_steps=3 training.per_device_train_batch_size=4 training.warmup_steps=1"
    usual = f"base={folder}/base data.path={folder}/data data.validation_rows=60 {training}"
    places = f"--output {folder / output} --results {folder / results}"
    real_study.main(f"{usual} {places} --limit 4 --methods lora,d2mora --workers 1 {words}".split())
    return json.loads((folder / results).read_text())


def test_the_study_stops_goes_on_and_has_two_budgets(base, monkeypatch):
    folder, work, runs, words = base[0], real_study.one_run, [], "--learning-rates 0.001,0.003 --seeds"

    def dies(recipe, *rest):
        if len(runs) == 2:
            raise KeyboardInterrupt
        runs.append(recipe)
        return work(recipe, *rest)

    def saved():
        found = folder.glob("study/*/*/seed-0/adapter/adapter_model.safetensors")
        return {path: path.stat().st_mtime_ns for path in found if "paper" not in path.parts}

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(real_study, "one_run", dies)
        study(folder, f"{words} 0")
    first, before = json.loads((folder / "result.json").read_text()), saved()
    assert [r["method"] for r in first["runs"]] == ["lora"] and not first["paired"] and len(before) == 4

    result = study(folder, f"{words} 0,1")
    jobs = [(r["method"], r["seed"]) for r in result["runs"]]
    assert jobs == [("lora", 0), ("d2mora", 0), ("lora", 1), ("d2mora", 1)] and saved() == before
    assert result["runs"][0] == first["runs"][0] and result["learning_rates"] == first["learning_rates"]
    best = {m: min(losses, key=losses.get) for m, losses in result["learning_rates"].items()}
    trained = {p.parts[-3:-1] for p in folder.glob("study/*/*/seed-1")}
    assert trained == {(m, f"learning-rate-{rate}") for m, rate in best.items()}
    assert mean(result["runs"][1]["held_out"].values()) == result["learning_rates"]["d2mora"][best["d2mora"]]
    assert set(result["paired"]) == {"0", "1"}
    assert result["paired"]["0"]["lora"]["content"]["all rows"]["n"] == 4 * len(TASKS)

    paper = study(folder, f"{words} 0 --budget paper --workers 2", "paper.json")
    rates = [p.name for p in (folder / "study/paper/lora").iterdir()]
    assert rates == [f"learning-rate-{best['lora']}"] and saved() == before  # the rate is that of the equal size
    assert paper["runs"][1] == result["runs"][1] and paper["learning_rates"] == result["learning_rates"]
    assert paper["runs"][0]["parameters"] > result["runs"][0]["parameters"] and "--budget paper" in paper["command"]


def test_seeds_are_added_to_a_result_file_whose_runs_are_gone(base, monkeypatch):
    folder, work, trained, words = base[0], real_study.one_run, [], "--learning-rates 0.001 --seeds"

    def noted(recipe, *rest):
        trained.append(recipe.training["seed"])
        return work(recipe, *rest)

    monkeypatch.setattr(real_study, "one_run", noted)
    first = study(folder, f"{words} 0", "added.json", "here")
    own, first["base_sha256"] = first["base_sha256"], "of another machine"
    (folder / "added.json").write_text(json.dumps(first))
    trained.clear()
    result = study(folder, f"{words} 0,1 --add", "added.json", "there")
    assert {*trained} == {1} and result["kept_seeds"] == {"0": "of another machine"}
    assert result["runs"][:2] == first["runs"] and [r["seed"] for r in result["runs"][2:]] == [1, 1]
    assert all(result[key] == first[key] for key in ("learning_rates", "frozen", "rates_left_cpu_seconds"))
    assert study(folder, f"{words} 0,1 --add", "added.json", "nowhere") == result and not (folder / "nowhere").exists()
    more = study(folder, f"{words} 2 --add", "added.json", "there")
    assert more["kept_seeds"] == {"0": "of another machine", "1": own} and more["planned_seeds"] == [0, 1, 2]
    wrong = {"3 --limit 3": "other limit", "3 --learning-rates 0.001,0.003": "other learning rates"}
    for given, says in (wrong | {"3 --scaling ratio": "other methods"}).items():
        with pytest.raises(ValueError, match=f"another study.*{says}"):
            study(folder, f"{words} {given} --add", "added.json", "there")
    with pytest.raises(ValueError, match="to add seeds to"):
        study(folder, f"{words} 3 --add", "none.json", "there")
    assert json.loads((folder / "added.json").read_text()) == more


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
