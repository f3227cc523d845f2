"""Selection: one pass equals many, sums before magnitudes, and virtual vectors that compose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import EPS, dot_error
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import atlas_kernels as ak
from atlas_kernels.learn.few_shot import ImageBatches, classify
from atlas_kernels.learn.selection import (
    gradient_scores,
    select_blocks,
    select_by_features,
    select_random,
    select_vectors,
    virtual_vectors,
)
from atlas_kernels.learn.trainer import Recipe, learn

N = 6
INPUTS, LABELS = (
    torch.randn(50, 7, generator=torch.Generator().manual_seed(0)),
    torch.randint(3, (50,), generator=torch.Generator().manual_seed(1)),
)


def identity(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return images


# Batches of 13, 13, 13 and 11.
BATCHES = ImageBatches(INPUTS, LABELS, 13, identity, seed=0)


class Given:
    """Batches as they are given."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, index: int) -> Iterator[Any]:
        return iter(self.batches)


def make_module() -> nn.Sequential:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Dropout(0.2), nn.Linear(11, 3))
    return module.requires_grad_(False)


def make_vectors(count: int = N) -> list[ak.TaskVector]:
    """Vectors of a module; the last one lacks a block."""
    base = make_module().state_dict()
    vectors = [
        ak.TaskVector.from_state_dicts(
            base,
            {k: v + 0.3 * torch.randn_like(v) for k, v in base.items()},
            torch.float32,
            name=f"v{i}",
        )
        for i in range(count)
    ]
    del vectors[-1].deltas["3.bias"]
    return vectors


def make_encoder(vectors: Sequence[ak.TaskVector], **options: Any) -> ak.ComposedModel:
    module = make_module()
    bank = ak.TaskVectorBank.from_task_vectors(module, vectors, codec="fp32")
    return ak.ComposedModel(module, bank, **options)


def base_gradient() -> dict[str, Tensor]:
    """Of the summed loss, in float64."""
    module = make_module().double().eval().requires_grad_()
    cross_entropy(module(INPUTS.double()), LABELS, reduction="sum").backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["whole", "recompute", "stream", "linearized"])
def test_scores_are_inner_products_with_the_summed_gradient(kind: Any, tmp_path: Path) -> None:
    module, vectors = make_module(), make_vectors()
    bank = ak.TaskVectorBank.pack(tmp_path / "bank.safetensors", module, vectors, codec="fp32")
    # At the base, a linearised model has the gradient of the model itself.
    linearized = kind == "linearized"
    encoder = (
        ak.LinearizedModel(module, bank)
        if linearized
        else ak.ComposedModel(module, bank, memory=kind)
    )
    scores = gradient_scores(encoder, encoder, BATCHES)
    gradient = base_gradient()
    for i, vector in enumerate(vectors):
        for j, block in enumerate(bank.blocks):
            delta = vector.deltas.get(block)
            if delta is None:
                assert scores[i, j] == 0
                continue
            expected = (gradient[block] * delta.double()).sum().abs().item()
            # G sums 50 terms per weight in four batches through two layers: some tens of roundings
            # of terms of order 1, which the inner product averages like its own.
            terms = (gradient[block].abs() * delta.double().abs()).sum().item()
            assert scores[i, j].item() == pytest.approx(expected, abs=50 * EPS * terms)


@pytest.mark.parametrize("size", [1, 2, 3, 4, N])
def test_one_pass_scores_as_groups_of_vectors_do(size: int) -> None:
    """The published way loads b vectors at a time; all of them see the same base."""
    vectors = make_vectors()
    whole = make_encoder(vectors)
    scores = gradient_scores(whole, whole, BATCHES)
    gradient = base_gradient()
    for first in range(0, N, size):
        group = vectors[first : first + size]
        encoder = make_encoder(group)
        theirs = gradient_scores(encoder, encoder, BATCHES)
        for i, vector in enumerate(group):
            for j, block in enumerate(whole.bank.blocks):
                if block not in encoder.bank.blocks:
                    assert scores[first + i, j] == 0
                    continue
                delta = vector.deltas.get(block, torch.zeros_like(gradient[block]))
                # Both take inner products with the same G, each with its own rounding.
                error = 2 * dot_error(gradient[block], delta)
                other = theirs[i, encoder.bank.blocks.index(block)]
                assert scores[first + i, j].item() == pytest.approx(other.item(), abs=error)


def test_scoring_leaves_everything_as_it_was_and_reads_the_data_once() -> None:
    encoder = make_encoder(make_vectors())
    with torch.no_grad():
        encoder.coef.fill_(0.5)
    seen: list[int] = []

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(len(batch[0]))
        return classify(model, batch)

    compositions = 0
    compose = ak.TaskVectorBank.compose

    def counted(*args: Any, **options: Any) -> dict[str, Tensor]:
        nonlocal compositions
        compositions += 1
        return compose(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ak.TaskVectorBank, "compose", counted)
        scores = gradient_scores(encoder, encoder, BATCHES, objective)
    assert (seen, compositions) == ([13, 13, 13, 11], 1)
    assert torch.equal(encoder.coef, torch.full_like(encoder.coef, 0.5))
    assert encoder.coef.grad is None
    with torch.no_grad():
        encoder.coef.zero_()
    assert torch.equal(gradient_scores(encoder, encoder, BATCHES), scores)


