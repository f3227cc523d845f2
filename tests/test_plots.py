import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_rgb

from atlas_kernels import plots

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
        ("no layer", [0, 4], ["conv1 w", "proj"]),
        ("layer 1", [2, 3], ["qkv w", "qkv b"]),
        ("layer 2", [1], ["ln 1 w"]),
    ]


def test_heat_map_moves_columns_with_their_names() -> None:
    coef = np.arange(10.0).reshape(2, 5)
    figure = plots.coefficient_figure(coef, ["a-x", "b-y"], BLOCKS, title="what it takes")
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


def test_contact_sheet_shows_every_image_and_frames_the_marked() -> None:
    image = np.arange(4, dtype=np.uint8)[:, None, None] * np.ones((4, 2, 2), np.uint8)
    figure = plots.contact_sheet(
        {"a-x": image, "a-y": image}, ["x", "y"], ["a"], title="t", marked=["a-y"]
    )
    first, second = figure.axes
    shown = first.images[0].get_array()
    assert [shown[1, 1], shown[1, 5], shown[5, 1], shown[5, 5]] == [0, 1, 2, 3]
    framed = [axes.spines["left"].get_visible() for axes in (first, second)]
    assert framed == [False, True]


def test_saved_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    figure = plots.coefficient_figure(np.zeros((1, 1)), ["a"], ["b"], title="t")
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

    code = "import sys, atlas_kernels.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
