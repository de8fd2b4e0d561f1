"""Drawings of what the notebooks explain: boxes and arrows, and pictures of a toy's own numbers."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse, Rectangle

from slimllm_nb.plots.style import PALETTE, SIZE, Picture, Values, as_numbers, finish, legend, new_picture

BLUE, PRUNED, GREEN = PALETTE[0], PALETTE[3], PALETTE[2]
HATCHED = {"facecolor": "white", "edgecolor": PRUNED, "hatch": "////"}


def _canvas(title: str, width: float, height: float) -> tuple[Picture, Axes]:
    picture, (axes,) = new_picture(title, size=(SIZE[0], height * SIZE[0] / width + 0.35))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return picture, axes


def _box(axes: Axes, x: float, y: float, text: str, marked: bool = False) -> None:
    style = {"boxstyle": "round,pad=0.35", "edgecolor": PRUNED if marked else "0.5", "linewidth": 2 if marked else 1}
    style["facecolor"] = "#fde8dc" if marked else "white"
    axes.text(x, y, text, fontsize=9, ha="center", va="center", bbox=style, zorder=3)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour="0.4", width: float = 1.2) -> None:
    arrow = {"arrowstyle": "->", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=arrow, zorder=2)


def _cells(axes: Axes, left: float, y: float, count: int, pruned: Collection[int], width: float) -> None:
    """`count` cells in a row; the pruned ones are hatched."""
    for index in range(count):
        style = HATCHED if index in pruned else {"facecolor": BLUE, "edgecolor": "white"}
        axes.add_patch(Rectangle((left + index * width, y), 0.86 * width, 0.34, linewidth=0.8, **style))


def decoder_layer(widths: Mapping[str, int]) -> Picture:
    """A decoder layer as it hangs on the residual stream: query heads in groups on their key/value heads, channels, and
    the two projections where pruned and kept parts meet. `widths`: hidden, heads, key/value heads, intermediate. One
    group in two is drawn without its first query head, and every third of a dozen channels is pruned, as an example."""
    picture, axes = _canvas("One decoder layer: heads and channels are pruned, the residual stream is not", 10, 5.6)
    hidden, intermediate = widths["hidden"], widths["intermediate"]
    heads, groups = widths["heads"], widths["key/value heads"]
    axes.add_patch(Rectangle((0.5, 2.6), 9, 0.4, facecolor="0.85"))
    axes.text(5, 2.8, f"residual stream, {hidden:,} numbers for each token", fontsize=9, ha="center", va="center")
    pruned = set(range(0, heads, 2 * heads // groups))
    _cells(axes, 3.1, 4.75, heads, pruned, width := 2.6 / heads)
    owned = heads // groups
    for group in range(groups):
        x = 3.1 + (group * owned + owned / 2) * width
        own = range(group * owned, (group + 1) * owned)
        gone = pruned.issuperset(own)  # with its last query head
        style = HATCHED | {"linewidth": 0.8} if gone else {"facecolor": GREEN}
        axes.add_patch(Rectangle((x - 0.36 * owned * width, 3.75), 0.72 * owned * width, 0.34, **style))
        for head in own:
            colour = {"color": PRUNED, "linestyle": ":"} if head in pruned else {"color": "0.5"}
            axes.plot([3.1 + (head + 0.43) * width, x], [4.72, 4.12], linewidth=0.8, **colour)
    axes.text(4.4, 5.25, f"{heads} query heads", fontsize=9, ha="center")
    axes.text(4.4, 3.43, f"{groups} key/value heads", fontsize=9, ha="center", color=GREEN)
    _cells(axes, 3.1, 1.05, 12, {2, 5, 8, 11}, 2.6 / 12)
    axes.text(4.4, 1.6, f"{intermediate:,} channels", fontsize=9, ha="center")
    axes.text(4.4, 0.45, "silu(gate) times up, channel by channel", fontsize=8.5, ha="center", color="0.3")
    halves = {4.4: (3.0, "q_proj\nk_proj\nv_proj", "o_proj"), 1.2: (2.6, "gate_proj\nup_proj", "down_proj")}
    for y, (edge, first, last) in halves.items():
        _box(axes, 1.9, y, first)
        _box(axes, 7.3, y, last, marked=True)
        _arrow(axes, (0.9, edge), (0.9, y))
        for x, end in ((0.9, 1.3), (2.5, 2.95), (5.9, 6.55), (8.05, 8.9)):
            _arrow(axes, (x, y), (end, y))
        _arrow(axes, (8.9, y), (8.9, edge))
        axes.text(9.05, (y + edge) / 2, "added", fontsize=8.5, va="center")
        axes.text(0.8, (y + edge) / 2, "norm", fontsize=8.5, va="center", ha="right")
        axes.text(7.3, y - 0.77, "pruned: columns", fontsize=8.5, ha="center", color=PRUNED)
    return picture


def pruning_walk(layers: int = 3) -> Picture:
    """The walk of pruning down the decoder: each half is pruned on what the halves before it, already pruned, give."""
    picture, axes = _canvas("Each half is calibrated on the output of what was pruned before it", 10, 2.5)
    step = 8.7 / (2 * layers)
    places = [1.4 + step * (index + 0.25) for index in range(2 * layers)]
    for index, x in enumerate(places):
        _box(axes, x, 1.3, "attention" if index % 2 == 0 else "MLP", marked=index < layers)
        _arrow(axes, (x - 0.62 * step, 1.3), (x - 0.4 * step, 1.3))
        if index % 2 == 0:
            axes.text(x + step / 2, 2.05, f"decoder layer {index // 2}", fontsize=9, ha="center")
    axes.text(0.05, 1.3, "samples", fontsize=9, va="center")
    below = {"y": 0.62, "fontsize": 8.5, "va": "center"}
    axes.text(x=np.mean(places[:layers]), s="pruned, regression folded in", ha="center", color=PRUNED, **below)
    axes.text(x=places[layers], s="next: statistics of its\ninput as it comes here", ha="center", **below)
    axes.text(x=9.95, s="still dense", ha="right", color="0.3", **below)
    return picture


def exchange(kept: Sequence[int], candidate: int, similarities: Values, before: float) -> Picture:
    """One step of the greedy search: `candidate` is tried in the place of every kept head. similarities (kept,): of the
    output after each exchange; before: without one."""
    values = as_numbers(similarities)
    best, better = int(values.argmax()), values.max() > before
    after = f"takes the place of head {kept[best]}" if better else "stays out"
    picture, (axes,) = new_picture(f"Head {candidate} is tried in the place of every kept head, and {after}")
    colours = [PRUNED if better and index == best else BLUE for index in range(len(kept))]
    bars = axes.bar(range(len(kept)), values, 0.6, color=colours)
    for text in axes.bar_label(bars, fmt="%.1f", fontsize=9, padding=2):
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        text.set_zorder(4)
    axes.axhline(before, color="0.3", linewidth=1.2, linestyle="--", label=f"no exchange: {before:.1f}")
    axes.set_xticks(range(len(kept)), [f"{candidate} for {head}" for head in kept])
    low, high = min(values.min(), before), max(values.max(), before)
    axes.set_ylim(low - 0.5 * (high - low), high + 0.2 * (high - low))
    finish(axes, "exchange", "similarity of what is kept", with_legend=True)
    return picture


def feature_space(outputs: Values, row: Values) -> Picture:
    """Two outputs of many tokens as a cloud (tokens, 2), with one row of W_down: in the basis of the outputs and in
    that of the cloud's eigenvectors, where each axis has a weight (paper eqs. 5 to 7)."""
    cloud, row = (as_numbers(one) for one in (outputs, row))
    cloud = cloud - cloud.mean(0)
    variances, directions = np.linalg.eigh(cloud.T @ cloud)
    variances, directions = variances[::-1], directions[:, ::-1] * np.sign(directions[0, ::-1])
    weights = 1 / (1 + np.exp(-variances / variances.mean()))
    picture, panels = new_picture(
        "The same row of W_down in two bases: the second knows where the output varies", columns=2, size=(SIZE[0], 3.9)
    )
    spread, turned = 2 * np.sqrt(variances / len(cloud)), row @ directions
    angle = np.degrees(np.arctan2(directions[1, 0], directions[0, 0]))
    limit = 1.15 * max(np.abs(cloud).max(), np.abs(cloud @ directions).max())
    for axes, points, arrow, tilt, basis in (
        (panels[0], cloud, row, angle, directions.T),
        (panels[1], cloud @ directions, turned, 0, np.eye(2)),
    ):
        axes.scatter(*points.T, s=5, color="0.75", linewidths=0)
        axes.add_patch(
            Ellipse((0, 0), 2 * spread[0], 2 * spread[1], angle=tilt, fill=False, edgecolor=BLUE, linewidth=1.6)
        )
        for size, axis, weight in zip(spread, basis, weights, strict=True):
            _arrow(axes, (0, 0), tuple(size * axis), BLUE, 2)
            axes.text(*(1.12 * size * axis), f"weight {weight:.2f}", fontsize=8.5, color=BLUE)
        _arrow(axes, (0, 0), tuple(arrow), PRUNED, 2.4)
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    panels[0].set_title(f"outputs: length {np.linalg.norm(row):.2f}", fontsize=10)
    panels[1].set_title(f"feature space: weighted length {np.linalg.norm(weights * turned):.2f}", fontsize=10)
    finish(panels[0], "output 1", "output 2")
    finish(panels[1], "first eigenvector", "second eigenvector")
    return picture


