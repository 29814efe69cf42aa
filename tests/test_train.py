"""What a run leaves and says, which adapters can be trained, and what stops a run."""

import contextlib
import io
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from d2mora.orthogonality import pairwise_cosine
from d2mora.recipe import load_recipe
from d2mora.toy import toy_base, toy_rows
from d2mora.train import D2MoraTrainer, read_metrics, train, validation_losses, write_card

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
    total = sum(tensor.numel() for tensor in weights(run).values())
    routers = sum(tensor.numel() for name, tensor in weights(run).items() if "_router_" in name)
    before, after = validation_losses(run)["boolq"]
    (run / "evaluation-choice.json").write_text(json.dumps({"tasks": {"boolq": {"n": 40, "accuracy": 0.625}}}))
    write_card(run)
    (run / "evaluation-choice.json").unlink()
    card = (run / "adapter" / "README.md").read_text()
    for part in (f"{total:,} parameters, of which {routers:,} in routers", "num_up_experts: 8", "cutoff: 128", "library_name: peft",
                 f"| held-out loss | boolq | {before:.3f} → {after:.3f} |", "| choice, 40 rows | boolq | 62.5 % right |"):  # fmt: skip
        assert part in card, part
    assert "import d2mora" in card.split("---\n", 2)[2].strip().splitlines()[0]
    assert not [part for part in ("More Information Needed", str(run.parent), toy_base()) if part in card]


def test_the_log_and_the_bar_say_loss_cosines_tokens_and_speed(ran):
    _, run, seen, screen = ran
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    tokens = [0] + [line["tokens"] for line in lines]
    assert all(4 * 20 <= b - a <= 4 * 128 for a, b in zip(tokens, tokens[1:]))  # without padding
    told = {"cosine_down", "cosine_up", "train_tokens_per_second", "num_input_tokens_seen"}
    assert all(told <= logs.keys() for logs in seen if "loss" in logs)
    shown = ("4/4", "loss=", "down=", "up=", "tokens/s=", "<")
    assert any(all(part in bar for part in shown) for bar in screen.split("\r")), screen
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


@pytest.mark.parametrize("adapter", [
    {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]},
    {"peft_type": "LORA", "r": 4, "use_dora": True, "target_modules": ["q_proj"]},
    {"pairing": "one-to-many", "num_down_experts": 1, "num_up_experts": 4, "target_modules": "all-linear"},
    {"pairing": "one-to-one", "num_down_experts": 3, "num_up_experts": 3, "target_modules": ["q_proj"]},
])  # fmt: skip
def test_every_adapter_of_peft_is_a_recipe(adapter, tmp_path):
    raw = {"base": "toy", "adapter": adapter, "data": {"path": "toy", "cutoff": 128, "train_on_inputs": True}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(raw))
    keys = {key: value for key, value in SMALL.items() if not key.startswith("adapter.")}
    run = train(load_recipe(tmp_path / "own.yaml", keys | {"training.learning_rate": 0.01}), tmp_path / "run")
    before, after = validation_losses(run)["boolq"]
    assert after < before
    assert all(("cosine_up" in line) == ("pairing" in adapter) for line in read_metrics(run) if "loss" in line)
    assert ("d2mora" in (run / "adapter" / "README.md").read_text().split("# Adapter")[0]) == ("pairing" in adapter)


def test_equal_seeds_give_equal_runs_and_others_do_not(ran, tmp_path):
    runs = [train(load_recipe("demo", SMALL | {"training.seed": seed}), tmp_path / str(seed)) for seed in (0, 1)]
    assert same(weights(ran[1]), weights(runs[0])) and not same(weights(runs[0]), weights(runs[1]))
    assert (ran[1] / "metrics.jsonl").read_text() == (runs[0] / "metrics.jsonl").read_text()


@pytest.mark.parametrize("keys, words", [
    ({"training.learning_rate": 1e30, "training.max_grad_norm": 0}, "step 2: the loss is nan: lower training.learning_rate"),
    ({"data.cutoff": 60, "data.truncation": "published"}, "the loss is nan.*set data.truncation=prompt"),
])  # fmt: skip
def test_a_loss_that_is_not_finite_stops_the_run(keys, words, tmp_path):
    "Fifteen rows in sixteen lose their answer to a cutoff of 60 tokens."
    rows = toy_rows("toy", "boolq", "train")[:16]
    long = [row | {"instruction": "is it so " * 40 + row["instruction"]} for row in rows[1:]]
    (tmp_path / "data/boolq").mkdir(parents=True)
    (tmp_path / "data/boolq/train.json").write_text(json.dumps(rows[:1] + long if "data.cutoff" in keys else rows))
    keys = SMALL | {"data.path": str(tmp_path / "data"), "data.validation_rows": 0} | keys
    with pytest.raises(FloatingPointError, match=words):
        train(load_recipe("demo", keys | {"training.per_device_train_batch_size": 1}), tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("fused", [False, True])
def test_fp16s_scaler_skips_an_infinite_gradient_and_without_it_the_run_stops(fused, tmp_path):
    args = TrainingArguments(str(tmp_path), optim="adamw_torch_fused" if fused else "adamw_torch", use_cpu=True)
    trainer = D2MoraTrainer(torch.nn.Linear(2, 1), args)
    optimizer, scaler = trainer.create_optimizer(), torch.amp.GradScaler("cpu")
    scaler.scale(trainer.model(torch.ones(1, 2)).sum()).backward()
    trainer.model.weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    with pytest.raises(FloatingPointError, match="step 1: the gradient norm is inf"):
        optimizer.step()
