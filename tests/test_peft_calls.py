"""What a user of PEFT may call on an adapted model: each call does as with LoRA, or is refused in one line (appendix D)."""

import re
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
from helpers import adapted, difference, fill, our_config, tiny_llama, tokens
from peft.utils import hotswap
from transformers import T5Config, T5ForConditionalGeneration

from d2mora.tuner import D2MoraLinear, record_routing

pytestmark = pytest.mark.filterwarnings("ignore")
ids = tokens(rows=4)


def two(base=None, **fields):
    "An adapted model with a second adapter of other sizes on other layers."
    model = adapted(base, modules_to_save=["lm_head"], **fields)
    model.add_adapter(
        "second", our_config("one-to-many", r=4, target_modules=["q_proj", "o_proj"], modules_to_save=["lm_head"])
    )
    fill(model, seed=2, adapter="second")
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["second"].weight.mul_(1.5)
    return model.eval()


def alone(model, name, **inputs):
    "What one adapter says to all rows."
    if name == "__base__":
        with model.disable_adapter():
            return model(**inputs).logits
    model.set_adapter(name)
    logits = model(**inputs).logits
    model.set_adapter("default")
    return logits


def refused(call, *words, kinds=(ValueError, TypeError)):
    with pytest.raises(kinds) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is not AttributeError and "\n" not in text and all(word in text for word in words), text


# ---- each row its own adapter ----
NAMES = ["default", "second", "__base__", "second"]


def test_each_row_has_its_own_adapter():
    model = two()
    wanted = torch.cat([alone(model, name, input_ids=ids[i : i + 1]) for i, name in enumerate(NAMES)])
    got = model(input_ids=ids, adapter_names=NAMES).logits
    assert difference(got, wanted) < 1e-5 and difference(got, model(input_ids=ids).logits) > 1e-2
    assert torch.equal(model(input_ids=ids).logits, alone(model, "default", input_ids=ids))  # and nothing stays
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids, adapter_names=NAMES).logits, model(input_ids=ids).logits)
    got.sum().backward()  # gradients reach what is active


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_gives_each_row_its_own_adapter(beams):
    model, settings = two(), dict(max_new_tokens=4, do_sample=False, num_beams=beams, pad_token_id=0)
    got = model.generate(input_ids=ids, adapter_names=NAMES, **settings)
    for i, name in enumerate(NAMES):
        with model.disable_adapter() if name == "__base__" else nullcontext(model.set_adapter(name)):
            row = model.generate(input_ids=ids[i : i + 1], **settings)[0]
        assert torch.equal(got[i, : len(row)], row), name


@pytest.mark.skipif(peft.__version__ < "0.19", reason="this PEFT cannot wrap T5 of transformers 5")
def test_an_encoder_sees_each_row_once_under_beam_search():
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    base, how = T5ForConditionalGeneration(T5Config(**sizes)).eval(), dict(target_modules=["q", "v"])
    model = peft.get_peft_model(base, our_config(**how, task_type="SEQ_2_SEQ_LM"))
    model.add_adapter("second", our_config("one-to-one", **how, task_type="SEQ_2_SEQ_LM"))
    model, settings = fill(model).eval(), dict(max_new_tokens=4, num_beams=2)
    got = model.generate(input_ids=ids[:2], adapter_names=["default", "second"], **settings)
    for i, name in enumerate(("default", "second")):
        model.set_adapter(name)
        row = model.generate(input_ids=ids[i : i + 1], **settings)[0]
        assert torch.equal(got[i, : len(row)], row)


WRONG_NAMES = {
    "did you mean 'default'": ["default", "defualt", "second", "second"],
    "1 names and the input 4 rows": ["default"],
    "give a list": "second",
    "no adapter is called": [None] * 4,
}


@pytest.mark.parametrize("word", WRONG_NAMES)
def test_wrong_names_are_refused(word):
    model, names = two(), WRONG_NAMES[word]
    refused(lambda: model(input_ids=ids, adapter_names=names), word)
    refused(lambda: model.generate(input_ids=ids, adapter_names=names, max_new_tokens=2), word)
    plain, named = model(input_ids=ids).logits, model(input_ids=ids, adapter_names=["default"] * 4).logits
    assert torch.equal(plain, named)  # no hook is left behind
    refused(lambda: model.train()(input_ids=ids, adapter_names=NAMES), "training mode")


# ---- call by call ----
def names_and_rows(model):
    assert difference(model(input_ids=ids, adapter_names=NAMES).logits, model(input_ids=ids).logits) > 1e-2


def looked_at(model):
    with record_routing(model):
        refused(lambda: model(input_ids=ids, adapter_names=NAMES), "one adapter at a time")


def unmerged(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.unmerge_adapter()
    assert any("Already unmerged" in str(w.message) for w in caught)


def required(model):
    model.set_requires_grad("second", True)
    trained = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad and "d2mora_" in n}
    assert trained == {"default", "second"}
    model.set_requires_grad(["default", "second"], False)
    assert not any(p.requires_grad for p in model.parameters())


def deleted(model):
    before = alone(model, "second", input_ids=ids)
    model.delete_adapter("default")
    assert torch.equal(model(input_ids=ids).logits, before) and model.active_adapters == ["second"]
    refused(lambda: model.delete_adapter("default"), "default")


