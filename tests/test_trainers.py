"""Trainers and optimizers of others find the experts; λ counts once per optimizer step, whoever trains, each accumulating four batches.

One step of SGD at learning rate 1, with λ = 0 and with λ = 1, from the same weights on the same rows: the two results differ by the
gradient of the orthogonality loss, exactly once."""

import accelerate
import datasets
import peft
import pytest
import torch
import transformers
from helpers import fill, our_config

import d2mora
from d2mora import attach_orthogonality, orthogonality_loss
from d2mora.toy import toy_base, toy_rows

pytestmark = pytest.mark.filterwarnings("ignore")
ACCUMULATE = 4


def base():
    return transformers.AutoModelForCausalLM.from_pretrained(toy_base())


def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(toy_base())


def model_of(weight):
    "The embedded base with a filled adapter, the same each time."
    config = our_config(r=2, num_down_experts=2, num_up_experts=3, orthogonality_weight=weight)
    return fill(peft.get_peft_model(base(), config), std=0.1).train()


def experts(model):
    "Those that are trained: DPOTrainer puts a frozen copy of the adapter beside them, as its reference."
    ends = ("d2mora_A.default.weight", "d2mora_B.default.weight")
    return {name: p for name, p in model.named_parameters() if name.endswith(ends)}


def check_once(train):
    "Train with and without λ; the difference must be one gradient."
    fresh, after = model_of(1.0), {}
    expected = torch.autograd.grad(orthogonality_loss(fresh), list(experts(fresh).values()))
    for weight in (0.0, 1.0):
        model = model_of(weight)
        start = {name: p.detach().clone() for name, p in experts(model).items()}
        train(model)
        after[weight] = {name: p.detach() for name, p in experts(model).items()}
        assert all((after[weight][name] - p).abs().max() > 0 for name, p in start.items())  # the step was taken
    for name, gradient in zip(after[1.0], expected):
        torch.testing.assert_close(after[0.0][name] - after[1.0][name], gradient, rtol=2e-3, atol=2e-5)


def batch(k):
    ids = torch.arange(24).view(2, 12) * (k + 3) % 90 + 3
    return {"input_ids": ids, "labels": ids}


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)


def plain_loop(model, folder, term=0.0):
    optimizer = sgd(model)
    if not term:
        attach_orthogonality(model, optimizer)
    for k in range(ACCUMULATE):
        (model(**batch(k)).loss / ACCUMULATE + term * orthogonality_loss(model)).backward()
    optimizer.step()


def by_accelerate(model, folder):
    accelerate.state.GradientState._reset_state()  # of a Trainer in another test
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    model, optimizer = accelerator.prepare(model, sgd(model))
    attach_orthogonality(model, optimizer)
    for k in range(ACCUMULATE):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch(k)).loss)
            optimizer.step()
            optimizer.zero_grad()


def run(kind, arguments, model, folder, rows, **more):
    "A trainer built on transformers', for one step of SGD without clipping."
    settings = dict(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=ACCUMULATE, optim="sgd")
    settings |= dict(learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to="none")
    arguments = arguments(str(folder), save_strategy="no", disable_tqdm=True, seed=0, **settings)
    trainer = kind(model, args=arguments, train_dataset=rows, **more)
    attach_orthogonality(trainer.model, trainer.create_optimizer())
    trainer.train()


def stock_trainer(model, folder):
    ids = [row.tolist() for k in range(ACCUMULATE) for row in batch(k)["input_ids"]]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    run(transformers.Trainer, transformers.TrainingArguments, model, folder, rows)


def sft_trainer(model, folder):
    trl = pytest.importorskip("trl", reason="trl is missing: pip install 'd2mora[trl]'")
    rows = preferences().select_columns(["prompt", "completion"])
    run(trl.SFTTrainer, trl.SFTConfig, model, folder, rows, processing_class=tokenizer())


def dpo_trainer(model, folder):
    "And the reference, a frozen copy of the adapter, stays as it was."
    trl = pytest.importorskip("trl", reason="trl is missing: pip install 'd2mora[trl]'")
    start = {name: p.detach().clone() for name, p in experts(model).items()}
    rows = preferences().select_columns(["prompt", "chosen", "rejected"])
    run(trl.DPOTrainer, trl.DPOConfig, model, folder, rows, processing_class=tokenizer())
    held = dict(model.named_parameters())
    assert all(torch.equal(held[name.replace(".default", ".ref")], p) for name, p in start.items())


@pytest.mark.parametrize("trainer", [plain_loop, by_accelerate, stock_trainer, sft_trainer, dpo_trainer])
def test_counted_once_per_step(trainer, tmp_path):
    check_once(lambda model: trainer(model, tmp_path))


def test_a_term_in_every_batch_would_be_noticed(tmp_path):
    weight = lambda model: model.peft_config["default"].orthogonality_weight or 1e-30
    with pytest.raises(AssertionError, match="not close"):
        check_once(lambda model: plain_loop(model, tmp_path, weight(model)))


def preferences():
    other, rows = {"true": "false", "false": "true"}, []
    for row in toy_rows("toy", "boolq", "train", 16):
        good, bad = " " + row["output"], " " + row["output"].replace(row["answer"], other[row["answer"]])
        rows.append({"prompt": row["instruction"], "chosen": good, "rejected": bad, "completion": good})
    return datasets.Dataset.from_list(rows)


def test_the_reference_of_a_trained_adapter_is_its_copy(tmp_path):
    "TRL copies the adapter by the names of its parameters; what it does not find stays at its random start, in silence."
    trl = pytest.importorskip("trl", reason="trl is missing: pip install 'd2mora[trl]'")
    arguments = trl.DPOConfig(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=2)
    rows = preferences().select_columns(["prompt", "chosen", "rejected"])
    trainer = trl.DPOTrainer(model_of(1e-4), args=arguments, train_dataset=rows, processing_class=tokenizer())
    model, ids, logits = trainer.model.eval(), torch.arange(3, 15)[None], {}
    for adapter in ("default", "ref"):
        model.set_adapter(adapter)
        logits[adapter] = model(input_ids=ids).logits
    with model.disable_adapter():
        plain = model(input_ids=ids).logits
    assert torch.equal(logits["default"], logits["ref"]) and (plain - logits["ref"]).abs().max() > 0.1


def test_muon_and_groups_for_the_parts():
    model = model_of(1e-4)
    groups = d2mora.parameter_groups(model, up={"lr": 0.0}, routers={"weight_decay": 0.0}, others={"lr": 1.0})
    assert [set(group) - {"params"} for group in groups] == [set(), {"lr"}, {"weight_decay"}]  # no others are trained
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Muon(groups, lr=1e-2)  # takes matrices only
    attach_orthogonality(model, optimizer)
    model(**batch(0)).loss.backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) == ("d2mora_B" in name) for name, p in before.items())
    with pytest.raises(ValueError, match="no experts to train in"):
        d2mora.parameter_groups(model.unload())
