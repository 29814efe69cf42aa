"""Instruments against planted truth: each sees what was planted, and a broken version of it does not pass."""

import json
import shutil
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from helpers import adapted, fill, our_config, tiny_llama, tokens
from matplotlib.backends.backend_agg import FigureCanvasAgg

from d2mora import analysis
from d2mora.analysis import Watch
from d2mora.utils import canvas, headline
from d2mora.recipe import load_recipe
from d2mora.evaluate import draw_results, report
from d2mora.train import read_metrics
from d2mora.train import train
from d2mora.compare import draw_comparison
from d2mora.orthogonality import Experts

SHORT = {"training.max_steps": 12, "training.logging_steps": 2, "training.disable_tqdm": True, "data.tasks": ["piqa", "boolq"], "adapter.target_modules": ["q_proj", "v_proj"]}
ROOT = Path(__file__).parents[1]
TEXTS = [list(range(5, 25)), list(range(30, 33)), [7, 8, 9, 90, 91, 92, 93]]


def parts(model, name="d2mora_B"):
    "Of each layer its matrices, views of the weights."
    return [m["default"].stack().detach() for n, m in model.named_modules() if n.endswith(name) and "default" in m]


# ---- likeness ----
def test_planted_twins_are_the_most_alike_pair_and_orthogonal_ones_score_zero():
    model = adapted()
    B = parts(model)[2]
    with torch.no_grad(): B[6] = -3 * B[1]
    top, layer, pair = analysis.most_alike(analysis.likeness(model), "up")
    assert abs(top - 1) < 1e-4 and pair == (1, 6) and (layer["block"], layer["kind"]) == (0, "v_proj")
    with torch.no_grad():
        for A in parts(model, "d2mora_A"): A.copy_(torch.eye(A.shape[0] * A.shape[1], A.shape[2]).view_as(A))
    found = analysis.likeness(model)
    assert analysis.overall(found, "down", analysis.main_kinds(found)) == 0 == analysis.overall(found, "down", ["q_proj"], "overlap")


def test_overlap_sees_what_the_cosine_misses():
    P = torch.randn(4, 64)
    mixed = torch.linalg.qr(torch.randn(4, 4)).Q @ P  # another basis of the same subspace
    both = torch.stack([P, mixed, torch.zeros(4, 64)])
    overlap = analysis.subspace_overlap(both)
    assert abs(overlap[0, 1] - 1) < 1e-4 and overlap[0, 2] == 0 == overlap[2, 2]
    assert analysis.pairwise_cosine(both)[0, 1].abs() < 0.9


def test_likeness_of_half_precision_and_of_one_a():
    found = analysis.likeness(adapted(pairing="one-to-many").to(torch.bfloat16))
    assert analysis.overall(found, "up", ["q_proj"]) > 0 and analysis.curve(found, "q_proj", "down", "cosine") == []


def test_several_models_are_drawn_side_by_side_and_lora_is_left_out():
    lora = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    figure = analysis.draw_similarity({"a": adapted(), "b": adapted(pairing="one-to-many"), "LoRA": lora})
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"a", "b (a single A)", "two random subspaces"}
    assert "B's are most alike in " in figure.get_label() and analysis.draw_similarity({"LoRA": lora}) is None


# ---- routing ----
def test_padding_does_not_matter(monkeypatch):
    model, texts = adapted(), sorted(TEXTS, key=len)
    together, alone = analysis.token_weights(model, TEXTS), [analysis.token_weights(model, [text]) for text in texts]
    gap = lambda found: max((found[n][s] - torch.cat([own[n][s] for own in alone])).abs().max().item() for n in found for s in found[n])
    assert sum(map(len, TEXTS)) == len(next(iter(together.values()))["up"]) and gap(together) < 1e-5
    monkeypatch.setattr(analysis, "equal_lengths", lambda rows: [torch.tensor([(row * 20)[:len(row)] + [0] * (20 - len(row)) for row in rows])])
    assert len(next(iter(analysis.token_weights(model, TEXTS).values()))["up"]) == 60  # a version that reads padding is another


