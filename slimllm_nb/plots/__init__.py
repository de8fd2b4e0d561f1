"""Every figure of the notebooks, in one style: fixed size, labelled axes, colours that the colour-blind can tell apart.

Each function returns the figure, which a notebook shows once, as the last value of its cell (or with display()).
"""

from slimllm_nb.plots.charts import curves, grouped_bars, heat_map, histogram, scatter_pairs, spectrum
from slimllm_nb.plots.intervals import ratio_intervals
from slimllm_nb.plots.layers import decoder_layer, layer_lines, layer_panels
from slimllm_nb.plots.style import DPI, PALETTE, SIZE, Picture

__all__ = [
    "DPI",
    "PALETTE",
    "SIZE",
    "Picture",
    "curves",
    "decoder_layer",
    "grouped_bars",
    "heat_map",
    "histogram",
    "layer_lines",
    "layer_panels",
    "ratio_intervals",
    "scatter_pairs",
    "spectrum",
]
