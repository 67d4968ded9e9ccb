"""What the tests of calibration share."""

from pathlib import Path

import pytest

from sparseflow.store.calibration import PROFILE_NAME, Calibration
from sparseflow.store.manifest import Manifest


@pytest.fixture
def calibration(calibrated_demo_store: Path) -> Calibration:
    """What that store's profile.json says."""
    content = (calibrated_demo_store / PROFILE_NAME).read_bytes()
    return Calibration.from_json(content, Manifest.load(calibrated_demo_store).profile)
