"""What task vectors do to each other, and noise to compare them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..files import digest
from ..models import ComposedModel
from ..tasks.images import Images
from ..vectors import TaskVector, to_dense
from .few_shot import features

# Elements of a block at a time: their products are in float64.
_CHUNK = 1 << 20


def disentanglement_error(
    encoder: ComposedModel,
    coef: Tensor,
    heads: Sequence[Tensor],
    images: Sequence[Images],
    *,
    batch_size: int = 500,
) -> Tensor:
    """How often a second task vector changes what the first one's task predicts.

    ``xi[a, b]`` is the share of images x of task a with ``argmax f(x; theta_0 + coef_a tau_a) !=
    argmax f(x; theta_0 + coef_a tau_a + coef_b tau_b)``. The diagonal is zero, and so is a column
    whose vector or coefficients are zero. The published number is `off_diagonal_mean`.

    Args:
        encoder: composed of the N tasks' vectors; as it was afterwards.
        coef: (N, B) or (N,), as the encoder holds them, such as `add` learned.
        heads: of the tasks in the order of the bank, [C, d] each, on the encoder's device.
        images: the same tasks' images, at least one each.
        batch_size: images at a time.

    Returns:
        float64 [N, N] on the CPU; a row belongs to the task that is evaluated.

    Raises:
        ValueError: not one head and one set of images per vector, or coefficients of another shape.

    Source: aTLAS (arXiv 2407.02880), appendix C.2.

    Example:
        >>> import torch, atlas_kernels as ak
        >>> from atlas_kernels.tasks.images import Images
        >>> from atlas_kernels.learn import disentanglement_error
        >>> module = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)
        >>> _ = module.weight.copy_(torch.eye(2))
        >>> swap = ak.TaskVector({"weight": torch.tensor([[-1.0, 1.0], [1.0, -1.0]])}, name="swap")
        >>> grow = ak.TaskVector({"weight": torch.eye(2) / 2}, name="grow")
        >>> bank = ak.TaskVectorBank.from_task_vectors(module, [swap, grow])
        >>> encoder = ak.ComposedModel(module, bank, granularity="task")
        >>> inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> images = Images(2, lambda chosen: inputs[chosen], lambda chosen, _: inputs[chosen])
        >>> disentanglement_error(encoder, torch.ones(2), [torch.eye(2)] * 2, [images] * 2).tolist()
        [[0.0, 0.0], [1.0, 0.0]]
    """
    count = len(encoder.bank.names)
    if len(heads) != count or len(images) != count:
        raise ValueError(
            f"{count} task vectors need as many heads and sets of images, got {len(heads)} and"
            f" {len(images)}"
        )
    if coef.shape != encoder.coef.shape:
        raise ValueError(
            f"expected coefficients {tuple(encoder.coef.shape)}, got {tuple(coef.shape)}"
        )
    before, chosen = encoder.coef.detach().clone(), coef.detach().clone()

    def predicted(task: int, *rows: int) -> Tensor:
        """Of the task's images, with these vectors alone."""
        with torch.no_grad():
            encoder.coef.zero_()
            for row in rows:
                encoder.coef[row] = chosen[row].to(encoder.coef)
            unit = features(encoder, images[task], batch_size=batch_size)
            return (unit @ heads[task].T).argmax(1)

    errors = torch.zeros(count, count, dtype=torch.float64)
    try:
        for a in range(count):
            alone = predicted(a, a)
            for b in range(count):
                if b != a:
                    errors[a, b] = (predicted(a, a, b) != alone).double().mean()
    finally:
        with torch.no_grad():
            encoder.coef.copy_(before)
    return errors


def off_diagonal_mean(matrix: Tensor) -> float:
    """The mean of a square matrix without its diagonal: over 56 pairs of eight tasks.

    Example:
        >>> import torch
        >>> from atlas_kernels.learn import off_diagonal_mean
        >>> off_diagonal_mean(torch.tensor([[9.0, 1.0], [3.0, 9.0]]))
        2.0
    """
    others = ~torch.eye(len(matrix), dtype=torch.bool)
    return matrix[others].double().mean().item()


def cosines(vectors: Sequence[TaskVector]) -> Tensor:
    """``<tau_i, tau_k> / (|tau_i| |tau_k|)`` over all blocks, float64 [N, N]; 0 if one is zero.

    A block that a vector lacks counts as zero.

    Raises:
        ValueError: two vectors have blocks of one name and different shapes.
    """
    products = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for block in dict.fromkeys(block for vector in vectors for block in vector.deltas):
        rows = [row for row, vector in enumerate(vectors) if block in vector.deltas]
        dense = [to_dense(vectors[row].deltas[block]) for row in rows]
        for row, delta in zip(rows, dense, strict=True):
            if delta.shape != dense[0].shape:
                raise ValueError(
                    f"{block}: shapes {tuple(dense[0].shape)} in {vectors[rows[0]].name!r} and"
                    f" {tuple(delta.shape)} in {vectors[row].name!r}"
                )
        grid = torch.tensor(rows)
        for parts in zip(*(delta.flatten().split(_CHUNK) for delta in dense), strict=True):
            matrix = torch.stack([part.double() for part in parts])
            products[grid[:, None], grid] += matrix @ matrix.T
    squares = products.diagonal()
    # One root of the product, not a product of roots: a vector's cosine with itself is 1.
    lengths = (squares[:, None] * squares).sqrt()
    return torch.where(lengths > 0, products / lengths, 0.0)


def random_basis(base: Mapping[str, Tensor], count: int, seed: int) -> list[TaskVector]:
    """Random directions in place of task vectors: every block is N(mean(theta_0), std(theta_0)).

    The mean and deviation are of the block's own elements. These vectors are as large as the base
    itself; for a fair comparison see `norm_matched`.

    Args:
        base: the parameters of the pre-trained model by name; those of integers are left out.
        count: how many; the first ones are the same for every count.
        seed: of all of them.

    Source: aTLAS (arXiv 2407.02880), section 3.2.

    Example:
        >>> import torch
        >>> from atlas_kernels.learn import random_basis
        >>> [vector.name for vector in random_basis({"w": torch.ones(2, 2)}, 2, seed=0)]
        ['random-0', 'random-1']
    """
    floating = {name: tensor for name, tensor in base.items() if tensor.is_floating_point()}
    prints = {name: digest(tensor) for name, tensor in floating.items()}
    generator = torch.Generator().manual_seed(seed)
    vectors = []
    for index in range(count):
        deltas = {}
        for name, tensor in floating.items():
            values = tensor.detach().float().cpu()
            noise = torch.randn(values.shape, generator=generator)
            # Of one element the deviation is zero, not unknown.
            deltas[name] = values.mean() + values.std(correction=0) * noise
        vectors.append(TaskVector({**deltas}, base=prints, name=f"random-{index}"))
    return vectors


def norm_matched(vector: TaskVector, seed: int) -> TaskVector:
    """Gaussian noise with the norm of every block of a task vector: the fair random control.

    Example:
        >>> import torch, atlas_kernels as ak
        >>> from atlas_kernels.learn import norm_matched
        >>> vector = ak.TaskVector({"w": torch.tensor([3.0, 4.0])}, name="cars")
        >>> noise = norm_matched(vector, seed=0)
        >>> noise.name, round(noise.norm(), 5)
        ('random-cars', 5.0)
    """
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, delta in vector.deltas.items():
        noise = torch.randn(delta.shape, generator=generator)
        deltas[name] = noise * (to_dense(delta).norm() / noise.norm())
    return TaskVector({**deltas}, base=vector.base, name=f"random-{vector.name}")
