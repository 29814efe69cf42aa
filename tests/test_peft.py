"""The method as PEFT hosts it. Every test fills the adapter with random values first. Calls of PEFT: test_peft_calls."""

import copy
import re
import warnings

import peft
import pytest
import torch
from helpers import PAIRS, QKV, adapted, difference, fill, our_config, tiny_llama, tokens
from program import Program
from torch import nn
from transformers import AutoModelForCausalLM

import d2mora
from d2mora.tuner import CARD_NOTE, D2MoraLinear

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
pairings = pytest.mark.parametrize("pairing", PAIRS)


def layer_names(model):
    return {name.rpartition(".")[-1] for name, m in model.named_modules() if isinstance(m, D2MoraLinear)}


# ---- fresh, saved, loaded, taken off ----


@pairings
def test_fresh_adapter_leaves_the_base_alone(pairing):
    base, ids = tiny_llama(), tokens()
    before = base(ids).logits
    model = peft.get_peft_model(base, our_config(pairing)).eval()
    assert torch.equal(model(ids).logits, before)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all(n.split(".")[-3].startswith("d2mora_") for n in names)


def loads_the_same(folder):
    "In a new process: each saved adapter gives the logits that lie beside it; without our class PEFT fails."
    for pairing in PAIRS:
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / pairing)
        assert torch.equal(model.eval()(tokens()).logits, torch.load(folder / pairing / "logits.pt")), pairing
    for table in (peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, peft.PeftType._value2member_map_):
        del table["D2MORA"]
    with pytest.raises((KeyError, ValueError, TypeError), match="D2MORA"):
        peft.PeftConfig.from_pretrained(folder / "many-to-many")


def test_saved_and_loaded_exactly_in_a_new_process(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    for pairing in PAIRS:
        model = adapted(pairing=pairing)
        model.save_pretrained(tmp_path / pairing)
        torch.save(model(tokens()).logits, tmp_path / pairing / "logits.pt")
    process = Program(tmp_path, call=loads_the_same)
    assert process.communicate()[1].count("Error") == 0 and process.returncode == 0, process.said("err")


def test_the_card_says_what_to_import_and_keeps_other_words(tmp_path):
    card, theirs = tmp_path / "README.md", "library_name: peft\n\n---\na\n---\nb\n"
    card.write_text("---\nlicense: mit\n---\nMy words\n\n---\nafter a rule\n")
    model = adapted()
    for _ in range(2):  # a second save does not say it twice
        model.save_pretrained(tmp_path)
    text = card.read_text()
    assert text.count(CARD_NOTE) == 1 and text.split("---\n", 2)[2].startswith(CARD_NOTE)
    assert all(words in text for words in ("license: mit", "My words", "after a rule"))
    (tmp_path / "above").mkdir()
    (tmp_path / "above/README.md").write_text(theirs)
    model.save_pretrained(tmp_path / "above/adapter")
    our_config().save_pretrained(tmp_path / "above")  # a configuration alone writes no card, and changes none
    assert (tmp_path / "above/README.md").read_text() == theirs
    peft.get_peft_model(tiny_llama(), our_config(), adapter_name="math").save_pretrained(tmp_path / "named")
    assert CARD_NOTE in (tmp_path / "named/README.md").read_text()  # the adapter itself lies one folder deeper


def test_disabled_unloaded_copied_and_saved_whole(tmp_path):
    base, ids = tiny_llama(), tokens()
    before = base(ids).logits
    model = adapted(base)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, before)
    torch.save(model, tmp_path / "whole.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert torch.equal(other(ids).logits, model(ids).logits)
    plain = model.unload()
    assert torch.equal(plain(ids).logits, before) and not layer_names(plain)


# ---- precision, shapes, compilation ----


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_base(dtype, cast):
    model = fill(peft.get_peft_model(tiny_llama(dtype), our_config(lora_dropout=0.1), autocast_adapter_dtype=cast))
    assert {p.dtype for n, p in model.named_parameters() if "d2mora_" in n} == {torch.float32 if cast else dtype}
    exact = fill(peft.get_peft_model(tiny_llama(dtype).float(), our_config())).eval()(tokens()).logits
    logits = model.eval()(tokens()).logits
    assert logits.dtype == dtype and difference(logits, exact) < 0.1 * exact.abs().max()
    model.train()(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("shape", [(48,), (2, 3, 4, 48), (2, 0, 48)])
def test_plain_mlp_any_leading_shape(shape):
    net = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8))
    model = fill(peft.get_peft_model(net, d2mora.D2MoraConfig(target_modules=["0", "2"], lora_dropout=0.1)))
    for mode in (model.train(), model.eval()):
        x = torch.randn(shape, requires_grad=True)
        y = mode(x)
        y.sum().backward()
        assert y.shape == (*shape[:-1], 8) and x.grad.shape == x.shape
    if 0 not in shape:
        rows = torch.stack([model(row) for row in x.reshape(-1, 48)])
        torch.testing.assert_close(model(x).reshape(rows.shape), rows)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = adapted(lora_dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        model(tokens(), labels=tokens()).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*grads)
    assert grads[0].norm() > 0