def plain_scores(*batches: tuple[Tensor, Tensor]) -> list[list[float]]:
    """Scores of steps along the axes, where a batch's mean loss is the mean output times y."""
    module = nn.Linear(2, 1, bias=False)
    vectors = [
        ak.TaskVector({"weight": torch.eye(2)[i : i + 1].clone()}, name=f"v{i}") for i in (0, 1)
    ]
    encoder = ak.ComposedModel(module, ak.TaskVectorBank.from_task_vectors(module, vectors))
    return gradient_scores(
        encoder,
        encoder,
        Given(*batches),
        lambda model, batch: (model(batch[0]).flatten() * batch[1]).mean(),
    ).tolist()


def test_magnitudes_follow_the_sum_over_all_data() -> None:
    # Small integers: exact. Along the first axis the batches cancel.
    left, right = torch.tensor([[-3.0, 1.0]]), torch.tensor([[3.0, 1.0]])
    assert plain_scores((left, torch.ones(1)), (right, torch.ones(1))) == [[0.0], [2.0]]


def test_every_example_counts_the_same_however_large_its_batch() -> None:
    many, one = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[-3.0, 1.0]])
    # Means of batches would give |1 - 3| = 2 along the first axis.
    assert plain_scores((many, torch.ones(4)), (one, torch.ones(1))) == [[1.0], [1.0]]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 12))
def test_blocks_are_ranked_on_their_own_and_ties_keep_the_earlier(
    values: list[int], blocks: int, budget: int
) -> None:
    scores = torch.tensor(values).repeat(blocks, 1).T.float()
    # Another ranking in every block.
    scores = torch.stack([scores[:, j].roll(j) for j in range(blocks)], 1)
    if budget > len(values):
        with pytest.raises(ValueError, match=f"budget of {budget}.*1 to {len(values)}"):
            select_blocks(scores, [str(j) for j in range(blocks)], budget)
        return
    table = select_blocks(scores, [str(j) for j in range(blocks)], budget)
    for j in range(blocks):
        column = scores[:, j].tolist()
        ranked = sorted(range(len(column)), key=lambda i: (-column[i], i))
        assert table[:, j].tolist() == ranked[:budget]
    sums = scores.sum(1).tolist()
    ranked = sorted(range(len(sums)), key=lambda i: (-sums[i], i))
    assert select_vectors(scores, budget).tolist() == ranked[:budget]
    # With one block, both are the same.
    single = scores[:, :1]
    assert torch.equal(select_blocks(single, ["0"], budget)[:, 0], select_vectors(single, budget))


def permuted(coef: Tensor, table: Tensor) -> Tensor:
    """Coefficients of the candidates as those of the virtual vectors."""
    return coef.gather(0, table)


def test_virtual_vectors_hold_the_sources_of_every_block() -> None:
    vectors = make_vectors()
    blocks = make_encoder(vectors).bank.blocks
    table = torch.tensor([[0, 1, 2, 3], [4, 3, 5, 5]])
    found = virtual_vectors(vectors, table, blocks)
    assert [vector.name for vector in found] == ["rank-1", "rank-2"]
    for vector, row in zip(found, table.tolist(), strict=True):
        for block, source in zip(blocks, row, strict=True):
            # The very tensors: nothing is copied.
            assert vector.deltas.get(block) is vectors[source].deltas.get(block)
            if block in vector.deltas:
                assert vector.base[block] == vectors[source].base[block]
    assert "3.bias" in found[0].deltas
    assert "3.bias" not in found[1].deltas
    other = {k: v + 1 for k, v in make_module().state_dict().items()}
    with pytest.raises(ValueError, match="another base"):
        ak.TaskVectorBank.from_task_vectors(other, found)


