"""Where the real data is, and models small enough for tests."""

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("D2MORA_SHARED", Path(__file__).parents[2] / "shared"))


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
