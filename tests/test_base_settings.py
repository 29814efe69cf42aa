"""What base, tokenizer and adapter folder bring with them: the protocol alone decides how is graded, and what does not fit is one line."""

import json
import shutil

import peft
import pytest
import transformers
from helpers import fill, our_config

from d2mora.cli import main
from d2mora.evaluate import evaluate, load_target
from d2mora.export import export
from d2mora.recipe import load_base
from d2mora.scoring import write
from d2mora.tasks import evaluation_prompt
from d2mora.toy import toy_base, toy_rows

HABITS = {  # what a base's generation_config may ask for, which no protocol asks for
    "processors": dict(
        repetition_penalty=3.0, no_repeat_ngram_size=1, min_new_tokens=20, suppress_tokens=list(range(3, 200)),
        begin_suppress_tokens=list(range(3, 300)), forced_bos_token_id=320, forced_eos_token_id=321,
        exponential_decay_length_penalty=[2, 1.5], length_penalty=-5.0, early_stopping="never",
    ),
    "lists": dict(bad_words_ids=[[i] for i in range(3, 200)], sequence_bias=[[[i], -50.0] for i in range(3, 150)]),
    "sampling": dict(do_sample=True, temperature=9.0, top_k=3, guidance_scale=3.0, use_cache=False),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain_texts():
    base, tokenizer = load_base("toy")
    prompts = [evaluation_prompt(row) for row in toy_rows("toy", "ARC-Easy", "test")[:2]]
    return prompts, [write(base, tokenizer, prompts, num_beams=beams) for beams in (1, 4)]


@pytest.mark.parametrize("habit", HABITS)
def test_a_base_does_not_say_how_it_is_graded(habit, plain_texts, tmp_path):
    "Bare and adapted it writes what the protocol alone makes it write, and keeps its own settings."
    shutil.copytree(toy_base(), tmp_path / "base")
    (tmp_path / "base/generation_config.json").write_text(json.dumps(HABITS[habit] | {"eos_token_id": 2}))
    base, tokenizer = load_base(str(tmp_path / "base"))
    prompts, expected = plain_texts
    kept = {name: value for name, value in HABITS[habit].items() if name != "sequence_bias"}
    for model in (base, peft.get_peft_model(base, our_config())):
        assert [write(model, tokenizer, prompts, num_beams=beams) for beams in (1, 4)] == expected
        assert all(getattr(model.generation_config, name) == value for name, value in kept.items())


@pytest.fixture
def adapter(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(toy_base())
    fill(peft.get_peft_model(model, our_config())).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


LONGER = "has 350 tokens, its base 349 rows of embeddings: save the base again after model.resize_token_embeddings(350)"


def test_a_tokenizer_with_more_tokens_than_embeddings_is_one_line(adapter, tmp_path, capsys):
    "Of a base and of an adapter's folder, in every command."
    longer, base = transformers.AutoTokenizer.from_pretrained(toy_base()), tmp_path / "base"
    longer.add_special_tokens({"pad_token": "[PAD]"})
    shutil.copytree(toy_base(), base)
    for folder in (base, adapter):
        longer.save_pretrained(folder)
    capsys.readouterr()
    for line in (
        f"train demo base={base} data.tasks=[boolq] --output {tmp_path}/run",
        f"train demo base={base} data.tasks=[boolq] --dry-run",
        f"evaluate --base {base} --data toy",
        f"evaluate --base {base} --ask so?",
        f"evaluate {adapter} --data toy",
        f"evaluate {adapter} --ask so?",
        f"export {adapter} {tmp_path}/out --data toy",
    ):
        status, err = main(line.split()), capsys.readouterr().err
        assert status == 2 and err.strip().count("\n") == 0 and LONGER in err, err


def test_an_adapters_own_tokenizer_is_the_one_it_is_graded_and_exported_with(adapter, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy_base())
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(40)
    tokenizer.save_pretrained(adapter)
    graded = evaluate(adapter, None, "generate", ["boolq"], 2, "toy", progress=False)
    assert graded["settings"]["generation"]["eos_token_id"] == 40
    export(adapter, tmp_path / "lora", data="toy", tasks=["boolq"], rows=2, limit=2)
    assert load_target(tmp_path / "lora")[1].eos_token_id == 40
