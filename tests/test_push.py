"""What a stranger finds on the hub: files and card of a pushed adapter, with a hub that is a local folder."""

import re
import shutil
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import d2mora
from d2mora.toy import toy_base

DEMO = Path(__file__).parents[1] / "nbs" / "results" / "demo" / "adapter"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A folder that stands for the hub: commits are copied into it, nothing is sent anywhere."
    import transformers.utils.hub as client

    folder = tmp_path / "hub"

    def commit(self, repo_id, operations, **_):
        for operation in operations:
            there = folder / repo_id / operation.path_in_repo
            there.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as content: there.write_bytes(content.read())

    class Url(str):
        repo_id = "someone/adapter"

    def no_card(*args, **kwargs): raise huggingface_hub.errors.EntryNotFoundError("a new repository has no card")

    fakes = {"create_repo": lambda self, *a, **k: Url("https://hub.example/someone/adapter"), "create_commit": commit,
             "upload_folder": lambda self, *, repo_id, folder_path, **k: shutil.copytree(folder_path, folder / repo_id)}
    for name, fake in fakes.items():
        monkeypatch.setattr(huggingface_hub.HfApi, name, fake)
        if hasattr(client, name): monkeypatch.setattr(client, name, lambda *a, fake=fake, **k: fake(None, *a, **k))  # older transformers
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", no_card)
    return folder / "someone" / "adapter"


def card_of(folder):
    "Front matter and text of the model card."
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def loaded_by_its_card(folder):
    "Run the card's own Python with the folder in place of its name."
    code = re.search(r"```python\n(.*?)```", card_of(folder)[1], re.S)[1]
    assert "FOLDER_OR_NAME" in code
    names = {}
    exec(code.replace("FOLDER_OR_NAME", str(folder)), names)
    return names["model"]


def test_a_finished_adapter_uploaded_is_usable_by_its_card(hub):
    huggingface_hub.HfApi().upload_folder(repo_id="someone/adapter", folder_path=str(DEMO))
    front, text = card_of(hub)
    assert front["library_name"] == "peft" and front["base_model"] and text.startswith("`import d2mora` first (`pip install d2mora`)")
    assert all(word in text for word in ("num_down_experts 3", "## Scores", "| choice | boolq |", "parameters")) and "More Information Needed" not in text
    model = loaded_by_its_card(hub).eval()
    ids = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with model.disable_adapter(): before = model(ids).logits
        assert (model(ids).logits - before).abs().max() > 1e-2


@pytest.fixture
def model():
    "A small adapter with something in it."
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(toy_base()), d2mora.D2MoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "d2mora_" in name: torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def test_push_to_hub_sends_an_adapter_that_loads(hub, model):
    "In a new repository its card is transformers' own empty one, written last: hence README and 08f name `hf upload` of a saved folder."
    model.push_to_hub("someone/adapter")
    assert {p.name for p in hub.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "import d2mora" not in card_of(hub)[1]  # if this fails, push_to_hub has learned to keep our card: say so in 08f
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy_base()), hub)
    ids = torch.randint(5, 90, (2, 7))
    assert torch.equal(model(ids).logits, again.eval()(ids).logits)


def test_push_to_hub_keeps_the_card_that_is_there(hub, model, monkeypatch):
    from transformers.utils.hub import ModelCard
    huggingface_hub.HfApi().upload_folder(repo_id="someone/adapter", folder_path=str(DEMO))
    before = card_of(hub)
    monkeypatch.setattr(ModelCard, "load", lambda *a, **k: huggingface_hub.ModelCard((hub / "README.md").read_text(encoding="utf-8")))
    model.push_to_hub("someone/adapter")
    assert card_of(hub)[1].strip() == before[1].strip() and "## Scores" in before[1]


def test_a_saved_folder_uploaded_says_what_to_import(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    huggingface_hub.HfApi().upload_folder(repo_id="someone/adapter", folder_path=str(tmp_path / "saved"))
    front, text = card_of(hub)
    assert text.lstrip().startswith("`import d2mora` first (`pip install d2mora`)") and front["base_model"] == toy_base()
