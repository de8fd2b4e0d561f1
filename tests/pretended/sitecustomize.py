"""With this folder on PYTHONPATH every Python that starts, kernels among them, has the pretend accelerator."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import pretend

pretend.install()
