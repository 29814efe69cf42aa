"""What others find on the hub: files and card of a pushed adapter, with a hub that is a local folder."""

import re
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import yaml
from helpers import difference, fill
from transformers import AutoModelForCausalLM

import d2mora
from d2mora.toy import toy_base

DEMO = Path(__file__).parents[1] / "nbs" / "results" / "demo" / "adapter"
IMPORT = "`import d2mora` first (`pip install d2mora`)"


class Url(str):
    repo_id = "someone/adapter"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A folder that stands for the hub: commits are copied into it, nothing is sent anywhere."
    import transformers.utils.hub as client

    folder = tmp_path / "hub"

    def commit(self, repo_id, operations, **_):
        for operation in operations:
            there = folder / repo_id / operation.path_in_repo
            there.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as content:
                there.write_bytes(content.read())

    def no_card(*_, **__):
        raise huggingface_hub.errors.EntryNotFoundError("a new repository has no card")

    url = Url("https://hub.example/someone/adapter")
    for name, fake in {"create_repo": lambda *_, **__: url, "create_commit": commit}.items():
        monkeypatch.setattr(huggingface_hub.HfApi, name, fake)
        if hasattr(client, name):  # older transformers
            monkeypatch.setattr(client, name, lambda *a, fake=fake, **k: fake(None, *a, **k))
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", no_card)
    return folder / "someone" / "adapter"


def card_of(folder):
    "Front matter and text of the model card."
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text.strip()


def test_the_card_of_a_run_says_how_the_adapter_is_used():
    front, text = card_of(DEMO)
    assert front["library_name"] == "peft" and front["base_model"] and text.startswith(IMPORT)
    parts = ("num_down_experts: 3", "| choice, 200 rows | boolq |", "parameters, of which")
    assert all(part in text for part in parts) and "More Information Needed" not in text
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1].replace("FOLDER_OR_NAME", str(DEMO)), names)
    model, ids = names["model"].eval(), torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), model.disable_adapter():
        before = model(ids).logits
    assert difference(model(ids).logits, before) > 1e-2


@pytest.fixture
def model():
    "A small adapter with something in it."
    config = d2mora.D2MoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return fill(peft.get_peft_model(AutoModelForCausalLM.from_pretrained(toy_base()), config)).eval()


def test_push_to_hub_sends_an_adapter_that_loads(hub, model):
    "In a new repository transformers' own empty card is written last: hence the README names `hf upload` of a saved folder."
    model.push_to_hub("someone/adapter")
    assert {p.name for p in hub.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "import d2mora" not in card_of(hub)[1]  # if this fails, push_to_hub keeps our card: say so in the README
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy_base()), hub).eval()
    ids = torch.randint(5, 90, (2, 7))
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_a_saved_folder_says_what_to_import(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    front, text = card_of(tmp_path / "saved")
    assert text.startswith(IMPORT) and front["base_model"] == toy_base()
