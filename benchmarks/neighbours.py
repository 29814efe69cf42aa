"""The ideas of neighbouring methods, written as pairings in the appendix nbs/c_related.ipynb, trained on the easy toy world beside ours.

    python benchmarks/neighbours.py nbs/results/neighbours-toy.json

The pairings are read from the notebook: its cells that say so are run here. Each idea is trained as the fields of axes.py are: the
recipe `demo`, cut to the same steps, with the same seeds, graded on as many rows. Nothing was tuned for any of them. Finished runs
stand in the output file and are not trained again.
"""

import json
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import nbformat
import torch
import transformers
from axes import LIMIT, PLATEAU, SEEDS, STEPS, left_plateau
from common import command_line, store
from torch import Tensor

from d2mora.compare import about_comparison, varied
from d2mora.evaluate import test_rows
from d2mora.many_to_many import mix_down
from d2mora.scoring import grade_rows
from d2mora.recipe import load_base, load_recipe
from d2mora.routers import many_to_many
from d2mora.shared_a import mix_up, one_to_many, one_to_one
from d2mora.train import train
from d2mora.tuner import PAIRINGS

NOTEBOOK = Path(__file__).parents[1] / "nbs" / "c_related.ipynb"
GIVEN = dict(torch=torch, nn=torch.nn, load_base=load_base, Tensor=Tensor, replace=replace, PAIRINGS=PAIRINGS)
GIVEN |= dict(mix_down=mix_down, mix_up=mix_up, one_to_one=one_to_one, one_to_many=one_to_many)
GIVEN |= dict(many_to_many=many_to_many)


def ideas() -> dict:
    "Run the notebook's marked cells; what they define."
    mark = "# benchmarks/neighbours.py runs this cell too"
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.source.startswith(mark):
            exec(cell.source, GIVEN)
    return GIVEN


class Hand(transformers.TrainerCallback):
    "Does to the model what an idea needs besides its pairing, and keeps the model."

    def __init__(self, besides):
        self.besides = besides

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self.model = model
        with torch.no_grad():
            self.besides(model)


def measured(recipe, name: str, given: dict, seed: int) -> dict:
    "Train one idea once and grade it in memory: an adapter with a pairing of a notebook can be loaded nowhere else."
    _, M, N, r = given["IDEAS"][name]
    size = {"num_down_experts": M, "num_up_experts": N, "r": r}
    size |= {"lora_alpha": r * recipe.adapter["lora_alpha"] / recipe.adapter["r"]}
    adapter = recipe.adapter | size | {"pairing": name, "orthogonality_weight": 0.0} | given["FIELDS"].get(name, {})
    hand = Hand(given["BESIDES"].get(name, lambda model: None))
    with tempfile.TemporaryDirectory() as folder:
        left = left_plateau(train(varied(recipe, adapter, seed=seed), Path(folder) / "run", [hand]))
    model, tokenizer = hand.model.eval(), load_base(recipe.base)[1]
    rows = test_rows(recipe.data, None, LIMIT).items()
    right = {task: [g["right"] for g in grade_rows(model, tokenizer, task, own)] for task, own in rows}
    tasks = {task: sum(own) / len(own) for task, own in right.items()}
    return {
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "average": sum(tasks.values()) / len(tasks),
        "tasks": tasks,
        "left_plateau": left,
    }


def main():
    "Command line."
    parser = command_line(__doc__)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    recipe, given = load_recipe("demo", {"training.max_steps": STEPS, "training.disable_tqdm": True}), ideas()
    found = json.loads(args.output.read_text())["ideas"] if args.output.is_file() else {}
    for seed, name in product(SEEDS, given["IDEAS"]):
        runs = found.setdefault(name, [])
        if seed not in [run["seed"] for run in runs]:
            runs.append(measured(recipe, name, given, seed))
        about = about_comparison(recipe, "equal", LIMIT)
        about |= {"command": f"python benchmarks/neighbours.py {args.output}", "plateau": PLATEAU}
        store(args.output, about | {"ideas": found})
        reached, left = 100 * runs[-1]["average"], runs[-1]["left_plateau"]
        print(f"{name}, seed {seed}: {reached:.1f}, off the plateau at step {left}", flush=True)


if __name__ == "__main__":
    main()
