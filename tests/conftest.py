"""Where the real data is, and models small enough for tests."""

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("D2MORA_SHARED", Path(__file__).parents[2] / "shared")).resolve()


SLOW = """test_gpu test_notebooks test_site test_whole test_resume test_bad_input test_main_job test_export test_distributed test_cli
test_grading_resume test_peft test_package test_compare test_studies test_scoring test_chaos test_demo test_analysis test_plan test_data""".split()


def pytest_collection_modifyitems(items):
    "Slow files first: with `-n 2 --dist loadfile` no worker begins the longest one last."
    place = lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW)
    items.sort(key=place)


@pytest.fixture(scope="session")
def shared():
    "The folder with real data, the golden recordings and stories260K; tests that need it skip where it is missing."
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"no shared data at {SHARED}: set D2MORA_SHARED")
    return SHARED


@pytest.fixture(autouse=True)
def seed():
    "Every test starts from the same random state."
    torch.manual_seed(0)
