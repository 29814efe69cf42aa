"""What the layer keeps and computes, counted by the functions of benchmarks/layer.py: exact, so a test and not a benchmark."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import layer

AT_MOST = {  # D2MoRA's share of what another adapter takes
    ("LoRA r 64", "flops"): 0.75,
    ("LoRA r 64", "peak_bytes"): 0.9,
    ("loops", "kept_bytes"): 0.035,
    ("loops", "flops"): 1,
    ("loops", "peak_bytes"): 0.5,
}


@pytest.mark.parametrize("d, inner, kept", [(1024, 1024, 0.25), (4096, 2048, 0.20)])
def test_bytes_and_operations_of_the_layer(d, inner, kept):
    "One block with q, k and v adapted; the feed-forward, which nobody adapts, is small."
    shape = dict(hidden_size=d, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=d // 128)
    layer.SHAPES["test"] = shape
    base = layer.frozen("test")
    layer.check_loops(base)
    counted = layer.counted(base, ("LoRA r 64", "loops", "D2MoRA"), 128)
    for (other, what), share in (AT_MOST | {("LoRA r 64", "kept_bytes"): kept}).items():
        assert counted["D2MoRA"][what] <= share * counted[other][what], (other, what)
    assert counted["D2MoRA"]["flops"] == counted["loops"]["flops"]


def test_the_counter_sees_what_is_freed():
    with layer.LiveBytes() as live:
        a = torch.randn(1000)
        b = a * 2
        del a
        c = b + 1
    assert live.peak == 8000 and live.now == 8000 and len(c) == 1000
