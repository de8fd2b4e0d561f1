"""Figures: what is drawn, not that something is."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from slimllm_nb import channels, plots


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
    assert size_of(picture) == (805, 368)
    assert len(bundle["image/png"]) < 30_000


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


def test_the_decoder_layer_marks_the_two_projections_and_prunes_key_value_heads_with_their_last_query_head():
    widths = {"hidden": 64, "heads": 4, "key/value heads": 2, "intermediate": 1200}
    hatched = []
    for groups in (2, 4):
        picture = plots.decoder_layer(widths | {"key/value heads": groups})
        texts = {text.get_text(): text for text in picture.axes[0].texts}
        assert {"4 query heads", f"{groups} key/value heads", "1,200 channels"} <= texts.keys()
        marked = {name for name, text in texts.items() if (box := text.get_bbox_patch()) and box.get_linewidth() == 2}
        assert marked == {"o_proj", "down_proj"}
        hatched.append(sum(bool(patch.get_hatch()) for patch in picture.axes[0].patches))
    assert hatched == [1 + 4, 2 + 2 + 4]  # query heads, key/value heads, channels


def test_drawings_of_a_toy_show_its_numbers():
    (axes,) = plots.exchange([0, 2], 4, torch.tensor([3.0, 5.0]), before=4.0).axes
    assert [bar.get_height() for bar in axes.patches] == [3, 5]
    assert (
        axes.figure.get_suptitle() == "Head 4 is tried in the place of every kept head, and takes the place of head 2"
    )
    assert plots.exchange([0], 1, [3.0], before=4.0).get_suptitle().endswith("stays out")
    cloud = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) @ torch.tensor([[3.0, 1], [0, 1]])
    row, scatter = torch.tensor([1.0, 2.0]), (cloud - cloud.mean(0)).double().T @ (cloud - cloud.mean(0)).double()
    title = plots.feature_space(cloud, row).axes[1].get_title()
    expected = channels.direction_importance(scatter, row[:, None].double()).item()
    assert title == f"feature space: weighted length {expected:.2f}"
    line = plots.fitted_line([0.0, 2.0], [1.0, 5.0], 2.0, 1.0).axes[0].lines[1]
    assert line.get_xydata().tolist() == [[0, 1], [2, 5]]
    _, right = plots.kept_of_layers({"heads": [1.0, 0.5], "channels": [1.0, 0.25]}).axes
    assert [bar.get_height() for bar in right.patches] == [1, 0.25, 0, 0.75]
    for picture in (plots.pruning_walk(), plots.method_steps()):
        assert size_of(picture)[0] == 805


def test_a_slider_draws_again_into_the_same_place(monkeypatch):
    shown, handle = [], SimpleNamespace(update=lambda picture: shown.append(picture.get_suptitle()))
    monkeypatch.setattr("IPython.display.display", lambda what, **_: shown.append(what) or handle)
    plots.with_sliders(lambda a: plots.curves([1, 2], {"a": [a, a]}, f"a = {a}", "x", "y"), a=(0.0, 10.0, 3.0))
    picture, box = shown
    assert picture.get_suptitle() == "a = 3.0"
    box.children[0].value = 5.0
    assert shown[2:] == ["a = 5.0"]


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


def test_a_ratio_far_above_the_others_is_written_at_the_edge():
    rows = {f"row {index}": (1 + index / 50, 0.9, 1.2) for index in range(6)} | {"far": (9.87, 5.0, 20.0)}
    (axes,) = plots.ratio_intervals({"50 %": {"news": rows}}, "t", "x").axes
    assert axes.get_xlim()[1] < 3 and [text.get_text() for text in axes.texts] == ["9.87 →"]
    assert plots.ratio_intervals({"50 %": {"news": {}}}, "t", "x").axes[0].texts[:] == []  # SlimLLM alone
