"""With this folder on PYTHONPATH every Python that starts, kernels among them, has the pretend accelerator; but for the
programs that run a notebook and that judge, which import no torch."""

import sys
from pathlib import Path

if not {"slimllm_nb.reproduce", "slimllm_nb.reproduce.notebook"} & set(sys.orig_argv):
    sys.path.append(str(Path(__file__).parents[1]))

    import pretend

    pretend.install()
