"""Models that tests adapt, and the two habits of every behaviour test: fill the adapter, see that it acts."""

from functools import partial

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import d2mora
from d2mora.tuner import PAIRINGS

QKV = ["q_proj", "k_proj", "v_proj"]
PAIRS = {"many-to-many": (3, 8), "one-to-many": (1, 4), "one-to-one": (4, 4)}


def tiny_llama(dtype=torch.float32, **changes):
    "Two blocks, grouped-query attention, random weights; the same each time."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
        config = LlamaConfig(**{**sizes, "num_key_value_heads": 2, "max_position_embeddings": 256, **changes})
        return LlamaForCausalLM(config).to(dtype).eval()


def our_config(pairing="many-to-many", **fields):
    M, N = PAIRS[pairing]
    given = dict(pairing=pairing, num_down_experts=M, num_up_experts=N, target_modules=QKV, task_type="CAUSAL_LM")
    return d2mora.D2MoraConfig(**{**given, **fields})


def fill(model, seed=1, std=0.3, adapter=""):
    "Give every adapter tensor random values: a fresh adapter has B = 0 and hides every fault."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, p in model.named_parameters():
            if "d2mora_" in name and name.endswith(adapter and f".{adapter}.weight"):
                p.data.copy_(std * torch.randn(p.shape))  # drawn in float32: other types draw other numbers
    return model


def adapted(base=None, pairing="many-to-many", **fields):
    "An adapted tiny LLaMA whose logits differ from the base's by more than 1e-2."
    base, ids = tiny_llama() if base is None else base, tokens()
    before = base(ids).logits.detach()
    model = fill(peft.get_peft_model(base, our_config(pairing, **fields))).eval()
    assert difference(model(ids).logits, before) > 1e-2
    return model


def adapted_stories(shared, **fields):
    "stories260K with a filled adapter, its tokenizer, and the folder of real rows."
    from d2mora.recipe import load_base

    base, tokenizer = load_base(str(shared / "models/stories260K"))
    torch.manual_seed(0)
    return fill(peft.get_peft_model(base, our_config(**fields)), std=0.05), tokenizer, str(shared / "data")


def loop(layer, x):
    "The update of a layer in float64, token by token and expert by expert; of a new pairing, by its own function."
    config = layer.adapter_config["default"]

    def part(name):
        return getattr(layer, f"d2mora_{name}")["default"].stack().detach().double()

    def weigh(side, v):
        return (part(f"router_{side}") @ v).softmax(0)

    def token(v):
        down = torch.stack([a @ v for a in part("A")])
        if config.pairing == "one-to-one":
            e = [w * h for w, h in zip(weigh("down", v), down)]
        elif config.pairing == "one-to-many":
            e = [w * down[0] for w in weigh("up", v)]
        elif config.pairing == "many-to-many":
            z = sum(w * h for w, h in zip(weigh("down", v), down))
            e = [w * z for w in weigh("up", z)]
        else:
            e = PAIRINGS[config.pairing](lambda v: down, partial(weigh, "down"), partial(weigh, "up"), v)
        return sum(b.T @ e_j for b, e_j in zip(part("B"), e))

    out = torch.stack([token(v) for v in x.double().reshape(-1, x.shape[-1])])
    return out.view(*x.shape[:-1], -1) * config.lora_alpha / config.r


def tokens(rows=2, length=12, seed=3):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def difference(a, b):
    return (a.float() - b.float()).abs().max().item()


def demo_run(folder, tasks=None, scale=1.0, seed=0):
    "A copy of the committed demo run, not graded: with a recipe for fewer tasks, scaled adapter weights, or another seed."
    import shutil
    from pathlib import Path

    import yaml
    from safetensors.torch import load_file, save_file

    demo, ungraded = Path(__file__).parents[1] / "nbs/results/demo", shutil.ignore_patterns("evaluation*", "before*")
    shutil.copytree(demo, folder, ignore=ungraded, copy_function=shutil.copyfile)
    recipe, weights = folder / "recipe.yaml", folder / "adapter/adapter_model.safetensors"
    words = yaml.safe_load(recipe.read_text())
    words["data"]["tasks"] = tasks or words["data"]["tasks"]
    words["training"]["seed"] = seed
    recipe.write_text(yaml.safe_dump(words))
    save_file({name: scale * tensor for name, tensor in load_file(weights).items()}, weights)
    return folder


def few_real_rows(folder, shared, train, test, order=lambda rows, task: rows):
    "The first rows of each task in some order, written as files; hellaswag has none to train on."
    import json

    from d2mora.data import read_task
    from d2mora.tasks import TASKS

    for task in TASKS:
        (folder / task).mkdir()
        for split, count in (("train", train), ("test", test)):
            if (task, split) != ("hellaswag", "train"):
                rows = read_task(str(shared / "data"), task, split).remove_columns(["task", "row"]).to_list()
                (folder / task / f"{split}.json").write_text(json.dumps(order(rows, task)[:count]))
    return folder
