"""`make gpu` without a GPU: its trial on tiny shapes, on a machine without datasets, nbdev and fastcore; and what it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
from gpu_checks import CHECKS  # noqa: E402


def gpu_sh(folder, *arguments, blocked=(), **environment):
    "Call scripts/gpu.sh with a python that cannot import some packages."
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n")
    own = {"PYTHON": sys.executable, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    call, env = ["bash", ROOT / "scripts/gpu.sh", *arguments], os.environ | own | environment
    return subprocess.run(call, env=env, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def trial(shared, tmp_path_factory):
    "One trial of all parts: its output, and its files."
    folder, blocked = tmp_path_factory.mktemp("gpu"), ("datasets", "nbdev", "fastcore")
    done = gpu_sh(folder, "5", folder / "out", "--cpu", blocked=blocked, D2MORA_SHARED=str(shared))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done, {path.stem: json.loads(path.read_text()) for path in (folder / "out").glob("*.json")}


def test_every_part_leaves_its_file_and_names_the_device(trial):
    done, files = trial
    assert files.keys() == {"correctness", "speed", "generation", "study"}
    for part, found in files.items():
        assert found["trial"] and "CPU" in found["device"] and found["ended"] == "complete" and found["date"]
        assert {"torch", "transformers", "peft", "d2mora", "python"} <= found["versions"].keys()
        assert found["summary"] and all(line in done.stdout for line in found["summary"]), part
    assert "datasets not installed" in files["study"]["results"]["skipped"] and "datasets" in done.stderr


def test_what_the_parts_found(trial):
    checks, speed, generation = (trial[1][part]["results"] for part in ("correctness", "speed", "generation"))
    assert checks.keys() == CHECKS.keys()
    assert all(found["right"] and found["value"] <= found["bound"] for found in checks.values()), checks
    assert checks["bfloat16 autocast, gradients against float32"]["value"] > 1e-4  # it is half precision
    for name, methods in speed["cases"].items():
        assert methods.keys() == {*gpu.SPEED} and speed["compiled"][name][gpu.COMPILED]["step_ms"] > 0
        assert all(m["tokens_per_second"] > 0 and m["peak_gib"] > 0 for m in methods.values())
        for method in ("D2MoRA", "LoRA r 64"):
            assert 0.85 < speed["plan"][name][method]["gib"] / methods[method]["peak_gib"] < 1.15
    assert all(seen["launches"] > 0 and len(seen["kernels"]) == 10 for seen in speed["profile"].values())
    assert "not measured" not in "\n".join(trial[1]["speed"]["summary"])
    assert all(m["tokens_per_second"] > 0 for methods in generation["generation"].values() for m in methods.values())
    assert generation["grading"]["times_as_fast"] > 1


@pytest.mark.parametrize("name", ["06_memory", "14_full_run"])
def test_the_notebooks_show_a_run(name, trial, tmp_path, monkeypatch, capsys):
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text())["cells"]
    (source,) = (
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "results/gpu" in "".join(cell["source"])
    )
    (tmp_path / "nbs").mkdir(), monkeypatch.chdir(tmp_path / "nbs")
    exec(source, {"json": json, "Path": Path})
    assert re.search("No GPU run|No result of `make gpu`", capsys.readouterr().out)
    (tmp_path / "benchmarks/results/gpu").mkdir(parents=True)
    for part, found in trial[1].items():
        (tmp_path / f"benchmarks/results/gpu/{part}.json").write_text(json.dumps(found))
    exec(source, {"json": json, "Path": Path})
    said = capsys.readouterr().out
    assert all(word in said for word in ("CPU", "GiB", "planned memory"))


def test_a_wrong_layer_is_noticed(shared, monkeypatch):
    from d2mora import tuner

    right = tuner.update
    monkeypatch.setattr(tuner, "update", lambda *args: 1.01 * right(*args))
    for name in ("recording m3n8r8, float32", "logits and gradients against loops over experts"):
        check, bound = CHECKS[name]
        assert check(torch.device("cpu"), shared, True) > bound, name


def test_a_check_that_fails_is_in_the_table():
    wrong, skipped = {"value": 0.5, "bound": 0.1, "right": False}, {"skipped": "out of memory (8 GiB)", "right": False}
    found = gpu.correctness_summary({"a": {"right": True}, "b": wrong, "c": skipped})
    assert found[1:] == ["wrong: b: off by 5.0e-01, allowed 1e-01", "wrong: c: out of memory (8 GiB)"]


def refused(capsys, *arguments):
    "The line on stderr of a call that ends with exit code 2."
    with pytest.raises(SystemExit) as ended:
        gpu.main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_what_it_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no NVIDIA GPU" in refused(capsys, "1", tmp_path / "out") and not (tmp_path / "out").exists()
    assert "name another folder" in refused(capsys, "1", gpu.RESULTS, "--cpu")
    kept = json.dumps({"device": "NVIDIA A100"})
    (tmp_path / "speed.json").write_text(kept)
    assert "NVIDIA A100" in refused(capsys, "1", tmp_path, "--cpu") and (tmp_path / "speed.json").read_text() == kept
    (tmp_path / "speed.json").write_text("[]")
    assert "is no result of this command" in refused(capsys, "1", tmp_path, "--cpu")


def test_parts_that_do_not_fit_are_skipped_with_numbers(tmp_path, capsys):
    assert gpu.main(["1", str(tmp_path), "--cpu", "--parts", "speed,generation", "--memory", "0.001"]) == 0
    assert "0.001 are there" in json.loads((tmp_path / "speed.json").read_text())["results"]["skipped"]
    assert "speed (skipped)" in capsys.readouterr().out


def test_a_missing_package_is_named(tmp_path):
    done = gpu_sh(tmp_path, "1", tmp_path / "out", "--cpu", blocked=("torch",))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "torch not installed" in done.stderr and "WHEELS" in done.stderr
    done = gpu_sh(tmp_path, WHEELS=str(tmp_path))
    assert done.returncode == 2 and "holds no .whl file" in done.stderr
