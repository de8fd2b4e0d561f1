"""Ratios with intervals: methods against one another."""

from collections.abc import Mapping

import numpy as np
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from slimllm_nb.plots.style import MARKERS, PALETTE, SIZE, Picture, finish, legend, log_ticks, new_picture


def ratio_intervals(
    panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float, float]]]], title: str, xlabel: str
) -> Picture:
    """{panel: {series: {row: (ratio, low, high)}}}: panels side by side, a row for each name from the top, the series
    apart by colour and mark, on a logarithmic axis with a line at 1. An interval that is NaN is not drawn. A few ratios
    far above all others would leave the others no room: they are written at the right edge."""
    names = list(dict.fromkeys(name for series in panels.values() for rows in series.values() for name in rows))
    height = 1.3 + 0.42 * len(names)
    picture, axes = new_picture(title, columns=len(panels), size=(SIZE[0] + 1.6, max(height, 2.2)))
    for one, (panel, series) in zip(axes, panels.items(), strict=True):
        one.axvline(1, color="0.3", linewidth=1.2, linestyle="--")
        shown = [ratio for rows in series.values() for ratio, *_ in rows.values()]
        limit = 2 * max(1, np.quantile(shown or [1], 0.75))
        far: dict[int, list[str]] = {}
        for index, (label, rows) in enumerate(series.items()):
            heights = [names.index(name) + (index - (len(series) - 1) / 2) * 0.22 for name in rows]
            ratios, low, high = np.array(list(rows.values())).reshape(-1, 3).T
            for number in np.flatnonzero(ratios > limit):
                far.setdefault(round(heights[number]), []).append(f"{ratios[number]:.3g}")
                ratios[number] = np.nan
            errors = np.nan_to_num([ratios - low, high - ratios])
            style = {"color": PALETTE[index], "marker": MARKERS[index % len(MARKERS)], "markersize": 5, "capsize": 2}
            one.errorbar(ratios, heights, xerr=errors, linestyle="", label=label, **style)
        one.set_xscale("log")
        if far:
            one.set_xlim(right=limit)
        for height, values in far.items():
            style = {"fontsize": 7.5, "ha": "right", "va": "center", "color": "0.2"}
            one.text(0.98 * limit, height, f"{', '.join(values)} →", **style)
        left, right = one.get_xlim()
        if right / left < 4:  # 1, 2, 5 would leave one tick
            one.xaxis.set_major_locator(MaxNLocator(5))
            one.xaxis.set_major_formatter(ScalarFormatter())
            one.xaxis.set_minor_formatter(NullFormatter())
        else:
            log_ticks(one.xaxis)
        one.set_yticks(range(len(names)), names if one is axes[0] else [""] * len(names))
        one.set_ylim(len(names) - 0.5, -0.5)
        one.set_title(panel, fontsize=10)
        finish(one, xlabel, "")
    legend(picture, *axes[-1].get_legend_handles_labels())
    return picture
