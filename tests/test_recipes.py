"""The built-in recipes: every one loads, the published ones say what was published, and their adapters have the published sizes."""

import json
import re
import shlex
from importlib.resources import files
from pathlib import Path

import pytest

from d2mora.data import DataConfig
from d2mora.compare import trained_parameters
from d2mora.recipe import base_shape
from d2mora.recipe import load_recipe, recipe_names

PUBLISHED = {  # name: base, M, N, r
    "llama-7b-m3n8r8": ("huggyllama/llama-7b", 3, 8, 8),
    "llama-7b-m3n4r16": ("huggyllama/llama-7b", 3, 4, 16),
    "llama2-7b-m3n8r8": ("meta-llama/Llama-2-7b-hf", 3, 8, 8),
    "llama2-7b-m4n3r16": ("meta-llama/Llama-2-7b-hf", 4, 3, 16),
}
MENDED = [f"{name}-mended" for name in PUBLISHED]
BASELINES = ["lora-r64", "dora-r64", "one-to-one-8-8-8", "one-to-many-1-8-12", "one-to-many-1-6-16"]
OTHERS = ["llama3-8b-m3n8r8", "qwen2.5-0.5b-m3n8r8", "smollm2-135m", "smollm2-135m-cloze"]
TOY = {"data.path": "toy"}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads(name):
    overrides = TOY | ({"base": "toy"} if name == "commonsense-mini" else {})
    assert load_recipe(name, overrides).adapter["peft_type"] in ("D2MORA", "LORA")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_say_what_was_published(name):
    base, M, N, r = PUBLISHED[name]
    recipe, training = load_recipe(name, TOY), load_recipe(name, TOY).training
    assert recipe.base == base
    adapter = dict(
        peft_type="D2MORA",
        pairing="many-to-many",
        num_down_experts=M,
        num_up_experts=N,
        r=r,
        lora_alpha=2 * r,
        lora_dropout=0.05,
    )
    assert recipe.adapter == adapter | dict(
        expert_dropout="independent", orthogonality_weight=1e-4, target_modules=["q_proj", "k_proj", "v_proj"]
    )
    data = dict(
        prompt="official",
        train_on_inputs=True,
        cutoff=256,
        truncation="published",
        validation_rows=2000,
        sampling="random",
    )
    assert recipe.data == DataConfig(path="toy", **data)  # all eight tasks: the default
    assert (
        training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] == 16
        and training["per_device_train_batch_size"] == 4
    )
    expected = dict(
        num_train_epochs=4,
        optim="adamw_torch",
        learning_rate=3e-4,
        weight_decay=0.0,
        lr_scheduler_type="linear",
        warmup_steps=100,
    )
    expected |= dict(
        max_grad_norm=1.0,
        fp16=True,
        gradient_checkpointing=False,
        eval_strategy="steps",
        eval_steps=200,
        save_strategy="steps",
    )
    expected |= dict(save_steps=200, load_best_model_at_end=True, metric_for_best_model="loss")
    assert {key: training.get(key) for key in expected} == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_mended_recipes_differ_only_where_they_say_so(name):
    old, new = load_recipe(name, TOY), load_recipe(f"{name}-mended", TOY)
    assert (new.data.cutoff, new.data.truncation, new.data.prompt, new.data.sampling) == (
        512,
        "prompt",
        "plain",
        "packed",
    )
    assert (new.data.train_on_inputs, new.data.validation_rows, new.base) == (
        old.data.train_on_inputs,
        old.data.validation_rows,
        old.base,
    )
    assert new.adapter == old.adapter | {"expert_dropout": "shared"}
    changed = {key for key in old.training | new.training if old.training.get(key) != new.training.get(key)}
    assert changed == {"fp16", "bf16", "eval_steps", "save_steps"} and new.training["bf16"] is True


def trained(name):
    return trained_parameters(load_recipe(name, TOY))


