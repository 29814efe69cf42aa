"""The paper's own axes on the easy toy world: λ by rank, and M by N at one budget.

    python benchmarks/axes.py nbs/results/axes-toy.json --runs runs/axes

Each field is the recipe `demo` with one thing changed, cut to STEPS steps, run once for each of SEEDS. `lora_alpha / r` is the
recipe's everywhere. In the second table the rank is the one that brings the parameters nearest to the recipe's. Every run keeps a
folder of its own under --runs: finished ones are read, an interrupted measurement goes on. --table takes one of the two.
"""

import json
from pathlib import Path

import transformers
from common import command_line, store

from d2mora.compare import about_comparison, nearest_size, one_run, trained_parameters, varied
from d2mora.recipe import Recipe, load_recipe
from d2mora.train import read_metrics

STEPS, SEEDS, LIMIT = 200, (0, 1, 2), 100  # LIMIT: test rows a task
WEIGHTS, RANKS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2), (1, 3, 6)
DOWN, UP = (1, 2, 4), (1, 2, 4, 8)
PLATEAU = 0.15  # nats per target token: runs stay near 0.19 until they have found how the tasks are put


def resized(recipe: Recipe, r: int, **changes) -> dict:
    "The recipe's adapter with another rank, lora_alpha / r kept."
    return recipe.adapter | {"r": r, "lora_alpha": r * recipe.adapter["lora_alpha"] / recipe.adapter["r"]} | changes


def at_budget(recipe: Recipe, M: int, N: int) -> dict:
    "M and N experts of the rank that comes nearest to the recipe's number of parameters."
    sized = lambda r: resized(recipe, r, num_down_experts=M, num_up_experts=N)
    return sized(nearest_size(lambda r: trained_parameters(recipe, sized(r)), trained_parameters(recipe)))


def fields(recipe: Recipe) -> dict[str, dict[str, dict]]:
    "For each table the name and the adapter of each of its fields."
    weights = {f"weight-{w:g}-r-{r}": resized(recipe, r, orthogonality_weight=w) for w in WEIGHTS for r in RANKS}
    sizes = {f"down-{M}-up-{N}": at_budget(recipe, M, N) for M in DOWN for N in UP}
    return {"weight-rank": weights, "down-up": sizes}


def left_plateau(folder: Path) -> int | None:
    "The first logged step whose loss is below the plateau."
    return next((line["step"] for line in read_metrics(folder) if line.get("loss", PLATEAU) < PLATEAU), None)


def measured(recipe: Recipe, adapter: dict, folder: Path) -> dict:
    "One field: what it is, and for each seed what it reached, how similar its experts are, and when it left the plateau."
    kept = {k: adapter[k] for k in ("r", "num_down_experts", "num_up_experts", "orthogonality_weight")} | {"runs": []}
    for seed in SEEDS:
        own = folder / f"seed-{seed}"
        run = one_run(varied(recipe, adapter, seed=seed), own, limit=LIMIT)
        kept["parameters"] = run["parameters"]
        found = {"seed": seed, "average": run["grades"]["choice"]["average"], "similarity": run["similarity"]}
        kept["runs"].append(found | {"left_plateau": left_plateau(own)})
    return kept


def main():
    "Command line."
    parser = command_line(__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/axes"))
    parser.add_argument("--table", choices=("weight-rank", "down-up"))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    recipe = load_recipe("demo", {"training.max_steps": STEPS, "training.disable_tqdm": True})
    kept = json.loads(args.output.read_text())["tables"] if args.output.is_file() else {}
    for table, own in fields(recipe).items():
        if args.table not in (None, table):
            continue
        for number, (name, adapter) in enumerate(own.items(), 1):
            kept.setdefault(table, {})[name] = found = measured(recipe, adapter, args.runs / name)
            about = about_comparison(recipe, "equal", LIMIT)
            about |= {"command": f"python benchmarks/axes.py {args.output}", "plateau": PLATEAU}
            store(args.output, about | {"tables": kept})
            runs = ", ".join(f"{100 * run['average']:.1f} (step {run['left_plateau']})" for run in found["runs"])
            print(f"{table} {number} of {len(own)}: {name}: {runs}", flush=True)


if __name__ == "__main__":
    main()