def test_a_full_budget_trains_an_equivalent_model() -> None:
    vectors = make_vectors()
    encoder = make_encoder(vectors)
    blocks = encoder.bank.blocks
    table = select_blocks(gradient_scores(encoder, encoder, BATCHES), blocks, N)
    assert table[-1, blocks.index("3.bias")] == N - 1  # The one that lacks it comes last.
    virtual = make_encoder(virtual_vectors(vectors, table, blocks))
    assert virtual.bank.blocks == blocks
    recipe = Recipe(epochs=3, lr=0.02)
    for model in (encoder, virtual):
        rising = iter(range(9))
        learn(
            model,
            classify,
            BATCHES,
            recipe,
            evaluate=lambda _, rising=rising: float(next(rising)),
            progress=False,
        )
    # Sums over i in another order change gradients by roundings, at most 1e-5 of them where terms
    # cancel, and AdamW's 12 steps of 0.02 by as much. Sources in another order would change them by
    # whole steps.
    expected = permuted(encoder.coef.detach(), table)
    torch.testing.assert_close(virtual.coef.detach(), expected, rtol=0, atol=12 * 0.02 * 1e-5)
    assert (encoder.coef - expected).abs().max() > 0.02
    for ours, theirs in zip(
        virtual.merge().parameters(), encoder.merge().parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def low_rank_vectors() -> list[ak.TaskVector]:
    torch.manual_seed(3)
    return [
        ak.TaskVector(
            {
                "0.weight": ak.LowRank(torch.randn(11, 2), torch.randn(2, 7), 0.5),
                "3.weight": ak.LowRank(torch.randn(3, 2), torch.randn(2, 11), 0.5),
                "3.bias": torch.randn(3),
            },
            name=f"v{i}",
        )
        for i in range(4)
    ]


@pytest.mark.parametrize("lora", ["product", "factorwise"])
def test_low_rank_vectors_are_selected_in_both_modes(lora: Any) -> None:
    vectors = low_rank_vectors()

    def encoder_of(vectors: Sequence[ak.TaskVector]) -> ak.ComposedModel:
        module = make_module()
        bank = ak.TaskVectorBank.from_task_vectors(module, vectors, codec="fp32", lora=lora)
        return ak.ComposedModel(module, bank)

    encoder = encoder_of(vectors)
    blocks = encoder.bank.blocks
    scores = gradient_scores(encoder, encoder, BATCHES)
    table = select_blocks(scores, blocks, 4)
    firsts = [j for j, block in enumerate(blocks) if block.endswith(".lora_A")]
    assert len(firsts) == (2 if lora == "factorwise" else 0)
    for j in firsts:
        partner = blocks.index(blocks[j].removesuffix("A") + "B")
        assert not scores[:, j].any()
        assert scores[:, partner].all()
        assert torch.equal(table[:, j], table[:, partner])
        # As the ranking of zeros would be.
        assert not torch.equal(table[:, j], torch.arange(4))
    virtual = encoder_of(virtual_vectors(vectors, table, blocks))
    coef = torch.randn(4, len(blocks))
    with torch.no_grad():
        encoder.coef.copy_(coef)
        virtual.coef.copy_(permuted(coef, table))
    # Sums of four terms of order 1 in another order, and products of two such factors.
    for block, weight in encoder.weights().items():
        torch.testing.assert_close(virtual.weights()[block], weight, rtol=1e-5, atol=1e-4)


def test_selection_by_chance_follows_the_seed() -> None:
    chosen = select_random(100, 10, seed=3)
    assert len(chosen.unique()) == 10
    assert torch.equal(chosen, select_random(100, 10, seed=3))
    assert not torch.equal(chosen, select_random(100, 10, seed=4))
    assert select_random(5, 5, seed=0).sort().values.tolist() == list(range(5))


def test_selection_by_features_takes_the_mean_of_all_of_them() -> None:
    axes = torch.eye(3)
    target = torch.cat([axes[0].expand(9, 3), axes[1:2]])
    # Near the mean of the target; its last feature alone; far from both.
    candidates = [axes[1:2], axes[2:], torch.cat([axes[0].expand(4, 3), axes[1:2]])]
    assert select_by_features(target, candidates, 3).tolist() == [2, 0, 1]
    assert select_by_features(target, candidates, 1).tolist() == [2]
    # The length of a mean, which tells how spread features are, does not count.
    assert select_by_features(target, [0.01 * candidates[2], candidates[0]], 1).tolist() == [0]


def test_bad_arguments_are_refused() -> None:
    vectors = make_vectors()
    isotropic = make_encoder(vectors, granularity="task")
    with pytest.raises(ValueError, match="granularity='block'"):
        gradient_scores(isotropic, isotropic, BATCHES)
    encoder = make_encoder(vectors)
    with pytest.raises(ValueError, match="at least one batch"):
        gradient_scores(encoder, encoder, Given())
    with pytest.raises(FloatingPointError, match="not finite"):
        gradient_scores(encoder, encoder, Given((INPUTS / 0, LABELS)))
    for budget in (0, 4):
        with pytest.raises(ValueError, match="expected 1 to 3"):
            select_random(3, budget, seed=0)
        with pytest.raises(ValueError, match="expected 1 to 3"):
            select_vectors(torch.ones(3, 2), budget)
        with pytest.raises(ValueError, match="expected 1 to 3"):
            select_by_features(torch.ones(1, 2), [torch.ones(1, 2)] * 3, budget)
    with pytest.raises(ValueError, match="2 blocks are scored, but 1"):
        select_blocks(torch.ones(3, 2), ["a"], 1)
    with pytest.raises(ValueError, match="shape"):
        virtual_vectors(vectors, torch.zeros(1, 2, dtype=torch.int64), ["0.weight"])
    with pytest.raises(ValueError, match="sources up to 6"):
        virtual_vectors(vectors, torch.tensor([[6]]), ["0.weight"])
