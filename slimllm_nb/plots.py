"""Every figure of the notebooks, in one style: fixed size, labelled axes, colours that the colour-blind can tell apart.

Each function returns the figure, which a notebook shows once, as the last value of its cell (or with display()). The
figures stand apart from pyplot, so that nothing has to be closed and they look the same under any backend.
"""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter
from PIL import Image

DPI = 80  # a notebook with ten figures stays under 300 KB
SIZE = (7.0, 3.2)
PALETTE = sns.color_palette("colorblind")
MARKERS = "osD^vP*X"
STYLE = sns.axes_style("whitegrid") | {"grid.color": "0.9", "axes.edgecolor": "0.4", "axes.titlesize": 11}
MAX_POINTS = 4000  # of a scatter: more cannot be told apart, and make the picture large

Values = Sequence[float | None] | np.ndarray


class Picture(Figure):
    """A figure that shows itself as a small PNG, whatever backend matplotlib works with."""

    def png(self) -> bytes:
        """The picture with 128 colours: a third of the bytes, and no difference to the eye."""
        drawn, small = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png")
        Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, "png", optimize=True)
        return small.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"image/png": base64.b64encode(self.png()).decode("ascii"), "text/plain": "<Figure>"}


def _picture(title: str, columns: int = 1, size: tuple[float, float] = SIZE) -> tuple[Picture, np.ndarray]:
    with sns.plotting_context("notebook", font_scale=0.8), sns.axes_style(STYLE):
        picture = Picture(figsize=size, dpi=DPI, layout="constrained")
        axes = picture.subplots(1, columns, squeeze=False)[0]
        picture.suptitle(title, fontsize=11)
        for one in axes:
            one.tick_params(labelsize=9)
    return picture, axes


def _finish(axes: Axes, xlabel: str, ylabel: str, legend: bool = False) -> None:
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    if legend:
        axes.figure.legend(fontsize=8.5, frameon=False, loc="outside right center")


def _numbers(values: Values) -> np.ndarray:
    """As float64, None as NaN; a tensor comes over as it is."""
    return np.asarray([np.nan if value is None else float(value) for value in values])


