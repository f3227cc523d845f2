"""Which task vectors, or which blocks of them, to learn with under a budget of b vectors.

Sources of blocks are an int64 table [b, B]: entry (r, j) is the vector whose block j the r-th
vector of the budget takes. Source: aTLAS (arXiv 2407.02880), section 5.2 and appendix D.6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ..bank import factor_names
from ..models import ComposedModel
from ..vectors import TaskVector
from .few_shot import classify
from .trainer import Batches, Objective

_DOWN, _UP = factor_names("")


def select_random(count: int, budget: int, seed: int) -> Tensor:
    """``budget`` of ``count`` task vectors at random, as indices int64 [b].

    Raises:
        ValueError: ``budget`` is not in [1, count].

    Example:
        >>> from atlas_kernels.learn import select_random
        >>> sorted(select_random(3, 3, seed=0).tolist())
        [0, 1, 2]
    """
    _check_budget(count, budget)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:budget]


def select_by_features(target: Tensor, candidates: Sequence[Tensor], budget: int) -> Tensor:
    """The task vectors whose data look most like the target's: indices int64 [b], best first.

    Data are compared by the cosine between the means of their zero-shot features.

    Args:
        target: [n, d], of the target's images (see `features`), all of them.
        candidates: for each task vector [n_i, d], of images of the data that it was trained on.
        budget: b.

    Raises:
        ValueError: ``budget`` is not in [1, len(candidates)].

    Example:
        >>> import torch
        >>> from atlas_kernels.learn import select_by_features
        >>> target = torch.tensor([[0.0, 1.0]])
        >>> select_by_features(target, [torch.eye(2), torch.eye(2)[1:]], budget=1).tolist()
        [1]
    """
    _check_budget(len(candidates), budget)
    means = torch.stack([candidate.float().mean(0) for candidate in candidates])
    return _top(cosine_similarity(means, target.float().mean(0, keepdim=True)), budget)


def gradient_scores(
    model: nn.Module, encoder: ComposedModel, batches: Batches, objective: Objective = classify
) -> Tensor:
    """``|sum over all data of dL/dcoef[i, j]|`` at ``coef = 0``, float32 [N, B].

    At zero every task vector sees the base, and so the same gradient G of its weights: one pass
    over the data sums G, one pass over the bank takes ``<G, tau_ij>`` for all i and j. The same
    task vectors in several smaller banks would score the same.

    Args:
        model: holds ``encoder``; in eval mode afterwards.
        encoder: composed of all candidates; its coefficients and everything else are left as they
            are. With ``memory="stream"`` its bank may exceed memory.
        batches: the first epoch of them is used; the first part of a batch is its images.
        objective: (model, batch) to the mean loss of the batch.

    Raises:
        ValueError: the coefficients are not per block, or there are no data.
        FloatingPointError: a gradient is not finite.

    Example:
        >>> import torch, atlas_kernels as ak
        >>> from atlas_kernels.learn import ImageBatches, gradient_scores
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> steps = ([[1.0, 0.0]], [[0.0, 1.0]])
        >>> vectors = [
        ...     ak.TaskVector({"weight": torch.tensor(step)}, name=f"v{i}")
        ...     for i, step in enumerate(steps)
        ... ]
        >>> encoder = ak.ComposedModel(module, ak.TaskVectorBank.from_task_vectors(module, vectors))
        >>> inputs = torch.tensor([[3.0, 1.0], [-1.0, -5.0]])
        >>> batches = ImageBatches(inputs, torch.zeros(2), 2, lambda x, _: x, seed=0)
        >>> gradient_scores(encoder, encoder, batches, lambda m, batch: m(batch[0]).mean()).tolist()
        [[2.0], [4.0]]
    """
    if encoder.granularity != "block":
        raise ValueError(
            "task vectors are scored block by block: use a ComposedModel with granularity='block'"
        )
    before = encoder.coef.detach().clone()
    model.eval()
    model.zero_grad()
    try:
        with torch.no_grad():
            encoder.coef.zero_()
        with encoder.composed_once(accumulate=True):
            for batch in batches.epoch(0):
                # The sum: batches may differ in size.
                (len(batch[0]) * objective(model, batch)).backward()
        gradient = encoder.coef.grad
    finally:
        with torch.no_grad():
            encoder.coef.copy_(before)
        model.zero_grad()
    if gradient is None:
        raise ValueError("scores need at least one batch of data")
    if not bool(gradient.isfinite().all()):
        raise FloatingPointError(
            "the gradient at the base is not finite: check the images and labels"
        )
    return gradient.abs()


def select_vectors(scores: Tensor, budget: int) -> Tensor:
    """The task vectors with the highest sums over blocks: indices int64 [b], best first.

    Args:
        scores: [N, B], see `gradient_scores`.
        budget: b.

    Raises:
        ValueError: ``budget`` is not in [1, N].

    Example:
        >>> import torch
        >>> from atlas_kernels.learn import select_vectors
        >>> select_vectors(torch.tensor([[1.0, 2.0], [0.0, 4.0], [1.0, 1.0]]), budget=2).tolist()
        [1, 0]
    """
    _check_budget(len(scores), budget)
    return _top(scores.sum(1), budget)


def select_blocks(scores: Tensor, blocks: Sequence[str], budget: int) -> Tensor:
    """The best ``budget`` sources of every block by its own scores: a table int64 [b, B].

    Vectors that lack a block score 0 there and come last. The first factor of LoRA (``lora_A`` of
    ``lora="factorwise"``), whose gradient is 0 at the base, follows the second one.

    Args:
        scores: [N, B], see `gradient_scores`.
        blocks: the names of the B blocks, those of the bank.
        budget: b.

    Raises:
        ValueError: ``budget`` is not in [1, N], or there is not one name per block.

    Example:
        >>> import torch
        >>> from atlas_kernels.learn import select_blocks
        >>> scores = torch.tensor([[1.0, 2.0], [0.0, 4.0], [2.0, 1.0]])
        >>> select_blocks(scores, ["weight", "bias"], budget=2).tolist()
        [[2, 1], [0, 0]]
    """
    _check_budget(len(scores), budget)
    if len(blocks) != scores.shape[1]:
        raise ValueError(f"{scores.shape[1]} blocks are scored, but {len(blocks)} have names")
    places = {block: j for j, block in enumerate(blocks)}
    # Where a block's own scores are: its own, unless it is a first factor.
    own = [places.get(block.removesuffix(_DOWN) + _UP, j) for block, j in places.items()]
    return _top(scores, budget)[:, own]


def virtual_vectors(
    vectors: Sequence[TaskVector], table: Tensor, blocks: Sequence[str]
) -> list[TaskVector]:
    """The ``b`` task vectors of a table of sources; the r-th is called ``rank-{r + 1}``.

    A bank of them, packed as the candidates' was, composes the selected blocks. They share the
    memory of ``vectors``. If b = N, that bank composes the same models as the candidates'.

    Args:
        vectors: the candidates, in the order of the bank that was scored.
        table: int64 [b, B], see `select_blocks`.
        blocks: the names of the B blocks, those of that bank.

    Raises:
        ValueError: the table does not fit the vectors or the names.

    Example:
        >>> import torch, atlas_kernels as ak
        >>> from atlas_kernels.learn import virtual_vectors
        >>> vectors = [ak.TaskVector({"a": torch.ones(1) * i, "b": torch.ones(1)}) for i in (1, 2)]
        >>> virtual_vectors(vectors, torch.tensor([[1, 0]]), ["a", "b"])[0].deltas["a"].item()
        2.0
    """
    if table.ndim != 2 or table.shape[1] != len(blocks):
        raise ValueError(
            f"a table of {len(blocks)} blocks has shape [b, {len(blocks)}], got "
            f"{tuple(table.shape)}"
        )
    if table.numel() and not 0 <= int(table.min()) <= int(table.max()) < len(vectors):
        raise ValueError(
            f"the table names sources up to {int(table.max())}, but there are {len(vectors)} "
            "vectors"
        )
    return [
        _virtual(vectors, dict(zip(blocks, row, strict=True)), f"rank-{rank}")
        for rank, row in enumerate(table.tolist(), 1)
    ]


def _virtual(vectors: Sequence[TaskVector], sources: dict[str, int], name: str) -> TaskVector:
    deltas, base = {}, {}
    for block, source in sources.items():
        vector = vectors[source]
        # A factor of LoRA is part of the delta of its weight.
        for key in (block, block.removesuffix(_DOWN).removesuffix(_UP)):
            if key in vector.deltas:
                deltas[key] = vector.deltas[key]
                if key in vector.base:
                    base[key] = vector.base[key]
                break
    return TaskVector(deltas, base=base, name=name)


def _top(scores: Tensor, budget: int) -> Tensor:
    """Indices of the highest along the first axis; the earlier of equal ones comes first."""
    return torch.sort(scores, dim=0, descending=True, stable=True).indices[:budget]


def _check_budget(count: int, budget: int) -> None:
    if not 1 <= budget <= count:
        raise ValueError(
            f"a budget of {budget} cannot be taken from {count} task vectors: expected 1 to {count}"
        )
