"""What the layer keeps and computes, counted by the functions of benchmarks/layer.py: exact, so a test and not a benchmark."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import layer

KEPT, FLOPS, PEAK, KEPT_LOOPS, PEAK_LOOPS = 0.25, 0.75, 0.9, 0.035, 0.5  # at most, against LoRA r = 64 and against loops


@pytest.fixture(scope="module", params=[(1024, 1024, KEPT), (4096, 2048, 0.20)], ids=["d 1024", "d 4096"])
def figures(request):
    "One block with q, k and v adapted; the feed-forward, which nobody adapts, is small."
    d, inner, kept = request.param
    layer.SHAPES["test"] = dict(hidden_size=d, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=d // 128)
    base = layer.frozen("test")
    layer.check_loops(base)
    return layer.counted(base, ("LoRA r 64", "loops", "D2MoRA"), 128), kept


def test_bytes_kept_for_backward(figures):
    counted, kept = figures
    assert counted["D2MoRA"]["kept_bytes"] <= kept * counted["LoRA r 64"]["kept_bytes"]
    assert counted["D2MoRA"]["kept_bytes"] <= KEPT_LOOPS * counted["loops"]["kept_bytes"]


def test_operations(figures):
    counted, _ = figures
    assert counted["D2MoRA"]["flops"] <= FLOPS * counted["LoRA r 64"]["flops"]
    assert counted["D2MoRA"]["flops"] == counted["loops"]["flops"]


def test_largest_sum_of_live_tensors(figures):
    counted, _ = figures
    assert counted["D2MoRA"]["peak_bytes"] <= PEAK * counted["LoRA r 64"]["peak_bytes"]
    assert counted["D2MoRA"]["peak_bytes"] <= PEAK_LOOPS * counted["loops"]["peak_bytes"]


def test_the_counter_sees_what_is_freed():
    import torch

    with layer.LiveBytes() as live:
        a = torch.randn(1000)
        b = a * 2
        del a
        c = b + 1
    assert live.peak == 8000 and live.now == 8000 and len(c) == 1000