def _log_ticks(axis) -> None:
    """1, 2, 5, 10, ... written out, instead of powers of ten: perplexities rarely span two of them."""
    low, high = sorted(axis.get_view_interval())
    wide = high / low > 1000
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.set_major_formatter(EngFormatter(sep="") if high >= 10_000 else ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def _references(axes: Axes, lines: Mapping[str, float]) -> None:
    """A dashed horizontal line for each name: what the curves are to be compared with."""
    for (name, value), style in zip(lines.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color="0.3", linewidth=1.2, linestyle=style, label=name)


def layer_lines(
    lines: Mapping[str, Values], title: str, ylabel: str, reference: Mapping[str, float] | None = None
) -> Picture:
    """One line per name over the decoder layers, counted from 0. A layer without a value (None or NaN) is left out of
    its line and marked by a cross on the horizontal axis. `reference`: named horizontal lines."""
    picture, (axes,) = _picture(title)
    missing = _draw_layers(axes, lines, reference or {})
    _finish(axes, "decoder layer", ylabel, legend=len(lines) > 1 or bool(missing) or bool(reference))
    return picture


def layer_panels(
    panels: Mapping[str, Mapping[str, Values]], title: str, ylabel: str, reference: Mapping[str, float] | None = None
) -> Picture:
    """Panels of layer_lines side by side on the same vertical axis, to be compared; all have the same line names."""
    picture, axes = _picture(title, columns=len(panels), size=(SIZE[0] + 1.2, SIZE[1]))
    for one, (name, lines) in zip(axes, panels.items(), strict=True):
        one.sharey(axes[0])
        _draw_layers(one, lines, reference or {})
        one.set_title(name, fontsize=10)
        _finish(one, "decoder layer", ylabel if one is axes[0] else "")
    picture.legend(*axes[-1].get_legend_handles_labels(), fontsize=8.5, frameon=False, loc="outside right center")
    return picture


def _draw_layers(axes: Axes, lines: Mapping[str, Values], reference: Mapping[str, float]) -> list[int]:
    """Draw the lines; returns the layers that have no value in any."""
    _references(axes, reference)
    for index, (name, values) in enumerate(lines.items()):
        numbers = _numbers(values)
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
    columns = [_numbers(values) for values in lines.values()]
    return [range(len(columns[0])), *columns]


def heat_map(
    values,
    title: str,
    xlabel: str,
    ylabel: str,
    unit: str = "",
    signed: bool = False,
    marks: Sequence[tuple[int, int]] = (),
) -> Picture:
    """values (rows, columns) as colours, `unit` beside their scale; `signed` gives a diverging palette centred at zero.
    `marks`: the (row, column) cells that get a cross, such as what is pruned. Rows count from the top."""
    table = np.asarray(values, dtype=float)
    height = float(np.clip(1.4 + 0.13 * len(table), 2.6, 6.5))
    picture, (axes,) = _picture(title, size=(SIZE[0], height))
    limit = np.nanmax(np.abs(table)) if signed else None
    colours = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if signed else {"cmap": "viridis"}
    image = axes.imshow(table, aspect="auto", interpolation="nearest", **colours)
    scale = picture.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    scale.set_label(unit, fontsize=9)
    scale.ax.tick_params(labelsize=8)
    if len(marks):
        rows, columns = zip(*marks, strict=True)
        for colour, width in (("black", 3), ("white", 1.3)):  # to be seen on dark and on light cells
            axes.scatter(columns, rows, marker="x", s=22, linewidths=width, color=colour)
    axes.grid(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, xlabel, ylabel)
    return picture


def decoder_layer(widths: Mapping[str, int]) -> Picture:
    """A LLaMA decoder layer as boxes, from the residual stream on the left and back to it on the right; the two
    projections that pruning looks at are marked. `widths`: hidden, heads and intermediate, written at the arrows."""
    picture, (axes,) = _picture("One decoder layer: what is pruned meets the rest in o_proj and down_proj")
    axes.set(xlim=(0, 10), ylim=(-0.35, 4.1))
    axes.axis("off")
    hidden, heads, intermediate = (f"{widths[name]:,}" for name in ("hidden", "heads", "intermediate"))
    rows = {
        3.1: ("attention", ["norm", "q_proj\nk_proj\nv_proj", "attention,\nhead by head", "o_proj"], f"{heads} heads"),
        1.0: ("MLP", ["norm", "gate_proj\nup_proj", "silu, product", "down_proj"], f"{intermediate} channels"),
    }
    for height, (name, boxes, inside) in rows.items():
        axes.text(0.05, height, name, fontsize=10, va="center", weight="bold")
        for index, box in enumerate(boxes):
            marked = box in ("o_proj", "down_proj")
            style = {"boxstyle": "round,pad=0.35", "edgecolor": PALETTE[3] if marked else "0.5"}
            style |= {"facecolor": "white" if not marked else "#fde8dc", "linewidth": 2 if marked else 1}
            axes.text(2.1 + 2.25 * index, height, box, fontsize=9, ha="center", va="center", bbox=style, zorder=3)
        axes.annotate("", (9.7, height), (1.1, height), arrowprops={"arrowstyle": "->", "color": "0.4"}, zorder=1)
        axes.text(7.75, height + 0.42, inside, fontsize=8.5, ha="center", color=PALETTE[3])
        axes.text(1.35, height + 0.42, f"{hidden} wide", fontsize=8.5, ha="center", color="0.3")
        axes.text(9.75, height, "+", fontsize=14, ha="center", va="center")
    axes.text(5, -0.2, "each half reads the residual stream and adds its output to it", fontsize=8.5, ha="center")
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
    picture, panels = _picture(title, columns=2, size=(SIZE[0], 4.1))
    pairs = [(_numbers(x), _numbers(y)) for x, y in (left, right)]
    low, high = min(map(np.min, sum(pairs, ()))), max(map(np.max, sum(pairs, ())))
    edge = 0.04 * (high - low)
    for axes, (x, y), name, colour in zip(panels, pairs, names, PALETTE, strict=False):
        step = -(-len(x) // MAX_POINTS)
        axes.axline((0, 0), slope=1, color="0.3", linewidth=1, linestyle="--")
        axes.scatter(x[::step], y[::step], s=6, alpha=0.4, color=colour, linewidths=0)
        axes.set(xlim=(low - edge, high + edge), ylim=(low - edge, high + edge), aspect="equal")
        axes.set_title(name, fontsize=10)
        _finish(axes, xlabel, ylabel)
    return picture


def spectrum(values: Values, title: str, ylabel: str = "eigenvalue", mean: bool = True) -> Picture:
    """Positive values sorted from the largest, on logarithmic axes; `mean` draws their mean as a line."""
    numbers = np.sort(_numbers(values))[::-1]
    numbers = numbers[numbers > 0]
    picture, (axes,) = _picture(title)
    axes.loglog(np.arange(1, len(numbers) + 1), numbers, color=PALETTE[0])
    if mean:
        axes.axhline(numbers.mean(), color=PALETTE[1], linestyle="--", label=f"mean {numbers.mean():.3g}")
    _finish(axes, "rank (1 is the largest)", ylabel, legend=mean)
    return picture


def histogram(
    samples: Mapping[str, Values], title: str, xlabel: str, bins: int = 60, log: bool = False, counts: bool = False
) -> Picture:
    """The distribution of each named sample, over common bins, as a share of that sample, or (`counts`) as its number
    of values, where samples are parts of a whole. `log`: a logarithmic axis, which shows outliers."""
    picture, (axes,) = _picture(title)
    numbers = {name: _numbers(values) for name, values in samples.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(numbers.values())), bins=bins)
    for index, (name, sample) in enumerate(numbers.items()):
        share = np.full(len(sample), 1 if counts else 1 / len(sample))
        style = {"color": PALETTE[index], "linewidth": 1.6, "histtype": "step"}
        axes.hist(sample, bins=edges, weights=share, label=name, log=log, **style)
    _finish(axes, xlabel, "number of values" if counts else "share of values", legend=len(numbers) > 1)
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
    picture, (axes,) = _picture(title)
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
        _log_ticks(axes.yaxis)
    else:
        axes.margins(y=0.12)
    _finish(axes, "", ylabel, legend=len(table.columns) > 1)
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
) -> Picture:
    """One line per name over x, with a mark at each point. `logx` puts the ticks at the points themselves.
    `reference`: named horizontal lines."""
    picture, (axes,) = _picture(title)
    _references(axes, reference or {})
    for index, (name, values) in enumerate(lines.items()):
        axes.plot(x, _numbers(values), color=PALETTE[index], marker=MARKERS[index % len(MARKERS)], label=name)
    if logx:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(list(x)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    if logy:
        axes.set_yscale("log")
        _log_ticks(axes.yaxis)
    _finish(axes, xlabel, ylabel, legend=len(lines) > 1 or bool(reference))
    return picture
