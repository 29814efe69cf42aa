"""What LoRA, one-to-many and D2MoRA reach on the toy world: equal steps, equal learning rate, parameters equal to within 3 %.

    python benchmarks/toy_methods.py --world toy --output nbs/results/toy-methods.json
    python benchmarks/toy_methods.py --world toy-hard --output nbs/results/toy-hard-methods.json

Each run is `train` and `evaluate` of the recipe `demo` or `demo-hard` with another adapter, on one thread. Finished runs are kept in the
output file, so that an interrupted measurement goes on where it stopped.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

import peft
import torch
import transformers

from d2mora.evaluate import evaluate
from d2mora.tasks import toy_base
from d2mora.train import adapted_base, load_recipe, train

OURS = dict(peft_type="D2MORA", r=3, lora_alpha=24, lora_dropout=0.0, orthogonality_weight=1e-4, target_modules="all-linear")
QKV = ["q_proj", "k_proj", "v_proj"]
METHODS = {
    "lora": dict(peft_type="LORA", r=18, lora_alpha=36, lora_dropout=0.0, target_modules="all-linear"),
    "one-to-many": OURS | dict(pairing="one-to-many", num_down_experts=1, num_up_experts=8),
    "d2mora": OURS | dict(num_down_experts=3, num_up_experts=8),
    "d2mora-qkv": OURS | dict(num_down_experts=3, num_up_experts=8, target_modules=QKV),
}

def one_run(recipe_name: str, method: str, seed: int, steps: int | None) -> dict:
    "Train and grade one method with one seed."
    changes = {"training.seed": seed, "training.disable_tqdm": True} | ({"training.max_steps": steps} if steps else {})
    recipe = load_recipe(recipe_name, changes)
    recipe.adapter = METHODS[method]
    model, _ = adapted_base(recipe, seed)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        run = train(recipe, Path(folder) / "run")
        seconds = dict(wall=round(time.perf_counter() - wall), cpu=round(time.process_time() - cpu))
        result = evaluate(run)
    tasks = {task: dict(n=t["n"], accuracy=t["accuracy"], chance=t["chance"], interval=t["interval"]) for task, t in result["tasks"].items()}
    return dict(method=method, seed=seed, steps=recipe.training["max_steps"], parameters=trained, seconds=seconds, average=result["average"], tasks=tasks)

def table(runs: list[dict]) -> dict:
    "For each method the mean and standard deviation over seeds."
    out = {}
    for method in dict.fromkeys(r["method"] for r in runs):
        own = [r for r in runs if r["method"] == method]
        averages = [r["average"] for r in own]
        out[method] = dict(seeds=len(own), parameters=own[0]["parameters"], average=mean(averages), std=stdev(averages) if len(own) > 1 else None,
                           tasks={t: mean(r["tasks"][t]["accuracy"] for r in own) for t in own[0]["tasks"]})
    return out

def main(argv=None):
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=("toy", "toy-hard"), default="toy")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    runs = json.loads(args.output.read_text())["runs"] if args.output.exists() else []
    done = {(r["method"], r["seed"]) for r in runs}
    recipe = {"toy": "demo", "toy-hard": "demo-hard"}[args.world]
    for seed in map(int, args.seeds.split(",")):
        for method in (m for m in args.methods.split(",") if (m, seed) not in done):
            runs.append(one_run(recipe, method, seed, args.steps))
            about = dict(command="python benchmarks/toy_methods.py " + " ".join(argv or sys.argv[1:]), threads=torch.get_num_threads(),
                         versions=dict(torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__),
                         hashes=(Path(toy_base()).parent / "toy.sha256").read_text().splitlines())
            args.output.write_text(json.dumps(about | dict(methods=table(runs), runs=runs), indent=1) + "\n")
            print({k: v for k, v in runs[-1].items() if k != "tasks"}, {t: v["accuracy"] for t, v in runs[-1]["tasks"].items()}, flush=True)

if __name__ == "__main__":
    main()
