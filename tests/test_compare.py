"""A comparison: sizes, the search for a learning rate, tests over seeds, and what is trained once."""

import json
import math

import pytest
from scipy import stats

from d2mora import compare as module
from d2mora.compare import adapters_at, at_edge, best_rate, choose_rate, compare, comparison_report, first_step_change
from d2mora.compare import last_fifth, next_rates, paired_test, paired_tests, significance, trained_parameters, varied
from d2mora.recipe import load_recipe

FEW = {"training.max_steps": 3, "training.disable_tqdm": True, "training.warmup_steps": 0}
FEW |= {"training.per_device_train_batch_size": 2, "data.tasks": ["boolq", "piqa"], "data.validation_rows": 10}
CHOICE = {"seeds": (0,), "learning_rates": (1e-3, 3e-3), "limit": 5}


@pytest.fixture(scope="module")
def tiny():
    return load_recipe("demo-hard", FEW)


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    "A comparison of two methods: its folder and its result."
    folder = tmp_path_factory.mktemp("comparison")
    return folder, compare(tiny, folder, ("lora", "d2mora"), **CHOICE)


def test_sizes_are_equal_within_four_percent_and_one_lora_alpha_is_that_of_all(tiny):
    adapters, ours = adapters_at(tiny), tiny.adapter
    sizes = {m: trained_parameters(tiny, a) / trained_parameters(tiny) for m, a in adapters.items()}
    assert sizes.pop("lora-same-rank") < 0.5 and adapters["lora-same-rank"]["r"] == ours["r"]
    assert all(abs(size - 1) < 0.04 for size in sizes.values()), sizes
    assert {a["lora_alpha"] for a in adapters.values()} == {ours["lora_alpha"]}
    assert {m for m, a in adapters.items() if a.get("orthogonality_weight")} == {"d2mora"}
    r, paper = ours["r"], adapters_at(tiny, "paper")
    assert [paper[m]["r"] for m in ("lora", "dora", "one-to-one", "one-to-many")] == [8 * r, 8 * r, r, round(1.5 * r)]


def test_the_first_step_grows_with_the_scale(tiny):
    "Under Adam the first step moves each entry of B by the learning rate, whatever the gradient."
    lora = adapters_at(tiny, "equal", ("lora",))["lora"]
    once, scaled = (first_step_change(varied(tiny, lora | {"lora_alpha": n * lora["lora_alpha"]})) for n in (1, 6))
    assert scaled / once == pytest.approx(6, rel=0.2)
    half = first_step_change(varied(tiny, lora, learning_rate=tiny.training["learning_rate"] / 2))
    assert half == pytest.approx(once / 2, rel=0.2)


def searched(loss):
    losses = {}
    while rates := next_rates(losses, 1e-3):
        losses |= {rate: loss(rate) for rate in rates[:1]}
    return {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in losses.items()}


@pytest.mark.parametrize(
    "loss, best, edge",
    [
        *((lambda rate, best=best: abs(math.log2(rate / best)), best, False) for best in (2e-5, 1e-3, 4e-3, 3e-2)),
        (lambda rate: math.inf if rate > 2e-3 else -rate, 2e-3, False),  # training breaks down beyond the best
        (lambda rate: rate, 3.90625e-06, True),  # the search ends at nine rates
    ],
)
def test_rates_are_doubled_and_halved_until_the_best_lies_inside(loss, best, edge):
    losses = searched(loss)
    assert at_edge(losses) == edge and (len(losses) == 9 if edge else len(losses) <= 9)
    assert abs(math.log2(best_rate(losses) / best)) <= 1 and not at_edge({"1": None})


def test_a_rate_is_judged_by_the_mean_of_two_seeds_and_one_that_breaks_training_is_not_chosen(
    tiny, tmp_path, monkeypatch, capsys
):
    def trained(recipe, folder, resume):
        rate, seed = recipe.training["learning_rate"], recipe.training["seed"]
        if rate > 7e-3:
            raise FloatingPointError("step 3: the loss is nan")
        return abs(math.log2(rate / 6e-3)) + (0.5 if seed == module.CHOOSING_SEEDS[0] else 0.1)

    monkeypatch.setattr(module, "train", trained)
    monkeypatch.setattr(module, "validation_losses", lambda loss: {"boolq": (9.0, loss)})
    losses = choose_rate(tiny, tmp_path)
    assert losses == {"0.0015": 2.3, "0.003": 1.3, "0.006": pytest.approx(0.3), "0.012": None}
    assert best_rate(losses) == 6e-3 and "learning-rate-0.012/seed-1000: step 3" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"each learning rate \(1, 2\): name lower ones by --learning-rates"):
        choose_rate(tiny, tmp_path, [1.0, 2.0])


