"""The embedded world: captioned shapes, a gold reward, and small models trained on them."""

from pathlib import Path

ZOO = Path(__file__).parent / "zoo"