def fitted_line(kept_output: Values, full_output: Values, scale: float, shift: float) -> Picture:
    """Scale and shift as slope and intercept of the line through (kept, full), one point for each token."""
    x, y = as_numbers(kept_output), as_numbers(full_output)
    picture, (axes,) = new_picture("Scale and shift are the slope and the intercept of a line through the tokens")
    ends = np.array([min(0, x.min()), x.max()])
    axes.plot(ends, ends, color="0.3", linewidth=1, linestyle="--", label="nothing done: y = x")
    axes.plot(ends, scale * ends + shift, color=BLUE, label=f"fit: y = {scale:.3g} x + {shift:.3g}")
    axes.vlines(x, x, y, color=PRUNED, linewidth=1.2, label="error before")
    axes.plot(x, y, "o", color=BLUE, zorder=3)
    axes.plot(0, shift, "s", color=PALETTE[1], markersize=8, zorder=4, label=f"shift {shift:.3g}")
    finish(axes, "output of what is kept, x", "full output, y", with_legend=True)
    return picture


def kept_of_layers(kept: Mapping[str, Sequence[float]]) -> Picture:
    """What is left of every decoder layer: {part: share kept, layer by layer} as columns cut from the top."""
    picture, panels = new_picture("What is left of each decoder layer", columns=len(kept), size=(SIZE[0], 2.6))
    for axes, (part, shares) in zip(panels, kept.items(), strict=True):
        numbers, layers = as_numbers(shares), np.arange(len(shares))
        axes.bar(layers, numbers, 0.8, color=BLUE, label="kept")
        axes.bar(layers, 1 - numbers, 0.8, bottom=numbers, label="pruned", linewidth=0.5, **HATCHED)
        axes.set_title(part, fontsize=10)
        axes.grid(False, axis="x")
        finish(axes, "decoder layer", f"share of the layer's {part}")
    legend(picture, *axes.get_legend_handles_labels())
    return picture