def test_a_planted_router_is_read_as_planted():
    model = adapted()
    with torch.no_grad():
        for R in parts(model, "router_up"): R.zero_()
    found = analysis.token_weights(model, TEXTS)
    assert all(torch.allclose(own["up"], torch.full_like(own["up"], 1 / 8)) for own in found.values())
    own = analysis.summary(next(iter(found.values())))
    assert abs(own["each_up"] - 8) < 1e-4 and torch.allclose(own["meetings"], torch.outer(own["down"], own["up"]))
    assert torch.allclose(analysis.surprise(own["meetings"]), torch.ones(3, 8), atol=1e-4)


def test_the_page_of_a_text_cannot_be_broken_by_its_tokens():
    found = {"tokens": ["</script><b>", "“x”"], "layers": {"block 0 q_proj": {"down": [[90, 10], [5, 95]]}}, "shown": "block 0 q_proj"}
    page = analysis.router_page(found)
    assert page.count("</script>") == 1 and "http" not in page and "/*MAP*/" not in page
    data = page.split("const map = ")[1].split(";\n")[0]
    assert json.loads(data)["tokens"] == found["tokens"]


# ---- ablations ----
@pytest.mark.parametrize("pairing, side", [("many-to-many", "down"), ("many-to-many", "up"), ("one-to-many", "up"), ("one-to-one", "down")])
def test_without_an_expert_is_the_model_that_never_had_it(pairing, side):
    model, ids = adapted(pairing=pairing), tokens()
    whole = model(ids).logits
    cut = partial(analysis.without, side=side, j=1)
    with analysis.changed(model, cut): found = model(ids).logits
    counts = {"many-to-many": {"down": {"num_down_experts": 2}, "up": {"num_up_experts": 7}}, "one-to-many": {"up": {"num_up_experts": 3}},
              "one-to-one": {"down": {"num_down_experts": 3, "num_up_experts": 3}}}[pairing][side]
    smaller = peft.get_peft_model(tiny_llama(), our_config(pairing, **counts)).eval()
    with torch.no_grad():
        for name, own in smaller.named_modules():
            if not isinstance(own, Experts): continue
            large = model.get_submodule(name).stack()
            own.stack().copy_(large if own.sizes == model.get_submodule(name).sizes else large[[j for j in range(len(large)) if j != 1]])
    torch.testing.assert_close(found, smaller(ids).logits)
    assert (whole - found).abs().max() > 1e-3 and torch.equal(model(ids).logits, whole)


def test_a_failing_ablation_leaves_no_trace():
    model = adapted()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError), analysis.changed(model, analysis.uniform): raise RuntimeError
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(p, after[n]) for n, p in before.items())


@pytest.mark.parametrize("pairing", ["many-to-many", "one-to-many", "one-to-one"])
def test_one_mix_keeps_a_model_whose_routers_are_constant(pairing):
    model, ids = adapted(pairing=pairing), tokens()
    with torch.no_grad():
        for side in ("router_down", "router_up"):
            for R in parts(model, side): R.zero_()
    means = {layer: {side: w.mean(0) for side, w in own.items()} for layer, own in analysis.token_weights(model, TEXTS).items()}
    with analysis.changed(model, partial(analysis.one_mix, weights=means)):
        assert all(len(A) == 1 for A in parts(model, "d2mora_A"))
        mixed = model(ids).logits
    torch.testing.assert_close(mixed, model(ids).logits, atol=1e-4, rtol=1e-4)
    wrong = {layer: {side: 2 * w for side, w in own.items()} for layer, own in means.items()}
    with analysis.changed(model, partial(analysis.one_mix, weights=wrong)): assert (model(ids).logits - mixed).abs().max() > 1e-3


# ---- alarms ----
def test_alarms_name_what_was_planted_and_nothing_else():
    model = adapted()
    assert not any(analysis.alarms(fill(model, std=0.05), TEXTS).values())
    with torch.no_grad(): parts(model)[4][7] = parts(model)[4][0]
    found = analysis.alarms(model, TEXTS)
    assert found["twins"] == ["B1 = B8 in block 1 k_proj"] and analysis.said(found) == "twins: B1 = B8 in block 1 k_proj"