@pairings
def test_compiles_without_graph_break(pairing):
    torch.compiler.reset()
    layer = adapted(pairing=pairing, lora_dropout=0.1).base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    layer.train()
    compiled(x).sum().backward()


# ---- a token's output depends on no other token ----


@pairings
def test_generation_with_cache_equals_without(pairing):
    model, ids = adapted(pairing=pairing), tokens()
    settings = dict(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(*(model.generate(use_cache=cache, **settings) for cache in (True, False)))


@pairings
def test_causal(pairing):
    "A later token never changes an earlier logit."
    model, ids = adapted(pairing=pairing), tokens()
    later = ids.clone()
    later[:, 7:] = (later[:, 7:] + 11) % 90 + 3
    a, b = model(ids).logits, model(later).logits
    torch.testing.assert_close(a[:, :7], b[:, :7], rtol=0, atol=1e-5)
    assert difference(a[:, 7:], b[:, 7:]) > 1e-2


@pairings
def test_batch_and_padding_invariant(pairing):
    "A row's logits do not depend on its batch mates nor on padding."
    model, ids = adapted(pairing=pairing), tokens(rows=4)
    alone = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(model(ids).logits, alone, rtol=0, atol=1e-5)
    mask = torch.tensor([[0] * 5 + [1] * 12] * 4)
    padded, positions = torch.cat([torch.full((4, 5), 0), ids], 1), (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)


# ---- which layers ----


def test_all_linear_targets():
    model = adapted(target_modules="all-linear")
    assert layer_names(model) == {*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"}
    model.add_adapter("second", our_config(target_modules="all-linear"))  # finds the layers behind our own
    assert all("second" in m.d2mora_A for m in model.modules() if isinstance(m, D2MoraLinear))


@pytest.mark.parametrize(
    "layer", [nn.Embedding(8, 4), nn.Conv1d(4, 4, 3), nn.LayerNorm(4), nn.MultiheadAttention(4, 1)]
)
def test_unsupported_layer(layer):
    with pytest.raises(ValueError, match=f"layer 'odd': .*linear layers only.*{type(layer).__name__}"):
        net = nn.ModuleDict({"odd": layer, "fc": nn.Linear(4, 4)})
        peft.get_peft_model(net, d2mora.D2MoraConfig(target_modules=["odd"]))


UNMATCHED = {  # the cause that the error names
    "q_prj is near q_proj": dict(target_modules=["q_prj"]),
    "linear layers here: down_proj": dict(target_modules=["xyzzy"]),
    "match no layer": dict(target_modules=r".*\.nothing"),
    "modules_to_save=['lm_head'] may leave none": dict(target_modules=["lm_head"], modules_to_save=["lm_head"]),
    "exclude_modules={'q_proj'} may leave none": dict(target_modules=["q_proj"], exclude_modules=["q_proj"]),
    "give a list of names": dict(target_modules=[]),
}


@pytest.mark.parametrize("cause", UNMATCHED)
def test_targets_that_match_nothing(cause):
    "The same kind of error as LoRA's, with the cause and near misses."
    with pytest.raises(ValueError) as lora:
        peft.get_peft_model(tiny_llama(), peft.LoraConfig(**UNMATCHED[cause]))
    with pytest.raises(ValueError, match=re.escape(cause)) as ours:
        peft.get_peft_model(tiny_llama(), our_config(**UNMATCHED[cause]))
    assert type(ours.value) is type(lora.value) and "\n" not in str(ours.value)


def test_some_targets_that_match_nothing_warn_and_empty_lists_are_lists():
    with pytest.warns(UserWarning, match="k_prj"):
        peft.get_peft_model(tiny_llama(), our_config(target_modules=["q_proj", "k_prj"]))
    empty = dict(exclude_modules=[], modules_to_save=[], layers_to_transform=[], layers_pattern="")
    assert layer_names(peft.get_peft_model(tiny_llama(), our_config(target_modules=["q_proj"], **empty))) == {"q_proj"}


# ---- configuration (what it refuses: appendix I, and test_bad_input) ----


def test_configuration_survives_a_file(tmp_path):
    config = our_config("one-to-many", r=4, lora_alpha=8.0, expert_dropout="independent", orthogonality_weight=0.5)
    config.save_pretrained(tmp_path)
    again = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(again) is d2mora.D2MoraConfig and again.to_dict() == config.to_dict()
    assert peft.get_peft_config({"peft_type": "D2MORA", "r": 4}).r == 4


def test_no_warnings_of_ours_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = adapted(orthogonality_weight=0.0).train()
        model(tokens(), labels=tokens()).loss.backward()
