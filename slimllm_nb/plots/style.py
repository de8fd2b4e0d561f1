"""What all figures share: size, colours, axes, and how a notebook shows them.

The figures stand apart from pyplot, so that nothing has to be closed and they look the same under any backend.
"""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter, ScalarFormatter
from PIL import Image

DPI = 115  # 800 pixels wide, to be read on a projector; a notebook with ten figures stays under 300 KB
SIZE = (7.0, 3.2)
PALETTE = sns.color_palette("colorblind")
MARKERS = "osD^vP*X"
STYLE = sns.axes_style("whitegrid") | {"grid.color": "0.9", "axes.edgecolor": "0.4", "axes.titlesize": 11}

Values = Sequence[float | None] | np.ndarray


class Picture(Figure):
    """A figure that shows itself as a small PNG, whatever backend matplotlib works with."""

    def png(self) -> bytes:
        """The picture with 256 colours: half of the bytes, and no difference to the eye."""
        drawn, small = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png")
        Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
        return small.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"image/png": base64.b64encode(self.png()).decode("ascii"), "text/plain": "<Figure>"}


def new_picture(title: str, columns: int = 1, size: tuple[float, float] = SIZE) -> tuple[Picture, np.ndarray]:
    """A figure with this title and its axes, side by side."""
    with sns.plotting_context("notebook", font_scale=0.8), sns.axes_style(STYLE):
        picture = Picture(figsize=size, dpi=DPI, layout="constrained")
        axes = picture.subplots(1, columns, squeeze=False)[0]
        picture.suptitle(title, fontsize=11)
        for one in axes:
            one.tick_params(labelsize=9)
    return picture, axes


def legend(picture: Picture, *handles_and_labels) -> None:
    """A legend beside the axes; of all that is drawn, unless handles and labels are given."""
    picture.legend(*handles_and_labels, fontsize=8.5, frameon=False, loc="outside right center")


def finish(axes: Axes, xlabel: str, ylabel: str, with_legend: bool = False) -> None:
    """Axis labels, and perhaps a legend."""
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    if with_legend:
        legend(axes.figure)


def as_numbers(values: Values) -> np.ndarray:
    """As float64, None as NaN; a tensor may lie on any device, in any dtype."""
    if hasattr(values, "detach"):
        return values.detach().cpu().double().numpy()
    return np.asarray([np.nan if value is None else float(value) for value in values])


def log_ticks(axis) -> None:
    """1, 2, 5, 10, ... written out, instead of powers of ten: perplexities rarely span two of them."""
    low, high = sorted(axis.get_view_interval())
    wide = high / low > 1000
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(_short) if high >= 10_000 else ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def _short(value: float, position: int) -> str:
    """10k, 1M; but 0.1, not 100m."""
    return f"{value:g}" if value < 1 else EngFormatter(sep="")(value)


def references(axes: Axes, lines: Mapping[str, float]) -> None:
    """A dashed horizontal line for each name: what the curves are to be compared with."""
    for (name, value), style in zip(lines.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color="0.3", linewidth=1.2, linestyle=style, label=name)
