"""Every shipped recipe, and every pairing down to a single expert, goes through all commands: train, evaluate, export, compare."""

import json

import pytest

from d2mora.cli import main
from d2mora.recipe import load_recipe, recipe_names
from d2mora.toy import toy_rows

EXPERTS = {"many-to-many": [(1, 1), (3, 1), (2, 3)], "one-to-many": [(1, 3)], "one-to-one": [(2, 2)]}
SHAPES = [(pairing, M, N) for pairing, shapes in EXPERTS.items() for M, N in shapes]
SMALL = """base=toy data.tasks=[boolq] data.validation_rows=2 data.cutoff=128 training.max_steps=2 training.warmup_steps=0
    training.per_device_train_batch_size=2 training.gradient_accumulation_steps=1 training.fp16=false
    training.bf16=false training.logging_steps=1""".split()
TRAINED = ["run/adapter/adapter_model.safetensors", "run/report.md", "run/evaluation-choice.json"]
MADE = ["lora/adapter_model.safetensors", "lora/README.md", "all/comparison-equal.json", "all/comparison-equal.md"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A few rows of one task."
    folder = tmp_path_factory.mktemp("data")
    (folder / "boolq").mkdir()
    for split in ("train", "test"):
        (folder / f"boolq/{split}.json").write_text(json.dumps(toy_rows("toy", "boolq", split, 12)))
    return f"data.path={folder}"


def through_all_commands(recipe, overrides, folder, capsys):
    "Each command must end well and leave what it promises; only ours can be exported and compared."
    run, ours = folder / "run", load_recipe(recipe, overrides).adapter["peft_type"] == "D2MORA"
    commands = [["train", recipe, *overrides, "--output", run], ["evaluate", run, "--limit", 4]]
    if ours:
        one = ["--methods", "d2mora", "--seeds", 0, "--learning-rates", "1e-3", "--limit", 4]
        commands.append(["export", run, folder / "lora", "--rows", 4, "--limit", 4])
        commands.append(["compare", recipe, *overrides, *one, "--output", folder / "all"])
    for words in commands:
        assert main([str(word) for word in words]) == 0, (words, capsys.readouterr().err[-800:])
    assert [name for name in TRAINED + MADE * ours if not (folder / name).is_file()] == []


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe(name, data, tmp_path, capsys):
    through_all_commands(name, [data, *SMALL], tmp_path, capsys)


@pytest.mark.parametrize("pairing, M, N", SHAPES)
def test_a_pairing(pairing, M, N, data, tmp_path, capsys):
    shape = [
        f"adapter.pairing={pairing}",
        f"adapter.num_down_experts={M}",
        f"adapter.num_up_experts={N}",
        "adapter.r=1",
    ]
    through_all_commands("demo", [data, *SMALL, *shape], tmp_path, capsys)
