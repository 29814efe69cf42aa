"""The same command twice, each in a process of its own and with another hash seed: which files differ? And what other numbers of processes or threads change.

`python benchmarks/determinism.py`: benchmarks/results/determinism.json.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chaos import UNEVEN, Case, Place, tree  # sets the environment

import torch
from common import ROOT, command_line, store, versions
from safetensors.torch import load_file

import d2mora.cli
from d2mora.recipe import load_base
from d2mora.train import read_metrics

TWICE = ("train with pictures", "train by length", "evaluate choice", "evaluate official", "compare rates", "export")


def alone(place, case, seed):
    "A command in a process of its own."
    env = os.environ | {"PYTHONHASHSEED": str(seed)}
    command = [sys.executable, "-m", "d2mora.cli", *place.line(case)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def twice(place, name):
    "How many files, and which of them differ; whether the same was printed."
    case, said = place.cases[name], []
    for seed in (1, 2):
        place.begin(case)
        said.append(alone(place, case, seed))
        if seed == 1:
            shutil.copytree(place.run, place.kept / name, dirs_exist_ok=True)
    found = {"files": len(tree(place.run)), "differing": sorted(place.differences(name))}
    return found | {"printed_the_same": timed(said[0]) == timed(said[1])}


def timed(said):
    return [line for line in said.splitlines() if not line.startswith("time:")]


def result(place, case, threads=1):
    "Run a case; where its result now lies."
    place.begin(case)
    status, said = place.whole(case, inside=lambda: torch.set_num_threads(threads))
    assert status == 0, said[-2000:]
    kept = Path(tempfile.mkdtemp(dir=place.kept))
    return Path(shutil.copytree(place.run, kept / "run"))


def apart(a, b):
    "How far two runs are from each other."
    files = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (a, b))
    x, y = (torch.cat([tensors[name].flatten() for name in sorted(tensors)]) for tensors in files)
    losses = [abs(m[key] - n[key]) for m, n in zip(read_metrics(a), read_metrics(b)) for key in m if "loss" in key]
    found = {"equal_to_the_bit": torch.equal(x, y), "adapter_relative": float((x - y).norm() / y.norm())}
    return found | {"largest_loss_difference": max(losses)}


def processes(place):
    "One process against two, in a first epoch, in which all read the same rows: graded rows are equal to the bit."
    graded, train = place.cases["evaluate, two processes"], place.cases["train, two processes"]
    words = [word for word in train.words if "dropout" not in word and "batch_size" not in word]
    words += ["adapter.lora_dropout=0.0", "training.max_steps=8"]
    rows, runs = [], []
    for n in (1, 2):
        run = result(place, Case("evaluate", graded.words, n, prepared=graded.prepared))
        rows.append(sorted((run / "evaluation-generate.jsonl").read_text().splitlines()))
        own = [*words, f"training.per_device_train_batch_size={4 // n}"]
        runs.append(result(place, Case("train", own, n)))
    return {"graded_rows_equal": rows[0] == rows[1], "rows": len(rows[0]), "training": apart(*runs)}


PROMISED = {
    "same command, same machine, same versions": "every file equal, but for training_args.bin, which is written and "
    "not read, and times in trainer_state.json",
    "a killed run that goes on": "as an undisturbed one (chaos.json)",
    "evaluation by other numbers of processes": "the same rows",
    "training by other numbers of processes": "losses to 1e-5, adapter to 1e-4, without dropout, in the first epoch; "
    "the rows that are left at its end are shared out otherwise",
    "other numbers of threads, other machines, other versions": "nothing",
}


def main():
    parser = command_line(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "determinism.json")
    args, root, began = parser.parse_args(), Path(tempfile.mkdtemp(prefix="twice-")), time.monotonic()
    place = Place(root)
    d2mora.cli.hush()
    load_base("toy")
    try:
        shutil.copytree(result(place, place.cases["train"]), place.kept / "train")
        found = {"twice": {name: twice(place, name) for name in TWICE}, "processes": processes(place)}
        found["threads"] = apart(*(result(place, place.cases["train"], threads) for threads in (1, 2)))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    about = {"command": "python benchmarks/determinism.py", "promised": PROMISED, "not_compared": list(UNEVEN)}
    about |= {"seconds": round(time.monotonic() - began)} | found
    store(args.output, about | {"versions": versions("accelerate", "datasets")})


if __name__ == "__main__":
    main()
