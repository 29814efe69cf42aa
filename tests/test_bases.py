"""Small random models of several families, GPT-2's Conv1D and bitsandbytes: default targets, training, saving, generation, export."""

import warnings

import peft
import pytest
import torch
import transformers

import d2mora
from d2mora import tuner
from d2mora.export import calibrate, static_lora
from helpers import difference, fill, tiny_llama, tokens
from test_export import constant, rows

SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
GROUPED = SIZES | dict(num_key_value_heads=2, head_dim=16)
GPT2 = dict(vocab_size=97, n_positions=128, n_embd=64, n_layer=2, n_head=4, pad_token_id=0, eos_token_id=2)
QKV = {"q_proj", "k_proj", "v_proj"}
FAMILIES = {  # configuration and the layers that are adapted when none are named
    "mistral": (transformers.MistralConfig(**GROUPED, sliding_window=8), QKV),
    "qwen 3": (transformers.Qwen3Config(**GROUPED), QKV),
    "gemma 2": (transformers.Gemma2Config(**GROUPED), QKV),
    "phi": (transformers.PhiConfig(**SIZES), QKV | {"fc1", "fc2"}),
    "phi 3": (transformers.Phi3Config(**SIZES), {"qkv_proj"}),
    "gpt 2": (transformers.GPT2Config(**GPT2), {"c_attn"}),
}


def small(name):
    "A base of a family, the same each time."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(FAMILIES[name][0]).eval()


def config(**fields):
    return d2mora.D2MoraConfig(**{**dict(r=2, num_down_experts=2, num_up_experts=3, task_type="CAUSAL_LM"), **fields})


def adapted_layers(model):
    return {name.rpartition(".")[-1] for name, m in model.named_modules() if isinstance(m, tuner.D2MoraLinear)}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, tmp_path):
    base, ids, writes = small(name), tokens(), dict(max_new_tokens=4, do_sample=False)
    before = base(ids).logits.detach()
    model = peft.get_peft_model(base, config())
    assert adapted_layers(model) == FAMILIES[name][1]
    assert difference(model(ids).logits, before) < 1e-5  # B = 0
    losses = train_steps(fill(model, std=0.2), ids, 4)
    assert losses[-1] < losses[0] and difference(model.eval()(ids).logits, before) > 1e-2
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small(name), tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(loaded.generate(input_ids=ids, **writes), model.generate(input_ids=ids, **writes))
    check_export(model, ids, tmp_path / "lora", small(name))


def train_steps(model, ids, steps):
    "Losses of some optimizer steps, the orthogonality gradient among them."
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    d2mora.attach_orthogonality(model, optimizer)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_export(model, ids, folder, fresh):
    "With constant routers the static LoRA is exact, before and after a trip through stock PEFT, and merged."
    with torch.no_grad():
        expected = constant(model)(ids).logits
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*fan_in_fan_out")
            static = static_lora(model, calibrate(model, rows()))
        static.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(fresh, folder).eval()
        for answer in (static(ids).logits, loaded(ids).logits, loaded.merge_and_unload()(ids).logits):
            assert difference(answer, expected) < 1e-3 * expected.abs().max()


# --- bitsandbytes -------------------------------------------------------------------------------------------------------------------

BITS = {
    "8 bits": dict(load_in_8bit=True),
    "4 bits": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    "A base on the disk; its widths are multiples of 64, as bitsandbytes' CPU kernels want them."
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing: pip install 'd2mora[quantized]'")
    folder = tmp_path_factory.mktemp("stored")
    tiny_llama(intermediate_size=128).save_pretrained(folder)
    return folder


def quantized(folder, bits):
    quantization = transformers.BitsAndBytesConfig(**BITS[bits])
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map="cpu", dtype=torch.float32
    ).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", BITS)
def test_experts_run_on_quantized_layers(bits, stored, tmp_path):
    base, ids = quantized(stored, bits), tokens()
    with torch.no_grad():
        base(ids), (before := base(ids).logits)  # the first pass packs the weights
    model = peft.get_peft_model(base, config(target_modules="all-linear"))
    layers = [m for m in model.modules() if isinstance(m, tuner.D2MoraLinear)]
    assert len(layers) == 14 and {type(m.base_layer).__name__ for m in layers} <= {"Linear8bitLt", "Linear4bit"}
    assert difference(model(ids).logits, before) < 1e-5
    whole = [m.base_layer.weight.clone() for m in layers]
    losses = train_steps(fill(model, std=0.2), ids, 4)
    assert losses[-1] < losses[0] and all(torch.equal(m.base_layer.weight, w) for m, w in zip(layers, whole))
    for m in layers:  # every expert and every router is in the graph, and the frozen weight is not
        assert all(getattr(m, part)["default"].weight.grad.abs().max() > 0 for part in m.adapter_layer_names)
        assert m.base_layer.weight.grad is None
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized(stored, bits), tmp_path).eval()
    loaded(ids), model(ids)
    assert difference(loaded(ids).logits, model(ids).logits) < 1e-2 < difference(model(ids).logits, before)
    with torch.no_grad():
        expected = constant(model)(ids).logits
        static = static_lora(model, calibrate(model, rows()))  # exported unmerged
        assert difference(static(ids).logits, expected) < 2e-2 * expected.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_a_run_on_a_quantized_folder(stored, tmp_path):
    "A base that was saved in 4 bits is a base like others: recipe, training, grading."
    from d2mora.evaluate import evaluate
    from d2mora.recipe import load_recipe
    from d2mora.toy import toy_base
    from d2mora.train import train

    quantized(toy_base(), "4 bits").save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(toy_base()).save_pretrained(tmp_path / "base")
    keys = {"base": str(tmp_path / "base"), "data.tasks": ["boolq"], "training.disable_tqdm": True}
    run = train(load_recipe("demo", keys | {"training.max_steps": 2}), tmp_path / "run")
    assert evaluate(run, limit=4)["tasks"]["boolq"]["n"] == 4
