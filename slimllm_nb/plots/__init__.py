"""Every figure of the notebooks, in one style: fixed size, labelled axes, colours that the colour-blind can tell apart.

Each function returns the figure, which a notebook shows once, as the last value of its cell (or with display()).
"""

from slimllm_nb.plots.charts import curves, grouped_bars, heat_map, histogram, scatter_pairs, spectrum
from slimllm_nb.plots.drawings import (
    decoder_layer,
    exchange,
    feature_space,
    fitted_line,
    kept_of_layers,
    method_steps,
    pruning_walk,
)
from slimllm_nb.plots.interactive import with_sliders
from slimllm_nb.plots.intervals import ratio_intervals
from slimllm_nb.plots.layers import layer_lines, layer_panels
from slimllm_nb.plots.style import DPI, PALETTE, SIZE, Picture

__all__ = [
    "DPI",
    "PALETTE",
    "SIZE",
    "Picture",
    "curves",
    "decoder_layer",
    "exchange",
    "feature_space",
    "fitted_line",
    "grouped_bars",
    "heat_map",
    "histogram",
    "kept_of_layers",
    "layer_lines",
    "layer_panels",
    "method_steps",
    "pruning_walk",
    "ratio_intervals",
    "scatter_pairs",
    "spectrum",
    "with_sliders",
]
