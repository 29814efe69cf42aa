"""Trainers and optimizers of others find the experts; λ counts once per optimizer step, whoever trains, each accumulating four batches.

One step of SGD at learning rate 1, with λ = 0 and with λ = 1, from the same weights on the same rows: the two results differ by the
gradient of the orthogonality loss, exactly once."""

import accelerate
import peft
import pytest
import torch
import transformers

import d2mora
from d2mora import attach_orthogonality, orthogonality_loss
from d2mora.toy import toy_base, toy_rows
from helpers import fill, our_config

ACCUMULATE = 4


def model_of(weight, pairing="many-to-many"):
    "The embedded base with a filled adapter, the same each time."
    base = transformers.AutoModelForCausalLM.from_pretrained(toy_base())
    config = our_config(pairing, r=2, num_down_experts=2, num_up_experts=3, orthogonality_weight=weight)
    return fill(peft.get_peft_model(base, config), std=0.1).train()


def experts(model):
    "Those that are trained: DPOTrainer puts a frozen copy of the adapter beside them, as its reference."
    return {name: p for name, p in model.named_parameters() if name.endswith(("d2mora_A.default.weight", "d2mora_B.default.weight"))}


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
        torch.testing.assert_close(after[0.0][name] - after[1.0][name], gradient, rtol=2e-3, atol=2e-5, msg=lambda text: f"{name}: {text}")


def tokens_of(model, k):
    ids = torch.arange(24).view(2, 12) * (k + 3) % 90 + 3
    return {"input_ids": ids, "labels": ids}


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)


def test_plain_loop():
    def train(model):
        optimizer = sgd(model)
        attach_orthogonality(model, optimizer)
        for k in range(ACCUMULATE): (model(**tokens_of(model, k)).loss / ACCUMULATE).backward()
        optimizer.step()

    check_once(train)


def test_a_term_in_every_batch_would_be_noticed():
    def train(model):
        optimizer, weight = sgd(model), model.peft_config["default"].orthogonality_weight
        for k in range(ACCUMULATE): (model(**tokens_of(model, k)).loss / ACCUMULATE + weight * orthogonality_loss(model)).backward()
        optimizer.step()

    with pytest.raises(AssertionError, match="not close"): check_once(train)


def test_accelerate():
    def train(model):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
        model, optimizer = accelerator.prepare(model, sgd(model))
        attach_orthogonality(model, optimizer)
        for k in range(ACCUMULATE):
            with accelerator.accumulate(model):
                accelerator.backward(model(**tokens_of(model, k)).loss)
                optimizer.step(), optimizer.zero_grad()

    check_once(train)


def arguments(kind, folder):
    "What both trainers of TRL are asked for: one step of SGD, no clipping."
    return kind(str(folder), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=ACCUMULATE, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
                max_grad_norm=0.0, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, seed=0)


@pytest.fixture
def trl():
    return pytest.importorskip("trl", reason="trl is missing: pip install 'd2mora[trl]'")


def questions(count=16):
    return toy_rows("toy", "boolq", "train", count)


@pytest.mark.filterwarnings("ignore")
def test_sft_trainer(trl, tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"prompt": r["instruction"], "completion": " " + r["output"]} for r in questions()])

    def train(model):
        trainer = trl.SFTTrainer(model, arguments(trl.SFTConfig, tmp_path), train_dataset=rows, processing_class=transformers.AutoTokenizer.from_pretrained(toy_base()))
        attach_orthogonality(trainer.model, trainer.create_optimizer())
        trainer.train()

    check_once(train)


def preferences():
    import datasets

    other = {"true": "false", "false": "true"}
    texts = [(r["instruction"], " " + r["output"], " " + r["output"].replace(r["answer"], other[r["answer"]])) for r in questions()]
    return datasets.Dataset.from_list([{"prompt": p, "chosen": good, "rejected": bad, "completion": good, "label": i % 2 == 0} for i, (p, good, bad) in enumerate(texts)])


COLUMNS = {"DPO": ["prompt", "chosen", "rejected"], "KTO": ["prompt", "completion", "label"], "GRPO": ["prompt"], "RLOO": ["prompt"]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", [None, peft.LoraConfig(target_modules=["q_proj"])], ids=["D2MoRA", "LoRA"])
@pytest.mark.parametrize("name", COLUMNS)
def test_the_reference_of_a_trained_adapter_is_its_copy(trl, tmp_path, name, adapter):
    "TRL copies the adapter by the names of its parameters; what it does not find stays at its random start, in silence."
    model = model_of(1e-4) if adapter is None else peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(toy_base()), adapter)
    for key, p in model.named_parameters():
        if "lora_" in key: p.data.normal_()
    kind, config = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    more = {"beta": 0.1, "num_generations": 2} if name in ("GRPO", "RLOO") else {}
    rewards = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)} if more else {}
    trainer = kind(model, args=config(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=2, **more),
                   train_dataset=preferences().select_columns(COLUMNS[name]), processing_class=transformers.AutoTokenizer.from_pretrained(toy_base()), **rewards)
    model, ids, logits = trainer.model.eval(), torch.arange(3, 15)[None], {}
    for adapter_name in ("default", "ref"):
        model.set_adapter(adapter_name)
        logits[adapter_name] = model(input_ids=ids).logits
    with model.disable_adapter(): base = model(input_ids=ids).logits
    assert torch.equal(logits["default"], logits["ref"]) and (base - logits["ref"]).abs().max() > 0.1


def test_muon_and_groups_for_the_parts():
    model = model_of(1e-4)
    groups = d2mora.parameter_groups(model, up={"lr": 0.0}, routers={"weight_decay": 0.0}, others={"lr": 1.0})
    assert [sorted(set(group) - {"params"}) for group in groups] == [[], ["lr"], ["weight_decay"]]  # nothing else is trained
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Muon(groups, lr=1e-2)  # takes matrices only
    attach_orthogonality(model, optimizer)
    model(**tokens_of(model, 0)).loss.backward(), optimizer.step()
    assert {"d2mora_B" in name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])} == {True}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "d2mora_B" in name)
    with pytest.raises(ValueError, match="no experts in"): d2mora.parameter_groups(model.unload())


@pytest.mark.filterwarnings("ignore")
def test_dpo_trainer(trl, tmp_path):
    rows, references = preferences(), []

    def train(model):
        start = {name: p.detach().clone() for name, p in experts(model).items()}
        trainer = trl.DPOTrainer(model, args=arguments(trl.DPOConfig, tmp_path), train_dataset=rows, processing_class=transformers.AutoTokenizer.from_pretrained(toy_base()))
        attach_orthogonality(trainer.model, trainer.create_optimizer())
        trainer.train()
        held = dict(model.named_parameters())
        references.append(all(torch.equal(held[name.replace(".default", ".ref")], p) for name, p in start.items()))

    check_once(train)
    assert references == [True, True]  # the reference is the adapter as it was
