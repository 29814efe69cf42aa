"""Grading that is killed, runs out of memory, is shared by processes or meets other results: the same table, or one line and nothing changed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from program import Program

from d2mora import scoring
from d2mora.cli import main
from d2mora.evaluate import evaluate, read_graded
from d2mora.recipe import load_recipe
from d2mora.train import train

TASKS = ["boolq", "ARC-Easy", "winogrande"]
SHORT = {
    "training.max_steps": 8,
    "training.warmup_steps": 1,
    "training.logging_steps": 1,
    "training.disable_tqdm": True,
    "training.save_strategy": "no",
    "data.tasks": ["boolq"],
    "adapter.lora_dropout": 0.3,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of eight steps with dropout on."
    return train(load_recipe("demo", SHORT), tmp_path_factory.mktemp("runs") / "run")


def words(run, output, *more):
    return ["evaluate", str(run), "--tasks", ",".join(TASKS), "--output", str(output), "--batch-size", "8", *more]


def table(folder, protocol="choice"):
    return json.loads((Path(folder) / f"evaluation-{protocol}.json").read_text())["tasks"]


def rows_by_hash(folder, protocol="choice"):
    return {g["hash"]: g for g in read_graded(folder, protocol)}


@pytest.fixture
def graded(monkeypatch):
    "The rows that are graded, as they come."
    seen, grade = [], scoring.grade_batch

    def watched(model, tokenizer, task, rows, *more):
        seen.extend(rows)
        return grade(model, tokenizer, task, rows, *more)

    monkeypatch.setattr(scoring, "grade_batch", watched)
    return seen


@pytest.mark.parametrize("protocol, limit", [("choice", 120), ("official", 16)])
def test_killed_at_any_moment_it_goes_on_to_the_same_table(run, tmp_path, graded, protocol, limit):
    args = dict(protocol=protocol, tasks=TASKS, limit=limit, batch_size=8, progress=False)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    expected = evaluate(run, output=whole, **args)["tasks"]
    part, kills = killed / f"evaluation-{protocol}.part-0.jsonl", 0
    wanted = sorted(random.Random(0).sample(range(5, int(2.4 * limit)), 2))  # kill when so many rows are there
    for rows in wanted:
        process = Program(*words(run, killed, "--protocol", protocol, "--limit", limit))
        while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < rows):
            time.sleep(0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        if part.exists():
            with part.open("a") as file:
                file.write('{"hash": "torn')
    assert kills and not (killed / f"evaluation-{protocol}.json").exists()
    done = part.read_bytes().count(b"\n")
    graded.clear()
    assert evaluate(run, output=killed, **args)["tasks"] == expected
    assert rows_by_hash(killed, protocol) == rows_by_hash(whole, protocol)
    assert done >= wanted[0] and len(graded) <= 3 * limit - done + 8  # no row twice, but for one unfinished batch
    names = [f"evaluation-{protocol}.json", f"evaluation-{protocol}.jsonl", "plots", "report.md"]
    assert sorted(path.name for path in killed.iterdir()) == names


def test_two_processes_share_the_rows(run, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    evaluate(run, tasks=TASKS, limit=60, output=one, batch_size=8, progress=False)
    port = str(20000 + os.getpid() % 20000)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port, "-m", "d2mora.cli"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launch, *words(run, two, "--limit", "60")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert table(two) == table(one) and rows_by_hash(two) == rows_by_hash(one)
    assert json.loads((two / "evaluation-choice.json").read_text())["processes"] == 2
    assert done.stdout.count("average") == 1 and not list(two.glob("*.part-*"))


def test_out_of_memory_halves_the_batch(run, tmp_path, monkeypatch, capsys):
    args = dict(tasks=["boolq", "piqa"], limit=30, data="toy", batch_size=16, progress=False)
    before, grade, sizes = evaluate(run / "adapter", output=tmp_path / "roomy", **args), scoring.grade_batch, []

    def tight(model, tokenizer, task, rows, *more):
        if len(rows) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        sizes.append(len(rows))
        return grade(model, tokenizer, task, rows, *more)

    monkeypatch.setattr(scoring, "grade_batch", tight)
    after = evaluate(run / "adapter", output=tmp_path / "tight", **args)
    err = capsys.readouterr().err
    assert all(f"out of memory: going on with batches of {n}" in err for n in (8, 4))
    assert max(sizes) == 4 and sum(sizes) == 60
    for task in before["tasks"]:
        assert after["tasks"][task]["accuracy"] == before["tasks"][task]["accuracy"]

    def broken(*args):
        raise RuntimeError("a fault of another kind")

    monkeypatch.setattr(scoring, "grade_batch", broken)
    with pytest.raises(RuntimeError, match="another kind"):
        evaluate(run / "adapter", output=tmp_path / "fault", **args)


def test_more_rows_later_go_on_from_the_first_and_fewer_lose_none(run, tmp_path, graded):
    args = dict(tasks=["boolq"], output=tmp_path, progress=False, batch_size=5)
    for limit, fresh, kept in ((10, 10, 10), (10, 0, 10), (20, 20, 20), (5, 0, 20)):
        graded.clear()
        assert evaluate(run, limit=limit, **args)["tasks"]["boolq"]["n"] == limit
        assert len(graded) <= fresh and len(read_graded(tmp_path)) == kept


def test_results_of_another_run_are_refused_and_kept(run, tmp_path, capsys):
    call = ["evaluate", str(run), "--tasks", "boolq", "--limit", "6", "--output", str(tmp_path)]
    assert main(call) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("evaluation*")}
    other = train(load_recipe("demo", SHORT | {"training.max_steps": 2}), tmp_path / "other")
    capsys.readouterr()
    for changed in (["evaluate", str(other), *call[2:]], [*call, "--prompt", "official"]):
        assert main(changed) == 2
        out, err = capsys.readouterr()
        assert not out and err.strip().splitlines()[-1].startswith("d2mora: ")
        assert "another run" in err and "--again" in err
        assert {path.name: path.read_bytes() for path in tmp_path.glob("evaluation*")} == before
    assert main([*call, "--prompt", "official", "--again"]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "earlier-1").iterdir()} == before
    assert json.loads((tmp_path / "evaluation-choice.json").read_text())["prompt"] == "official"