def several(_):
    model = adapted()
    model.add_adapter("second", our_config("one-to-many", r=4, target_modules=["q_proj"]))
    layer, x, updates = fill(model).base_model.model.model.layers[0].self_attn.q_proj, torch.randn(3, 64), []
    for name in ("default", "second"):
        model.set_adapter(name)
        updates.append(layer(x) - layer.base_layer(x))
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), layer.base_layer(x) + updates[0] + updates[1])


def state(model):
    held = peft.get_peft_model_state_dict(model, adapter_name="second")
    fresh = two()
    fill(fresh, std=0.0, adapter="second")
    result = peft.set_peft_model_state_dict(fresh, held, adapter_name="second")
    assert not [key for key in result.missing_keys if ".second." in key]
    assert torch.equal(alone(fresh, "second", input_ids=ids), alone(model, "second", input_ids=ids))


def saved(model, load=lambda folder: peft.PeftModel.from_pretrained(tiny_llama(), folder), **how):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **how)
        again = load(folder).eval()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def loaded(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.load_adapter(folder + "/second", "third", low_cpu_mem_usage=True)
        model.load_adapter(folder, "fourth", autocast_adapter_dtype=False)
    assert torch.equal(alone(model, "third", input_ids=ids), alone(model, "second", input_ids=ids))


def kinds_of(model, kind):
    return {getattr(p, kind) for n, p in model.named_parameters() if "d2mora_" in n}


def empty(model):
    how = dict(low_cpu_mem_usage=True, ephemeral_gpu_offload=True)
    fresh = peft.get_peft_model(tiny_llama(), our_config(), low_cpu_mem_usage=True)
    assert kinds_of(fresh, "device") == {torch.device("meta")}
    saved(model, lambda folder: peft.PeftModel.from_pretrained(tiny_llama(), folder, **how))


def cast(model):
    for automatic, kind in ((True, torch.float32), (False, torch.bfloat16)):
        half = peft.get_peft_model(tiny_llama(torch.bfloat16), our_config(), autocast_adapter_dtype=automatic)
        assert kinds_of(half, "dtype") == {kind}
    peft.cast_mixed_precision_params(half, torch.bfloat16)
    assert kinds_of(half, "dtype") == {torch.float32}


def injected(model):
    held = peft.get_peft_model_state_dict(adapted(), save_embedding_layers=False)
    held = {key.removeprefix("base_model.model."): p for key, p in held.items()}
    for names, given in ((["q_proj"], None), (["o_proj"], held), (["nothing"], held)):  # PEFT lets the file decide
        plain = peft.inject_adapter_in_model(our_config(target_modules=names), tiny_llama(), state_dict=given)
        found = {n.rpartition(".")[2] for n, m in plain.named_modules() if isinstance(m, D2MoraLinear)}
        assert found == ({"q_proj", "k_proj", "v_proj"} if given else {"q_proj"})


WORKS = [names_and_rows, looked_at, unmerged, required, deleted, several, state, saved, loaded, empty, cast, injected]


@pytest.mark.parametrize("does", WORKS, ids=lambda does: does.__name__)
def test_works_as_with_lora(does):
    does(two())


def q_proj(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


REFUSED = {  # call -> what is called, and words of the refusal; the table of these is in appendix D
    "model(…, alora_offsets=…)": (lambda m: m(input_ids=ids, alora_offsets=[1] * 4), "alora_offsets"),
    "merge_adapter()": (lambda m: m.merge_adapter(), "cannot be merged", "d2mora export"),
    "merge_and_unload()": (lambda m: m.merge_and_unload(), "cannot be merged", "d2mora export"),
    "layer.get_delta_weight()": (lambda m: q_proj(m).get_delta_weight("default"), "cannot be merged"),
    "add_weighted_adapter()": (lambda m: m.add_weighted_adapter(["default", "second"], [1, 1], "c"), "set_adapter"),
    "hotswap_adapter()": (lambda m: hotswap.hotswap_adapter(m, tempfile.mkdtemp(), "default"), ""),
    "get_peft_model(mixed=True)": (lambda m: peft.get_peft_model(tiny_llama(), our_config(), mixed=True), "compatible"),
    "target_parameters=…": (lambda m: our_config(target_parameters=["experts.down_proj"]), "target_modules"),
    "trainable_token_indices=…": (lambda m: our_config(trainable_token_indices=[1]), "modules_to_save"),
    "rank_pattern=…": (lambda m: our_config(rank_pattern={"q_proj": 4}), "adapter of their own"),
    "use_rslora=…": (lambda m: our_config(use_rslora=True), "square root of r"),
    "use_dora=…": (lambda m: our_config(use_dora=True), "magnitude"),
    "bias=…": (lambda m: our_config(bias="all"), "biases stay frozen"),
}


@pytest.mark.parametrize("call", REFUSED)
def test_refused_in_one_line(call):
    does, *words = REFUSED[call]
    refused(lambda: does(two()), *words)


def test_every_refusal_stands_in_the_appendix():
    text = (Path(__file__).parents[1] / "nbs/d_integrations.ipynb").read_text()
    assert {*re.findall(r'"\| `(.+?)` \|', text)} == {*REFUSED}
