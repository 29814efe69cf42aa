"""PEFT's benchmark method_comparison/MetaMathQA with D2MoRA: its own run.py, unchanged, with the orthogonality loss attached.

    cd peft/method_comparison/MetaMathQA                       # a clone of https://github.com/huggingface/peft
    python D2MORA/benchmarks/metamathqa/run_d2mora.py -v experiments/d2mora/llama-3.2-3B-m3-n8-r6

The folders beside this file are copied to `experiments` first. Needs a GPU and the gated base meta-llama/Llama-3.2-3B: not run here.
"""

import runpy
import sys


def attach():
    "Have the benchmark's optimizers add the orthogonality gradient at each step."
    import utils  # the benchmark's

    from d2mora import attach_orthogonality  # which also makes PEFT know the method

    make = utils.get_optimizer_and_scheduler

    def make_and_attach(model, **settings):
        optimizer, scheduler = make(model, **settings)
        attach_orthogonality(model, optimizer)
        return optimizer, scheduler

    utils.get_optimizer_and_scheduler = make_and_attach


if __name__ == "__main__":
    sys.path.insert(0, ".")
    attach()
    ran = runpy.run_path("run.py", run_name="__main__")
