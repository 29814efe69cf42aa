"""The advice of a message fits its cause: what it says would mend it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

from d2mora.cli import explained, main
from d2mora.data import read_file
from d2mora.plan import GPUS, GiB, Plan, fits
from d2mora.recipe import load_base, load_recipe
from d2mora.toy import toy_base, toy_rows
from d2mora.train import check_device, train

SMALL = {
    "data.tasks": ["boolq"],
    "training.max_steps": 3,
    "training.warmup_steps": 0,
    "training.per_device_train_batch_size": 1,
    "training.logging_steps": 1,
}


def small(path="toy", **keys):
    return load_recipe(
        "demo", {**SMALL, "data.path": str(path), **{key.replace("__", "."): value for key, value in keys.items()}}
    )


@pytest.fixture
def long_and_short(tmp_path):
    "Fifteen rows in sixteen lose their answer to a cutoff of 60 tokens."
    rows = toy_rows("toy", "boolq", "train")[:16]
    rows = rows[:1] + [row | {"instruction": "is it so " * 40 + row["instruction"]} for row in rows[1:]]
    (tmp_path / "data/boolq").mkdir(parents=True)
    (tmp_path / "data/boolq/train.json").write_text(json.dumps(rows))
    return tmp_path / "data"


def test_a_batch_that_lost_its_answers_is_not_blamed_on_the_learning_rate(long_and_short, tmp_path):
    with pytest.raises(
        ValueError, match="the loss is nan.*data.cutoff took their answers: set data.truncation=prompt"
    ) as error:
        train(small(long_and_short, data__truncation="published", data__cutoff=60), tmp_path / "run")
    assert "learning_rate" not in str(error.value)
    train(small(long_and_short, data__truncation="prompt", data__cutoff=60), tmp_path / "mended")


@pytest.mark.parametrize(
    "keys, what",
    [
        ({"data__cutoff": 20}, "all training rows"),
        ({"data__cutoff": 60, "data__validation_rows": 2}, "all validation rows of boolq"),
    ],
)
def test_rows_that_all_lost_their_answers_are_refused_before_training(keys, what, long_and_short, tmp_path, capsys):
    with pytest.raises(
        ValueError, match=f"takes the whole answer from {what}: raise it, or set data.truncation=prompt"
    ):
        train(small(long_and_short, data__truncation="published", **keys), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_base_that_is_broken_is_not_blamed_on_the_learning_rate(tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(toy_base())
    base.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    (
        base.save_pretrained(tmp_path / "base"),
        transformers.AutoTokenizer.from_pretrained(toy_base()).save_pretrained(tmp_path / "base"),
    )
    with pytest.raises(ValueError, match="up_proj.*holds NaN or infinity: take another copy of the base"):
        train(small(base=str(tmp_path / "base")), tmp_path / "run")


def test_a_learning_rate_that_is_too_high_is_blamed(tmp_path):
    with pytest.raises(FloatingPointError, match="; lower training.learning_rate$"):
        train(small(training__learning_rate=1e30, training__max_grad_norm=0), tmp_path / "run")


def test_an_infinite_gradient_before_anything_is_learned_is_blamed_on_what_scales_it(tmp_path):
    with pytest.raises(ValueError, match="nothing is learned yet: lower adapter.lora_alpha"):
        train(small(adapter__lora_alpha=1e38, training__max_grad_norm=0), tmp_path / "run")


def test_too_long_a_prompt_in_grading_is_not_blamed_on_the_cutoff(tmp_path, capsys):
    shutil.copytree(toy_base(), tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    for positions in (2, 32, 33):
        (tmp_path / "base/config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
        assert main(
            [
                "evaluate",
                "--base",
                str(tmp_path / "base"),
                "--data",
                "toy",
                "--tasks",
                "boolq",
                "--limit",
                "1",
                "--protocol",
                "choice" if positions == 2 else "generate",
            ]
        ) in (0, 2)
        err = capsys.readouterr().err
        assert "data.cutoff" not in err and "IndexError" not in err
        if positions == 2:
            assert "the base cannot read more" in err


@pytest.mark.parametrize(
    "training, part", [({"fp16": True}, "set training.fp16=false"), ({"use_cpu": False}, "set training.use_cpu=true")]
)
def test_a_gpu_that_is_missing(training, part, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=part):
        check_device(training)


CAUSES = {
    "free memory": torch.OutOfMemoryError("CUDA out of memory"),
    "HF_TOKEN": (OSError("You are trying to access a gated repo."), GatedRepoError),
    "hf download": (OSError("We couldn't connect to 'https://huggingface.co'"), LocalEntryNotFoundError),
    "install what is missing": ImportError("bitsandbytes is missing"),
    "make it readable": PermissionError(13, "Permission denied"),
    "make room": OSError(28, "No space left on device"),
    "a hub name or a folder": OSError("no file named config.json"),
}


@pytest.mark.parametrize("advice", CAUSES)
def test_a_base_that_cannot_be_loaded(advice, monkeypatch):
    error, kind = CAUSES[advice] if isinstance(CAUSES[advice], tuple) else (CAUSES[advice], None)
    if kind:
        error.__cause__ = kind.__new__(kind)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: (_ for _ in ()).throw(error)
    )
    with pytest.raises(ValueError, match=advice) as raised:
        load_base("toy")
    assert sum(words in str(raised.value) for words in CAUSES) == 1


def test_access_and_room_are_told_apart(tmp_path):
    assert (
        "make room" in explained(OSError(28, "No space left on device"))[0]
        and "grant" not in explained(OSError(28, "No space left on device"))[0]
    )
    assert (
        "grant access" in explained(PermissionError(13, "Permission denied"))[0]
        and "room" not in explained(PermissionError(13, "Permission denied"))[0]
    )
    (tmp_path / "train.json").mkdir()  # what cannot be opened is not a broken file
    with pytest.raises(ValueError, match="make it readable"):
        read_file(tmp_path / "train.json")


def test_a_gpu_too_small_for_the_weights_is_not_blamed_on_the_batch():
    parts = {"weights": 13 * GiB, "gradients": GiB, "optimizer": GiB, "activations": 40 * GiB}
    plan = Plan({}, 0, None, 0, 0, {False: parts, True: parts}, {})
    assert "lower training.per_device_train_batch_size" in fits(plan, GPUS["A100-40"])
    assert "batch_size" not in (said := fits(plan, replace(GPUS["A100-40"], memory=12))) and "a larger GPU" in said
