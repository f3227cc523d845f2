"""Random groups of a block's elements, given by a seed alone: aTLAS x K.

Every tile of a block (`layout.TILE` elements, the last one shorter) has a key, a hash of the seed,
the block's name and the tile's number. A keyed bijection sends the elements of a tile to as many
*slots*, and slot s belongs to group ``s * K // TILE``. So each element's group is a counter-based
hash of (seed, block, element), the same on every device, and no mask is ever stored.

A bijection rather than any hash: groups are balanced within every tile, and a backward pass can add
products into slots without two of them meeting, that is without atomics and in a fixed order.

Source: aTLAS (arXiv 2407.02880), section 6.2, appendix F, where groups are drawn independently
and stored as masks.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layout import TILE, Layout

MAX_GROUPS = TILE

_BITS = TILE.bit_length() - 1
# Three rounds leave neighbours at distances of a quarter of a tile visibly related, four do not.
_ROUNDS = 4
_WORD = 0xFFFFFFFF


def check_groups(groups: int) -> None:
    """Raises ValueError unless a block can be partitioned into so many groups."""
    if not 1 <= groups <= MAX_GROUPS:
        raise ValueError(f"{groups} groups of a block's elements, expected 1 to {MAX_GROUPS}")


def tile_keys(blocks: Sequence[str], layout: Layout, seed: int) -> Tensor:
    """int32 [T]: the key of every tile of the named blocks, on the layout's device.

    Depends on a block's name and not on its place, so that a partition outlives a repacked bank.
    """
    block_keys = [_block_key(name, seed) for name in blocks]
    device = layout.tile_block.device
    keys = torch.tensor(block_keys, dtype=torch.int64, device=device)[layout.tile_block.long()]
    first = layout.block_tile.long()[layout.tile_block.long()]
    number = torch.arange(len(keys), device=device) - first
    keys = (keys + number * 0x9E3779B9) & _WORD
    # The finaliser of MurmurHash3: every bit of the number reaches every bit of the key.
    keys = ((keys ^ keys >> 16) * 0x85EBCA6B) & _WORD
    keys = ((keys ^ keys >> 13) * 0xC2B2AE35) & _WORD
    keys = keys ^ keys >> 16
    return torch.where(keys >= 1 << 31, keys - (1 << 32), keys).int()


def slots(tile_key: Tensor, elements: int) -> Tensor:
    """int64 [tiles, elements]: the slot, in [0, TILE), of each of a tile's first elements.

    In 32-bit unsigned arithmetic, which is how the kernels do it.
    """
    key = tile_key.long().unsqueeze(1) & _WORD
    slot = torch.arange(elements, device=tile_key.device).expand(len(tile_key), -1)
    for _ in range(_ROUNDS):
        # Multiplying by an odd number, adding, and this shift are bijections modulo TILE.
        slot = (slot * (key & (TILE - 1) | 1) + (key >> _BITS & (TILE - 1))) & (TILE - 1)
        slot = slot ^ slot >> _BITS // 2
        key = (key * 0x2C1B3C6D + 0x297A2D39) & _WORD
        key = key ^ key >> 15
    return slot


def group_of(slot: Tensor, groups: int) -> Tensor:
    """``slot * groups // TILE``."""
    return slot * groups // TILE


def group_sums(values: Tensor, slot: Tensor, groups: int) -> Tensor:
    """The sums [groups] of values [n], elements of consecutive tiles with slots [tiles, TILE]."""
    tiles = pad(values, (0, slot.numel() - len(values))).view(-1, TILE)
    by_slot = torch.empty_like(tiles).scatter_(1, slot, tiles)
    return sum_groups(by_slot.sum(0), groups)


def sum_groups(by_slot: Tensor, groups: int) -> Tensor:
    """The sums [groups] over the slots of every group of values [TILE], in a fixed order."""
    first = -(-torch.arange(groups + 1, device=by_slot.device) * TILE // groups)
    width = -(-TILE // groups)
    members = first[:-1].unsqueeze(1) + torch.arange(width, device=by_slot.device)
    inside = members < first[1:].unsqueeze(1)
    return torch.where(inside, by_slot[members.clamp(max=TILE - 1)], 0).sum(1)


def _block_key(name: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{operator.index(seed)} {name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


# To the compiler a number like any other: see `backends.resolve`.
_block_key._dynamo_marked_constant = True  # type: ignore[attr-defined]
