"""The demo model; README.md beside this file says what it is."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "demo_model"
