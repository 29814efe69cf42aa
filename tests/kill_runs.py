"""Kill a run again and again, resume it each time, and print as JSON what happened: `python kill_runs.py FOLDER KILLS`.

One process imports everything; each run is a fork of it. Every second fork is killed from outside at a random moment, the others kill
themselves at a chosen point of a checkpoint write. The gate kills six times; `benchmarks/chaos.py` is the long version.
"""

import gc
import json
import os
import random
import sys
from itertools import islice
from pathlib import Path

import transformers
from forks import POINTS, Fork, arm

from d2mora.recipe import load_base, load_recipe
from d2mora.toy import toy_rows
from d2mora.train import defect, train

SAVE = 4
KEYS = {
    "adapter.lora_dropout": 0.1, "adapter.target_modules": ["q_proj"], "data.tasks": ["boolq"], "data.train_on_inputs": True,
    "data.validation_rows": 3, "training.save_strategy": "steps", "training.save_steps": SAVE,
    "training.save_total_limit": 2, "training.eval_strategy": "steps", "training.eval_steps": 8, "training.logging_steps": 3,
    "training.per_device_train_batch_size": 1, "training.gradient_accumulation_steps": 2, "training.use_cpu": True, "training.disable_tqdm": True,
}  # fmt: skip


class Reporter(transformers.TrainerCallback):
    "Tells the parent where the run begins and each step that is done."

    def __init__(self, pipe):
        self.pipe = pipe

    def on_train_begin(self, args, state, control, **kwargs):
        os.write(self.pipe, f"begin {state.global_step}\n".encode())

    def on_step_end(self, args, state, control, **kwargs):
        os.write(self.pipe, f"step {state.global_step}\n".encode())


def start(run, keys, resume, point=None, begin=0):
    "Fork a run; the process, and what it reports."
    ours, theirs = os.pipe()

    def work():
        if point:
            arm(point, f"checkpoint-{begin + 2 * SAVE}")
        train(load_recipe("demo", keys), run, [Reporter(theirs)], resume)

    fork = Fork(work)
    os.close(theirs)
    return fork, os.fdopen(ours)


def newest(run):
    "The step of the newest complete checkpoint, and whether there is an incomplete one."
    found = {int(p.name.rpartition("-")[2]): defect(p) for p in run.glob("checkpoints/checkpoint-*")}
    return max((step for step, why in found.items() if not why), default=0), any(found.values())


def kill_once(run, keys, point, chance):
    "Start or resume, let it be killed, and say what was there then."
    before, _ = newest(run)
    fork, reports = start(run, keys, run.exists(), point, before)
    target, begin, last = max(before + chance.randint(1, 6), SAVE + 1), None, 0
    for word, step in map(str.split, reports):
        begin, last = (int(step), last) if word == "begin" else (begin, int(step))
        if not point and last >= target:
            fork.kill()
    status, (step, torn) = fork.wait(), newest(run)
    return {"point": point, "began": begin, "expected": before, "last": last, "newest": step, "signal": -status,
            "writing": torn, "finished": (run / "adapter").exists()}  # fmt: skip


def main(folder, kills):
    chance, keys = random.Random(0), KEYS | {"data.path": str(folder / "data"), "training.max_steps": 10 * kills}
    (folder / "data" / "boolq").mkdir(parents=True)
    (folder / "data" / "boolq" / "train.json").write_text(json.dumps(toy_rows("toy", "boolq", "train")[:17]))
    load_base("toy")  # fills caches of the libraries that every fork inherits
    gc.freeze()
    fork, _ = start(folder / "whole", keys, resume=False)
    assert fork.wait() == 0, fork.said()
    points = islice((own for point in POINTS for own in (point, None)), kills)
    seen = [kill_once(folder / "killed", keys, point, chance) for point in points]
    before, _ = newest(folder / "killed")
    fork, reports = start(folder / "killed", keys, resume=True)
    last = {"began": int(next(reports).split()[1]), "expected": before, "status": fork.wait()}
    print(json.dumps({"kills": seen, "last": last, "steps": 10 * kills}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
