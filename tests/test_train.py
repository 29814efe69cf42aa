"""What a run leaves and says, and which recipes can be trained."""

import contextlib
import io
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from d2mora.orthogonality import pairwise_cosine
from d2mora.recipe import load_recipe
from d2mora.toy import toy_base
from d2mora.train import read_metrics, train, validation_losses, write_card

SMALL = {
    "adapter.target_modules": ["q_proj"], "data.tasks": ["boolq"], "data.validation_rows": 16, "training.max_steps": 4,
    "training.per_device_train_batch_size": 4, "training.logging_steps": 1, "training.warmup_steps": 0, "training.use_cpu": True,
    "training.disable_tqdm": True,
}  # fmt: skip


def weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Reporter(TrainerCallback):
    "Keeps what every reporter of the Trainer is told."

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(logs)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "A recipe, its run folder, what was logged, and what stood on the screen."
    recipe, reporter = load_recipe("demo", SMALL | {"training.disable_tqdm": False}), Reporter()
    with contextlib.redirect_stderr(io.StringIO()) as screen:
        run = train(recipe, tmp_path_factory.mktemp("ran") / "run", [reporter])
    return recipe, run, reporter.seen, screen.getvalue()


def test_a_run_folder_can_be_read_back(ran):
    recipe, run, _, _ = ran
    assert load_recipe(run / "recipe.yaml") == recipe
    assert {p.name for p in run.iterdir()} == {"recipe.yaml", "adapter", "checkpoints", "metrics.jsonl", "data.json"}
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "toy" and config["peft_type"] == "D2MORA"


def test_the_model_card_is_filled(ran):
    _, run, _, _ = ran
    card, metrics = (run / "adapter" / "README.md").read_text(), read_metrics(run)
    total = sum(tensor.numel() for tensor in weights(run).values())
    routers = sum(tensor.numel() for name, tensor in weights(run).items() if "_router_" in name)
    before, after = validation_losses(run)["boolq"]
    for part in (f"{total:,} trained, of which {routers:,} in routers", "num_up_experts: 8", "boolq", "cutoff: 128", "max_steps: 4",
                 "steps 4", f"tokens {metrics[-1]['tokens']}", f"boolq {before:.3f} → {after:.3f}", "library_name: peft", "Not graded yet"):  # fmt: skip
        assert part in card, part
    assert "import d2mora" in card.split("---\n", 2)[2].strip().splitlines()[0]
    assert not [part for part in ("More Information Needed", str(run.parent), toy_base()) if part in card]
    (run / "evaluation-choice.json").write_text(json.dumps({"tasks": {"boolq": {"n": 40, "accuracy": 0.625}}}))
    write_card(run)
    (run / "evaluation-choice.json").unlink()
    assert "| choice | boolq | 40 | 62.5 |" in (run / "adapter" / "README.md").read_text()


def test_the_log_and_the_bar_say_loss_cosines_tokens_and_speed(ran):
    _, run, seen, screen = ran
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    tokens = [0] + [line["tokens"] for line in lines]
    assert all(4 * 20 <= b - a <= 4 * 128 for a, b in zip(tokens, tokens[1:]))  # without padding
    told = {"cosine_down", "cosine_up", "train_tokens_per_second", "num_input_tokens_seen"}
    assert all(told <= logs.keys() for logs in seen if "loss" in logs)
    last = screen.split("\r")[-1]
    assert all(part in last for part in ("4/4", "loss=", "down=", "up=", "tokens/s=", "<")), last
    for side, key in (("A", "cosine_down"), ("B", "cosine_up")):  # the loop over all pairs is the reference
        found = []
        for name, own in weights(run).items():
            if f"d2mora_{side}." in name:
                W = pairwise_cosine(own.unflatten(0, (3 if side == "A" else 8, -1)))
                found += [abs(float(W[i, j])) for i in range(len(W)) for j in range(i)]
        assert lines[-1][key] == pytest.approx(sum(found) / len(found), rel=1e-4) and 0 < lines[-1][key] <= 1


def test_lambda_moves_the_adapter_and_is_not_in_the_loss(tmp_path):
    runs = []
    for weight in (0, 0.5):
        keys = {"adapter.orthogonality_weight": weight, "training.logging_steps": 500, "data.validation_rows": 0}
        runs.append(train(load_recipe("demo", SMALL | keys | {"training.max_steps": 1}), tmp_path / str(weight)))
    assert not same(weights(runs[0]), weights(runs[1]))
    (a,), (b,) = map(read_metrics, runs)  # one line, though the interval is longer than the run
    assert a["step"] == b["step"] == 1 and a["loss"] == b["loss"]


ADAPTERS = {
    "LoRA": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]},
    "DoRA": {"peft_type": "LORA", "r": 4, "use_dora": True, "target_modules": ["q_proj"]},
    "one A": {"pairing": "one-to-many", "num_down_experts": 1, "num_up_experts": 4, "target_modules": "all-linear"},
    "pairs": {"pairing": "one-to-one", "num_down_experts": 3, "num_up_experts": 3, "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_of_peft_is_a_recipe(name, tmp_path):
    adapter, theirs = ADAPTERS[name], "peft_type" in ADAPTERS[name]
    raw = {"base": "toy", "adapter": adapter, "data": {"path": "toy", "cutoff": 128}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(raw))
    keys = {key: value for key, value in SMALL.items() if not key.startswith("adapter.")} | {
        "data.train_on_inputs": True
    }
    run = train(load_recipe(tmp_path / "own.yaml", keys | {"training.learning_rate": 0.01}), tmp_path / "run")
    before, after = validation_losses(run)["boolq"]
    assert after < before
    assert all(("cosine_up" in line) != theirs for line in read_metrics(run) if "loss" in line)
    card = (run / "adapter" / "README.md").read_text()
    assert ("registers the method" in card) != theirs and ("in routers" in card) != theirs


def test_equal_seeds_give_equal_runs_and_others_do_not(ran, tmp_path):
    runs = [train(load_recipe("demo", SMALL | {"training.seed": seed}), tmp_path / str(seed)) for seed in (0, 1)]
    assert same(weights(ran[1]), weights(runs[0])) and not same(weights(runs[0]), weights(runs[1]))
    assert (ran[1] / "metrics.jsonl").read_text() == (runs[0] / "metrics.jsonl").read_text()


def test_a_reporter_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(ValueError, match="(?i)nowhere|report"):
        train(load_recipe("demo", SMALL | {"training.report_to": ["nowhere"]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
