"""The built-in recipes: every one loads, the published ones say what was published, and their adapters have the published sizes."""

import json
import re
import shlex
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from d2mora.compare import trained_parameters
from d2mora.data import DataConfig
from d2mora.recipe import base_shape, load_recipe, read_recipe, recipe_names

ROOT, PACKAGE = Path(__file__).parents[1], Path(str(files("d2mora")))
PUBLISHED = {  # name: base, M, N, r
    "llama-7b-m3n8r8": ("huggyllama/llama-7b", 3, 8, 8),
    "llama-7b-m3n4r16": ("huggyllama/llama-7b", 3, 4, 16),
    "llama2-7b-m3n8r8": ("meta-llama/Llama-2-7b-hf", 3, 8, 8),
    "llama2-7b-m4n3r16": ("meta-llama/Llama-2-7b-hf", 4, 3, 16),
}
BASELINES = ["lora-r64", "dora-r64", "one-to-one-8-8-8", "one-to-many-1-8-12", "one-to-many-1-6-16"]
LARGE = [*PUBLISHED, *(f"{name}-mended" for name in PUBLISHED), *BASELINES]  # a step reads 16 rows
SIZES = {  # million parameters
    "llama-7b-m3n8r8": 35.79, "llama-7b-m3n4r16": 45.23, "llama2-7b-m4n3r16": 45.62, "lora-r64": 50.33, "dora-r64": 50.72,
    "one-to-one-8-8-8": 53.48, "one-to-many-1-8-12": 45.61, "one-to-many-1-6-16": 46.40,
}  # fmt: skip
COUNTS = {
    "huggyllama/llama-7b": 6_738_415_616, "meta-llama/Llama-2-7b-hf": 6_738_415_616, "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "Qwen/Qwen2.5-0.5B": 494_032_768, "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}  # fmt: skip
TOY = {"data.path": "toy"}


def text_of(name):
    return (PACKAGE / "recipes" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_has_a_shape_and_says_how_to_run_it(name):
    small = name in ("demo", "demo-hard", "commonsense-mini")
    recipe = load_recipe(name, TOY | ({"base": "toy"} if small else {}))
    assert recipe.adapter["peft_type"] in ("D2MORA", "LORA")
    if not small:
        assert (PACKAGE / "assets/bases" / recipe.base / "config.json").is_file()
        head = [line for line in text_of(name).splitlines() if line.startswith("#")]
        assert len(head) >= 4 and any(f"d2mora train {name} " in line for line in head)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_say_what_was_published(name):
    base, M, N, r = PUBLISHED[name]
    recipe = load_recipe(name, TOY)
    assert recipe.base == base
    assert recipe.adapter == dict(
        peft_type="D2MORA", pairing="many-to-many", num_down_experts=M, num_up_experts=N, r=r, lora_alpha=2 * r, lora_dropout=0.05,
        expert_dropout="independent", orthogonality_weight=1e-4, target_modules=["q_proj", "k_proj", "v_proj"],
    )  # fmt: skip
    data = dict(prompt="official", train_on_inputs=True, cutoff=256, truncation="published", validation_rows=2000)
    assert recipe.data == DataConfig(path="toy", sampling="random", **data)  # all eight tasks: the default
    expected = dict(
        per_device_train_batch_size=4, gradient_accumulation_steps=4, num_train_epochs=4, optim="adamw_torch", learning_rate=3e-4,
        weight_decay=0.0, lr_scheduler_type="linear", warmup_steps=100, max_grad_norm=1.0, fp16=True, gradient_checkpointing=False,
        eval_strategy="steps", eval_steps=200, save_strategy="steps", save_steps=200, load_best_model_at_end=True,
        metric_for_best_model="loss",
    )  # fmt: skip
    assert {key: recipe.training.get(key) for key in expected} == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_mended_recipes_differ_only_where_they_say_so(name):
    old, new = load_recipe(name, TOY), load_recipe(f"{name}-mended", TOY)
    mended = dict(cutoff=512, truncation="prompt", prompt="plain", sampling="packed")
    assert vars(new.data) == vars(old.data) | mended and new.base == old.base
    assert new.adapter == old.adapter | {"expert_dropout": "shared"}
    changed = {key for key in old.training | new.training if old.training.get(key) != new.training.get(key)}
    assert changed == {"fp16", "bf16", "eval_steps", "save_steps"} and new.training["bf16"] is True


def test_numbers_without_a_dot_are_numbers_and_the_environment_stands_in_for_a_path(tmp_path, monkeypatch):
    own = "base: toy\ntraining: {learning_rate: 3e-4}\nadapter: {orthogonality_weight: 1e-4, target_modules: [q_proj]}"
    (tmp_path / "own.yaml").write_text(own)
    assert read_recipe(tmp_path / "own.yaml")["training"]["learning_rate"] == "3e-4"
    monkeypatch.setenv("D2MORA_DATA", "toy-hard")
    recipe = load_recipe(tmp_path / "own.yaml", ["training.weight_decay=1e-2"])
    assert (recipe.training, recipe.data.path) == ({"learning_rate": 3e-4, "weight_decay": 1e-2}, "toy-hard")
    assert recipe.adapter["orthogonality_weight"] == 1e-4 and load_recipe("demo").data.path == "toy"


@pytest.mark.parametrize("name", SIZES)
def test_adapters_have_the_size_that_the_recipe_states(name):
    assert round(trained_parameters(load_recipe(name, TOY)) / 1e6, 2) == SIZES[name]
    stated = re.search(r"([\d.]+) M parameters", text_of(name))
    assert stated is None or float(stated[1]) in (SIZES[name], 45.6)


@pytest.mark.parametrize("base", COUNTS)
def test_shipped_shapes_have_their_publishers_parameter_counts(base):
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoModelForCausalLM.from_config(base_shape(base)).parameters()) == COUNTS[base]


def launches():
    "Every command of README and book that starts several processes: where it stands, how many, and what is behind `train`."
    for path in (ROOT / "README.md", *sorted((ROOT / "nbs").glob("*.ipynb"))):
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".md":
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        for line in text.replace("\\\n", " ").splitlines():
            if found := re.search(r"--num_processes (\d+) .*-m d2mora.cli train (?!RECIPE)(.*)", line):
                yield path.name, int(found[1]), shlex.split(found[2], comments=True)


def test_commands_for_several_gpus_keep_the_published_batch():
    found = list(launches())
    assert {"README.md", "index.ipynb", "14_full_run.ipynb"} <= {name for name, _, _ in found}
    advice = {2: "gradient_accumulation_steps=2", 4: "gradient_accumulation_steps=1"}  # of the recipes' comments
    found += [("recipe", count, (name, f"training.{word}")) for name in LARGE for count, word in advice.items()]
    for where, processes, (recipe, *words) in found:
        overrides = [word for word in words if "=" in word and not word.startswith("data.path")]
        training = load_recipe(recipe, ["data.path=toy", *overrides]).training
        rows = training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1) * processes
        assert rows == 16, (where, recipe)
    for name in LARGE:
        assert "Two GPUs: training.gradient_accumulation_steps=2; four: 1; eight: 1 and" in text_of(name).replace(
            "\n# ", " "
        )
