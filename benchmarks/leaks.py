"""Does memory stay where it is? A thousand steps of training and of writing, two hundred adapters loaded and deleted, and what a run leaves open.

`python benchmarks/leaks.py`: benchmarks/results/leaks.json. `--leak BYTES` keeps so much at each step, so that the check can be seen to fail.
"""

import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import peft
import psutil
import torch
from common import ROOT, command_line, store, versions
from transformers import TrainerCallback

from d2mora.cli import hush
from d2mora.scoring import write_tokens
from d2mora.recipe import load_base, load_recipe
from d2mora.tasks import evaluation_prompt
from d2mora.toy import toy_rows
from d2mora.train import train
from d2mora.tuner import record_routing

DEMO = ROOT / "nbs" / "results" / "demo" / "adapter"
SETTLED = 0.3  # the part of the steps after which memory is to stay
ALLOWED = 0.02  # by which it may grow from there on
PROCESS = psutil.Process()
kept = []  # what a planted leak keeps


def living():
    "Tensors that Python still holds."
    gc.collect()
    return sum(1 for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter))


class Curve:
    "Memory over steps, in bytes."

    def __init__(self, leak=0):
        self.leak, self.steps, self.bytes = leak, [], []

    def look(self, step):
        if self.leak:
            kept.append(torch.ones(self.leak // 4))
        self.steps.append(step), self.bytes.append(PROCESS.memory_info().rss)

    def figures(self):
        "Growth from the settled part's beginning to its highest, and its slope."
        rest = [(step, own) for step, own in zip(self.steps, self.bytes) if step >= SETTLED * self.steps[-1]]
        growth = max(own for _, own in rest) / rest[0][1] - 1
        every = max(1, len(self.steps) // 40)
        found = {"steps": self.steps[-1], "settled_at": rest[0][0], "bytes_there": rest[0][1]}
        found |= {"growth": round(growth, 5), "bytes_per_step": round(slope(rest)), "constant": growth <= ALLOWED}
        return found | {"curve": list(zip(self.steps, self.bytes))[::every]}


def slope(points):
    x, y = torch.tensor(points, dtype=torch.float64).T
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum().clamp_min(1e-9))


class Look(TrainerCallback):
    def __init__(self, curve):
        self.curve = curve

    def on_step_end(self, args, state, control, **kwargs):
        self.curve.look(state.global_step)


def recipe(steps, **more):
    keys = {"max_steps": steps, "per_device_train_batch_size": 8, "logging_steps": 10, "save_strategy": "steps"}
    keys |= {"save_steps": max(1, steps // 10), "save_total_limit": 2, "use_cpu": True, "disable_tqdm": True}
    keys = {f"training.{key}": value for key, value in keys.items()} | {"data.tasks": ["boolq", "piqa"]}
    return load_recipe("demo", keys | more)


def training(folder, steps, leak=0):
    "The library's own run, with checkpoints."
    curve = Curve(leak)
    train(recipe(steps), folder / "steps", [Look(curve)])
    return curve.figures()


def writing(steps, leak=0):
    "Tokens written by four beams, as the published protocol has them."
    base, tokenizer = load_base("toy")
    model = peft.PeftModel.from_pretrained(base, str(DEMO)).eval()
    heads = [tokenizer(evaluation_prompt(row, "official"))["input_ids"] for row in toy_rows("toy", "piqa", "test", 16)]
    curve, done = Curve(leak), 0
    handle = base.register_forward_hook(lambda *_: count.append(1))
    count = []
    while len(count) < steps:
        ids = write_tokens(model, tokenizer, heads[done % 12 : done % 12 + 4], 4)
        assert len(ids) == 4
        curve.look(len(count))
        done += 1
    handle.remove()
    return curve.figures() | {"calls": done}


def parts(model):
    "What an adapter adds to: modules, parameters, hooks."
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)
    return {"modules": len([*model.modules()]), "parameters": len([*model.parameters()]), "hooks": hooks}


def adapters(times, leak=0):
    "Load, use and delete a second adapter; take the first off and put it on again."
    base, tokenizer = load_base("toy")
    ids = tokenizer(evaluation_prompt(toy_rows("toy", "piqa", "test", 1)[0]), return_tensors="pt").input_ids
    model, curve = peft.PeftModel.from_pretrained(base, str(DEMO)).eval(), Curve(leak)
    with torch.no_grad():
        before, first, tensors = parts(model), model(ids).logits, living()
        for n in range(times):
            model.load_adapter(str(DEMO), "second"), model.set_adapter("second")
            with record_routing(model):
                model(ids)
            model.set_adapter("default"), model.delete_adapter("second")
            model = peft.PeftModel.from_pretrained(model.unload(), str(DEMO)).eval()
            curve.look(n + 1)
        same = torch.equal(model(ids).logits, first)
    found = {"before": before, "after": parts(model), "tensors": [tensors, living()], "same_logits": same}
    return curve.figures() | found


def opened():
    files = PROCESS.num_fds() if hasattr(PROCESS, "num_fds") else PROCESS.num_handles()
    return {"files": files, "processes": len(PROCESS.children(recursive=True)), "tensors": living()}


def left(folder):
    "What runs with two loading processes leave open: after the first, which fills caches, and after the third."
    seen = []
    for n in range(3):
        train(recipe(6, **{"training.dataloader_num_workers": 2, "data.validation_rows": 8}), folder / f"workers-{n}")
        seen.append(opened())
    return {"after_first": seen[0], "after_third": seen[-1], "same": seen[0] == seen[-1]}


def killed(folder):
    "A run with two loading processes is killed from outside: how long until they are gone too."
    keys = {"max_steps": 5000, "dataloader_num_workers": 2, "use_cpu": "true", "logging_steps": 1}
    words = ["demo", *(f"training.{key}={value}" for key, value in keys.items()), "--output", str(folder / "killed")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run = subprocess.Popen([sys.executable, "-m", "d2mora.cli", "train", *words], **quiet)
    metrics, until = folder / "killed" / "metrics.jsonl", time.monotonic() + 300
    steps = lambda: metrics.read_text().count("\n") if metrics.exists() else 0
    while time.monotonic() < until and run.poll() is None and steps() <= 3:
        time.sleep(0.05)
    workers = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGKILL), run.wait()
    began = time.monotonic()
    _, alive = psutil.wait_procs(workers, timeout=120)
    took = round(time.monotonic() - began, 1)
    return {"loading_processes": len(workers), "left": len(alive), "gone_after_seconds": took}


def main():
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--leak", type=int, default=0, help="Bytes to keep at each step.")
    parser.add_argument("--parts", default="training,writing,adapters,left,killed")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "leaks.json")
    args = parser.parse_args()
    hush(), torch.set_num_threads(1), torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="leaks-") as name:
        jobs = {
            "training": lambda: training(Path(name), args.steps, args.leak),
            "writing": lambda: writing(args.steps, args.leak),
            "adapters": lambda: adapters(args.adapters, args.leak),
            "left": lambda: left(Path(name)),
            "killed": lambda: killed(Path(name)),
        }
        found = {}
        for part in args.parts.split(","):
            found[part] = jobs[part]()
            print(part, {k: v for k, v in found[part].items() if k != "curve"}, file=sys.stderr, flush=True)
    about = {"command": "python " + " ".join(["benchmarks/leaks.py", *sys.argv[1:]])}
    about |= {"allowed_growth": ALLOWED, "settled_after": SETTLED}
    store(args.output, about | found | {"versions": versions("accelerate")})


if __name__ == "__main__":
    main()
