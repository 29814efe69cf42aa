"""What LoRA, one-to-many and D2MoRA reach on the easy toy world: equal steps, equal learning rate, parameters equal to within 3 %.

How strongly an update counts, lora_alpha / r, is chosen for each method among the same three by the loss on training rows set aside.

    python benchmarks/toy_methods.py --steps 400 --output nbs/results/toy-methods.json

Each run is `train` and `evaluate` of the recipe `demo` with another adapter, on one thread. The hard world has `hard_world.py`. Finished runs are kept in the
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
from d2mora.toy import toy_base
from d2mora.recipe import adapted_base, load_recipe
from d2mora.train import validation_losses
from d2mora.train import train

OURS = dict(peft_type="D2MORA", r=3, lora_dropout=0.0, orthogonality_weight=1e-4, target_modules="all-linear")
METHODS = {
    "lora": dict(peft_type="LORA", r=18, lora_dropout=0.0, target_modules="all-linear"),
    "one-to-many": OURS | dict(pairing="one-to-many", num_down_experts=1, num_up_experts=8),
    "d2mora": OURS | dict(num_down_experts=3, num_up_experts=8),
    "d2mora-qkv": OURS | dict(num_down_experts=3, num_up_experts=8, target_modules=["q_proj", "k_proj", "v_proj"]),
}
SCALES, CHOOSING_SEED, HELD_OUT = (
    (2, 8, 32),
    100,
    400,
)  # lora_alpha / r; the seed and the training rows set aside to choose it by


def recipe_of(method: str, scale: int, seed: int, changes: dict):
    "The demo's recipe with another method, scale and seed."
    recipe = load_recipe("demo", {"training.seed": seed, "training.disable_tqdm": True} | changes)
    recipe.adapter = METHODS[method] | dict(lora_alpha=scale * METHODS[method]["r"])
    return recipe


def held_out_loss(method: str, scale: int, changes: dict) -> float:
    "Final loss on training rows that were set aside; tested facts play no part in the choice."
    with tempfile.TemporaryDirectory() as folder:
        run = train(
            recipe_of(method, scale, CHOOSING_SEED, changes | {"data.validation_rows": HELD_OUT}), Path(folder) / "run"
        )
        return mean(last for _, last in validation_losses(run).values())


def one_run(method: str, scale: int, seed: int, changes: dict) -> dict:
    "Train and grade one method with one seed."
    recipe = recipe_of(method, scale, seed, changes)
    trained = sum(p.numel() for p in adapted_base(recipe, seed)[0].parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        run = train(recipe, Path(folder) / "run")
        seconds = dict(wall=round(time.perf_counter() - wall), cpu=round(time.process_time() - cpu))
        result = evaluate(run)
    tasks = {
        task: dict(n=t["n"], accuracy=t["accuracy"], chance=t["chance"], interval=t["interval"])
        for task, t in result["tasks"].items()
    }
    return dict(
        method=method,
        scale=scale,
        seed=seed,
        steps=recipe.training["max_steps"],
        parameters=trained,
        seconds=seconds,
        average=result["average"],
        tasks=tasks,
    )


def table(runs: list[dict]) -> dict:
    "For each method the mean and standard deviation over seeds."
    out = {}
    for method in dict.fromkeys(r["method"] for r in runs):
        own = [r for r in runs if r["method"] == method]
        averages = [r["average"] for r in own]
        out[method] = dict(
            seeds=len(own),
            parameters=own[0]["parameters"],
            scale=own[0]["scale"],
            average=mean(averages),
            std=stdev(averages) if len(own) > 1 else None,
            tasks={t: mean(r["tasks"][t]["accuracy"] for r in own) for t in own[0]["tasks"]},
        )
    return out


def write(path: Path, command: str, choice: dict, runs: list[dict]):
    "The result file, complete or as before."
    about = dict(
        command=command,
        threads=torch.get_num_threads(),
        versions=dict(torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__),
        hashes=(Path(toy_base()).parent / "toy.sha256").read_text().splitlines(),
    )
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(about | dict(choice=choice, methods=table(runs), runs=runs), indent=1) + "\n")
    aside.rename(path)


def main(argv=None):
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    changes, command = (
        {"training.max_steps": args.steps} if args.steps else {},
        "python benchmarks/toy_methods.py " + " ".join(argv or sys.argv[1:]),
    )
    kept = json.loads(args.output.read_text()) if args.output.exists() else dict(choice={}, runs=[])
    choice, runs, methods = kept["choice"], kept["runs"], args.methods.split(",")
    for method in methods:
        losses = choice.setdefault(method, {})
        for scale in (s for s in SCALES if str(s) not in losses):
            losses[str(scale)] = held_out_loss(method, scale, changes)
            write(args.output, command, choice, runs)
            print(method, "scale", scale, "held-out loss", losses[str(scale)], flush=True)
    done = {(r["method"], r["seed"]) for r in runs}
    for seed in map(int, args.seeds.split(",")):
        for method in (m for m in methods if (m, seed) not in done):
            runs.append(one_run(method, int(min(choice[method], key=choice[method].get)), seed, changes))
            write(args.output, command, choice, runs)
            print(
                {k: v for k, v in runs[-1].items() if k != "tasks"},
                {t: v["accuracy"] for t, v in runs[-1]["tasks"].items()},
                flush=True,
            )


if __name__ == "__main__":
    main()
