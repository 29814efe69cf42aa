"""Faults, leaks, determinism in a short form; `benchmarks/chaos.py` and `benchmarks/leaks.py` are the long ones. And: what these checks would not let pass."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from program import program

from d2mora.data import read_file
from d2mora.utils import LOCK, locked
from d2mora.train import begun
from d2mora.toy import toy_rows

ROOT = Path(__file__).parents[1]


def script(name):
    "A script of `benchmarks/`, imported; what it sets in the environment is taken back."
    before = dict(os.environ)
    try:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        os.environ.clear(), os.environ.update(before)


def test_eight_faults(tmp_path):
    words = [
        sys.executable,
        str(ROOT / "benchmarks" / "chaos.py"),
        "--faults",
        "8",
        "--seed",
        "1",
        "--output",
        str(tmp_path / "chaos.json"),
    ]
    done = subprocess.run(
        words, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "chaos.json").read_text())
    assert seen["faults"] == seen["survived"] == 8 and seen["bytes_lost"] == 0 and len(seen["by_kind"]) == 8
    assert all(not twice["differing"] and twice["files"] > 5 for twice in seen["undisturbed_twice"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["chaos.json"]  # nothing left, nothing mounted


@pytest.fixture
def place(tmp_path):
    (tmp_path / "chaos").mkdir()
    place = script("chaos").Place(tmp_path / "chaos")
    for folder in (place.kept / "train", place.run):
        shutil.copytree(ROOT / "nbs" / "results" / "demo" / "adapter", folder / "adapter")
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return place


def test_the_driver_sees_what_is_lost_torn_or_left_over(place):
    weights = place.run / "adapter" / "adapter_model.safetensors"
    assert place.differences("train") == {} and place.half_written("train") == []
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert place.differences("train") == {"adapter/adapter_model.safetensors": len(content)} and place.half_written(
        "train"
    ) == ["adapter/adapter_model.safetensors"]
    weights.unlink(), (place.run / ".report.tmp.md").touch()
    assert (
        place.differences("train") == {"adapter/adapter_model.safetensors": len(content), ".report.tmp.md": 0}
        and place.half_written("train") == []
    )


def test_the_driver_wants_one_line_and_status_two():
    one_line = script("chaos").one_line
    assert one_line(2, "d2mora: it cannot be written\n", "written") is None
    for status, said in (
        (1, "d2mora: it cannot be written"),
        (2, "it cannot be written"),
        (2, "d2mora: written\nd2mora: twice"),
        (2, "Traceback\nd2mora: written"),
        (2, "d2mora: other"),
    ):
        assert one_line(status, said, "written")


def test_a_file_that_changed_within_its_old_time_is_read_anew(tmp_path):
    path, rows = tmp_path / "train.json", toy_rows("toy", "boolq", "train")[:3]
    path.write_text(json.dumps(rows)), os.utime(path, (1e9, 1e9))
    assert [row["answer"] for row in read_file(path)] == [row["answer"] for row in rows]
    path.write_text(json.dumps(rows[::-1])), os.utime(path, (1e9, 1e9))
    assert [row["instruction"] for row in read_file(path)] == [row["instruction"] for row in rows[::-1]]


def test_a_lock_dies_with_its_process(tmp_path):
    code = f"import pathlib, os, signal\nfrom d2mora.utils import locked\nwith locked(pathlib.Path({str(tmp_path)!r})): os.kill(os.getpid(), signal.SIGKILL)"
    assert program(code, {}, call=exec).returncode == -signal.SIGKILL and (tmp_path / LOCK).exists() and begun(tmp_path)
    with locked(tmp_path):
        with pytest.raises(ValueError, match="another process is writing"), locked(tmp_path):
            pass
    assert not tmp_path.exists() and not begun(tmp_path)


def test_a_run_killed_before_its_recipe_is_begun(tmp_path):
    (tmp_path / "checkpoints").mkdir()  # made by the Trainer, before the recipe is written
    assert begun(tmp_path)


def test_memory_stays_and_a_leak_is_seen():
    leaks = script("leaks")
    assert leaks.writing(200)["constant"]
    planted = leaks.writing(200, leak=2**22)
    assert not planted["constant"] and planted["bytes_per_step"] > 10_000
    leaks.kept.clear()


def test_adapters_leave_nothing_behind():
    found = script("leaks").adapters(6)
    assert found["before"] == found["after"] and found["same_logits"] and found["tensors"][0] == found["tensors"][1]


def test_runs_leave_nothing_open(tmp_path):
    before = len(psutil.Process().children(recursive=True))  # program.py's server, if a test has started it
    found = script("leaks").left(tmp_path)
    assert found["same"] and found["after_third"]["processes"] == before, found


def stored(name):
    "A result that the repository holds."
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_stored_faults_lost_nothing():
    found = stored("chaos")
    assert found["faults"] == found["survived"] == len(found["thrown"]) >= 100 and found["bytes_lost"] == 0
    assert not any(twice["differing"] for twice in found["undisturbed_twice"].values())


def test_stored_memory_is_constant():
    found = stored("leaks")
    assert (
        all(found[part]["constant"] for part in ("training", "writing", "adapters"))
        and found["adapters"]["before"] == found["adapters"]["after"]
    )
    assert found["left"]["same"] and found["killed"]["left"] == 0


def test_stored_determinism_is_what_is_promised():
    found = stored("determinism")
    assert (
        all(not twice["differing"] and twice["printed_the_same"] for twice in found["twice"].values())
        and found["processes"]["graded_rows_equal"]
    )
    assert (
        found["processes"]["training"]["adapter_relative"] < 1e-4
        and found["processes"]["training"]["largest_loss_difference"] < 1e-5
    )


def test_a_comparison_grades_anew_when_test_rows_changed(tmp_path, monkeypatch):
    from d2mora import compare
    from d2mora.scoring import row_hash

    rows, calls = toy_rows("toy", "boolq", "test")[:3], []
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text(json.dumps(rows))
    graded = [
        {
            "task": "boolq",
            "hash": row_hash(row, "boolq"),
            "answer": row["answer"],
            "predicted": row["answer"],
            "right": True,
        }
        for row in rows
    ]
    (tmp_path / "evaluation-choice.jsonl").write_text("".join(json.dumps(own) + "\n" for own in graded))
    (tmp_path / "evaluation-choice.json").write_text(
        json.dumps({"limit": None, "average": 1.0, "tasks": {"boolq": {"n": 3}}})
    )
    monkeypatch.setattr(compare, "evaluate", lambda folder, **keys: calls.append(folder))
    for changed, expected in (
        (rows, 0),
        ([rows[0], rows[1], rows[2] | {"instruction": "So " + rows[2]["instruction"]}], 1),
        (rows[:2], 2),
    ):
        (tmp_path / "boolq" / "test.json").write_text(json.dumps(changed))
        compare.grade(tmp_path, "choice", None, str(tmp_path))
        assert len(calls) == expected
    (tmp_path / "boolq" / "test.json").write_text(json.dumps(rows))
    (
        tmp_path / "evaluation-choice.part-0.jsonl"
    ).touch()  # a grading that was killed when it was all but finished: its card may be missing
    compare.grade(tmp_path, "choice", None, str(tmp_path))
    assert len(calls) == 3
