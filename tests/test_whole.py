"""Each kind of shipped recipe, and every pairing down to a single expert, goes through all commands."""

import json

import pytest

from d2mora.cli import main
from d2mora.recipe import load_recipe, recipe_names
from d2mora.toy import toy_rows

SMALL = """base=toy data.tasks=[boolq] data.validation_rows=2 data.cutoff=128 training.max_steps=1 training.warmup_steps=0
    training.per_device_train_batch_size=2 training.gradient_accumulation_steps=1 training.fp16=false training.bf16=false
    training.logging_steps=1 training.learning_rate=1e-3 training.seed=0 adapter.r=2""".split()
KINDS = {}  # recipes whose method or data still differ when they are made small; of each kind the first
for name in recipe_names():
    recipe = load_recipe(name, [*SMALL, "data.path=toy"])
    KINDS.setdefault((recipe.adapter["peft_type"], str(recipe.data)), name)
SHAPES = [("many-to-many", 1, 1), ("many-to-many", 3, 1), ("one-to-many", 1, 3), ("one-to-one", 2, 2)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A few rows of one task."
    folder = tmp_path_factory.mktemp("data")
    (folder / "boolq").mkdir()
    for split in ("train", "test"):
        (folder / f"boolq/{split}.json").write_text(json.dumps(toy_rows("toy", "boolq", split, 12)))
    return f"data.path={folder}"


def run(folder, capsys, *words):
    assert main([str(word) for word in words]) == 0, (words, capsys.readouterr().err[-800:])


@pytest.mark.parametrize("name", KINDS.values())
def test_a_recipe_trains_and_is_graded(name, data, tmp_path, capsys):
    run(tmp_path, capsys, "train", name, data, *SMALL, "--output", tmp_path / "run")
    run(tmp_path, capsys, "evaluate", tmp_path / "run", "--limit", 2)
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file() and (tmp_path / "run/report.md").is_file()


@pytest.mark.parametrize("pairing, M, N", SHAPES)
def test_a_pairing_goes_through_all_commands(pairing, M, N, data, tmp_path, capsys):
    shape = [f"adapter.pairing={pairing}", f"adapter.num_down_experts={M}", f"adapter.num_up_experts={N}"]
    run(tmp_path, capsys, "train", "demo", data, *SMALL, *shape, "--output", tmp_path / "run")
    run(tmp_path, capsys, "evaluate", tmp_path / "run", "--limit", 2)
    run(tmp_path, capsys, "export", tmp_path / "run", tmp_path / "lora", "--rows", 2, "--limit", 2)
    assert (tmp_path / "lora/adapter_model.safetensors").is_file() and (tmp_path / "lora/README.md").is_file()
    if N == 1:
        how = ["--methods", "d2mora", "--seeds", 0, "--learning-rates", "1e-3", "--limit", 2]
        run(tmp_path, capsys, "compare", "demo", data, *SMALL, *shape, *how, "--output", tmp_path / "all")
        assert (tmp_path / "all/comparison-equal.json").is_file() and (tmp_path / "all/comparison-equal.md").is_file()
