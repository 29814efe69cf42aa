"""What `d2mora demo` reaches over three seeds, against its promise: every task clear of chance by 25 points, 75 % on average.

    python benchmarks/demo_seeds.py nbs/results/demo-seeds.json --runs runs/seeds

Each seed is a whole demo in a folder of its own under --runs; finished ones are read, not trained again. The first is what stands in
nbs/results/demo (recipe, adapter, losses, grades).
"""

import json
from pathlib import Path
from statistics import mean

import transformers
from common import command_line, store

from d2mora.compare import run
from d2mora.recipe import load_recipe


def graded(folder: Path, seed: int) -> dict:
    "Accuracy, chance and interval by task of one demo, trained now if it is not there."
    if not (folder / "report.md").is_file():
        run(load_recipe("demo", {"training.seed": seed, "training.disable_tqdm": True}), folder)
    result = json.loads((folder / "evaluation-choice.json").read_text())
    kept = ("n", "accuracy", "chance", "interval")
    tasks = {task: {key: own[key] for key in kept} for task, own in result["tasks"].items()}
    return {"seed": seed, "average": result["average"], "tasks": tasks}


def promise(runs: list[dict]) -> dict:
    "Each line of the promise and whether it holds."
    gains = {t: mean(r["tasks"][t]["accuracy"] - r["tasks"][t]["chance"] for r in runs) for t in runs[0]["tasks"]}
    clear = all(t["interval"][0] > t["chance"] for r in runs for t in r["tasks"].values())
    reached = {"least_gain_over_chance": min(gains.values()), "average": mean(r["average"] for r in runs)}
    return {"intervals_clear_of_chance": clear} | reached


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    runs = [graded(args.runs / f"demo-{seed}", seed) for seed in range(3)]
    about = {"command": f"python benchmarks/demo_seeds.py {args.output}"}
    about |= {"steps": load_recipe("demo").training["max_steps"], "promise": promise(runs)}
    store(args.output, about | {"runs": runs})
    print(json.dumps(about["promise"]))
