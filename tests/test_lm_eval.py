"""lm-evaluation-harness, an adapter handed over as an object, real rows, no network: exactly our accuracies."""

import os

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="pip install d2mora[eval]")


from d2mora.scoring import PROTOCOLS, grade_rows, lm_eval_tasks
from d2mora.data import read_task
from d2mora.tasks import TASKS
from helpers import adapted_stories

ROWS = 24


@pytest.fixture(scope="module")
def model(shared):
    model, tokenizer, rows = adapted_stories(shared, lora_dropout=0.5)
    return model.eval(), tokenizer, rows


@pytest.fixture(scope="module")
def theirs(model):
    "Every task of ours by lm-eval: {(protocol, task): {metric: value}}."
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    os.environ["HF_HUB_OFFLINE"] = "1"
    adapted, tokenizer, data = model
    manager = TaskManager(include_path=lm_eval_tasks(), include_defaults=False, metadata={"data": data, "limit": ROWS})
    names = {(p, t): f"d2mora_{p}_{t.lower().replace('-', '_')}" for p in ("choice", "content") for t in TASKS}
    lm = HFLM(pretrained=adapted, tokenizer=tokenizer, batch_size=8, max_length=512)
    found = lm_eval.simple_evaluate(lm, tasks=list(names.values()), task_manager=manager, bootstrap_iters=0)
    samples = {key: sorted(found["samples"][name], key=lambda s: s["doc_id"]) for key, name in names.items()}
    return samples, {key: found["results"][name] for key, name in names.items()}


@pytest.mark.parametrize("protocol", ["choice", "content"])
@pytest.mark.parametrize("task", list(TASKS))
def test_the_same_accuracy(model, theirs, task, protocol):
    adapted, tokenizer, data = model
    rows = read_task(data, task, "test").to_list()[:ROWS]
    graded = grade_rows(adapted, tokenizer, task, rows, protocol)
    samples, results = theirs[0][protocol, task], theirs[1][protocol, task]
    fits = [i for i, g in enumerate(graded) if not g["shortened"]]
    assert len(samples) == ROWS and len(fits) >= ROWS // 4
    for i in fits:
        assert samples[i]["acc"] == graded[i]["right"], (i, samples[i]["filtered_resps"], graded[i]["scores"])
        assert [float(r[0]) for r in samples[i]["filtered_resps"]] == pytest.approx(list(graded[i]["scores"].values()), abs=2e-3)
        if "acc_norm" in samples[i]:
            assert samples[i]["acc_norm"] == (graded[i]["predicted_by_length"] == graded[i]["answer"])
    if len(fits) == ROWS:
        assert results["acc,none"] == pytest.approx(sum(g["right"] for g in graded) / ROWS)


def test_the_comparison_can_fail(model, theirs):
    "Options and prompts are not equally likely everywhere: another protocol gives other accuracies."
    adapted, tokenizer, data = model
    right = {p: [g["right"] for t in ("piqa", "social_i_qa") for g in grade_rows(adapted, tokenizer, t, read_task(data, t, "test").to_list()[:ROWS], p)] for p in ("choice", "content")}
    assert right["choice"] != right["content"] and set(PROTOCOLS) == {"choice", "content", "generate", "official"}
