"""Locks, leaks, and the long measurements of `benchmarks/` (chaos, leaks, determinism): what they would not let pass, and what they found."""

import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from d2mora.train import begun
from d2mora.utils import LOCK, locked

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


def stored(name):
    "A result that the repository holds."
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_driver_sees_what_is_lost_torn_or_left_over(tmp_path):
    place, name = script("chaos").Place(tmp_path), "adapter/adapter_model.safetensors"
    for folder in (place.kept / "train", place.run):
        shutil.copytree(ROOT / "nbs" / "results" / "demo" / "adapter", folder / "adapter")
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    assert place.differences("train") == {} and place.half_written("train") == []
    content = (place.run / name).read_bytes()
    (place.run / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert place.differences("train") == {name: len(content)} and place.half_written("train") == [name]
    (place.run / name).unlink(), (place.run / ".report.tmp.md").touch()
    assert place.differences("train") == {name: len(content), ".report.tmp.md": 0}
    assert place.half_written("train") == []


def test_stored_measurements_found_nothing_lost_leaked_or_different():
    chaos, leaks, determinism = map(stored, ("chaos", "leaks", "determinism"))
    assert chaos["faults"] == chaos["survived"] == len(chaos["thrown"]) >= 100 and chaos["bytes_lost"] == 0
    assert not any(twice["differing"] for twice in chaos["undisturbed_twice"].values())
    assert all(leaks[part]["constant"] for part in ("training", "writing", "adapters"))
    assert leaks["adapters"]["before"] == leaks["adapters"]["after"]
    assert leaks["left"]["same"] and leaks["killed"]["left"] == 0
    assert all(not twice["differing"] and twice["printed_the_same"] for twice in determinism["twice"].values())
    processes = determinism["processes"]
    assert processes["graded_rows_equal"] and processes["training"]["adapter_relative"] < 1e-4
    assert processes["training"]["largest_loss_difference"] < 1e-5


def test_adapters_leave_nothing_behind_and_a_leak_is_seen():
    leaks = script("leaks")
    found = leaks.adapters(3)
    assert found["before"] == found["after"] and found["same_logits"] and found["tensors"][0] == found["tensors"][1]
    planted = leaks.writing(100, leak=2**22)
    assert not planted["constant"] and planted["bytes_per_step"] > 10_000
    leaks.kept.clear()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_lock_dies_with_its_process(tmp_path):
    if (child := os.fork()) == 0:
        with locked(tmp_path / "run"):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "run" / LOCK).exists() and begun(tmp_path / "run")
    with locked(tmp_path / "run"):
        with pytest.raises(ValueError, match="another process is writing"), locked(tmp_path / "run"):
            pass
    assert not (tmp_path / "run").exists() and not begun(tmp_path / "run")
