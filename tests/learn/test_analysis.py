"""Disentanglement, cosines and random controls."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("open_clip")

import atlas_kernels as ak
from atlas_kernels.learn.analysis import (
    cosines,
    disentanglement_error,
    norm_matched,
    off_diagonal_mean,
    random_basis,
)
from atlas_kernels.tasks.embedded.image_task import embedded_task
from atlas_kernels.tasks.images.images import Images


def in_memory(inputs: torch.Tensor) -> Images:
    return Images(len(inputs), lambda chosen: inputs[chosen], lambda chosen, _: inputs[chosen])


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).requires_grad_(False)


def vector_of(module: nn.Module, name: str, scale: float = 1.0) -> ak.TaskVector:
    deltas = {key: scale * torch.randn_like(p) for key, p in module.named_parameters()}
    return ak.TaskVector(deltas, name=name)


@pytest.mark.parametrize("granularity", ["block", "task"])
def test_disentanglement_against_its_definition(granularity: str) -> None:
    module = net()
    # The third does nothing, and the fourth has no coefficients.
    vectors = [vector_of(module, name, 0.0 if name == "c" else 1.0) for name in "abcd"]
    bank = ak.TaskVectorBank.from_task_vectors(module, vectors, codec="fp32")
    encoder = ak.ComposedModel(module, bank, granularity=granularity)
    coef = torch.randn_like(encoder.coef)
    coef[3] = 0
    heads = [torch.randn(classes, 4) for classes in (3, 2, 4, 3)]
    inputs = [torch.randn(count, 5) for count in (60, 50, 40, 30)]
    start = torch.full_like(encoder.coef, 0.25)
    with torch.no_grad():
        encoder.coef.copy_(start)
    errors = disentanglement_error(encoder, coef, heads, [*map(in_memory, inputs)], batch_size=16)
    assert torch.equal(encoder.coef, start)
    # The encoder's own coefficients serve as well, though it changes them on its way.
    with torch.no_grad():
        encoder.coef.copy_(coef)
    own = disentanglement_error(encoder, encoder.coef, heads, [*map(in_memory, inputs)])
    assert torch.equal(own, errors)
    assert errors.dtype == torch.float64

    def predicted(a: int, rows: list[int]) -> torch.Tensor:
        model = module
        for row in rows:
            blocks = coef[row].expand(4) if granularity == "task" else coef[row]
            named = dict(zip(bank.blocks, blocks.tolist(), strict=True))
            factors = torch.tensor([named.get(key, 0.0) for key in vectors[row].deltas])
            model = vectors[row].apply_to(model, factors)
        return (model(inputs[a]) @ heads[a].T).argmax(1)

    for a in range(4):
        for b in range(4):
            rows = [a] if a == b else [a, b]
            changed = predicted(a, rows) != predicted(a, [a])
            assert errors[a, b].item() == changed.double().mean().item(), (a, b)
    assert errors[:, 2:].count_nonzero() == 0
    assert errors.count_nonzero() >= 5


def test_disentanglement_bad_input() -> None:
    module = net()
    bank = ak.TaskVectorBank.from_task_vectors(module, [vector_of(module, "a")])
    encoder = ak.ComposedModel(module, bank)
    images = in_memory(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"1 task vectors need as many heads .* got 2 and 1"):
        disentanglement_error(encoder, encoder.coef, [torch.eye(4)] * 2, [images])
    with pytest.raises(ValueError, match=r"expected coefficients \(1, 4\), got \(1,\)"):
        disentanglement_error(encoder, torch.ones(1), [torch.eye(4)], [images])

    def broken(chosen: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such image")

    with torch.no_grad():
        encoder.coef.fill_(0.5)
    bank_images = Images(3, broken, lambda chosen, _: chosen)
    with pytest.raises(RuntimeError, match="no such image"):
        disentanglement_error(encoder, torch.ones(1, 4), [torch.eye(4)], [bank_images])
    assert encoder.coef.unique().tolist() == [0.5]


def test_mean_over_the_56_pairs_of_eight_tasks() -> None:
    matrix = torch.arange(64.0).view(8, 8)
    others = [matrix[a, b].item() for a in range(8) for b in range(8) if a != b]
    assert len(others) == 56
    matrix.fill_diagonal_(math.nan)
    assert off_diagonal_mean(matrix) == pytest.approx(sum(others) / 56, rel=1e-15)


def test_cosines_against_those_of_pairs(monkeypatch) -> None:
    # Blocks of several pieces, the last of them short.
    monkeypatch.setattr("atlas_kernels.learn.analysis._CHUNK", 16)
    module = net()
    vectors = [vector_of(module, name) for name in "abc"]
    vectors.append(0.5 * vectors[0] + vectors[1])
    low = ak.LowRank(torch.randn(8, 2), torch.randn(2, 5), 0.5)
    vectors.append(ak.TaskVector({**vectors[0].deltas, "0.weight": low}))
    vectors.append(vectors[0] * 0)
    found = cosines(vectors)
    for i, one in enumerate(vectors):
        for k, other in enumerate(vectors):
            # Both are sums in float64 of float32 products; a low-rank dot never is dense, and its
            # factors' products round to float32 in `to_dense`.
            assert found[i, k].item() == pytest.approx(one.cosine(other), abs=1e-6)
    assert found.diagonal().tolist() == [1, 1, 1, 1, 1, 0]


def test_cosines_of_vectors_with_different_blocks() -> None:
    one = ak.TaskVector({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, name="one")
    two = ak.TaskVector({"b": torch.tensor([2.0])}, name="two")
    assert cosines([one, two])[0, 1].item() == pytest.approx(0.8, rel=1e-15)
    three = ak.TaskVector({"b": torch.ones(2)}, name="three")
    with pytest.raises(ValueError, match=r"b: shapes \(1,\) in 'one' and \(2,\) in 'three'"):
        cosines([one, two, three])


def test_random_basis_has_the_moments_of_every_block() -> None:
    base = {
        "wide": 3 + 0.1 * torch.randn(300, 200),
        "low": torch.full((50, 40), -2.0).bfloat16(),
        "one": torch.tensor(7.0),
        "steps": torch.tensor([3]),
    }
    first, second = random_basis(base, 2, seed=0)
    assert (first.name, second.name) == ("random-0", "random-1")
    assert list(first.deltas) == ["wide", "low", "one"]
    wide, target = first.deltas["wide"], base["wide"]
    # 60,000 draws: the mean's standard error is 0.1/245, the deviation's 0.1/346; five of each.
    assert abs(wide.mean() - target.mean()) < 5 * 0.1 / 245
    assert abs(wide.std() - target.std()) < 5 * 0.1 / 346
    # A constant block, and a number, have no deviation.
    assert first.deltas["low"].unique().tolist() == [-2]
    assert first.deltas["one"].item() == 7
    centred = [v.deltas["wide"] - v.deltas["wide"].mean() for v in (first, second)]
    # Independent: the cosine of two vectors of 60,000 draws is 1/245 on average; five times that.
    assert abs(torch.cosine_similarity(*(c.flatten() for c in centred), dim=0)) < 5 / 245
    again = random_basis(base, 1, seed=0)[0]
    assert torch.equal(again.deltas["wide"], wide)
    assert not torch.equal(random_basis(base, 1, seed=1)[0].deltas["wide"], wide)
    # They fit the base that they were made from, and no other.
    module = net()
    vectors = random_basis(dict(module.named_parameters()), 2, seed=0)
    ak.TaskVectorBank.from_task_vectors(module, vectors)
    with pytest.raises(ValueError, match="base"):
        ak.TaskVectorBank.from_task_vectors(net(), vectors)


def test_noise_of_the_same_norm() -> None:
    low = ak.LowRank(torch.randn(6, 2), torch.randn(2, 5), 0.5)
    deltas = {"w": 3 * torch.randn(40, 30), "low": low, "zero": torch.zeros(4)}
    vector = ak.TaskVector(deltas, base={"w": "print"}, name="cars")
    noise = norm_matched(vector, seed=5)
    assert (noise.name, noise.base) == ("random-cars", vector.base)
    for block, delta in noise.deltas.items():
        length = ak.TaskVector({block: vector.deltas[block]}).norm()
        assert delta.norm().item() == pytest.approx(length, rel=1e-5)
    # 1200 draws: the cosine has a deviation of 1/35; five of them.
    one, other = (ak.TaskVector({"w": its.deltas["w"]}) for its in (vector, noise))
    assert abs(one.cosine(other)) < 5 / 35
    assert torch.equal(norm_matched(vector, seed=5).deltas["w"], noise.deltas["w"])
    assert not torch.equal(norm_matched(vector, seed=6).deltas["w"], noise.deltas["w"])


def test_larger_steps_of_the_embedded_vectors_disturb_more() -> None:
    from atlas_kernels.tasks.clip.model import zero_shot_head
    from atlas_kernels.tasks.embedded.model import load_embedded_model
    from atlas_kernels.tasks.embedded.vectors import load_task_vectors

    clip = load_embedded_model()
    names = ("digits-inverted", "fashion-inverted")
    every = load_task_vectors(base=clip)
    visual = clip.get_submodule("visual")
    bank = ak.TaskVectorBank.from_task_vectors(visual, [every[name] for name in names])
    encoder = ak.ComposedModel(visual, bank, granularity="task")
    tasks = [embedded_task(name) for name in names]
    heads = [zero_shot_head(clip, task.classnames, task.templates) for task in tasks]
    images = [task.test.images for task in tasks]
    mild, strong = (
        off_diagonal_mean(disentanglement_error(encoder, torch.full((2,), a), heads, images))
        for a in (0.25, 1.0)
    )
    assert 0 < mild < strong < 1
