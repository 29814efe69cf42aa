"""Kill a run twenty times, resume it each time, and print as JSON what happened: `python kill_runs.py FOLDER`.

One process imports everything; each run is a fork of it, so that twenty runs pay for one import.
Ten forks are killed from outside at a random moment, ten kill themselves at a chosen point of a checkpoint write.
"""

import gc
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import datasets
import peft
import torch
import transformers

from d2mora.recipe import load_base, load_recipe
from d2mora.tasks import toy_rows
from d2mora.train import train

torch.set_num_threads(1)
datasets.disable_progress_bars()
STEPS, SAVE = 100, 4
KEYS = {
    "adapter.lora_dropout": 0.1, "adapter.target_modules": ["q_proj", "v_proj"], "data.tasks": ["boolq", "piqa"], "data.train_on_inputs": True,
    "data.validation_rows": 6, "training.max_steps": STEPS, "training.save_strategy": "steps", "training.save_steps": SAVE,
    "training.save_total_limit": 2, "training.eval_strategy": "steps", "training.eval_steps": 8, "training.logging_steps": 3,
    "training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 2, "training.use_cpu": True, "training.disable_tqdm": True,
}  # fmt: skip
POINTS = ("weights", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "whole", "renamed", "rotating", "optimizer.pt")


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


def die_when(owner, name, applies, tear=None):
    "Replace a function: where `applies`, it does its work, `tear` spoils it, and the process is killed."
    real = getattr(owner, name)

    def wrapper(*args, **kwargs):
        if not applies(*args):
            return real(*args, **kwargs)
        if tear:
            tear(real, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, wrapper)


def half(real, what, path, *args, **kwargs):
    "Write a file and leave half of it."
    real(what, path, *args, **kwargs)
    os.truncate(path, os.path.getsize(path) // 2)


def arm(point, begin):
    "Let this process die at a point of the second checkpoint write from here, or of the first that gets there."
    wanted = f"checkpoint-{begin + 2 * SAVE}"
    if point == "weights":
        die_when(peft.PeftModel, "save_pretrained", lambda model, folder, *_: str(folder).endswith(wanted), lambda real, model, folder, **_: (Path(folder) / "adapter_model.safetensors").write_bytes(b"half"))
    elif point == "trainer_state.json":
        die_when(transformers.TrainerState, "save_to_json", lambda state, path: wanted in path, lambda real, state, path: Path(path).write_text('{"global_step": '))
    elif point == "whole":
        die_when(os, "replace", lambda old, new: str(new).endswith(wanted))
    elif point == "renamed":
        die_when(os, "replace", lambda old, new: str(new).endswith(wanted), lambda real, old, new: real(old, new))
    elif point == "rotating":
        die_when(shutil, "rmtree", lambda path, *_: str(path).endswith(".leaving") and Path(path).exists(), lambda real, path, *_, **__: next(Path(path).glob("*.pt")).unlink())
    else:
        die_when(torch, "save", lambda what, path, *_: wanted in str(path) and str(path).endswith(point), half)


def start(run, data, resume, point=None, begin=0):
    "Fork a run; its process id, and what it reports."
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs)
        return pid, os.fdopen(ours)
    status = 1
    try:
        log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        if point:
            arm(point, begin)
        train(load_recipe("demo", KEYS | {"data.path": str(data)}), run, [Reporter(theirs)], resume)
        status = 0
    finally:
        os._exit(status)


def aside(run):
    "When the folder of an unfinished checkpoint was made; None if there is none."
    folder = run / "checkpoints" / ".writing"
    return folder.stat().st_ctime_ns if folder.exists() else None


def newest(run):
    "The step of the newest checkpoint, by its name alone."
    return max((int(p.name.rpartition("-")[2]) for p in run.glob("checkpoints/checkpoint-*")), default=0)


def kill_once(run, data, point, chance):
    "Start or resume, let it be killed, and say what was there then."
    before, left = newest(run), aside(run)
    pid, reports = start(run, data, resume=run.exists(), point=point, begin=before)
    begin, last = None, 0
    target = max(before + chance.randint(1, 6), SAVE + 1)
    for line in reports:
        word, step = line.split()
        begin, last = (int(step), last) if word == "begin" else (begin, int(step))
        if not point and last >= target:
            time.sleep(chance.uniform(0, 0.03))
            os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return {"point": point, "began": begin, "expected": before, "last": last, "newest": newest(run), "signal": os.WTERMSIG(status),
            "writing": aside(run) not in (None, left), "finished": (run / "adapter").exists()}  # fmt: skip


def main(folder):
    chance = random.Random(0)
    for task in ("boolq", "piqa"):
        (folder / "data" / task).mkdir(parents=True)
        (folder / "data" / task / "train.json").write_text(json.dumps(toy_rows("toy", task, "train")[:17]))
    load_base("toy")  # fills caches of the libraries that every fork inherits
    gc.freeze()
    pid, _ = start(folder / "whole", folder / "data", resume=False)
    assert os.waitpid(pid, 0)[1] == 0, (folder / "whole.log").read_text()
    plan = [None, *[point for pair in zip(POINTS, [None] * 10) for point in pair]][:20]
    kills = [kill_once(folder / "killed", folder / "data", point, chance) for point in plan]
    before = newest(folder / "killed")
    pid, reports = start(folder / "killed", folder / "data", resume=True)
    last = {"began": int(next(reports).split()[1]), "expected": before, "status": os.waitpid(pid, 0)[1]}
    print(json.dumps({"kills": kills, "last": last, "steps": STEPS}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
