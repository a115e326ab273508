"""The spy lies beside the tests: a worker runs it as a program."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
