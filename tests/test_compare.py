"""A comparison by single tasks and at the paper's proportions; what is trained once is not trained again; learning rates that break training."""

import pytest

from d2mora.compare import best_rate, choose_rate, compare
from d2mora.recipe import load_recipe

FEW = {"training.max_steps": 3, "training.disable_tqdm": True, "training.warmup_steps": 0, "data.tasks": ["boolq", "piqa"], "data.validation_rows": 20}
CHOICE = dict(learning_rates=(1e-3, 3e-3), limit=20)


def test_single_tasks_have_a_result_file_of_their_own(tmp_path):
    alone = compare(load_recipe("demo-hard", FEW), tmp_path, ("lora",), seeds=(1,), learning_rates=(1e-3,), limit=20, single=True)
    assert set(alone["runs"][0]["single"]["choice"]["tasks"]) == {"boolq", "piqa"}
    assert all((tmp_path / f"comparison-equal-single.{kind}").is_file() for kind in ("json", "md", "png", "svg")) and not (tmp_path / "comparison-equal.json").is_file()


def test_a_method_of_the_same_size_at_both_budgets_is_trained_once(tmp_path):
    tiny = load_recipe("demo-hard", FEW)
    result = compare(tiny, tmp_path, ("lora", "d2mora"), seeds=(0,), **CHOICE)
    both = compare(tiny, tmp_path, ("d2mora", "lora"), seeds=(0,), budget="paper", **CHOICE)
    assert [r for r in both["runs"] if r["method"] == "d2mora"] == [r for r in result["runs"] if r["method"] == "d2mora"]
    assert {p.name for p in (tmp_path / "paper").iterdir()} == {"lora"} and both["runs"][1]["parameters"] > result["runs"][0]["parameters"]


def test_a_learning_rate_that_breaks_training_is_not_chosen(tmp_path, capsys):
    recipe = load_recipe("demo-hard", FEW)
    losses = choose_rate(recipe, tmp_path / "some", [1e30, 3e-3])
    assert losses["1e+30"] is None and losses["0.003"] > 0 and best_rate(losses) == 3e-3
    assert "learning-rate-1e+30: step" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"each learning rate \(1e\+30, 1e\+31\): name lower ones by --learning-rates"):
        choose_rate(recipe, tmp_path / "none", [1e30, 1e31])
