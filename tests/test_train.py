"""Runs as processes leave them, and recipes as people write them."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from d2mora.data import prepare
from d2mora.data import read_rows
from d2mora.toy import toy_base
from d2mora.train import write_card
from d2mora.recipe import load_recipe, read_recipe
from d2mora.train import read_metrics, validation_losses
from d2mora.train import train

SMALL = {
    "data.tasks": ["boolq"],
    "data.validation_rows": 16,
    "training.max_steps": 6,
    "training.per_device_train_batch_size": 4,
    "training.logging_steps": 1,
    "training.save_strategy": "steps",
    "training.save_steps": 2,
    "training.use_cpu": True,
    "training.disable_tqdm": True,
}


def weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_commonsense_mini_is_the_main_jobs_recipe():
    recipe = load_recipe("commonsense-mini", ["base=toy", "data.path=toy"])
    assert len(recipe.data.tasks) == 7 and "hellaswag" not in recipe.data.tasks
    assert (
        recipe.adapter["target_modules"] == ["q_proj", "k_proj", "v_proj"] and recipe.adapter["peft_type"] == "D2MORA"
    )


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path):
    (tmp_path / "own.yaml").write_text(
        "base: toy\ndata: {path: toy}\ntraining: {learning_rate: 3e-4}\nadapter: {orthogonality_weight: 1e-4, target_modules: [q_proj]}"
    )
    assert read_recipe(tmp_path / "own.yaml")["training"]["learning_rate"] == "3e-4"
    recipe = load_recipe(tmp_path / "own.yaml", ["training.weight_decay=1e-2"])
    assert (
        recipe.training["learning_rate"],
        recipe.training["weight_decay"],
        recipe.adapter["orthogonality_weight"],
    ) == (3e-4, 1e-2, 1e-4)


def test_the_environment_stands_in_for_a_missing_path(monkeypatch):
    monkeypatch.setenv("D2MORA_DATA", "toy-hard")
    assert load_recipe("commonsense-mini", ["base=toy"]).data.path == "toy-hard"
    assert load_recipe("demo").data.path == "toy"


def test_a_run_folder_can_be_read_back(tmp_path):
    recipe = load_recipe("demo", SMALL)
    run = train(recipe, tmp_path / "run")
    assert (
        load_recipe(run / "recipe.yaml") == recipe
        and yaml.safe_load((run / "recipe.yaml").read_text())["base"] == "toy"
    )
    assert {p.name for p in run.iterdir()} == {"recipe.yaml", "adapter", "checkpoints", "metrics.jsonl", "data.json"}
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "toy" and config["peft_type"] == "D2MORA"
    card = (run / "adapter" / "README.md").read_text()
    assert toy_base() not in card
    card = card.split("---\n", 2)[2].strip()
    assert "import d2mora" in card.splitlines()[0]


def test_the_model_card_is_filled(tmp_path):
    run = train(load_recipe("demo", SMALL), tmp_path / "run")
    card, metrics = (run / "adapter" / "README.md").read_text(), read_metrics(run)
    total = sum(tensor.numel() for tensor in weights(run).values())
    routers = sum(tensor.numel() for name, tensor in weights(run).items() if "_router_" in name)
    before, after = validation_losses(run)["boolq"]
    for part in (f"{total:,} trained, of which {routers:,} in routers", "num_up_experts: 8", "boolq", "cutoff: 128", "max_steps: 6", f"tokens {metrics[-1]['tokens']}",
                 f"boolq {before:.3f} → {after:.3f}", "import d2mora  # registers", "library_name: peft", "Not graded yet"):  # fmt: skip
        assert part in card, part
    assert "More Information Needed" not in card and str(tmp_path) not in card
    (run / "evaluation-choice.json").write_text(json.dumps({"tasks": {"boolq": {"n": 40, "accuracy": 0.625}}}))
    write_card(run)
    assert "| choice | boolq | 40 | 62.5 |" in (run / "adapter" / "README.md").read_text()
    assert not (run / "adapter" / ".README.tmp").exists()


def test_a_run_shorter_than_its_log_interval(tmp_path):
    run = train(
        load_recipe(
            "demo", SMALL | {"training.logging_steps": 500, "training.save_strategy": "no", "data.validation_rows": 0}
        ),
        tmp_path / "run",
    )
    (line,) = read_metrics(run)
    assert line["step"] == 6 and line["loss"] > 0 and "steps 6" in (run / "adapter" / "README.md").read_text()


def test_the_card_of_another_adapter_does_not_ask_for_d2mora(tmp_path):
    (tmp_path / "own.yaml").write_text(
        "base: toy\nadapter: {peft_type: LORA, target_modules: [q_proj]}\ndata: {path: toy, cutoff: 128}"
    )
    run = train(load_recipe(tmp_path / "own.yaml", SMALL), tmp_path / "run")
    card = (run / "adapter" / "README.md").read_text()
    assert (
        "registers the method" not in card
        and "PEFT loads this adapter only where" not in card
        and "in routers" not in card
    )


def test_tokens_are_counted_without_padding_and_reported_elsewhere_too(tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs)

    run = train(load_recipe("demo", SMALL), tmp_path / "run", [Reporter()])
    ready = prepare(
        read_rows("toy", ["boolq"]), load_recipe("demo", SMALL).data, AutoTokenizer.from_pretrained(toy_base())
    )
    lengths = set(ready.train["length"])
    tokens = [0] + [line["tokens"] for line in read_metrics(run) if "loss" in line]
    assert all(4 * min(lengths) <= b - a <= 4 * max(lengths) for a, b in zip(tokens, tokens[1:]))
    losses = [logs for logs in seen if "loss" in logs]
    assert all(
        {"orthogonality_down", "orthogonality_up", "train_tokens_per_second", "num_input_tokens_seen"} <= logs.keys()
        for logs in losses
    )


def test_the_bar_tells_losses_speed_and_time_left(tmp_path, capsys):
    train(load_recipe("demo", SMALL | {"training.disable_tqdm": False}), tmp_path / "run")
    last = capsys.readouterr().err.split("\r")[-1]
    assert all(part in last for part in ("6/6", "loss=", "down=", "up=", "tokens/s=", "<")), last


def test_a_reporter_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(ValueError, match="(?i)nowhere|report"):
        train(load_recipe("demo", SMALL | {"training.report_to": ["nowhere"]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_tell_the_language_model_loss_and_both_parts_apart(tmp_path):
    run = train(
        load_recipe("demo", SMALL | {"adapter.orthogonality_weight": 0.5, "training.learning_rate": 0}),
        tmp_path / "run",
    )
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["orthogonality_down"] > 0 and line["orthogonality_up"] == 0 for line in lines)  # B = 0 stays
    plain = train(
        load_recipe("demo", SMALL | {"adapter.orthogonality_weight": 0, "training.learning_rate": 0}),
        tmp_path / "plain",
    )
    assert [line["loss"] for line in lines] == [line["loss"] for line in read_metrics(plain) if "loss" in line]


def test_lambda_moves_the_adapter(tmp_path):
    runs = [
        train(load_recipe("demo", SMALL | {"adapter.orthogonality_weight": weight}), tmp_path / str(weight))
        for weight in (0, 0.5)
    ]
    assert not same(weights(runs[0]), weights(runs[1]))


@pytest.mark.parametrize(
    "adapter",
    [
        {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]},
        {"peft_type": "LORA", "r": 4, "use_dora": True, "target_modules": ["q_proj"]},
        {
            "peft_type": "D2MORA",
            "pairing": "one-to-many",
            "num_down_experts": 1,
            "num_up_experts": 4,
            "target_modules": "all-linear",
        },
        {
            "peft_type": "D2MORA",
            "pairing": "one-to-one",
            "num_down_experts": 3,
            "num_up_experts": 3,
            "target_modules": ["q_proj"],
        },
    ],
)
def test_every_adapter_of_peft_is_a_recipe(adapter, tmp_path):
    (tmp_path / "own.yaml").write_text(
        yaml.safe_dump({"base": "toy", "adapter": adapter, "data": {"path": "toy", "cutoff": 128}})
    )
    run = train(load_recipe(tmp_path / "own.yaml", SMALL | {"training.learning_rate": 0.01}), tmp_path / "run")
    before, after = validation_losses(run)["boolq"]
    assert after < before
    assert all(
        ("orthogonality_up" in line) == (adapter["peft_type"] == "D2MORA")
        for line in read_metrics(run)
        if "loss" in line
    )


def test_equal_seeds_give_equal_runs_and_others_do_not(tmp_path):
    runs = [
        train(load_recipe("demo", SMALL | {"training.seed": seed}), tmp_path / name)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert same(weights(runs[0]), weights(runs[1])) and not same(weights(runs[0]), weights(runs[2]))
    assert (runs[0] / "metrics.jsonl").read_text() == (runs[1] / "metrics.jsonl").read_text()


def test_resume_refuses_another_recipe_and_accepts_a_finished_run(tmp_path, capsys):
    recipe = load_recipe("demo", SMALL)
    run = train(recipe, tmp_path / "run")
    before = weights(run)
    with pytest.raises(ValueError, match="adapter.r.*training.learning_rate"):
        train(load_recipe("demo", SMALL | {"adapter.r": 2, "training.learning_rate": 1}), run, resume=True)
    with pytest.raises(ValueError, match="no run to resume"):
        train(recipe, tmp_path / "none", resume=True)
    train(recipe, run, resume=True)
    assert "finished" in capsys.readouterr().err and same(before, weights(run))


def test_a_stopped_run_without_checkpoint_starts_again(tmp_path, capsys):
    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    recipe = load_recipe("demo", SMALL)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", callbacks=[Stop()])
    train(recipe, tmp_path / "run", resume=True)
    assert "step 0" in capsys.readouterr().err
    assert same(weights(tmp_path / "run"), weights(train(recipe, tmp_path / "other")))