SIZES = {
    "llama-7b-m3n8r8": 35.79,
    "llama-7b-m3n4r16": 45.23,
    "llama2-7b-m4n3r16": 45.62,
    "lora-r64": 50.33,
    "dora-r64": 50.72,
}
SIZES |= {"one-to-one-8-8-8": 53.48, "one-to-many-1-8-12": 45.61, "one-to-many-1-6-16": 46.40}


@pytest.mark.parametrize("name", SIZES)
def test_adapters_have_the_size_that_the_recipe_states(name):
    assert round(trained(name) / 1e6, 2) == SIZES[name]
    text = (Path(str(files("d2mora"))) / "recipes" / f"{name}.yaml").read_text()
    stated = re.search(r"([\d.]+) M parameters", text)
    assert stated is None or float(stated[1]) in (SIZES[name], 45.6)


COUNTS = {"huggyllama/llama-7b": 6_738_415_616, "meta-llama/Llama-2-7b-hf": 6_738_415_616}
COUNTS |= {
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}


@pytest.mark.parametrize("base", COUNTS)
def test_shipped_shapes_have_their_publishers_parameter_counts(base):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        assert sum(p.numel() for p in AutoModelForCausalLM.from_config(base_shape(base)).parameters()) == COUNTS[base]


@pytest.mark.parametrize("name", [*PUBLISHED, *MENDED, *BASELINES, *OTHERS])
def test_every_base_has_a_shipped_shape_and_every_departure_a_comment(name):
    recipe, folder = load_recipe(name, TOY), Path(str(files("d2mora")))
    assert (folder / "assets/bases" / recipe.base / "config.json").is_file()
    head = [line for line in (folder / "recipes" / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert len(head) >= 4 and any(f"d2mora train {name} " in line for line in head)


ROOT = Path(__file__).parents[1]


def launches():
    "Every command of README and book that starts several processes: where it stands, how many, and what is behind `train`."
    for path in (ROOT / "README.md", *sorted((ROOT / "nbs").glob("*.ipynb"))):
        text = (
            path.read_text(encoding="utf-8")
            if path.suffix == ".md"
            else "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"])
        )
        for line in text.replace("\\\n", " ").splitlines():
            if found := re.search(r"--num_processes (\d+) .*-m d2mora.cli train (?!RECIPE)(.*)", line):
                yield path.name, int(found[1]), shlex.split(found[2], comments=True)


def rows_a_step(recipe, processes):
    return (
        recipe.training["per_device_train_batch_size"]
        * recipe.training.get("gradient_accumulation_steps", 1)
        * processes
    )


def test_commands_for_several_gpus_keep_the_published_batch():
    found = list(launches())
    assert {(name, processes) for name, processes, _ in found} >= {
        ("README.md", 8),
        ("index.ipynb", 8),
        ("14_full_run.ipynb", 2),
        ("14_full_run.ipynb", 16),
    }
    for name, processes, (recipe, *words) in found:
        overrides = [word for word in words if "=" in word and not word.startswith("data.path")]
        assert rows_a_step(load_recipe(recipe, ["data.path=toy", *overrides]), processes) == 16, name


@pytest.mark.parametrize("name", [*PUBLISHED, *MENDED, *BASELINES])
def test_what_a_recipe_advises_for_more_gpus_keeps_its_batch(name):
    text = (Path(str(files("d2mora"))) / "recipes" / f"{name}.yaml").read_text()
    assert all(
        words in text.replace("\n# ", " ")
        for words in (
            "Two GPUs: training.gradient_accumulation_steps=2; four: 1; eight: 1 and training.per_device_train_batch_size=2",
        )
    )
    for processes, keys in {
        1: {},
        2: {"gradient_accumulation_steps": 2},
        4: {"gradient_accumulation_steps": 1},
        8: {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2},
    }.items():
        assert (
            rows_a_step(load_recipe(name, TOY | {f"training.{key}": value for key, value in keys.items()}), processes)
            == 16
        )
