"""Figures of any quantities: heat maps, scatters, spectra, histograms, bars and curves."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, NullFormatter, ScalarFormatter

from slimllm_nb.plots.style import (
    MARKERS,
    PALETTE,
    SIZE,
    Picture,
    Values,
    as_numbers,
    finish,
    log_ticks,
    new_picture,
    references,
)

MAX_POINTS = 4000  # of a scatter: more lie on top of each other, and make the picture large


def heat_map(
    values,
    title: str,
    xlabel: str,
    ylabel: str,
    unit: str = "",
    signed: bool = False,
    marks: Sequence[tuple[int, int]] = (),
    columns: Sequence[int | str] = (),
) -> Picture:
    """values (rows, columns) as colours, `unit` beside their scale; `signed` gives a diverging palette centred at zero.
    `marks`: the (row, column) cells that get a cross, such as what is pruned. `columns`: their names, on the axis; else
    they are counted. Rows count from the top."""
    table = as_numbers(values) if hasattr(values, "detach") else np.asarray(values, dtype=float)
    height = float(np.clip(1.4 + 0.13 * len(table), 2.6, 6.5))
    picture, (axes,) = new_picture(title, size=(SIZE[0], height))
    limit = np.nanmax(np.abs(table)) if signed else None
    colours = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if signed else {"cmap": "viridis"}
    image = axes.imshow(table, aspect="auto", interpolation="nearest", **colours)
    scale = picture.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    scale.set_label(unit, fontsize=9)
    scale.ax.tick_params(labelsize=8)
    if len(marks):
        down, across = zip(*marks, strict=True)
        for colour, width in (("black", 3), ("white", 1.3)):  # to be seen on dark and on light cells
            axes.scatter(across, down, marker="x", s=22, linewidths=width, color=colour)
    axes.grid(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    if len(columns):
        axes.set_xticks(range(len(columns)), columns, rotation=90)
    finish(axes, xlabel, ylabel)
    return picture


def scatter_pairs(
    left: tuple[Values, Values],
    right: tuple[Values, Values],
    title: str,
    names: tuple[str, str] = ("before", "after"),
    xlabel: str = "full output",
    ylabel: str = "pruned output",
) -> Picture:
    """Two panels of points (x, y) on the same axes, each with the identity line that perfect agreement would follow."""
    picture, panels = new_picture(title, columns=2, size=(SIZE[0], 4.1))
    pairs = [(as_numbers(x), as_numbers(y)) for x, y in (left, right)]
    low, high = min(map(np.min, sum(pairs, ()))), max(map(np.max, sum(pairs, ())))
    edge = 0.04 * (high - low)
    for axes, (x, y), name, colour in zip(panels, pairs, names, PALETTE, strict=False):
        step = -(-len(x) // MAX_POINTS)
        axes.axline((0, 0), slope=1, color="0.3", linewidth=1, linestyle="--")
        axes.scatter(x[::step], y[::step], s=6, alpha=0.4, color=colour, linewidths=0)
        axes.set(xlim=(low - edge, high + edge), ylim=(low - edge, high + edge), aspect="equal")
        axes.set_title(name, fontsize=10)
        finish(axes, xlabel, ylabel)
    return picture


def spectrum(values: Values, title: str, ylabel: str = "eigenvalue", mean: bool = True) -> Picture:
    """Positive values sorted from the largest, on logarithmic axes; `mean` draws their mean as a line."""
    numbers = np.sort(as_numbers(values))[::-1]
    numbers = numbers[numbers > 0]
    picture, (axes,) = new_picture(title)
    axes.loglog(np.arange(1, len(numbers) + 1), numbers, color=PALETTE[0])
    if mean:
        axes.axhline(numbers.mean(), color=PALETTE[1], linestyle="--", label=f"mean {numbers.mean():.3g}")
    finish(axes, "rank (1 is the largest)", ylabel, with_legend=mean)
    return picture


def histogram(
    samples: Mapping[str, Values], title: str, xlabel: str, bins: int = 60, log: bool = False, counts: bool = False
) -> Picture:
    """The distribution of each named sample, over common bins, as a share of that sample, or (`counts`) as its number
    of values, where samples are parts of a whole. `log`: a logarithmic axis, which shows outliers."""
    picture, (axes,) = new_picture(title)
    numbers = {name: as_numbers(values) for name, values in samples.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(numbers.values())), bins=bins)
    for index, (name, sample) in enumerate(numbers.items()):
        share = np.full(len(sample), 1 if counts else 1 / len(sample))
        style = {"color": PALETTE[index], "linewidth": 1.6, "histtype": "step"}
        axes.hist(sample, bins=edges, weights=share, label=name, log=log, **style)
    finish(axes, xlabel, "number of values" if counts else "share of values", with_legend=len(numbers) > 1)
    return picture


def grouped_bars(
    values: pd.DataFrame | Mapping[str, Mapping[str, float]],
    title: str,
    ylabel: str,
    log: bool = False,
    error: pd.DataFrame | Mapping[str, Mapping[str, float]] | None = None,
) -> Picture:
    """Bars in groups, each with its value above it: {series: {group: value}} or a DataFrame with groups as rows and
    series as columns. `error`, in the same form, draws plus and minus that much."""
    table, spread = pd.DataFrame(values), None if error is None else pd.DataFrame(error)
    picture, (axes,) = new_picture(title)
    width = 0.8 / len(table.columns)
    centres = np.arange(len(table))
    for index, name in enumerate(table.columns):
        offset = (index - (len(table.columns) - 1) / 2) * width
        bars = axes.bar(
            centres + offset,
            table[name],
            width * 0.92,
            label=name,
            color=PALETTE[index],
            yerr=None if spread is None else spread[name].reindex(table.index),
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        axes.bar_label(bars, fmt=_short, fontsize=8 if len(table) * len(table.columns) < 12 else 6.5, padding=2)
    axes.set_xticks(centres, table.index)
    axes.grid(False, axis="x")
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, table.min().min() / 2), high * 1.6)
        log_ticks(axes.yaxis)
    else:
        axes.margins(y=0.12)
    finish(axes, "", ylabel, with_legend=len(table.columns) > 1)
    return picture


def _short(value: float) -> str:
    if abs(value) >= 10_000:
        return EngFormatter(places=0, sep="")(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def curves(
    x: Values,
    lines: Mapping[str, Values],
    title: str,
    xlabel: str,
    ylabel: str,
    logx: bool = False,
    logy: bool = False,
    reference: Mapping[str, float] | None = None,
    spread: Mapping[str, Values] | None = None,
) -> Picture:
    """One line per name over x, with a mark at each point. `logx` puts the ticks at the points themselves.
    `reference`: named horizontal lines. `spread`, for the same names: plus and minus that much at each
    point, or (2, points): that much below and above."""
    picture, (axes,) = new_picture(title)
    references(axes, reference or {})
    for index, (name, values) in enumerate(lines.items()):
        axes.plot(x, as_numbers(values), color=PALETTE[index], marker=MARKERS[index % len(MARKERS)], label=name)
        if spread is not None:
            bars = {"fmt": "none", "ecolor": PALETTE[index], "elinewidth": 1, "capsize": 3}
            axes.errorbar(x, as_numbers(values), yerr=np.asarray(spread[name], dtype=float), **bars)
    if logx:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(list(x)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    if logy:
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    finish(axes, xlabel, ylabel, with_legend=len(lines) > 1 or bool(reference))
    return picture
