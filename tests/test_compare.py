"""A comparison: sizes, the search for a learning rate, tests over seeds, single tasks, and what is trained once."""

import json
import math

import pytest
from scipy import stats

from d2mora import compare as module
from d2mora.compare import adapters_at, best_rate, choose_rate, compare, comparison_report, first_step_change, varied
from d2mora.compare import at_edge, last_fifth, loss_levels, next_rates, paired_test, paired_tests, significance
from d2mora.compare import steps_to_loss, trained_parameters
from d2mora.recipe import load_recipe

FEW = {"training.max_steps": 3, "training.disable_tqdm": True, "training.warmup_steps": 0}
FEW |= {"data.tasks": ["boolq", "piqa"], "data.validation_rows": 20}


@pytest.fixture(scope="module")
def tiny():
    return load_recipe("demo-hard", FEW)


@pytest.mark.parametrize("scaling", ["alpha", "ratio"])
def test_sizes_are_equal_within_four_percent_and_scales_as_asked(tiny, scaling):
    adapters, ours = adapters_at(tiny, "equal", scaling=scaling), tiny.adapter
    sizes = {m: trained_parameters(tiny, a) / trained_parameters(tiny) for m, a in adapters.items()}
    assert sizes.pop("lora-same-rank") < 0.5 and adapters["lora-same-rank"]["r"] == ours["r"]
    assert all(abs(size - 1) < 0.04 for size in sizes.values()), sizes
    same = {a["lora_alpha"] if scaling == "alpha" else a["lora_alpha"] / a["r"] for a in adapters.values()}
    assert same == {ours["lora_alpha"] if scaling == "alpha" else ours["lora_alpha"] / ours["r"]}
    assert {m for m, a in adapters.items() if a.get("orthogonality_weight")} == {"d2mora"}


def test_the_first_step_grows_with_the_scale(tiny):
    "Under Adam the first step moves each entry of B by the learning rate, whatever the gradient."
    lora = {s: adapters_at(tiny, "equal", ("lora",), s)["lora"] for s in ("alpha", "ratio")}
    changes = {s: first_step_change(varied(tiny, adapter)) for s, adapter in lora.items()}
    scale = lora["ratio"]["lora_alpha"] / lora["alpha"]["lora_alpha"]
    assert changes["ratio"] / changes["alpha"] == pytest.approx(scale, rel=0.2) and scale > 5
    half = first_step_change(varied(tiny, lora["alpha"], learning_rate=tiny.training["learning_rate"] / 2))
    assert half == pytest.approx(changes["alpha"] / 2, rel=0.2)


def searched(loss, start=1e-3):
    losses = {}
    while rates := next_rates(losses, start):
        losses |= {rate: loss(rate) for rate in rates[:1]}
    return losses


@pytest.mark.parametrize("best", [2e-5, 1e-3, 4e-3, 3e-2])
def test_rates_are_doubled_and_halved_until_the_best_lies_inside(best):
    losses = searched(lambda rate: abs(math.log2(rate / best)))
    found = min(losses, key=losses.get)
    assert min(losses) < found < max(losses) and abs(math.log2(found / best)) <= 1 and len(losses) <= 9


def test_a_search_ends_at_nine_rates_and_an_edge_is_named():
    losses = {f"{rate:g}": loss for rate, loss in searched(lambda rate: rate).items()}
    assert (
        len(losses) == 9
        and at_edge(losses)
        and not at_edge({"1": 2.0, "2": 1.0, "4": None})
        and not at_edge({"1": None})
    )
    broken = searched(lambda rate: math.inf if rate > 2e-3 else -rate)
    assert min(broken, key=broken.get) == 2e-3 and not at_edge({f"{rate:g}": loss for rate, loss in broken.items()})


def test_a_rate_is_searched_by_the_mean_of_two_seeds(tiny, tmp_path, monkeypatch):
    def loss(recipe, folder):
        rate, seed = recipe.training["learning_rate"], recipe.training["seed"]
        return abs(math.log2(rate / 6e-3)) + (0.5 if seed == module.CHOOSING_SEEDS[0] else 0.1)

    monkeypatch.setattr(module, "held_out_loss", loss)
    losses = choose_rate(tiny, tmp_path)
    assert (
        losses["0.006"] == pytest.approx(0.3)
        and best_rate(losses) == 6e-3
        and set(losses) == {"0.0015", "0.003", "0.006", "0.012"}
    )


def test_a_learning_rate_that_breaks_training_is_not_chosen(tiny, tmp_path, capsys):
    losses = choose_rate(tiny, tmp_path / "some", [1e30, 3e-3])
    assert losses["1e+30"] is None and losses["0.003"] > 0 and best_rate(losses) == 3e-3
    assert "learning-rate-1e+30/seed-1000: step" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"each learning rate \(1e\+30, 1e\+31\): name lower ones by --learning-rates"):
        choose_rate(tiny, tmp_path / "none", [1e30, 1e31])


