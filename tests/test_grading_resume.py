"""Grading that is killed, shared by processes, runs out of memory or meets other results: the same table, or one line and nothing changed.

Many kills at all moments, of every protocol: `benchmarks/chaos.py`.
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import demo_run
from program import Program

from d2mora import scoring
from d2mora.cli import main
from d2mora.evaluate import evaluate, read_graded

TASKS = ["boolq", "ARC-Easy", "winogrande"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return demo_run(tmp_path_factory.mktemp("runs") / "run")


def words(run, output, *more):
    return ["evaluate", str(run), "--tasks", ",".join(TASKS), "--output", str(output), "--batch-size", "4", *more]


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


def test_killed_it_goes_on_to_the_same_table(run, tmp_path, graded):
    args = dict(protocol="official", tasks=TASKS, limit=10, batch_size=4, progress=False)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    part = killed / "evaluation-official.part-0.jsonl"
    process = Program(*words(run, killed, "--protocol", "official", "--limit", "10"))
    while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < 5):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with part.open("a") as file:
        file.write('{"hash": "torn')
    done = part.read_bytes().count(b"\n")
    assert 5 <= done < 30 and not (killed / "evaluation-official.json").exists()
    after = evaluate(run, output=killed, **args)["tasks"]
    assert len(graded) <= 30 - done + 4  # no row twice, but for one unfinished batch
    assert after == evaluate(run, output=whole, **args)["tasks"]
    assert rows_by_hash(killed, "official") == rows_by_hash(whole, "official")
    names = ["evaluation-official.json", "evaluation-official.jsonl", "plots", "report.md"]
    assert sorted(path.name for path in killed.iterdir()) == names


def test_two_processes_share_the_rows(run, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    result = evaluate(run, tasks=TASKS, limit=20, output=one, batch_size=4, progress=False)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    envs = [os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [Program(*words(run, two, "--limit", "20"), env=env) for env in envs]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    stored = json.loads((two / "evaluation-choice.json").read_text())
    assert stored["tasks"] == json.loads(json.dumps(result["tasks"])) and rows_by_hash(two) == rows_by_hash(one)
    assert stored["processes"] == 2 and not list(two.glob("*.part-*"))
    assert [out.count("average") for out, _ in said] == [1, 0]


def test_out_of_memory_halves_the_batch(run, tmp_path, monkeypatch, capsys):
    args = dict(tasks=["boolq", "piqa"], limit=20, batch_size=16, progress=False)
    before, grade, sizes = evaluate(run, output=tmp_path / "roomy", **args), scoring.grade_batch, []

    def tight(model, tokenizer, task, rows, *more):
        if len(rows) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        sizes.append(len(rows))
        return grade(model, tokenizer, task, rows, *more)

    monkeypatch.setattr(scoring, "grade_batch", tight)
    after = evaluate(run, output=tmp_path / "tight", **args)
    err = capsys.readouterr().err
    assert all(f"out of memory: going on with batches of {n}" in err for n in (8, 4))
    assert max(sizes) == 4 and sum(sizes) == 40
    assert [t["accuracy"] for t in after["tasks"].values()] == [t["accuracy"] for t in before["tasks"].values()]

    def broken(*args):
        raise RuntimeError("a fault of another kind")

    monkeypatch.setattr(scoring, "grade_batch", broken)
    with pytest.raises(RuntimeError, match="another kind"):
        evaluate(run, output=tmp_path / "fault", **args)


def test_more_rows_later_go_on_from_the_first_and_fewer_lose_none(run, tmp_path, graded):
    args = dict(tasks=["boolq"], output=tmp_path, progress=False, batch_size=5)
    for limit, fresh, kept in ((10, 10, 10), (10, 0, 10), (20, 20, 20), (5, 0, 20)):
        graded.clear()
        assert evaluate(run, limit=limit, **args)["tasks"]["boolq"]["n"] == limit
        assert len(graded) <= fresh and len(read_graded(tmp_path)) == kept


def test_results_of_another_run_are_refused_and_kept(run, tmp_path, capsys):
    call = ["evaluate", str(run), "--tasks", "boolq", "--limit", "6", "--output", str(tmp_path / "out")]
    assert main(call) == 0
    contents = lambda folder: {path.name: path.read_bytes() for path in Path(folder).glob("evaluation*")}
    before, other = contents(tmp_path / "out"), demo_run(tmp_path / "other", scale=0.9)
    capsys.readouterr()
    for changed in (["evaluate", str(other), *call[2:]], [*call, "--prompt", "official"]):
        assert main(changed) == 2
        out, err = capsys.readouterr()
        assert not out and err.strip().splitlines()[-1].startswith("d2mora: ")
        assert "another run" in err and "--again" in err and contents(tmp_path / "out") == before
    assert main([*call, "--prompt", "official", "--again"]) == 0
    assert contents(tmp_path / "out/earlier-1") == before
    assert json.loads((tmp_path / "out/evaluation-choice.json").read_text())["prompt"] == "official"
