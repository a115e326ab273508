"""The embedded worlds: captioned shapes, a gold reward, and small models trained on them."""

from pathlib import Path

ZOO = Path(__file__).parent / "zoo"
# the base models that ship with the package: the word for `model.base` -> their folder under ZOO
EMBEDDED = {"sandbox": "pipeline", "sandbox-flow": "flow"}


def is_embedded(base: str) -> bool:
    """Whether a model's name is one of the small ones that ship with the package."""
    return base in EMBEDDED
