"""Where tests find the checkout, the experiment files, and real images that may lie beside the checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "orchestrator" / "experiments"
SHARED_DATA = ROOT.parent / "shared" / "data"
"""Real images; tests that read them skip where the folder is missing."""
