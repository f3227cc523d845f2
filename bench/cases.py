"""What is measured: shapes, numbers of task vectors, dtypes, and the bytes that must move."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from atlas_kernels.ops.layout import Layout, pieces


@dataclass(frozen=True)
class Case:
    """N task vectors over blocks of these shapes."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    num_vectors: int
    base_dtype: torch.dtype = torch.float32
    delta_dtype: torch.dtype = torch.bfloat16

    @property
    def numel(self) -> int:
        """Parameters of one model."""
        return sum(map(prod, self.shapes))

    def bytes(self, direction: str) -> int:
        """The fewest bytes that a direction moves: every input read, every output written once."""
        wide = 2 if direction == "forward" else 1
        per_element = wide * self.base_dtype.itemsize + self.num_vectors * self.delta_dtype.itemsize
        return self.numel * per_element


@dataclass(frozen=True)
class Inputs:
    """Random normal arguments of a case, in both forms."""

    case: Case
    base: list[Tensor]
    deltas: list[list[Tensor]]
    coef: Tensor
    grads: list[Tensor]
    layout: Layout
    bank_base: Tensor
    bank_deltas: Tensor
    bank_grad: Tensor

    @classmethod
    def random(cls, case: Case, device: str = "cpu") -> Inputs:
        """Arguments whose deltas are a tenth of the base in size."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            empty = torch.empty(shape, dtype=dtype, device=device)
            return empty.normal_(0, scale, generator=generator)

        base = [normal(shape, case.base_dtype) for shape in case.shapes]
        deltas = [
            [normal(shape, case.delta_dtype, 0.1) for shape in case.shapes]
            for _ in range(case.num_vectors)
        ]
        grads = [normal(shape, case.base_dtype) for shape in case.shapes]
        layout = Layout.from_shapes(case.shapes).to(device)
        return cls(
            case,
            base,
            deltas,
            normal((case.num_vectors, len(case.shapes)), torch.float32),
            grads,
            layout,
            _arena(layout, [base]),
            _arena(layout, deltas),
            _arena(layout, [grads]),
        )


def _arena(layout: Layout, rows: list[list[Tensor]]) -> Tensor:
    arena = rows[0][0].new_zeros(len(rows) * layout.numel)
    for b, (start, end) in enumerate(zip(layout.offsets, layout.offsets[1:], strict=False)):
        region = arena[len(rows) * start : len(rows) * end]
        for i, row in enumerate(rows):
            flat = row[b].new_zeros(end - start)
            flat[: row[b].numel()] = row[b].flatten()
            pieces_of_row = pieces(flat, end - start)
            targets = pieces(region, end - start, len(rows))
            for target, source in zip(targets, pieces_of_row, strict=True):
                target[:, i] = source[:, 0]
    return arena


def vit_b_32(num_vectors: int) -> Case:
    """The 152 blocks of the CLIP ViT-B/32 image encoder, 87.85 M parameters."""
    import open_clip

    visual = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32")).visual
    shapes = tuple(tuple(parameter.shape) for parameter in visual.parameters())
    return Case("ViT-B/32", shapes, num_vectors)


def tiny(num_vectors: int) -> Case:
    """As many blocks, with nothing in them: what remains is the cost of a call."""
    return Case("152 tiny blocks", ((8,),) * 152, num_vectors)