def test_paired_tests_are_students_corrected_by_holm():
    a, b, c = [0.80, 0.82, 0.79, 0.85, 0.81], [0.70, 0.75, 0.74, 0.72, 0.73], [0.72, 0.73, 0.75, 0.71, 0.75]
    alone, oracle = paired_test(a, b), stats.ttest_rel(a, b)
    assert (alone["p"], alone["low"]) == pytest.approx((oracle.pvalue, oracle.confidence_interval()[0]))
    together = paired_tests({"a": a, "b": b, "c": c}, "b")
    assert together["a"]["p"] == pytest.approx(2 * alone["p"])
    assert together["c"]["p"] == pytest.approx(paired_test(c, b)["p"])
    assert [significance(together[m]) for m in "ac"] == ["better", "no significant difference"]
    assert significance(paired_test(b, a)) == "worse" and paired_test([1.0], [0.0])["high"] == math.inf
    assert significance(paired_test([1.0], [0.0])) == "no significant difference"
    assert paired_test([0.5, 0.7], [0.5, 0.7])["p"] == 1 and paired_test([0.75, 1.0], [0.5, 0.75])["p"] == 0
    with pytest.raises(ValueError):
        paired_test([1.0], [0.0, 1.0])


def test_steps_to_three_losses_and_the_fall_over_the_last_fifth():
    curves = {name: [[10 * k, 4 / (1 + speed * k)] for k in range(11)] for name, speed in {"a": 0.3, "b": 3}.items()}
    levels = module._loss_levels([{"method": name, "curve": curve} for name, curve in curves.items()])
    assert 4 > levels[0] > levels[1] > levels[2] > curves["b"][-1][1]
    said = {"bb": "50", "ab": "50 (1 of 2)", "a": "never (0 of 1)"}
    for names, text in said.items():
        assert module._steps_to_loss([curves[name] for name in names], levels[1]) == text
    assert last_fifth(curves["a"]) == pytest.approx(1 - 3.4 / 4)


def test_a_comparison_goes_on_and_a_method_of_one_size_is_trained_once(tiny, done):
    folder, result = done
    saved = {p: p.stat().st_mtime_ns for p in folder.rglob("adapter_model.safetensors")}
    both = compare(tiny, folder, ("d2mora", "lora"), budget="paper", **CHOICE)
    assert both["runs"][0] == result["runs"][1] and all(p.stat().st_mtime_ns == at for p, at in saved.items())
    assert {p.name for p in (folder / "paper").iterdir()} == {"lora"}
    assert both["runs"][1]["parameters"] > result["runs"][0]["parameters"]
    assert json.loads((folder / "comparison-paper.json").read_text())["runs"] == json.loads(json.dumps(both["runs"]))
    places = {p.relative_to(folder).as_posix() for p in folder.glob("*/*/*/")}
    assert {"equal/lora/seed-0", "learning-rates/d2mora/learning-rate-0.003"} <= places
    said = comparison_report(result)
    for part in ("first step at", "(edge)", "steps to", "p (Holm)", "B's cosine", "no significant difference"):
        assert part in said, part
    with pytest.raises(ValueError, match="max_steps"):
        compare(varied(tiny, max_steps=4), folder, ("lora",), **CHOICE)


def test_single_tasks_have_a_result_file_of_their_own(tiny, done):
    folder, result = done
    before = (folder / "comparison-equal.json").read_text()
    alone = compare(tiny, folder, ("lora",), single=True, **CHOICE)
    assert set(alone["runs"][0]["single"]["choice"]["tasks"]) == {"boolq", "piqa"}
    assert "one adapter a task" in comparison_report(alone) and before == (folder / "comparison-equal.json").read_text()
    assert all((folder / f"comparison-equal-single.{kind}").is_file() for kind in ("json", "md", "png", "svg"))


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"methods": ()}, "at least one"),
        ({"seeds": (1, 1)}, "once"),
        ({"seeds": (1001,)}, "1001"),
        ({"protocols": ("chioce",)}, "did you mean"),
        ({"methods": ("d2mroa",)}, "did you mean"),
        ({"budget": "large"}, "equal"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_first_run(tiny, tmp_path, wrong, said):
    with pytest.raises(ValueError, match=said):
        compare(tiny, tmp_path / "none", **wrong)
    assert not (tmp_path / "none").exists()
