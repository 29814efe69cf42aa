"""Half precision, checkpointed activations, accumulation and torch.compile: the same gradients, and the loss falls."""

import json

import pytest
import torch
from helpers import fill
from transformers import TrainerCallback

from d2mora.recipe import load_recipe
from d2mora.toy import toy_rows
from d2mora.train import read_metrics, train

SMALL = {
    "adapter.target_modules": ["q_proj"], "adapter.lora_dropout": 0.0, "data.tasks": ["boolq"], "data.train_on_inputs": True,
    "training.per_device_train_batch_size": 8, "training.learning_rate": 3e-3, "training.warmup_steps": 0,
    "training.logging_steps": 1, "training.use_cpu": True, "training.disable_tqdm": True,
}  # fmt: skip
WAYS = {  # what is set, and how far the first step's gradient may be from float32's (relative norm)
    "accumulation": ({"training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 4}, 1e-5),
    "packed": ({"data.sampling": "packed"}, 1e-5),
    "bf16": ({"training.bf16": True}, 0.1),
    "checkpointing, accumulation": ({"training.gradient_checkpointing": True, "training.per_device_train_batch_size": 4,
                                     "training.gradient_accumulation_steps": 2}, 1e-5),
}  # fmt: skip


class Gradient(TrainerCallback):
    "Fills the adapter, so that no gradient is zero, and keeps the first step's gradient."

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        fill(model, std=0.05)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            trained = [p for p in model.parameters() if p.requires_grad]
            self.first, self.dtypes = torch.cat([p.grad.flatten() for p in trained]), {p.dtype for p in trained}
            self.base = {p.dtype for p in model.parameters() if not p.requires_grad}


def run(folder, keys, steps=6, fall=0.02):
    seen = Gradient()
    train(load_recipe("demo", SMALL | {"training.max_steps": steps} | keys), folder, [seen])
    losses = [line["loss"] for line in read_metrics(folder) if "loss" in line]
    assert len(losses) == steps and torch.tensor(losses).isfinite().all() and losses[-1] < losses[0] - fall, losses
    return seen


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    seen = run(tmp_path_factory.mktemp("plain") / "run", {})
    assert seen.dtypes == seen.base == {torch.float32} and seen.first.norm() > 1e-3
    return seen


@pytest.mark.parametrize("way", WAYS)
def test_same_gradient_and_falling_loss(way, tmp_path, plain):
    keys, tolerance = WAYS[way]
    seen = run(tmp_path / "run", keys)
    distance = float((seen.first - plain.first).norm() / plain.first.norm())
    assert distance < tolerance
    assert seen.dtypes == {torch.float32}  # the experts, whatever the base computes in
    assert seen.base == {torch.bfloat16 if "bf16" in way else torch.float32}
    assert distance > 1e-4 or "bf16" not in way  # it is half precision


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="torch 2.6 cannot trace transformers' forward (tried)")
def test_compiled_gradient(tmp_path):
    "Traced as for a GPU, run without one; rows of one length, so that there is one shape to trace."
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "train.json").write_text(json.dumps(toy_rows("toy", "boolq", "train")[:8]))
    keys = {"data.path": str(tmp_path), "data.cutoff": 20, "adapter.layers_to_transform": [0]}
    plain = run(tmp_path / "plain", keys, steps=1, fall=-1)
    traced = {"training.torch_compile": True, "training.torch_compile_backend": "aot_eager"}
    seen = run(tmp_path / "compiled", keys | traced, steps=1, fall=-1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # something was traced
    assert float((seen.first - plain.first).norm() / plain.first.norm()) < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 and its gradient scaler need a GPU")
def test_fp16_on_a_gpu(tmp_path, plain):
    seen = run(tmp_path / "run", {"training.fp16": True, "training.use_cpu": False})
    assert seen.dtypes == {torch.float32} and seen.base == {torch.float16}
    assert float((seen.first.cpu() - plain.first).norm() / plain.first.norm()) < 0.1
