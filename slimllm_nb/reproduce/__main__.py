"""python -m slimllm_nb.reproduce: see runner.py."""

import sys

from slimllm_nb.reproduce.runner import main

if __name__ == "__main__":
    sys.exit(main())
