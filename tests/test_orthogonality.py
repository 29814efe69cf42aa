"""λ is counted once per optimizer step, whoever trains; and is never silently inert."""

import pickle
import warnings

import peft
import pytest
import torch
from helpers import adapted, fill, our_config, tiny_llama, tokens
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import d2mora
from d2mora.orthogonality import orthogonality_loss, pairwise_cosine, similarity

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
LAMBDA = 1e-4  # at large λ Adam's normalisation would hide a double count


def train_loop(accumulation, attach, weight=LAMBDA, steps=3, optimizer_class=torch.optim.AdamW):
    "Three optimizer steps on the same twelve rows; returns the adapter as one vector."
    model = fill(peft.get_peft_model(tiny_llama(), our_config(orthogonality_weight=weight)))
    optimizer = optimizer_class((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    attach(model, optimizer)
    for step in range(steps):
        for part in tokens(rows=4, seed=step).chunk(accumulation):
            (model(part, labels=part).loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter(model)


def adapter(model):
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "d2mora_" in n])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def twice(model, optimizer):
    "What a term added in every micro-batch does: the hook's gradient is added a second time."
    d2mora.attach_orthogonality(model, optimizer)
    optimizer.register_step_pre_hook(lambda *_: d2mora.orthogonality.add_orthogonality_gradient(model, optimizer))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_counted_once_per_step_in_a_plain_loop(accumulation):
    one = train_loop(1, d2mora.attach_orthogonality)
    assert relative(train_loop(accumulation, d2mora.attach_orthogonality), one) < 1e-4
    assert relative(train_loop(accumulation, twice), one) > 2e-4  # the check sees a double count
    assert relative(train_loop(1, lambda *_: None), one) > 2e-4  # and a missing one


class Rows(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        row = tokens(rows=1, seed=100 + i)[0]
        return {"input_ids": row, "labels": row}


def train_stock(tmp_path, accumulation, attach=d2mora.attach_orthogonality):
    "transformers' own Trainer, with our hook on its optimizer and nothing else."
    model = fill(peft.get_peft_model(tiny_llama(), our_config(orthogonality_weight=LAMBDA)))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation,
        learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows())
    attach(model, trainer.create_optimizer())
    trainer.train()
    return adapter(model)


def test_counted_once_per_step_in_the_stock_trainer(tmp_path):
    one = train_stock(tmp_path, 1)
    for accumulation in (2, 4):
        assert relative(train_stock(tmp_path, accumulation), one) < 1e-4
    assert relative(train_stock(tmp_path, 4, attach=twice), one) > 2e-4


def test_hook_equals_a_term_in_the_loss():
    "Without accumulation and clipping, attaching is the same as adding λ · loss."
    model = fill(peft.get_peft_model(tiny_llama(), our_config(orthogonality_weight=0.3)))
    (model(tokens(), labels=tokens()).loss + 0.3 * orthogonality_loss(model)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    model(tokens(), labels=tokens()).loss.backward()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.0)
    d2mora.attach_orthogonality(model, optimizer)
    optimizer.step()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]), expected)


def test_attached_twice_counts_once_and_detaches():
    model = adapted(orthogonality_weight=1.0)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.0)
    norms = []
    for action in (lambda: d2mora.attach_orthogonality(model, optimizer), lambda: d2mora.attach_orthogonality(model, optimizer)):
        handle = action()
        model.zero_grad()
        optimizer.step()
        norms.append(sum(p.grad.norm() for p in model.parameters() if p.grad is not None).item())
    assert norms[0] == norms[1] > 0
    handle.remove()
    model.zero_grad()
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


def test_accelerate_and_fused_scaling():
    from accelerate import Accelerator

    model = adapted(orthogonality_weight=1.0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    prepared_model, prepared = Accelerator(cpu=True).prepare(model, optimizer)
    d2mora.attach_orthogonality(prepared_model, prepared)
    before = adapter(model)
    prepared.step()
    assert not torch.equal(adapter(model), before)
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    optimizer.grad_scale = torch.tensor(8.0)  # a fused step divides by the scaler's factor
    d2mora.orthogonality.add_orthogonality_gradient(model, optimizer)
    scaled = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(plain) == len(scaled) and scaled[0].norm() > 4 * plain[0].norm()


def test_only_trained_experts_are_moved():
    model = adapted(orthogonality_weight=1.0)
    frozen = [p for n, p in model.named_parameters() if "d2mora_A" in n]
    for p in frozen:
        p.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    d2mora.attach_orthogonality(model, optimizer)
    optimizer.step()
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for n, p in model.named_parameters() if "d2mora_B" in n)


def test_wrong_model_or_optimizer_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match="adapt it with a D2MoraConfig"):
        orthogonality_loss(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="holds none of the model's experts"):
        d2mora.attach_orthogonality(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0))


def test_values():
    eye = torch.eye(6).view(3, 2, 6)
    assert similarity(eye) == 0
    assert similarity(eye[:1].repeat(3, 1, 1)).item() == pytest.approx(3, abs=1e-4)
    zero = torch.zeros(4, 3, 5, requires_grad=True)
    loss = similarity(zero)
    loss.backward()
    assert loss == 0 and zero.grad.isfinite().all()
    W = torch.randn(5, 3, 7)
    cosine = torch.nn.functional.cosine_similarity
    pairs = sum(cosine(W[i].flatten(), W[j].flatten(), dim=0).abs() for i in range(5) for j in range(i))
    torch.testing.assert_close(similarity(W), pairs, rtol=1e-4, atol=1e-5)
    assert pairwise_cosine(W).shape == (5, 5)
    single = adapted(num_down_experts=1, num_up_experts=1)
    assert orthogonality_loss(single) == 0 and orthogonality_loss(single, parts=True) == (0, 0)


def train_steps(model, steps, use=None):
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    if use == "attach":
        d2mora.attach_orthogonality(model, optimizer)
    for _ in range(steps):
        loss = model(tokens(), labels=tokens()).loss
        (loss + (1e-4 * orthogonality_loss(model) if use == "loss" else 0)).backward()
        optimizer.step()
        optimizer.zero_grad()


def inert_warnings(weight=LAMBDA, use=None, steps=4, train=True):
    model = adapted(orthogonality_weight=weight).train(train)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_steps(model, steps, use)
        pickle.dumps(model)
    return sum("not applied" in str(w.message) for w in caught)


def test_inference_mode_is_no_training():
    "Inference tensors count no changes."
    with torch.inference_mode(): assert adapted().train()(tokens()).logits.isfinite().all()
    model = adapted().train()
    with torch.inference_mode(): model(tokens()), model(tokens())
    with torch.inference_mode(): born = adapted().train()
    born(tokens(), labels=tokens())


def test_a_weight_that_nobody_applies_warns_once():
    assert inert_warnings() == 1
    assert inert_warnings(steps=1) == 0  # nothing has moved yet
    assert inert_warnings(weight=0.0) == 0
    assert inert_warnings(use="attach") == 0
    assert inert_warnings(use="loss") == 0
    assert inert_warnings(train=False) == 0
