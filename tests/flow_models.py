"""Where the tests find small flow-matching models."""

from pathlib import Path

# a StableDiffusion3Pipeline with random weights, 16 pixels wide; a golden trace's
SD3 = Path(__file__).parent / "data/trace_flow/model"
