"""The comparison of chapter 12 on a base that knows something: SmolLM2-135M on the tasks' train sets, labels or texts as answers.

    make smollm2                                                          # the base, in models/smollm2-135m
    python benchmarks/smollm2.py --data FOLDER                            # days on two cores, an evening on one GPU
    timeout 9m python benchmarks/smollm2.py --data FOLDER --formats cloze --share 16 --methods lora,d2mora --seeds 0,1 --limit 500

For each format (the recipe smollm2-135m or smollm2-135m-cloze), `d2mora.compare.compare` searches a learning rate for each method, trains and
grades it by `choice` and `content`; so is the base without an adapter. --share 16 trains a sixteenth of an epoch. Results go to
benchmarks/results/smollm2-FORMAT-share-SHARE.json. Runs lie in runs/smollm2: a study that was stopped goes on there by the same command,
each run from its last checkpoint. The files in benchmarks/results/smollm2 are of an earlier form of this study.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from hard_world import called, listed, side_by_side
from real_study import graded_base

from d2mora.compare import METHODS, compare, comparison_report, varied
from d2mora.data import find_file, read_file
from d2mora.recipe import Recipe, load_recipe
from d2mora.utils import nearest, write_text

ROOT = Path(__file__).resolve().parents[1]
FORMATS = {"cloze": "smollm2-135m-cloze", "labels": "smollm2-135m"}  # the recipe of each
PROTOCOLS = ("choice", "content")


def recipe_of(style: str, args) -> Recipe:
    "The recipe of a format, on this base and these rows, with the steps of a share of the epoch."
    where = {"base": str(args.base), "data.path": str(args.data), "data.validation_rows": args.validation_rows}
    recipe = load_recipe(FORMATS[style], where)
    training = recipe.training
    rows = sum(len(read_file(find_file(args.data, task, "train"))) for task in recipe.data.tasks)
    step = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    steps = max(1, (rows - args.validation_rows) // step // args.share)
    changes = {"max_steps": steps, "warmup_steps": max(1, steps // 30), "save_steps": 50, "eval_strategy": "no"}
    return varied(recipe, disable_tqdm=True, use_cpu=not torch.cuda.is_available(), **changes)


def study(style: str, args, each) -> dict:
    "The comparison in one format, and the base without an adapter."
    recipe, folder = recipe_of(style, args), args.output / f"{style}-share-{args.share}"
    given = {"methods": args.methods, "seeds": args.seeds, "limit": args.limit, "protocols": PROTOCOLS}
    result = compare(recipe, folder, learning_rates=args.learning_rates, each=each, **given)
    result["frozen"] = {"grades": graded_base(recipe, folder / "frozen", PROTOCOLS, args.limit)}
    return result | {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}


def check(args) -> None:
    "Refuse what cannot be run before the first run."
    if not (args.base / "model.safetensors").is_file():
        raise ValueError(f"no base in {args.base}: run make smollm2, or name a folder by --base")
    for style in args.formats:
        if style not in FORMATS:
            raise ValueError(f"unknown format '{style}'{nearest(style, FORMATS)}")


def main(argv=None) -> None:
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("D2MORA_SHARED", ROOT.parent / "shared"))
    parser.add_argument("--base", type=Path, default=ROOT / "models/smollm2-135m")
    parser.add_argument("--data", type=Path, default=shared / "data", help="a folder with one folder a task")
    parser.add_argument("--formats", type=listed(), default=list(FORMATS))
    parser.add_argument("--methods", type=listed(), default=list(METHODS))
    parser.add_argument("--seeds", type=listed(int), default=[0, 1, 2, 3, 4])
    parser.add_argument("--learning-rates", type=listed(float), default=[], help="try these instead of searching")
    parser.add_argument("--share", type=int, default=1, help="16: a sixteenth of an epoch")
    parser.add_argument("--limit", type=int, help="test rows a task; default: all")
    parser.add_argument("--validation-rows", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/smollm2")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args(argv)
    check(args)
    with side_by_side(args.workers) as each:
        for style in args.formats:
            result = study(style, args, each) | {"command": called("smollm2", argv)}
            write_text(args.results / f"smollm2-{style}-share-{args.share}.json", json.dumps(result, indent=1) + "\n")
            print(comparison_report(result))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        sys.exit(2)
