"""Figures with the decoder layers along an axis."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from slimllm_nb.plots.style import (
    MARKERS,
    PALETTE,
    SIZE,
    Picture,
    Values,
    as_numbers,
    finish,
    legend,
    new_picture,
    references,
)


def layer_lines(
    lines: Mapping[str, Values], title: str, ylabel: str, reference: Mapping[str, float] | None = None
) -> Picture:
    """One line per name over the decoder layers, counted from 0. A layer without a value (None or NaN) is left out of
    its line and marked by a cross on the horizontal axis. `reference`: named horizontal lines."""
    picture, (axes,) = new_picture(title)
    missing = _draw_layers(axes, lines, reference or {})
    finish(axes, "decoder layer", ylabel, with_legend=len(lines) > 1 or bool(missing) or bool(reference))
    return picture


def layer_panels(
    panels: Mapping[str, Mapping[str, Values]], title: str, ylabel: str, reference: Mapping[str, float] | None = None
) -> Picture:
    """Panels of layer_lines side by side on the same vertical axis, to be compared; all have the same line names."""
    picture, axes = new_picture(title, columns=len(panels), size=(SIZE[0] + 1.2, SIZE[1]))
    for one, (name, lines) in zip(axes, panels.items(), strict=True):
        one.sharey(axes[0])
        _draw_layers(one, lines, reference or {})
        one.set_title(name, fontsize=10)
        finish(one, "decoder layer", ylabel if one is axes[0] else "")
    legend(picture, *axes[-1].get_legend_handles_labels())
    return picture


def _draw_layers(axes: Axes, lines: Mapping[str, Values], reference: Mapping[str, float]) -> list[int]:
    """Draw the lines; returns the layers that have no value in any."""
    references(axes, reference)
    for index, (name, values) in enumerate(lines.items()):
        numbers = as_numbers(values)
        style = {"color": PALETTE[index], "marker": MARKERS[index % len(MARKERS)], "markersize": 4, "linewidth": 1.5}
        axes.plot(np.arange(len(numbers)), numbers, label=name, **style)
    missing = [layer for layer, *column in zip(*_columns(lines), strict=True) if np.isnan(column).all()]
    if missing:
        bottom = np.zeros(len(missing))
        axes.plot(
            missing, bottom, "x", color="0.4", transform=axes.get_xaxis_transform(), clip_on=False, label="not pruned"
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return missing


def _columns(lines: Mapping[str, Values]) -> list[Sequence]:
    columns = [as_numbers(values) for values in lines.values()]
    return [range(len(columns[0])), *columns]
