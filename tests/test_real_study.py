"""The study on real rows in a short form: base, rows and comparison from start to result file, and on from where they stopped."""

import json
import sys
from pathlib import Path
from statistics import mean

import pytest

from d2mora.data import encode
from d2mora.data import DataConfig, plain, read_task
from d2mora.evaluate import load_target
from d2mora.tasks import TASKS

sys.path.insert(0, str(Path(__file__).parents[1]/"benchmarks"))
import real_base
import real_study

SHORT = ["--tokens", "24576", "--vocabulary", "400", "--rows", "220", "--test-rows", "6", "--hidden", "32", "--layers", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, shared):
    "Few real rows as files; a test row stands among the train rows, too."
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        (folder/task).mkdir()
        rows = {split: read_task(str(shared/"data"), task, split).remove_columns(["task", "row"]).to_list() for split in ("test", "train") if (task, split) != ("hellaswag", "train")}
        (folder/task/"test.json").write_text(json.dumps(rows["test"][:8]))
        if "train" in rows: (folder/task/"train.json").write_text(json.dumps(rows["train"][:120] + rows["test"][:1]))
    return folder


def make_base(data, folder):
    real_base.main(["--data", str(data), "--output", str(folder/"base"), "--figures", str(folder/"base.json"), *SHORT])
    return json.loads((folder/"base.json").read_text())


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
    forbidden = {real_base.asked(row, task) for task in TASKS for row in read_task(str(data), task, "test").to_list()}
    assert not forbidden & {real_base.asked(row, task) for task, own in drawn.items() for row in own.get("train", [])}
    assert sum(n["study"] for n in counts.values()) == 220


def test_a_stopped_base_goes_on_to_the_same_weights(data, base, tmp_path, monkeypatch, capsys):
    class Soon(real_base.Stopper):
        def on_step_end(self, args, state, control, **kwargs):
            self.asked |= state.global_step == 4
            super().on_step_end(args, state, control, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="stopped at step 4"):
        patched.setattr(real_base, "Stopper", Soon)
        make_base(data, tmp_path)
    assert not (tmp_path/"base").exists()
    again = make_base(data, tmp_path)
    assert "go on from checkpoint-4" in capsys.readouterr().err
    assert again["sha256"] == base[1]["sha256"] and again["steps"] == base[1]["steps"] == 12


def study(folder, *more, methods="lora,d2mora", results="result"):
    real_study.main([f"base={folder}/base", f"data.path={folder}/data", "training.max_steps=3", "training.per_device_train_batch_size=4", "data.validation_rows=60",
                     "training.warmup_steps=1", "--limit", "4", "--methods", methods, *([] if "--workers" in more else ["--workers", "1"]),
                     "--output", str(folder/"study"), "--results", str(folder/f"{results}.json"), *more])


