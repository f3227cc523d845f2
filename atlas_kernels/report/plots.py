"""Pictures: pure functions from numbers to matplotlib figures, and one that writes them.

No figure touches matplotlib's global state, and none needs a display.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import write_atomically

Array = npt.NDArray[Any]

# Okabe and Ito's colours: told apart with any kind of colour vision.
ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#777777"

_WIDTH = 9.0  # inches, at 200 dots per inch twice the width of a page on a screen
# Pixels around a sample image, some of which fill their frame.
_MARGIN = 5
_DPI = 200


@dataclass(frozen=True)
class Curve:
    """One line of a figure: ``y[i] +- error[i]`` at ``x[i]``; an error may be None."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float | None]
    color: str = GREY
    marker: str = "o"
    linestyle: str = "-"


@dataclass(frozen=True)
class Bars:
    """The bars of one colour of `bars_figure`: ``y[i] +- error[i]`` in group i; None for no bar."""

    label: str
    y: Sequence[float | None]
    error: Sequence[float | None]
    color: str = GREY


@dataclass(frozen=True)
class Comparison:
    """One row of the right panel of `accuracy_figure`: a difference and its standard error."""

    label: str
    value: float
    error: float | None
    color: str = GREY


def accuracy_figure(
    curves: Sequence[Curve],
    comparisons: Sequence[Comparison],
    *,
    title: str,
    left_title: str,
    right_title: str,
) -> Figure:
    """Accuracy against shots on the left, differences to one method on the right.

    Accuracies and differences are shares of 1 and drawn in per cent.
    """
    figure = new_figure(_WIDTH, 5.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    ticks = sorted({x for curve in curves for x in curve.x})
    for index, curve in enumerate(curves):
        # Just side by side, so that no error bar hides another. Shots are on a logarithmic axis.
        shift = 2 ** (0.012 * (index - (len(curves) - 1) / 2))
        left.errorbar(
            [x * shift for x in curve.x],
            [100 * y for y in curve.y],
            yerr=[100 * (e or 0.0) for e in curve.error],
            label=curve.label,
            color=curve.color,
            marker=curve.marker,
            linestyle=curve.linestyle,
            linewidth=1.8,
            markersize=5.5,
            capsize=2.5,
            elinewidth=1.1,
        )
    left.set_xscale("log", base=2)
    left.set_xticks(ticks, [str(tick) for tick in ticks])
    left.set_xlim(min(ticks) / 1.4, max(ticks) * 1.4)
    left.minorticks_off()
    left.set_xlabel("labelled images per class (k)")
    left.set_ylabel("test accuracy, %")
    left.set_ylim(bottom=0)
    _plain(left, "y")
    left.set_title(left_title, loc="left", fontsize=9.5)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    rows = range(len(comparisons))[::-1]
    for row, item in zip(rows, comparisons, strict=True):
        right.errorbar(
            100 * item.value,
            row,
            xerr=None if item.error is None else 100 * item.error,
            color=item.color,
            marker="o",
            markersize=6,
            capsize=3,
            linewidth=1.6,
        )
    right.axvline(0, color="black", linewidth=1)
    right.set_yticks(list(rows), [item.label for item in comparisons], fontsize=8.5)
    right.set_ylim(-0.7, len(comparisons) - 0.3)
    right.tick_params(axis="y", length=0)
    right.set_xlabel("percentage points")
    _plain(right, "x")
    right.set_title(right_title, loc="left", fontsize=9.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def history_figure(
    losses: Sequence[float], scores: Sequence[float], best: int, *, title: str
) -> Figure:
    """Training loss of epochs 1 to E on the left; accuracy of the start and of every epoch.

    Args:
        losses: E of them.
        scores: E + 1 shares of 1, the start first, drawn in per cent.
        best: the index of the score that is kept.
        title: above both.
    """
    figure = new_figure(_WIDTH, 3.6)
    left, right = figure.subplots(1, 2)
    left.plot(range(1, len(scores)), losses, color=ORANGE, marker="o", markersize=4)
    right.plot(range(len(scores)), [100 * y for y in scores], color=BLUE, marker="o", markersize=4)
    right.axhline(100 * scores[0], color=GREY, linestyle=":", label="zero-shot")
    right.plot(best, 100 * scores[best], "o", color=RED, markersize=9, label="kept")
    right.legend(frameon=False, fontsize=8.5)
    for axes, name in ((left, "mean training loss"), (right, "validation accuracy, %")):
        axes.set_title(name, loc="left", fontsize=9.5)
        axes.set_xlabel("epoch")
        axes.set_xlim(-0.5, len(scores) - 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _plain(axes, "y")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def lines_figure(
    curves: Sequence[Curve], *, title: str, xlabel: str, ylabel: str, log: bool = False
) -> Figure:
    """Several series against one number, with bands of their errors.

    Args:
        curves: their ``y`` are shares of 1, drawn in per cent.
        title: above.
        xlabel: what the number is.
        ylabel: what the share is; ", %" is added.
        log: a logarithmic axis of base 2 for the number.
    """
    figure = new_figure(_WIDTH, 4.8)
    axes = figure.subplots()
    for curve in curves:
        y = 100 * np.asarray(curve.y)
        error = 100 * np.asarray([e or 0.0 for e in curve.error])
        axes.fill_between(curve.x, y - error, y + error, color=curve.color, alpha=0.18, linewidth=0)
        axes.plot(
            curve.x,
            y,
            label=curve.label,
            color=curve.color,
            marker=curve.marker,
            linestyle=curve.linestyle,
            linewidth=1.8,
            markersize=5.5,
        )
    if log:
        axes.set_xscale("log", base=2)
    ticks = sorted({x for curve in curves for x in curve.x})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(f"{ylabel}, %")
    _plain(axes, "y")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def bars_figure(
    groups: Sequence[str], series: Sequence[Bars], *, title: str, ylabel: str
) -> Figure:
    """Groups of bars side by side, one colour per series, with error bars and their values.

    Args:
        groups: the names below.
        series: their ``y`` are shares of 1, drawn in per cent.
        title: above.
        ylabel: what the share is; ", %" is added.
    """
    figure = new_figure(_WIDTH, 4.4)
    axes = figure.subplots()
    width = 0.8 / len(series)
    # About how many points a bar is wide: the values above it turn upright when they would touch.
    room = 0.85 * 72 * _WIDTH * width / len(groups)
    for index, bars in enumerate(series):
        shift = width * (index - (len(series) - 1) / 2)
        drawn = [
            (i, y, e)
            for i, (y, e) in enumerate(zip(bars.y, bars.error, strict=True))
            if y is not None
        ]
        axes.bar(
            [i + shift for i, _, _ in drawn],
            [100 * y for _, y, _ in drawn],
            0.92 * width,
            color=bars.color,
            label=bars.label,
        )
        for i, y, error in drawn:
            if error is not None:
                axes.errorbar(
                    i + shift, 100 * y, 100 * error, color="black", capsize=2, linewidth=1
                )
            axes.annotate(
                f"{100 * y:.1f}",
                (i + shift, 100 * (y + (error or 0.0))),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7,
                rotation=0 if room > 20 else 90,
            )
    crowded = len(groups) * max(map(len, groups)) > 90
    axes.set_xticks(
        range(len(groups)),
        list(groups),
        rotation=40 if crowded else 0,
        ha="right" if crowded else "center",
        rotation_mode="anchor",
    )
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.margins(y=0.12)
    axes.set_ylabel(f"{ylabel}, %")
    _plain(axes, "y")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def matrix_figure(
    values: Array,
    names: Sequence[str],
    *,
    title: str,
    label: str,
    xlabel: str = "",
    ylabel: str = "",
    digits: int = 2,
) -> Figure:
    """A heat map of a matrix [N, N] between named things; its diagonal says nothing and is grey.

    Args:
        values: white is zero; purple are negative values, if there are any.
        names: of rows and columns; a line parts names with different beginnings, as in
            "digits-noise" and "fashion-noise".
        title: above.
        label: what a value is, at the colour bar.
        xlabel: what a column is.
        ylabel: what a row is.
        digits: behind the point of the values, which small matrices show.
    """
    count = len(names)
    shown = np.ma.masked_array(values, np.eye(count, dtype=bool))
    limit = float(np.abs(shown).max()) or 1.0
    signed = bool((shown < 0).any())
    side = min(_WIDTH - 2.6, max(2.4, 0.6 * count))
    # Room for the names, level and slanted, so that cells are about square.
    longest = 0.07 * max(map(len, names))
    width = max(side + longest + 1.3, 0.115 * len(title))
    figure = new_figure(width, side + 0.7 * longest + 0.9)
    axes = figure.subplots()
    axes.set_facecolor("#cccccc")
    image = axes.imshow(
        shown,
        aspect="auto",
        interpolation="nearest",
        cmap="PuOr_r" if signed else "Oranges",
        vmin=-limit if signed else 0,
        vmax=limit,
    )
    size = 9 if count <= 10 else 7.5
    axes.set_xticks(range(count), list(names), rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), list(names))
    axes.tick_params(length=0, labelsize=size)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if count <= 12:
        for row, column in zip(*np.nonzero(~shown.mask), strict=True):
            red, green, blue, _ = image.to_rgba(values[row, column])
            axes.text(
                column,
                row,
                f"{values[row, column]:.{digits}f}",
                ha="center",
                va="center",
                fontsize=size - 0.5,
                # By brightness as the eye sees it.
                color="white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black",
            )
    for after in _borders(names):
        axes.axhline(after, color="black", linewidth=0.8)
        axes.axvline(after, color="black", linewidth=0.8)
    _colorbar(figure, axes, label)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def coefficient_figure(
    maps: Mapping[str, tuple[Array, Sequence[str]]], blocks: Sequence[str], *, title: str
) -> Figure:
    """Heat maps of coefficients [N, B]: vectors by blocks, blocks grouped by layer.

    ``maps`` gives coefficients and names of vectors by what was learned; all have one scale.
    """
    heights = [len(vectors) for _, vectors in maps.values()]
    figure = new_figure(_WIDTH, 1.9 + 0.4 * (len(maps) - 1) + 0.16 * sum(heights))
    grid = figure.subplots(len(maps), 1, squeeze=False, sharex=True, height_ratios=heights)
    limit = max(float(np.abs(coef).max(initial=0)) for coef, _ in maps.values()) or 1.0
    for (name, (coef, vectors)), axes in zip(maps.items(), grid[:, 0], strict=True):
        _block_map(axes, coef, vectors, blocks, cmap="PuOr", vmin=-limit, vmax=limit)
        axes.set_ylabel(f"learned for {name}", fontsize=9)
        for after in _borders(vectors):
            axes.axhline(after, color="white", linewidth=2)
    _colorbar(figure, list(grid[:, 0]), "coefficient")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def bank_figure(
    errors: Array,
    bits: Sequence[float],
    vectors: Sequence[str],
    blocks: Sequence[str],
    *,
    title: str,
) -> Figure:
    """Heat map of relative errors [N, B] of a bank's deltas, and each block's bits per weight."""
    figure = new_figure(_WIDTH, 3.2 + 0.19 * len(vectors))
    upper, axes = figure.subplots(2, 1, height_ratios=(1.2, 2 + 0.19 * len(vectors)), sharex=True)
    groups = group_blocks(blocks)
    order = [column for _, columns, _ in groups for column in columns]
    upper.bar(range(len(bits)), [bits[column] for column in order], width=1.0, color=BLUE)
    upper.set_ylabel("bits per weight", fontsize=8.5)
    upper.tick_params(labelsize=7.5, bottom=False)
    _plain(upper, "y")
    _block_map(axes, errors, vectors, blocks, cmap="viridis", vmin=0, vmax=float(errors.max()) or 1)
    _colorbar(figure, axes, "|stored - delta| / |delta|")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def _block_map(
    axes: Axes, values: Array, vectors: Sequence[str], blocks: Sequence[str], **colors: Any
) -> None:
    """An image of [N, B] values, blocks grouped and named by layer."""
    groups = group_blocks(blocks)
    order = [column for _, columns, _ in groups for column in columns]
    names = [name for _, _, labels in groups for name in labels]
    axes.imshow(values[:, order], aspect="auto", interpolation="nearest", **colors)
    axes.set_yticks(range(len(vectors)), list(vectors), fontsize=7.5)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6.5)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    start = 0
    for layer, columns, _ in groups:
        end = start + len(columns)
        if start:
            axes.axvline(start - 0.5, color="black", linewidth=1.2)
        axes.annotate(
            layer,
            ((start + end - 1) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
        )
        start = end


def _borders(names: Sequence[str]) -> list[float]:
    """Between which rows a name begins unlike the one before it; none if all begin differently."""
    kinds = [name.rsplit("-", 1)[0] for name in names]
    if len({*kinds}) == len(kinds):
        return []
    return [row - 0.5 for row in range(1, len(names)) if kinds[row] != kinds[row - 1]]


def _colorbar(figure: Figure, axes: Axes | list[Axes], label: str) -> None:
    first = axes[0] if isinstance(axes, list) else axes
    bar = figure.colorbar(first.images[0], ax=axes, fraction=0.025, pad=0.015)
    bar.set_label(label, fontsize=8.5)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)


def group_blocks(blocks: Sequence[str]) -> list[tuple[str, list[int], list[str]]]:
    """Blocks by layer, for reading: (layer, columns, short names), layers in the model's order.

    Blocks outside of numbered layers are the group "outside the layers".

    Example:
        >>> from atlas_kernels.report.plots import group_blocks
        >>> group_blocks(["proj", "blocks.0.mlp.c_fc.weight", "blocks.0.mlp.c_fc.bias"])
        [('outside the layers', [0], ['proj']), ('layer 1', [1, 2], ['mlp in w', 'mlp in b'])]
    """
    layers: dict[int, list[tuple[int, str]]] = {}
    rest: list[tuple[int, str]] = []
    for column, block in enumerate(blocks):
        found = re.search(r"(?:^|\.)(\d+)\.", block)
        if found:
            layers.setdefault(int(found[1]), []).append((column, block[found.end() :]))
        else:
            rest.append((column, block))
    groups = [("outside the layers", rest)] if rest else []
    groups += [(f"layer {layer + 1}", layers[layer]) for layer in sorted(layers)]
    return [
        (name, [column for column, _ in members], [_short(block) for _, block in members])
        for name, members in groups
    ]


_SHORTER = (
    ("in_proj_weight", "qkv w"),
    ("in_proj_bias", "qkv b"),
    ("attn.out_proj", "attn out"),
    ("attn.", ""),
    ("mlp.c_fc", "mlp in"),
    ("mlp.c_proj", "mlp out"),
    ("_embedding", ""),
    (".weight", " w"),
    (".bias", " b"),
    ("_", " "),
)


def _short(block: str) -> str:
    for long, short in _SHORTER:
        block = block.replace(long, short)
    return block


def contact_sheet(
    images: dict[str, Array],
    columns: Sequence[str],
    rows: Sequence[str],
    *,
    title: str,
    marked: Sequence[str] = (),
    note: str = "",
) -> Figure:
    """Sample images of every task: ``images["{row}-{column}"]`` is [n, h, w] with n = 4.

    ``marked`` tasks get a frame; ``note`` says at the bottom what it means.
    """
    figure = new_figure(_WIDTH, 1.0 + 1.45 * len(rows))
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            axes: Axes = grid[i][j]
            name = f"{row}-{column}"
            axes.set_xticks([])
            axes.set_yticks([])
            if i == 0:
                axes.set_title(column, fontsize=11)
            if j == 0:
                axes.set_ylabel(row, fontsize=11)
            if name in images:
                axes.imshow(_mosaic(images[name]), cmap="gray", vmin=0, vmax=255)
            for spine in axes.spines.values():
                spine.set_visible(name in marked)
                spine.set_color(RED)
                spine.set_linewidth(3)
    if note:
        figure.supxlabel(note, x=0.01, ha="left", fontsize=10)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def _mosaic(images: Array) -> Array:
    """Four images [4, h, w] as two by two, each with a margin of its background, and thin gaps."""
    edges = [images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]]
    background = int(np.median(np.concatenate(edges, 1)))
    margin = (_MARGIN, _MARGIN)
    images = np.pad(images, ((0, 0), margin, margin), constant_values=background)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=128)
    return np.concatenate([np.concatenate(padded[:2], 1), np.concatenate(padded[2:4], 1)], 0)


def save(figure: Figure, path: str | Path) -> None:
    """Writes a PNG in one step."""
    write_atomically(path, lambda name: figure.savefig(name, format="png", dpi=_DPI))


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of this size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
