"""Figures: what is drawn, not that something is."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from slimllm_nb import plots


def size_of(picture):
    return Image.open(io.BytesIO(picture.png())).size


def test_layer_lines_leave_missing_layers_out_and_mark_those_that_all_lack():
    picture = plots.layer_lines({"a": [1.0, None, None], "b": torch.tensor([2.0, float("nan"), 4.0])}, "t", "y")
    first, second, crosses = picture.axes[0].lines
    assert np.array_equal(first.get_ydata(), [1, np.nan, np.nan], equal_nan=True)
    assert np.array_equal(second.get_ydata(), [2, np.nan, 4], equal_nan=True)
    assert list(crosses.get_xdata()) == [1]
    assert picture.get_suptitle() == "t"


def test_heat_map_is_centred_at_zero_when_signed_and_marks_cells():
    picture = plots.heat_map([[1.0, -3.0], [0.5, 2.0]], "t", "x", "y", signed=True, marks=[(0, 1)])
    (image,) = picture.axes[0].images
    assert image.get_clim() == (-3, 3)
    assert picture.axes[0].collections[0].get_offsets().tolist() == [[1, 0]]


def test_scatter_pairs_share_axes_and_show_identity():
    picture = plots.scatter_pairs(([0.0, 1.0], [5.0, 1.0]), ([0.0, 1.0], [0.0, 1.0]), "t")
    left, right = picture.axes
    assert left.get_xlim() == right.get_xlim() == left.get_ylim()
    assert left.collections[0].get_offsets().tolist() == [[0, 5], [1, 1]]


def test_spectrum_sorts_and_leaves_out_what_has_no_logarithm():
    line = plots.spectrum([1.0, 0.0, 4.0, 2.0], "t", mean=False).axes[0].lines[0]
    assert line.get_ydata().tolist() == [4, 2, 1] and line.get_xdata().tolist() == [1, 2, 3]


def test_histogram_shows_shares():
    picture = plots.histogram({"a": [0.0, 0.0, 1.0, 1.0], "b": [1.0]}, "t", "x", bins=2)
    shares = [patch.get_xy()[:, 1].max() for patch in picture.axes[0].patches]
    assert shares == pytest.approx([0.5, 1.0])


def test_grouped_bars_have_their_values_as_heights_and_labels():
    picture = plots.grouped_bars({"news": {"a": 3.0, "b": 25_000.0}, "wiki": {"a": 150.0, "b": 1.0}}, "t", "y")
    assert [bar.get_height() for bar in picture.axes[0].patches] == [3, 25_000, 150, 1]
    assert [text.get_text() for text in picture.axes[0].texts] == ["3", "25k", "150", "1"]


def test_curves_put_ticks_at_the_points_of_a_logarithmic_axis():
    axes = plots.curves([8, 32], {"a": [2.0, 1.0]}, "t", "x", "y", logx=True).axes[0]
    assert axes.get_xticks().tolist() == [8, 32]
    assert axes.lines[0].get_ydata().tolist() == [2, 1]


def test_curves_draw_a_spread_at_each_point():
    axes = plots.curves([8, 32], {"a": [2.0, 1.0]}, "t", "x", "y", spread={"a": [0.5, 0.25]}).axes[0]
    (bars,) = axes.containers
    lower, upper = (cap.get_ydata().tolist() for cap in bars.lines[1])
    assert (lower, upper) == ([1.5, 0.75], [2.5, 1.25])


def test_a_picture_is_small_and_of_fixed_size():
    picture = plots.curves(range(50), {"a": range(50)}, "t", "x", "y")
    bundle = picture._repr_mimebundle_()
    assert size_of(picture) == (560, 256)
    assert len(bundle["image/png"]) < 25_000


def test_reference_lines_are_drawn_and_named():
    for picture in (
        plots.layer_lines({"a": [1.0, 2.0]}, "t", "y", reference={"no change": 1.5}),
        plots.curves([1, 2], {"a": [1.0, 2.0]}, "t", "x", "y", reference={"no change": 1.5}),
    ):
        line, drawn = picture.axes[0].lines
        assert list(line.get_ydata()) == [1.5, 1.5] and list(drawn.get_ydata()) == [1.0, 2.0]
        assert [text.get_text() for text in picture.legends[0].get_texts()] == ["no change", "a"]


def test_panels_share_their_vertical_axis():
    panels = {"there": {"a": [1.0, None]}, "here": {"a": [5.0, 9.0]}}
    picture = plots.layer_panels(panels, "t", "y", reference={"no change": 1.0})
    left, right = picture.axes
    assert left.get_ylim() == right.get_ylim() and left.get_ylim()[1] > 9
    assert [axes.get_title() for axes in (left, right)] == ["there", "here"]


def test_histograms_count_or_share():
    samples = {"few": [1.0, 2.0], "many": [1.0] * 30}
    heights = []
    for counts in (True, False):
        picture = plots.histogram(samples, "t", "x", bins=2, counts=counts)
        heights.append([patch.get_xy()[:, 1].max() for patch in picture.axes[0].patches])
    assert heights == [[1, 30], pytest.approx([0.5, 1.0])]


def test_the_decoder_layer_marks_the_two_projections_and_names_the_widths():
    picture = plots.decoder_layer({"hidden": 64, "heads": 4, "intermediate": 1200})
    texts = {text.get_text(): text for text in picture.axes[0].texts}
    assert {"64 wide", "4 heads", "1,200 channels"} <= texts.keys()
    marked = {name for name, text in texts.items() if (box := text.get_bbox_patch()) and box.get_linewidth() == 2}
    assert marked == {"o_proj", "down_proj"}


def test_ratio_intervals_have_ticks_however_narrow_they_are():
    rows = {"ours": (0.9, 0.8, 1.1), "theirs": (1.2, float("nan"), float("nan"))}
    wide = {"ours": (0.5, 0.4, 0.6), "theirs": (30.0, 20.0, 40.0)}
    picture = plots.ratio_intervals({"20 %": {"news": rows}, "50 %": {"news": wide}}, "t", "x")
    left, right = picture.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["ours", "theirs"]
    low, high = left.get_xlim()
    assert len([tick for tick in left.get_xticks() if low <= tick <= high]) >= 3
    assert {1.0, 10.0} <= set(right.get_xticks())
    points, _, bars = left.containers[0]
    assert points.get_xdata().tolist() == [0.9, 1.2]
    assert bars[0].get_segments()[0][:, 0].tolist() == pytest.approx([0.8, 1.1])
