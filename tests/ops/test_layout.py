from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import shapes

from atlas_kernels.ops.layout import ALIGNMENT, TILE, Layout, pieces

block_lists = st.lists(shapes(), max_size=6)


@given(block_lists, st.sampled_from([ALIGNMENT, 128, 512]))
def test_tables_against_a_construction_element_by_element(
    blocks: list[tuple[int, ...]], alignment: int
) -> None:
    layout = Layout.from_shapes(blocks, alignment)
    offsets, tile_block, tile_offset, block_tile = [0], [], [], [0]
    position = 0
    for b, shape in enumerate(blocks):
        length = prod(shape)
        while length % alignment:
            length += 1
        remaining = length
        while remaining > 0:
            tile_block.append(b)
            tile_offset.append(position)
            step = min(TILE, remaining)
            position += step
            remaining -= step
        offsets.append(position)
        block_tile.append(len(tile_block))
    assert layout.shapes == tuple(blocks)
    assert list(layout.offsets) == offsets
    assert layout.numel == position
    assert layout.tile_block.tolist() == tile_block
    assert layout.tile_offset.tolist() == [*tile_offset, position]
    assert layout.block_tile.tolist() == block_tile
    assert layout.tile_block.dtype == layout.block_tile.dtype == torch.int32
    # 32-bit offsets would end at a bank of 2^31 elements.
    assert layout.tile_offset.dtype == torch.int64


def test_offsets_do_not_wrap_at_32_bits() -> None:
    layout = Layout.from_shapes([(3, 2**20, 1000), (2**31,), (1,)])
    starts = (0, 3 * 2**20 * 1000, 3 * 2**20 * 1000 + 2**31)
    assert layout.offsets == (*starts, starts[-1] + 16)
    assert layout.tile_offset[-2:].tolist() == [starts[-1], starts[-1] + 16]
    assert layout.tile_offset[layout.block_tile.long()[:-1]].tolist() == list(starts)


def test_no_blocks() -> None:
    layout = Layout.from_shapes([])
    assert (layout.numel, layout.tile_block.tolist(), layout.tile_offset.tolist()) == (0, [], [0])
    assert layout.block_tile.tolist() == [0]
    assert layout.split(torch.empty(0)) == ()


@given(block_lists)
def test_split_gives_views_of_the_blocks(blocks: list[tuple[int, ...]]) -> None:
    layout = Layout.from_shapes(blocks)
    flat = torch.arange(layout.numel)
    views = layout.split(flat)
    assert len(views) == len(blocks)
    for view, shape, start in zip(views, blocks, layout.offsets, strict=False):
        assert torch.equal(view, torch.arange(start, start + prod(shape)).view(shape))
        assert view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


@given(block_lists)
def test_gradient_of_split_is_the_blocks_with_zeros_in_the_padding(
    blocks: list[tuple[int, ...]],
) -> None:
    layout = Layout.from_shapes(blocks)
    flat = torch.zeros(layout.numel, requires_grad=True)
    cotangents = [torch.randn(shape) for shape in blocks]
    loss = sum((v * g).sum() for v, g in zip(layout.split(flat), cotangents, strict=True))
    expected = torch.zeros(layout.numel)
    for cotangent, start in zip(cotangents, layout.offsets, strict=False):
        expected[start : start + cotangent.numel()] = cotangent.flatten()
    if blocks:
        (gradient,) = torch.autograd.grad(loss, flat)
        assert torch.equal(gradient, expected)


@given(st.sampled_from([16, 32, TILE - 16, TILE, TILE + 16, 3 * TILE + 48]), st.integers(1, 4))
def test_pieces_address_every_element_once_and_in_the_documented_order(
    length: int, count: int
) -> None:
    region = torch.arange(count * length)
    # Element e of vector i lies in tile e // TILE, behind that tile of the vectors before it.
    expected = torch.empty(count, length, dtype=torch.int64)
    for i in range(count):
        for tile in range(0, length, TILE):
            size = min(TILE, length - tile)
            start = count * tile + i * size
            expected[i, tile : tile + size] = torch.arange(start, start + size)
    views = pieces(region, length, count)
    rows = torch.cat([view.transpose(0, 1).reshape(count, -1) for view in views], dim=1)
    assert torch.equal(rows, expected)
    assert all(view._is_view() for view in views)


def test_pieces_of_nothing() -> None:
    assert pieces(torch.empty(0), 0, 3) == []
    # No row says how many items an element has.
    assert [tuple(view.shape[:2]) for view in pieces(torch.empty(0), TILE + 16, 0)] == [(1, 0)] * 2


@pytest.mark.parametrize("device", ["cpu", torch.device("meta")])
def test_to_moves_the_tables_only(device: torch.device | str) -> None:
    layout = Layout.from_shapes([(5, 7), (TILE + 1,)])
    moved = layout.to(device)
    assert (moved.shapes, moved.offsets) == (layout.shapes, layout.offsets)
    for table in (moved.tile_block, moved.tile_offset, moved.block_tile):
        assert table.device == torch.device(device)
