"""Kill a run twenty times, resume it each time, and print as JSON what happened: `python kill_runs.py FOLDER`.

One process imports everything; each run is a fork of it, so that twenty runs pay for one import.
Ten forks are killed from outside at a random moment, ten kill themselves at a chosen point of a checkpoint write.
"""

import gc
import json
import os
import random
import sys
import time
from pathlib import Path

import transformers
from forks import POINTS, Fork, arm

from d2mora.recipe import load_base, load_recipe
from d2mora.toy import toy_rows
from d2mora.train import defect, train

STEPS, SAVE = 100, 4
KEYS = {
    "adapter.lora_dropout": 0.1, "adapter.target_modules": ["q_proj", "v_proj"], "data.tasks": ["boolq", "piqa"], "data.train_on_inputs": True,
    "data.validation_rows": 6, "training.max_steps": STEPS, "training.save_strategy": "steps", "training.save_steps": SAVE,
    "training.save_total_limit": 2, "training.eval_strategy": "steps", "training.eval_steps": 8, "training.logging_steps": 3,
    "training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 2, "training.use_cpu": True, "training.disable_tqdm": True,
}  # fmt: skip


class Reporter(transformers.TrainerCallback):
    "Tells the parent where the run begins and each step that is done."

    def __init__(self, pipe):
        self.pipe = pipe

    def tell(self, word, step):
        os.write(self.pipe, f"{word} {step}\n".encode())

    def on_train_begin(self, args, state, control, **kwargs):
        self.tell("begin", state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.tell("step", state.global_step)


def start(run, data, resume, point=None, begin=0):
    "Fork a run; the process, and what it reports."
    ours, theirs = os.pipe()

    def work():
        if point:
            arm(point, f"checkpoint-{begin + 2 * SAVE}")
        train(load_recipe("demo", KEYS | {"data.path": str(data)}), run, [Reporter(theirs)], resume)

    fork = Fork(work)
    os.close(theirs)
    return fork, os.fdopen(ours)


def newest(run):
    "The step of the newest complete checkpoint, and whether there is an incomplete one."
    found = {int(p.name.rpartition("-")[2]): defect(p) for p in run.glob("checkpoints/checkpoint-*")}
    return max((step for step, why in found.items() if not why), default=0), any(found.values())


def kill_once(run, data, point, chance):
    "Start or resume, let it be killed, and say what was there then."
    before, _ = newest(run)
    fork, reports = start(run, data, resume=run.exists(), point=point, begin=before)
    begin, last = None, 0
    target = max(before + chance.randint(1, 6), SAVE + 1)
    for line in reports:
        word, step = line.split()
        begin, last = (int(step), last) if word == "begin" else (begin, int(step))
        if not point and last >= target:
            time.sleep(chance.uniform(0, 0.03))
            fork.kill()
    status, (step, torn) = fork.wait(), newest(run)
    return {"point": point, "began": begin, "expected": before, "last": last, "newest": step, "signal": -status,
            "writing": torn, "finished": (run / "adapter").exists()}  # fmt: skip


def main(folder):
    chance = random.Random(0)
    for task in ("boolq", "piqa"):
        (folder / "data" / task).mkdir(parents=True)
        (folder / "data" / task / "train.json").write_text(json.dumps(toy_rows("toy", task, "train")[:17]))
    load_base("toy")  # fills caches of the libraries that every fork inherits
    gc.freeze()
    fork, _ = start(folder / "whole", folder / "data", resume=False)
    assert fork.wait() == 0, fork.said()
    points = (*POINTS, "optimizer.pt", "rng_state.pth", "trainer_state.json")
    plan = [None, *[point for pair in zip(points, [None] * 10) for point in pair]][:20]
    kills = [kill_once(folder / "killed", folder / "data", point, chance) for point in plan]
    before, _ = newest(folder / "killed")
    fork, reports = start(folder / "killed", folder / "data", resume=True)
    last = {"began": int(next(reports).split()[1]), "expected": before, "status": fork.wait()}
    print(json.dumps({"kills": kills, "last": last, "steps": STEPS}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
