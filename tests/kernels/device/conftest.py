"""Where kernels for a GPU run in these tests: on one, if there is one; else on the CPU, interpreted."""

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
