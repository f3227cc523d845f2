"""Pictures: pure functions from numbers to matplotlib figures, and one that writes them.

No figure touches matplotlib's global state, and none needs a display.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .checkpoints import write_atomically

Array = npt.NDArray[Any]

# Okabe and Ito's colours: told apart with any kind of colour vision.
ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#777777"

_WIDTH = 9.0  # inches, at 200 dots per inch twice the width of a page on a screen
_DPI = 200


@dataclass(frozen=True)
class Curve:
    """One line of `accuracy_figure`: ``y[i] +- error[i]`` at ``x[i]``; an error may be None."""

    label: str
    x: Sequence[int]
    y: Sequence[float]
    error: Sequence[float | None]
    color: str = GREY
    marker: str = "o"
    linestyle: str = "-"


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
        # Side by side, so that no error bar hides another. Shots are on a logarithmic axis.
        shift = 2 ** (0.05 * (index - (len(curves) - 1) / 2))
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


def coefficient_figure(
    coef: Array, vectors: Sequence[str], blocks: Sequence[str], *, title: str
) -> Figure:
    """Heat map of coefficients [N, B]: vectors by blocks, blocks grouped by layer."""
    figure = new_figure(_WIDTH, 1.9 + 0.19 * len(vectors))
    axes = figure.subplots()
    limit = float(np.abs(coef).max()) or 1.0
    _block_map(axes, coef, vectors, blocks, cmap="PuOr", vmin=-limit, vmax=limit)
    kinds = [name.rsplit("-", 1)[0] for name in vectors]
    for row in range(1, len(vectors)):
        if kinds[row] != kinds[row - 1]:
            axes.axhline(row - 0.5, color="white", linewidth=2)
    _colorbar(figure, axes, "coefficient")
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


def _colorbar(figure: Figure, axes: Axes, label: str) -> None:
    bar = figure.colorbar(axes.images[0], ax=axes, fraction=0.025, pad=0.015)
    bar.set_label(label, fontsize=8.5)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)


def group_blocks(blocks: Sequence[str]) -> list[tuple[str, list[int], list[str]]]:
    """Blocks by layer, for reading: (layer, columns, short names), layers in the model's order.

    Blocks outside of numbered layers are the group "no layer".

    Example:
        >>> from atlas_kernels.plots import group_blocks
        >>> group_blocks(["proj", "blocks.0.mlp.c_fc.weight", "blocks.0.mlp.c_fc.bias"])
        [('no layer', [0], ['proj']), ('layer 1', [1, 2], ['mlp in w', 'mlp in b'])]
    """
    layers: dict[int, list[tuple[int, str]]] = {}
    rest: list[tuple[int, str]] = []
    for column, block in enumerate(blocks):
        found = re.search(r"(?:^|\.)(\d+)\.", block)
        if found:
            layers.setdefault(int(found[1]), []).append((column, block[found.end() :]))
        else:
            rest.append((column, block))
    groups = [("no layer", rest)] if rest else []
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
    """Four images [4, h, w] as two by two, with a thin gap."""
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