def test_a_fresh_adapter_raises_no_alarm():
    assert not any(analysis.alarms(peft.get_peft_model(tiny_llama(), our_config()), TEXTS).values())


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    "A run without the loss, whose B's stay twins, with checkpoints."
    folder = tmp_path_factory.mktemp("watch")
    recipe = load_recipe("demo", SHORT | {"adapter.orthogonality_weight": 0.0, "training.save_strategy": "steps", "training.save_steps": 6})
    return recipe, train(recipe, folder / "run", [Watch()])


def test_a_watched_run_ends_with_the_same_weights_and_logs_more(watched, tmp_path):
    recipe, run = watched
    plain = train(recipe, tmp_path / "plain")
    assert (plain / "adapter/adapter_model.safetensors").read_bytes() == (run / "adapter/adapter_model.safetensors").read_bytes()
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert all({"grad_norm_A", "grad_norm_B", "grad_norm_routers", "loss_piqa", "loss_boolq"} <= line.keys() for line in lines)
    assert lines[-1]["alarms_twins"] > 0 and all(line["alarms_collapsed"] == 0 for line in lines if "alarms_collapsed" in line)
    extra = lambda line: {k: v for k, v in line.items() if not k.startswith(("grad_norm_", "loss_", "alarms_"))}
    assert [extra(line) for line in read_metrics(run)] == read_metrics(plain)


def test_a_resumed_run_logs_the_same(watched, tmp_path):
    recipe, run = watched
    again = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(again / "adapter"), shutil.rmtree(again / "checkpoints" / "checkpoint-12")
    train(recipe, again, [Watch()], resume=True)
    assert read_metrics(again) == read_metrics(run)


def test_a_lasting_alarm_is_told_once_in_one_line(tmp_path, capsys):
    recipe = load_recipe("demo", SHORT | {"adapter.orthogonality_weight": 0.0, "data.tasks": ["piqa"], "adapter.target_modules": ["q_proj"]})
    train(recipe, tmp_path / "run", [Watch()])
    told = [line for line in capsys.readouterr().err.splitlines() if "twins" in line]
    assert told and told[0].startswith("step 4: twins: ") and len({line.partition(": ")[2] for line in told}) == len(told)


# ---- a run's folder ----
def cut_off(figure):
    "Titles, labels, legends and other texts of a figure that do not lie on it as a whole."
    figure.set_dpi(110), FigureCanvasAgg(figure).draw()  # as it is saved
    legends = [*figure.legends, *filter(None, (ax.get_legend() for ax in figure.axes))]
    texts = [*figure.texts, *(text for ax in figure.axes for text in (ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label, *ax.texts)), *(text for own in legends for text in own.get_texts())]
    outside = lambda box: box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1
    return [text.get_text() for text in texts if text.get_text() and outside(text.get_window_extent())]


def test_a_text_that_is_cut_off_is_noticed():
    with canvas(width=3) as (figure, ((ax,),), _): ax.set_title("a title that is far too long for so small a figure")
    assert len(cut_off(headline(figure, "short", "a figure"))) == 1


def test_no_grade_has_a_text_cut_off():
    before, after = (json.loads((ROOT / f"nbs/results/demo/{name}.json").read_text()) for name in ("before", "evaluation-choice"))
    for named in ({"a-run-with-a-long-name": after}, {"frozen base": before, "with the adapter": after}, {f"run {k}": after for k in range(5)}):
        assert cut_off(draw_results(named)) == []
    assert cut_off(draw_comparison(json.loads((ROOT / "nbs/results/compare-toy-hard.json").read_text()))) == []


def test_report_shows_every_picture_with_its_description(tmp_path, monkeypatch):
    from d2mora import analysis
    run, figures, save = shutil.copytree(ROOT / "nbs/results/demo", tmp_path / "run"), {}, analysis.save_picture
    monkeypatch.setattr(analysis, "save_picture", lambda figure, folder, name: (save(figure, folder, name), figures.update({name: figure}))[0])
    drawn = analysis.draw(run)
    assert {name: cut for name, figure in figures.items() if (cut := cut_off(figure))} == {}
    text = report(run)
    assert {"loss", "routers", "similarity", "tokens"} <= {path.stem for path in drawn} and not (run / "plots/ablations.png").exists()  # not graded here
    for path in drawn: assert f"](plots/{path.name})" in text and path.with_suffix(".svg").is_file()
    assert "](plots/tokens.html)" in text and "![routers]" not in text
