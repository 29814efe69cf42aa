"""The comparison of chapter 12 on the hard toy world: a learning rate searched for each method, one lora_alpha for all, five seeds.

    python benchmarks/hard_world.py                      # equal parameters, the paper's proportions, and the loss at four weights
    python benchmarks/hard_world.py --parts equal --seeds 0,1 --methods lora,d2mora
    python benchmarks/hard_world.py training.max_steps=10 --limit 10 --runs runs/tiny --output runs/tiny    # a trial

Writes nbs/results/hard-world.json, hard-world-paper.json (results of `d2mora.compare.compare`) and hard-world-loss.json (D2MoRA with other
weights of its orthogonality loss, at the learning rate of the one without). Every run has a folder under --runs: a finished one is read and
an unfinished one goes on, so that the same command continues a study that was stopped. --workers runs go side by side, one thread each.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import datasets
import torch
import transformers

from d2mora.compare import METHODS, at_edge, best_rate, compare, comparison_report, last_fifth, one_job, varied
from d2mora.compare import with_curve
from d2mora.recipe import Recipe, load_recipe
from d2mora.utils import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = {"equal": "hard-world", "paper": "hard-world-paper", "loss": "hard-world-loss"}  # the file of each part
WEIGHTS = (0.0, 1e-6, 1e-5, 1e-4)  # of the orthogonality loss
LONG = ("training.max_steps=1500", "training.disable_tqdm=true")  # until the loss of no method falls any more


def quiet() -> None:
    "One thread and no messages of libraries, in each process."
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextmanager
def side_by_side(workers: int):
    "A `map` whose calls run in so many processes, one thread each, or in this one."
    quiet()
    if workers == 1:
        yield map
    else:
        os.environ["OMP_NUM_THREADS"] = "1"
        with ProcessPoolExecutor(workers, get_context("spawn"), quiet) as pool:
            yield partial(pool.map, chunksize=1)


def listed(kind=str):
    "A type of argument: values with commas between them."
    return lambda text: [kind(part) for part in text.split(",")]


def called(program: str, argv) -> str:
    "The command of a result file."
    return f"python benchmarks/{program}.py " + " ".join(sys.argv[1:] if argv is None else argv)


def with_weights(recipe: Recipe, equal: dict, args, each) -> dict:
    "D2MoRA at the rate of d2mora-no-loss, with each weight and seed."
    rate = best_rate(equal["learning_rates"]["d2mora-no-loss"])
    curved, jobs = varied(with_curve(recipe), learning_rate=rate), []
    for seed, weight in product(args.seeds, WEIGHTS):
        folder = args.runs / (f"loss/weight-{weight:g}" if weight else "equal/d2mora-no-loss") / f"seed-{seed}"
        one = varied(curved, recipe.adapter | {"orthogonality_weight": weight}, seed=seed)
        jobs.append((one, folder, f"weight {weight:g}", ("choice",), args.limit, False))
    keys = ("base", "data", "limit", "training", "hashes", "versions")
    return {k: equal[k] for k in keys} | {"learning_rate": rate, "runs": list(each(one_job, *zip(*jobs)))}


def write(part: str, result: dict, args) -> None:
    "Write a result file, and say where a rate lies at an edge or a run was too short."
    write_text(args.output / f"{RESULTS[part]}.json", json.dumps(result | {"command": args.command}, indent=1) + "\n")
    edges = [method for method, losses in result.get("learning_rates", {}).items() if at_edge(losses)]
    falling = sorted({run["method"] for run in result["runs"] if last_fifth(run["curve"]) > 0.01})
    print(f"{part}: rates at an edge: {', '.join(edges) or 'none'}", file=sys.stderr)
    print(f"{part}: loss still falling by over 1 % in the last fifth: {', '.join(falling) or 'none'}", file=sys.stderr)


def study(recipe: Recipe, args, each) -> None:
    "The parts that were asked for; the weights of the loss need the rates of the first part."
    common = {"methods": args.methods, "seeds": args.seeds, "limit": args.limit, "each": each}
    for budget in ("equal", "paper"):
        if budget in args.parts:
            result = compare(recipe, args.runs, budget=budget, **common)
            write(budget, result, args)
            print(comparison_report(result))
    if "loss" in args.parts:
        equal = args.output / f"{RESULTS['equal']}.json"
        if not equal.is_file():
            raise ValueError(f"{equal}: not there: run --parts equal first, with d2mora-no-loss among --methods")
        write("loss", with_weights(recipe, json.loads(equal.read_text()), args, each), args)


def main(argv=None) -> None:
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    parser.add_argument("overrides", nargs="*", help="section.key=value: values of the recipe demo-hard")
    parser.add_argument("--parts", type=listed(), default=list(RESULTS), help=", ".join(RESULTS))
    parser.add_argument("--methods", type=listed(), default=list(METHODS))
    parser.add_argument("--seeds", type=listed(int), default=[0, 1, 2, 3, 4])
    parser.add_argument("--limit", type=int, help="test rows a task; default: all")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/hard-world")
    parser.add_argument("--output", type=Path, default=ROOT / "nbs/results")
    args = parser.parse_args(argv)
    args.command = called("hard_world", argv)
    if unknown := set(args.parts) - set(RESULTS):
        raise ValueError(f"--parts {', '.join(unknown)}: choose among {', '.join(RESULTS)}")
    args.output.mkdir(parents=True, exist_ok=True)
    started, recipe = time.monotonic(), load_recipe("demo-hard", [*LONG, *args.overrides])
    with side_by_side(args.workers) as each:
        study(recipe, args, each)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes in this call", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"hard_world: {error}", file=sys.stderr)
        sys.exit(2)
