"""Makes ``studies`` importable, which is not installed; last in the path, so that it hides nothing."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
