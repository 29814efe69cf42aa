"""Grading that is killed, out of memory, shared by processes or given wrong input: the same table, or one line and nothing changed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from program import Program
import torch

from d2mora import scoring as module
from d2mora.cli import main
from d2mora.evaluate import evaluate
from d2mora.evaluate import comparison, read_graded, write_disagreements
from d2mora.toy import toy_base, toy_rows
from d2mora.recipe import load_recipe
from d2mora.train import train

TASKS = "boolq,ARC-Easy,winogrande"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of eight steps with dropout on."
    recipe = load_recipe("demo", {"training.max_steps": 8, "training.warmup_steps": 1, "data.tasks": ["boolq"], "training.disable_tqdm": True, "training.logging_steps": 1, "training.save_strategy": "no", "adapter.lora_dropout": 0.3})
    return train(recipe, tmp_path_factory.mktemp("runs") / "run")


def words(run, output, *more):
    return ["evaluate", str(run), "--tasks", TASKS, "--output", str(output), "--batch-size", "8", *more]


ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def table(folder, protocol):
    return json.loads((Path(folder) / f"evaluation-{protocol}.json").read_text())["tasks"]


def rows_by_hash(folder, protocol):
    return {g["hash"]: g for g in read_graded(folder, protocol)}


@pytest.mark.parametrize("protocol", ["choice", "official"])
def test_killed_at_any_moment_it_goes_on_to_the_same_table(run, tmp_path, protocol):
    limit = {"choice": 120, "official": 16}[protocol]
    whole = evaluate(run, protocol=protocol, tasks=TASKS.split(","), limit=limit, output=tmp_path / "whole", batch_size=8, progress=False)
    part, kills, dice = tmp_path / "killed" / f"evaluation-{protocol}.part-0.jsonl", 0, random.Random(0)
    wanted = sorted(dice.sample(range(5, int(2.4 * limit)), 2))  # kill when so many rows are there
    for rows in wanted:
        process = Program(*words(run, tmp_path / "killed", "--protocol", protocol, "--limit", limit))
        while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < rows):
            time.sleep(0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        if part.exists():
            with part.open("a") as file:
                file.write('{"hash": "torn')
    assert kills and not (tmp_path / "killed" / f"evaluation-{protocol}.json").exists()
    kept = part.read_bytes().count(b"\n")
    seen, grade = [], module.grade_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "grade_batch", lambda model, tokenizer, task, rows, *a: seen.extend(rows) or grade(model, tokenizer, task, rows, *a))
        again = evaluate(run, protocol=protocol, tasks=TASKS.split(","), limit=limit, output=tmp_path / "killed", batch_size=8, progress=False)
    assert again["tasks"] == whole["tasks"] and rows_by_hash(tmp_path / "killed", protocol) == rows_by_hash(tmp_path / "whole", protocol)
    assert kept >= wanted[0] and len(seen) <= 3 * limit - kept + 8  # what was graded is not graded again, but for one torn batch
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [f"evaluation-{protocol}.json", f"evaluation-{protocol}.jsonl", "plots", "report.md"]


def test_two_processes_share_the_rows(run, tmp_path):
    evaluate(run, tasks=TASKS.split(","), limit=60, output=tmp_path / "one", batch_size=8, progress=False)
    port = str(20000 + os.getpid() % 20000)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port, "-m", "d2mora.cli"]
    done = subprocess.run([*launch, *words(run, tmp_path / "two", "--limit", "60")], env=ENV, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert table(tmp_path / "two", "choice") == table(tmp_path / "one", "choice")
    assert rows_by_hash(tmp_path / "two", "choice") == rows_by_hash(tmp_path / "one", "choice")
    assert json.loads((tmp_path / "two" / "evaluation-choice.json").read_text())["processes"] == 2
    assert done.stdout.count("average") == 1 and not list((tmp_path / "two").glob("*.part-*"))


def test_out_of_memory_halves_the_batch(run, monkeypatch, capsys):
    args = dict(tasks=["boolq", "piqa"], limit=30, data="toy", batch_size=16, progress=False)
    before, grade, sizes = evaluate(run / "adapter", output=run.parent / "roomy", **args), module.grade_batch, []

    def tight(model, tokenizer, task, rows, *more):
        if len(rows) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        sizes.append(len(rows))
        return grade(model, tokenizer, task, rows, *more)

    monkeypatch.setattr(module, "grade_batch", tight)
    after = evaluate(run / "adapter", output=run.parent / "tight", **args)
    said = capsys.readouterr().err
    assert "out of memory: on with batches of 8" in said and "out of memory: on with batches of 4" in said and max(sizes) == 4 and sum(sizes) == 60
    for task in before["tasks"]:
        assert after["tasks"][task]["accuracy"] == before["tasks"][task]["accuracy"]
    monkeypatch.setattr(module, "grade_batch", lambda *a: (_ for _ in ()).throw(RuntimeError("a fault of another kind")))
    with pytest.raises(RuntimeError, match="another kind"):
        evaluate(run / "adapter", output=run.parent / "fault", **args)


def test_results_of_another_run_are_refused_and_kept(run, tmp_path, capsys):
    call = ["evaluate", str(run), "--tasks", "boolq", "--limit", "6", "--output", str(tmp_path)]
    assert main(call) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.glob("evaluation*")}
    capsys.readouterr()
    other = train(load_recipe("demo", {"training.max_steps": 2, "data.tasks": ["boolq"], "training.disable_tqdm": True, "training.logging_steps": 1, "training.save_strategy": "no"}), tmp_path / "other")
    for changed in (["evaluate", str(other), *call[2:]], [*call, "--prompt", "official"]):
        assert main(changed) == 2
        out, err = capsys.readouterr()
        assert not out and err.strip().splitlines()[-1].startswith("d2mora: ") and "another run" in err and "--again" in err
        assert {p.name: p.read_bytes() for p in tmp_path.glob("evaluation*")} == before
    assert main([*call, "--prompt", "official", "--again"]) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "earlier-1").iterdir()} == before
    assert json.loads((tmp_path / "evaluation-choice.json").read_text())["prompt"] == "official"


def test_more_rows_later_go_on_from_the_first(run, tmp_path, monkeypatch):
    evaluate(run, tasks=["boolq"], limit=10, output=tmp_path, progress=False, batch_size=5)
    seen, grade = [], module.grade_batch
    monkeypatch.setattr(module, "grade_batch", lambda m, t, task, rows, *a: seen.extend(rows) or grade(m, t, task, rows, *a))
    evaluate(run, tasks=["boolq"], limit=10, output=tmp_path, progress=False, batch_size=5)
    assert not seen
    result = evaluate(run, tasks=["boolq"], limit=20, output=tmp_path, progress=False, batch_size=5)
    assert result["tasks"]["boolq"]["n"] == 20 and len(read_graded(tmp_path)) == 20


def base_without(tmp, *tokens):
    "A copy of the toy base whose tokenizer lacks some special tokens."
    folder = Path(shutil.copytree(toy_base(), tmp / ("no-" + "-".join(tokens))))
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        if (folder / name).is_file():
            (folder / name).chmod(0o644)
            keys = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({k: v for k, v in keys.items() if not k.startswith(tokens)}))
    return str(folder)


def test_a_base_without_pad_token_is_graded_all_the_same(tmp_path):
    base = base_without(tmp_path, "pad_token")
    from d2mora.recipe import load_base

    assert load_base(base)[1].pad_token_id is None
    for protocol in ("choice", "generate", "official"):
        args = dict(protocol=protocol, data="toy", tasks=["piqa"], limit=12, progress=False)
        assert evaluate(base=base, **args)["tasks"] == evaluate(base="toy", **args)["tasks"]


def bad_inputs(run, tmp):
    "Command lines that a user may get wrong, and what the message must name."
    data = tmp / "data" / "boolq"
    data.mkdir(parents=True)
    good = toy_rows("toy", "boolq", "test", 3)
    files = {"empty": "[]", "nothing": "", "word": json.dumps([good[0], good[1] | {"answer": "yes"}])}
    for name, text in files.items():
        (tmp / name / "boolq").mkdir(parents=True)
        (tmp / name / "boolq" / "test.json").write_text(text)
    (tmp / "bare").mkdir()
    return {("evaluate", str(tmp / "bare")): "no adapter", ("evaluate", str(tmp / "missing")): "no such folder", ("evaluate",): "--base",
            ("evaluate", str(run), "--data", str(tmp / "data"), "--tasks", "piqa"): "no test.json", ("evaluate", str(run), "--data", str(tmp / "empty")): "array",
            ("evaluate", str(run), "--data", str(tmp / "nothing")): "JSON", ("evaluate", str(run), "--data", str(tmp / "word")): "row 1: field 'answer' is 'yes'",
            ("evaluate", str(run), "--limit", "0"): "limit=0", ("evaluate", str(run), "--limit", "-3"): "limit=-3", ("evaluate", str(run), "--protocol", "chioce"): "did you mean 'choice'",
            ("evaluate", str(run), "--batch-size", "0"): "batch_size=0", ("evaluate", str(run), "--tasks", "bolq"): "boolq", ("evaluate", str(run), "--prompt", "oficial"): "official",
            ("evaluate", str(run), "--protocol", "official", "--prompt", "plain"): "own prompt", ("evaluate", str(run), str(run), "--output", str(tmp / "x")): "one DIR",
            ("evaluate", "--base", str(tmp / "no-such-base")): "no such folder",
            ("evaluate", "--base", base_without(tmp, "eos_token", "pad_token"), "--data", "toy"): "no EOS token"}


def test_bad_input_is_one_line_and_changes_nothing(run, tmp_path, capsys):
    (run / "evaluation-choice.json").unlink(missing_ok=True)
    cases = bad_inputs(run, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in [*run.rglob("*"), *tmp_path.rglob("*")]}
    for call, named in cases.items():
        assert main(list(call)) == 2, call
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("d2mora: ")]
        assert not out and len(lines) == 1 and named in lines[0] and "Traceback" not in err, (call, err)
    assert {p: p.stat().st_mtime_ns for p in [*run.rglob("*"), *tmp_path.rglob("*")]} == before


def test_a_damaged_results_file_is_one_line(run, tmp_path, capsys):
    (tmp_path / "evaluation-choice.jsonl").write_text('{"hash": \n{"hash": "b"}\n')
    assert main(["evaluate", str(run), "--limit", "2", "--output", str(tmp_path)]) == 2
    assert "no JSON" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1


def test_several_folders_are_compared(run, tmp_path, capsys):
    seeds = [train(load_recipe("demo", {"training.max_steps": 2, "training.seed": s, "data.tasks": ["boolq"], "training.disable_tqdm": True, "training.logging_steps": 1, "training.save_strategy": "no"}), tmp_path / f"seed-{s}") for s in (0, 1)]
    assert main(["evaluate", *map(str, seeds), str(run), "--tasks", "boolq,piqa", "--limit", "30", "--protocol", "content"]) == 0
    out = capsys.readouterr().out
    assert "seed-0 (2 runs)" in out and "run (1 run)" in out and "±" in out and "only run" in out and "answer differently" in out
    assert "cannot be told apart" in comparison(seeds, "content")
    (path, n), = write_disagreements([seeds[0], run], "content")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == n and all(r["a"] != r["b"] and "Answer format" in r["instruction"] for r in rows)


def test_a_whole_model_a_plain_lora_and_a_base_by_name(tmp_path):
    import peft

    from d2mora.recipe import load_base

    args = dict(data="toy", tasks=["boolq"], limit=12, progress=False)
    model, tokenizer = load_base("toy")
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    base = evaluate(base="toy", **args)["tasks"]
    assert evaluate(tmp_path / "model", **args)["tasks"] == base and (tmp_path / "model" / "evaluation-choice.json").is_file()
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.peft_config["default"].base_model_name_or_path = "toy"
    lora.save_pretrained(tmp_path / "lora")
    assert evaluate(tmp_path / "lora", **args)["tasks"]["boolq"]["accuracy"] == base["boolq"]["accuracy"]