def method_steps() -> Picture:
    """The whole method: how much of each layer is pruned, then layer by layer what."""
    picture, axes = _canvas("SlimLLM: first how much of each layer, then layer by layer what", 10, 3.2)
    for x, text in ((0.75, "samples"), (2.7, "similarity of\nevery layer"), (4.8, "ratio of\nevery layer")):
        _box(axes, x, 2.6, text)
    steps = {0.95: "statistics of\nthe attention", 2.75: "heads:\nscore, search", 4.35: "scale\nand shift"}
    steps |= {6.05: "statistics of\nthe MLP", 7.65: "channels:\nscore", 9.15: "scale\nand shift"}
    for x, text in steps.items():
        _box(axes, x, 0.95, text, marked="statistics" not in text)
    for start, end, y in (
        (1.25, 1.95, 2.6),
        (3.4, 4.2, 2.6),
        (1.68, 2.05, 0.95),
        (3.42, 3.82, 0.95),
        (4.88, 5.3, 0.95),
        (6.78, 7.05, 0.95),
        (8.28, 8.6, 0.95),
    ):
        _arrow(axes, (start, y), (end, y))
    axes.plot([4.8, 4.8, 0.95], [2.25, 1.75, 1.75], color="0.4", linewidth=1.2)
    _arrow(axes, (0.95, 1.75), (0.95, 1.4))
    axes.plot([9.15, 9.15, 0.95], [0.55, 0.2, 0.2], color="0.4", linewidth=1.2)
    _arrow(axes, (0.95, 0.2), (0.95, 0.5))
    axes.text(5, 0.28, "next layer, on the output of the pruned one", fontsize=8.5, ha="center")
    axes.text(6.1, 2.6, "notebooks 01 and 05", fontsize=8.5, va="center", color="0.3")
    axes.text(5.05, 1.6, "notebooks 02, 04, 03, 04", fontsize=8.5, va="center", color="0.3")
    return picture
