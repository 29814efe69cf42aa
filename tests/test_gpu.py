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


@pytest.mark.parametrize("words, kept, answer", [
    ("1 {}/out", None, "sees no NVIDIA GPU"),
    ("1 {} --cpu", json.dumps({"device": "NVIDIA A100"}), "NVIDIA A100"),
    ("1 {} --cpu", "[]", "is no result of this command"),
])  # fmt: skip
def test_what_it_refuses(words, kept, answer, tmp_path, capsys, monkeypatch):
    "In one line with exit code 2, and earlier results stay as they were."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if kept:
        (tmp_path / "speed.json").write_text(kept)
    with pytest.raises(SystemExit) as ended:
        gpu.main(words.format(tmp_path).split())
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and answer in line
    assert [p.read_text() for p in tmp_path.iterdir()] == [kept] * bool(kept)


def test_a_missing_package_is_named(tmp_path):
    done = gpu_sh(tmp_path, "1", tmp_path / "out", "--cpu", blocked=("torch",))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "torch not installed" in done.stderr and "WHEELS" in done.stderr
