"""Methods side by side: the same numbers of parameters, the same calibration samples, several seeds.

`compare` does it; `protocol` says what is calibrated and judged on, `table` what follows from the rows.
`python -m slimllm_nb.comparison` is the command.
"""

from slimllm_nb.comparison.compare import compare
from slimllm_nb.comparison.protocol import Protocol, protocol_of
from slimllm_nb.comparison.table import Comparison

__all__ = ["Comparison", "Protocol", "compare", "protocol_of"]