def test_the_study_stops_goes_on_and_takes_more_seeds(base, monkeypatch):
    folder, work, runs = base[0], real_study.one_run, []

    def dies(recipe, *rest):
        if len(runs) == 2: raise KeyboardInterrupt
        runs.append(recipe)
        return work(recipe, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(real_study, "one_run", dies)
        study(folder, "--seeds", "0", "--learning-rates", "0.001,0.003")
    first = json.loads((folder/"result.json").read_text())
    assert [r["method"] for r in first["runs"]] == ["lora"] and not first["paired"]
    saved = lambda: {p.parts[-5:-2]: p.stat().st_mtime_ns for p in folder.glob("study/*/*/seed-0/adapter/adapter_model.safetensors")}
    before = saved()
    assert len(before) == 4

    study(folder, "--seeds", "0,1", "--learning-rates", "0.001,0.003")
    result = json.loads((folder/"result.json").read_text())
    assert [(r["method"], r["seed"]) for r in result["runs"]] == [("lora", 0), ("d2mora", 0), ("lora", 1), ("d2mora", 1)]
    assert saved() == before
    assert result["runs"][0] == first["runs"][0] and result["learning_rates"] == first["learning_rates"]
    best = {m: min(losses, key=losses.get) for m, losses in result["learning_rates"].items()}
    assert {p.parts[-3:-1] for p in folder.glob("study/*/*/seed-1")} == {(m, f"learning-rate-{rate}") for m, rate in best.items()}
    assert mean(result["runs"][1]["held_out"].values()) == result["learning_rates"]["d2mora"][best["d2mora"]]
    assert set(result["paired"]) == {"0", "1"} and result["paired"]["0"]["lora"]["content"]["all rows"]["n"] == 4 * len(TASKS)
    assert all(set(r["losses"]["answer"]) == {*TASKS, "average"} for r in result["runs"])

    study(folder, "--budget", "paper", "--seeds", "0", "--learning-rates", "0.001,0.003", "--workers", "2", results="paper")
    paper, path = json.loads((folder/"paper.json").read_text()), folder/"study/paper"
    assert [p.name for p in path.iterdir()] == ["lora"] and [p.name for p in (path/"lora").iterdir()] == [f"learning-rate-{best['lora']}"]  # the rate is that of the equal size
    assert paper["budget"] == "paper" and paper["runs"][1] == result["runs"][1] and paper["runs"][0]["parameters"] > result["runs"][0]["parameters"]
    assert paper["learning_rates"] == result["learning_rates"] and "--budget paper" in paper["command"] and saved() == before


def test_seeds_are_added_to_a_result_file_whose_runs_are_gone(base, tmp_path, monkeypatch):
    folder, work, trained = base[0], real_study.one_run, []
    monkeypatch.setattr(real_study, "one_run", lambda recipe, *rest: trained.append(recipe.training["seed"]) or work(recipe, *rest))
    alone = ["--results", str(tmp_path/"result.json"), "--learning-rates", "0.001", "--seeds"]
    study(folder, *alone, "0", "--output", str(tmp_path/"here"))
    first = json.loads((tmp_path/"result.json").read_text())
    assert {*trained} == {0} and first["kept_seeds"] == {}

    trained.clear()
    own, first["base_sha256"] = first["base_sha256"], "of another machine"
    (tmp_path/"result.json").write_text(json.dumps(first))
    study(folder, *alone, "0,1", "--add", "--output", str(tmp_path/"there"))
    result = json.loads((tmp_path/"result.json").read_text())
    assert {*trained} == {1} and not list(tmp_path.glob("there/*/*/seed-0")) and result["kept_seeds"] == {"0": "of another machine"}
    assert result["runs"][:2] == first["runs"] and [(r["method"], r["seed"]) for r in result["runs"][2:]] == [("lora", 1), ("d2mora", 1)]
    assert set(result["paired"]) == {"0", "1"} and result["paired"]["0"] == first["paired"]["0"]
    assert all(result[key] == first[key] for key in ("learning_rates", "frozen", "rates_left_cpu_seconds"))
    study(folder, *alone, "0,1", "--add", "--output", str(tmp_path/"nowhere"))
    assert json.loads((tmp_path/"result.json").read_text()) == result and {*trained} == {1} and not (tmp_path/"nowhere").exists()
    study(folder, *alone, "2", "--add", "--output", str(tmp_path/"there"))
    result = json.loads((tmp_path/"result.json").read_text())
    assert result["kept_seeds"] == {"0": "of another machine", "1": own} and len(result["runs"]) == 6
    assert result["planned_seeds"] == [0, 1, 2] and result["command"].endswith("--seeds 2 --add") and set(result["paired"]) == {"0", "1", "2"}

    for wrong, says in ((["--limit", "3"], "another study, with other limit"), (["--learning-rates", "0.001,0.003"], "with other learning rates"),
                        (["--results", str(tmp_path/"none.json")], "to add seeds to")):
        with pytest.raises(ValueError, match=says): study(folder, *alone, "3", "--add", *wrong)
    assert json.loads((tmp_path/"result.json").read_text()) == result


def test_losses_of_a_batch_are_those_of_its_rows_alone(base):
    folder, rows = base[0], read_task(str(base[0]/"data"), "piqa", "test").to_list()
    model, tokenizer, _ = load_target(None, str(folder/"base"))
    config = DataConfig(str(folder/"data"), cutoff=512)
    found = real_study.task_losses(model.eval(), tokenizer, config, rows)
    for row, got in zip(rows, found):
        coded = encode({k: [row[k]] for k in ("instruction", "input", "output")}, tokenizer, config)
        ids, start = model.dummy_inputs["input_ids"].new_tensor(coded["input_ids"]), coded["graded_from"][0]
        answer = ids.clone()
        answer[:, :start] = -100
        assert got["row"] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)
        assert got["answer"] == pytest.approx(model(input_ids=ids, labels=answer).loss.item() * (ids.shape[1] - start), rel=1e-4)
