import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_rgb

from atlas_kernels.report import plots

BLOCKS = (
    "conv1.weight",
    "transformer.resblocks.1.ln_1.weight",
    "transformer.resblocks.0.attn.in_proj_weight",
    "transformer.resblocks.0.attn.in_proj_bias",
    "proj",
)


def texts(figure) -> list[str]:
    return [t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text"))]


def test_blocks_are_grouped_by_layer_in_the_models_order() -> None:
    assert plots.group_blocks(BLOCKS) == [
        ("outside the layers", [0, 4], ["conv1 w", "proj"]),
        ("layer 1", [2, 3], ["qkv w", "qkv b"]),
        ("layer 2", [1], ["ln 1 w"]),
    ]


def test_heat_map_moves_columns_with_their_names() -> None:
    coef = np.arange(10.0).reshape(2, 5)
    figure = plots.coefficient_figure(
        {"task": (coef, ["a-x", "b-y"])}, BLOCKS, title="what it takes"
    )
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == coef[:, [0, 4, 2, 3, 1]].tolist()
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["conv1 w", "proj", "qkv w", "qkv b", "ln 1 w"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a-x", "b-y"]
    # Zero is the middle of the scale.
    assert axes.images[0].get_clim() == (-9, 9)
    assert "what it takes" in texts(figure)


def test_accuracy_draws_what_it_is_given() -> None:
    curves = [
        plots.Curve("ours", [4, 16], [0.5, 0.6], [0.1, 0.2], plots.BLUE),
        plots.Curve("alone", [4, 16], [0.25, 0.25], [None, None]),
    ]
    rows = [plots.Comparison("alone", 0.35, 0.05), plots.Comparison("full", -0.1, None)]
    figure = plots.accuracy_figure(curves, rows, title="t", left_title="l", right_title="r")
    left, right = figure.axes
    ours = left.containers[0]
    assert ours.lines[0].get_ydata().tolist() == [50, 60]
    low, high = ours.lines[2][0].get_segments()[1][:, 1]
    assert (low, high) == pytest.approx((40, 80))
    assert to_rgb(ours.lines[0].get_color()) == to_rgb(plots.BLUE)
    assert [text.get_text() for text in left.get_xticklabels()] == ["4", "16"]
    values = [container.lines[0].get_xdata()[0] for container in right.containers]
    assert values == pytest.approx([35, -10])
    positions = dict(
        zip((t.get_text() for t in right.get_yticklabels()), right.get_yticks(), strict=True)
    )
    assert positions["alone"] > positions["full"]


def test_lines_have_bands_where_they_have_errors() -> None:
    curves = [
        plots.Curve("ours", [0, 1, 4], [0.2, 0.5, 0.6], [0.1, None, 0.2], plots.BLUE),
        plots.Curve("noise", [0, 4], [0.2, 0.3], [None, None]),
    ]
    figure = plots.lines_figure(curves, title="t", xlabel="vectors", ylabel="accuracy")
    (axes,) = figure.axes
    line = axes.lines[0]
    assert line.get_xydata().tolist() == [[0, 20], [1, 50], [4, 60]]
    band = axes.collections[0].get_paths()[0].vertices
    for x, low, high in ((0, 10, 30), (1, 50, 50), (4, 40, 80)):
        ys = band[band[:, 0] == x, 1]
        assert (ys.min(), ys.max()) == pytest.approx((low, high))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "4"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("vectors", "accuracy, %")
    assert {"ours", "noise", "t"} <= set(texts(figure))
    curves = [plots.Curve("partitions", [1, 80], [0.2, 0.5], [None, None])]
    figure = plots.lines_figure(curves, title="t", xlabel="K", ylabel="accuracy", log=True)
    assert figure.axes[0].get_xscale() == "log"


def test_bars_stand_over_their_group_with_their_value() -> None:
    series = [
        plots.Bars("before", [0.25, None], [None, None]),
        plots.Bars("after", [0.5, 0.75], [0.125, None], plots.BLUE),
    ]
    figure = plots.bars_figure(["cars", "dtd"], series, title="t", ylabel="accuracy")
    (axes,) = figure.axes
    bars = [bar for bar in axes.patches if bar.get_width() < 1]
    found = [(round(bar.get_x() + bar.get_width() / 2), bar.get_height()) for bar in bars]
    assert found == [(0, 25), (0, 50), (1, 75)]
    # Side by side, in the order of the series.
    assert bars[0].get_x() + bars[0].get_width() <= bars[1].get_x()
    assert to_rgb(bars[1].get_facecolor()[:3]) == to_rgb(plots.BLUE)
    errors = [c for c in axes.containers if hasattr(c, "has_yerr") and c.has_yerr]
    (segment,) = errors[0].lines[2][0].get_segments()
    assert len(errors) == 1
    assert segment[:, 1].tolist() == [37.5, 62.5]
    assert {"25.0", "50.0", "75.0", "before", "after"} <= set(texts(figure))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cars", "dtd"]


def test_matrix_shows_its_values_and_no_diagonal() -> None:
    values = np.array([[9.0, 1.0, 2.0], [3.0, 9.0, 4.0], [0.0, 2.5, 9.0]])
    names = ["a-x", "a-y", "b-x"]
    figure = plots.matrix_figure(
        values, names, title="t", label="share", xlabel="added", ylabel="evaluated", digits=1
    )
    axes = figure.axes[0]
    shown = axes.images[0].get_array()
    assert shown.mask.tolist() == np.eye(3, dtype=bool).tolist()
    assert shown[1, 2] == 4
    # The diagonal does not stretch the colours.
    assert axes.images[0].get_clim() == (0, 4)
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written[2, 1] == "4.0"
    assert len(written) == 6
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    # One line between a and b in either direction.
    assert [line.get_ydata()[0] for line in axes.lines[::2]] == [1.5]
    assert [line.get_xdata()[0] for line in axes.lines[1::2]] == [1.5]
    signed = plots.matrix_figure(-values, ["a", "b", "c"], title="t", label="cosine")
    assert signed.axes[0].images[0].get_clim() == (-4, 4)
    assert not signed.axes[0].lines
    assert not plots.matrix_figure(np.eye(20), ["n"] * 20, title="t", label="l").axes[0].texts


def test_contact_sheet_shows_every_image_and_frames_the_marked() -> None:
    image = np.arange(4, dtype=np.uint8)[:, None, None] * np.ones((4, 2, 2), np.uint8)
    figure = plots.contact_sheet(
        {"a-x": image, "a-y": image}, ["x", "y"], ["a"], title="t", marked=["a-y"]
    )
    first, second = figure.axes
    shown = first.images[0].get_array()
    first_row, second_row = 1 + plots._MARGIN, 5 + 3 * plots._MARGIN
    places = [(y, x) for y in (first_row, second_row) for x in (first_row, second_row)]
    assert [shown[place] for place in places] == [0, 1, 2, 3]
    framed = [axes.spines["left"].get_visible() for axes in (first, second)]
    assert framed == [False, True]


def test_saved_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    figure = plots.coefficient_figure({"t": (np.zeros((1, 1)), ["a"])}, ["b"], title="t")
    path = tmp_path / "a.png"
    plots.save(figure, path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")

    def fails(name, **_):
        with open(name, "w") as file:
            file.write("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fails)
    with pytest.raises(OSError, match="No space"):
        plots.save(figure, path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_no_global_state() -> None:
    import subprocess
    import sys

    code = "import sys, atlas_kernels.report.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