def test_paired_tests_are_students_corrected_by_holm():
    values = {
        "a": [0.80, 0.82, 0.79, 0.85, 0.81],
        "b": [0.70, 0.75, 0.74, 0.72, 0.73],
        "c": [0.72, 0.73, 0.75, 0.71, 0.75],
    }
    alone = {m: paired_test(values[m], values["b"]) for m in "ac"}
    oracle = stats.ttest_rel(values["a"], values["b"])
    assert alone["a"]["p"] == pytest.approx(oracle.pvalue) and alone["a"]["low"] == pytest.approx(
        oracle.confidence_interval()[0]
    )
    together = paired_tests(values, "b")
    assert together["a"]["p"] == pytest.approx(2 * alone["a"]["p"]) and together["c"]["p"] == pytest.approx(
        alone["c"]["p"]
    )
    assert [significance(together[m]) for m in "ac"] == ["better", "no significant difference"]
    assert significance(paired_test(values["b"], values["a"])) == "worse"
    assert (
        paired_test([1.0], [0.0])["high"] == math.inf
        and significance(paired_test([1.0], [0.0])) == "no significant difference"
    )
    assert paired_test([0.5, 0.7], [0.5, 0.7])["p"] == 1 and paired_test([0.75, 1.0], [0.5, 0.75])["p"] == 0
    with pytest.raises(ValueError):
        paired_test([1.0], [0.0, 1.0])


def test_steps_to_a_loss_and_the_fall_over_the_last_fifth():
    slow, fast = ([[10 * k, 4 / (1 + speed * k)] for k in range(11)] for speed in (0.3, 3.0))
    levels = loss_levels([{"method": "slow", "curve": slow}, {"method": "fast", "curve": fast}])
    assert 4 > levels[0] > levels[1] > levels[2] > fast[-1][1]
    assert steps_to_loss([fast, fast], levels[1]) == "50" and steps_to_loss([slow], levels[2]) == "never (0 of 1)"
    assert steps_to_loss([fast, slow], levels[1]) == "50 (1 of 2)" and last_fifth(slow) == pytest.approx(1 - 3.4 / 4)


def test_a_comparison_goes_on_and_a_method_of_one_size_is_trained_once(tiny, tmp_path):
    choice = {"learning_rates": (1e-3, 3e-3), "limit": 20}
    result = compare(tiny, tmp_path, ("lora", "d2mora"), seeds=(0,), **choice)
    saved = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("adapter_model.safetensors")}
    both = compare(tiny, tmp_path, ("d2mora", "lora"), seeds=(0,), budget="paper", **choice)
    assert both["runs"][0] == result["runs"][1] and all(p.stat().st_mtime_ns == at for p, at in saved.items())
    assert {p.name for p in (tmp_path / "paper").iterdir()} == {"lora"}
    assert both["runs"][1]["parameters"] > result["runs"][0]["parameters"]
    assert json.loads((tmp_path / "comparison-paper.json").read_text())["runs"] == both["runs"]
    said = comparison_report(result)
    for part in ("first step at", "0.003 (edge)", "steps to", "p (Holm)", "B's cosine", "no significant difference"):
        assert part in said, part
    with pytest.raises(ValueError, match="max_steps"):
        compare(load_recipe("demo-hard", FEW | {"training.max_steps": 4}), tmp_path, ("lora",), seeds=(0,), **choice)


def test_single_tasks_have_a_result_file_of_their_own(tiny, tmp_path):
    alone = compare(tiny, tmp_path, ("lora",), seeds=(1,), learning_rates=(1e-3,), limit=20, single=True)
    assert set(alone["runs"][0]["single"]["choice"]["tasks"]) == {
        "boolq",
        "piqa",
    } and "one adapter a task" in comparison_report(alone)
    assert all((tmp_path / f"comparison-equal-single.{kind}").is_file() for kind in ("json", "md", "png", "svg"))
    assert not (tmp_path / "comparison-equal.json").is_file()


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"methods": ()}, "at least one"),
        ({"seeds": (1, 1)}, "once"),
        ({"seeds": (1001,)}, "1001"),
        ({"protocols": ("chioce",)}, "did you mean"),
        ({"methods": ("d2mroa",)}, "did you mean"),
        ({"budget": "large"}, "equal"),
        ({"scaling": "none"}, "alpha, ratio"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_first_run(tiny, tmp_path, wrong, said):
    with pytest.raises(ValueError, match=said):
        compare(tiny, tmp_path / "none", **wrong)
    assert not (tmp_path / "none").exists()
