import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from arena import differentiable
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    FUSED,
    INTERPRETED,
    Case,
    cases,
    float32_sum,
    float64_sum,
    for_examples,
    make,
    need,
    on_each_backend,
    present,
    same_bits,
)
from tolerances import EPS, compose_error, dot_error
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import atlas_kernels as ak
from atlas_kernels.ops import reference
from atlas_kernels.ops import schema as ops
from atlas_kernels.ops.backends import resolve
from atlas_kernels.ops.groups import tile_keys
from atlas_kernels.ops.layout import TILE, Layout

# -- values and gradients ------------------------------------------------------------------------


def small(backend: str, most: int = 4) -> st.SearchStrategy[Case]:
    """Cases of a size that the backend computes in milliseconds."""
    return cases(TILE + 20, min(most, 3)) if backend in INTERPRETED else cases(3 * TILE, most)


@on_each_backend
def test_values(backend: str) -> None:
    @for_examples(backend, small(backend))
    def check(case: Case) -> None:
        before = [tensor.clone() for tensor in case.tensors()]
        composed = ak.compose(case.base, case.deltas, case.coef, backend=backend)
        assert isinstance(composed, tuple)
        assert len(composed) == len(case.base)
        for b, result in enumerate(composed):
            column = case.column(b)
            error = (result.double() - float64_sum(*column)).abs()
            assert (error <= compose_error(*column)).all(), (b, error.max())
            # The same by definition: no fused multiply-add, in the order of i, rounded at the end.
            if backend not in FUSED:
                assert same_bits(result, float32_sum(*column)), b
            assert result.shape == case.base[b].shape
            assert result.dtype == case.base[b].dtype
            assert result.is_contiguous()
            assert result.untyped_storage().data_ptr() not in {
                tensor.untyped_storage().data_ptr() for tensor in case.tensors() if tensor.numel()
            }
        for tensor, copy in zip(case.tensors(), before, strict=True):
            assert same_bits(tensor, copy)


def gradients(case: Case, cotangents: list[Tensor], backend: str) -> tuple[Tensor, ...]:
    """Gradients of sum_b <cotangent_b, composed_b> in coef, every base and every delta."""
    for tensor in case.tensors():
        tensor.requires_grad_()
    composed = ak.compose(case.base, case.deltas, case.coef, backend=backend)
    inputs = [case.coef, *case.base, *(delta for _, _, delta in present(case.deltas))]
    return torch.autograd.grad(composed, inputs, cotangents)


@on_each_backend
def test_gradients(backend: str) -> None:
    @for_examples(backend, small(backend), st.sampled_from(["plain", "expanded", "transposed"]))
    def check(case: Case, form: str) -> None:
        if not case.base:
            return
        generator = torch.Generator().manual_seed(1)
        cotangents = [make(tuple(t.shape), t.dtype, form, generator) for t in case.base]
        coef_grad, *grads = gradients(case, cotangents, backend)
        base_grads, delta_grads = grads[: len(case.base)], grads[len(case.base) :]

        expected = torch.zeros(len(case.deltas), len(case.base), dtype=torch.float64)
        bound = torch.zeros_like(expected)
        for i, b, delta in present(case.deltas):
            expected[i, b] = (cotangents[b].double() * delta.detach().double()).sum()
            bound[i, b] = dot_error(cotangents[b], delta.detach())
        if case.coef.dim() == 1:
            # Its sum over blocks rounds at most B times, by eps/2 of the sum of magnitudes each.
            bound = bound.sum(1) + len(case.base) * EPS / 2 * expected.abs().sum(1)
            expected = expected.sum(1)
        info = torch.finfo(case.coef.dtype)
        rounding = info.eps / 2 * (expected.abs() + bound) + info.smallest_normal * info.eps
        finite = expected.abs() < info.max
        assert coef_grad.dtype == case.coef.dtype
        assert coef_grad.shape == case.coef.shape
        error = (coef_grad.double() - expected).abs()
        assert (error <= bound + rounding)[finite].all(), (error, bound)

        for grad, cotangent in zip(base_grads, cotangents, strict=True):
            assert same_bits(grad, cotangent)
        for (i, b, delta), grad in zip(present(case.deltas), delta_grads, strict=True):
            exact = case.per_block[i, b] * cotangents[b].double()
            info = torch.finfo(delta.dtype)
            # One product in float32, rounded to the delta's dtype.
            allowed = (EPS + info.eps) / 2 * 1.01 * exact.abs() + info.smallest_normal * info.eps
            assert grad.dtype == delta.dtype
            assert grad.shape == delta.shape
            assert ((grad.double() - exact).abs() <= allowed).all()


@on_each_backend
def test_unused_outputs_and_gradients_nobody_asked_for(backend: str) -> None:
    base = [torch.randn(17), torch.randn(3, 5)]
    deltas = [[torch.randn(17), torch.randn(3, 5)] for _ in range(2)]
    coef = torch.randn(2, 2, requires_grad=True)
    deltas[1][0].requires_grad_()
    first, _ = ak.compose(base, deltas, coef, backend=backend)
    first.sum().backward()
    assert coef.grad is not None
    assert deltas[1][0].grad is not None
    assert torch.equal(coef.grad[:, 1], torch.zeros(2))
    assert torch.equal(deltas[1][0].grad, coef.detach()[1, 0].expand(17))
    for i in range(2):
        assert abs(coef.grad[i, 0] - deltas[i][0].sum()) <= dot_error(torch.ones(17), deltas[i][0])
    assert base[0].grad is None
    assert deltas[0][0].grad is None


@on_each_backend
def test_many_vectors_and_blocks(backend: str) -> None:
    vectors, blocks = (5, 6) if backend in INTERPRETED else (40, 60)
    base = [torch.randn(b % 50) for b in range(blocks)]
    deltas = [[torch.randn_like(block) for block in base] for _ in range(vectors)]
    coef = torch.randn(vectors, blocks, requires_grad=True)
    composed = ak.compose(base, deltas, coef, backend=backend)
    torch.autograd.backward(composed, [torch.ones_like(block) for block in base])
    assert coef.grad is not None
    for b, result in enumerate(composed):
        column = base[b], [vector[b] for vector in deltas], coef.detach()[:, b]
        assert ((result - float64_sum(*column)).abs() <= compose_error(*column)).all()
        for i in range(vectors):
            bound = dot_error(torch.ones_like(base[b]), deltas[i][b])
            assert abs(coef.grad[i, b].double() - deltas[i][b].double().sum()) <= bound


@on_each_backend
@pytest.mark.parametrize("shape", [(0,), (0, 2)])
def test_no_task_vectors(backend: str, shape: tuple[int, ...]) -> None:
    base = [torch.randn(5), torch.tensor(2.0)]
    coef = torch.zeros(shape, requires_grad=True)
    composed = ak.compose(base, [], coef, backend=backend)
    assert all(same_bits(result, block) for result, block in zip(composed, base, strict=True))
    assert all(r.data_ptr() != block.data_ptr() for r, block in zip(composed, base, strict=True))
    (grad,) = torch.autograd.grad(composed[0].sum(), coef)
    assert grad.shape == coef.shape


@pytest.mark.parametrize(("count", "shape"), [(0, (0,)), (0, (0, 0)), (3, (3,)), (3, (3, 0))])
def test_no_blocks(count: int, shape: tuple[int, ...]) -> None:
    assert ak.compose([], [[]] * count, torch.zeros(shape)) == ()


@on_each_backend
def test_zero_coefficients_give_the_base(backend: str) -> None:
    for dtype in DTYPES:
        base = [torch.randn(TILE + 3).to(dtype), torch.tensor(-1.5, dtype=dtype)]
        deltas: list[list[Tensor | None]] = [[torch.randn(TILE + 3), None]] * 2
        composed = ak.compose(base, deltas, torch.zeros(2, 2), backend=backend)
        assert all(same_bits(result, block) for result, block in zip(composed, base, strict=True))


@on_each_backend
def test_rounds_once(backend: str) -> None:
    """bfloat16 steps at 256 are 2: sums of 1 vanish if rounded one by one, 1 + 1 at once do not."""
    base = [torch.full((33,), 256.0, dtype=torch.bfloat16)]
    deltas = [[torch.ones(33, dtype=torch.bfloat16)] for _ in range(2)]
    (composed,) = ak.compose(base, deltas, torch.ones(2), backend=backend)
    assert torch.equal(composed, torch.full((33,), 258.0, dtype=torch.bfloat16))
    # A coefficient that bfloat16 does not hold.
    (composed,) = ak.compose(
        [torch.zeros(3, dtype=torch.bfloat16)],
        [[torch.full((3,), 4096.0, dtype=torch.bfloat16)]],
        torch.tensor([1 + 2**-12]),
        backend=backend,
    )
    (difference,) = ak.compose(
        [torch.full((3,), -4096.0)],
        [[torch.full((3,), 4096.0, dtype=torch.bfloat16)]],
        torch.tensor([1 + 2**-12]),
        backend=backend,
    )
    assert composed.tolist() == [4096.0] * 3
    assert difference.tolist() == [1.0] * 3


@on_each_backend
def test_infinities_and_nans_stay_in_their_block_and_reach_the_result(backend: str) -> None:
    base = [torch.zeros(20), torch.zeros(20)]
    delta = torch.zeros(20)
    delta[3], delta[19] = torch.inf, torch.nan
    coef = torch.ones(1, 2, requires_grad=True)
    bad, good = ak.compose(base, [[delta, torch.ones(20)]], coef, backend=backend)
    assert bad[3] == torch.inf
    assert bad[19].isnan()
    assert bad[[0, 1, 2, *range(4, 19)]].eq(0).all()
    (bad.sum() + good.sum()).backward()
    assert coef.grad is not None
    assert coef.grad[0, 0].isnan()
    assert coef.grad[0, 1] == 20


@on_each_backend
def test_one_tensor_may_come_several_times(backend: str) -> None:
    shared = torch.randn(TILE + 1, requires_grad=True)
    coef = torch.tensor([[0.5, -2.0], [0.25, 1.0]])
    composed = ak.compose([shared] * 2, [[shared, None], [shared, shared]], coef, backend=backend)
    assert torch.allclose(composed[0], 1.75 * shared)
    assert torch.allclose(composed[1], 2 * shared)
    (composed[0] + 3 * composed[1]).sum().backward()
    assert shared.grad is not None
    assert torch.allclose(shared.grad, torch.tensor(1.75 + 3 * 2.0).expand(TILE + 1))


# -- float64 and derivatives of any order ----------------------------------------------------------


def double_arguments() -> tuple[list[Tensor], Tensor]:
    """Two blocks and two vectors, flat for gradcheck, and a block-wise coef."""
    tensors = [
        torch.randn(shape, dtype=torch.float64) for shape in ((3, 2), (), (3, 2), (), (3, 2))
    ]
    return [tensor.requires_grad_() for tensor in tensors], torch.randn(
        2, 2, dtype=torch.float64, requires_grad=True
    )


@pytest.mark.parametrize("isotropic", [False, True])
def test_gradcheck_of_the_list_form(isotropic: bool) -> None:
    tensors, coef = double_arguments()

    def function(coef: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        first, second, *deltas = tensors
        return ak.compose([first, second], [deltas[:2], [deltas[2], None]], coef, backend="torch")

    start = coef[:, 0].detach().clone().requires_grad_() if isotropic else coef
    assert gradcheck(function, (start, *tensors))
    assert gradgradcheck(function, (start, *tensors))


@pytest.mark.parametrize("groups", [0, 2])
def test_gradcheck_of_the_bank_form(groups: int) -> None:
    layout = Layout.from_shapes([(2, 3), (), (5,)])
    base = torch.randn(layout.numel, dtype=torch.float64, requires_grad=True)
    deltas = torch.randn(2 * layout.numel, dtype=torch.float64)
    shape = (2, 3, groups) if groups else (2, 3)
    coef = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    key = tile_keys("abc", layout, 0) if groups else None

    def function(coef: Tensor, base: Tensor) -> Any:
        return differentiable(base, (deltas, None, 0), coef, layout, "torch", key)

    assert gradcheck(function, (coef, base))
    assert gradgradcheck(function, (coef, base))


def test_float64_is_computed_in_float64() -> None:
    base, delta = torch.ones(3), torch.full((3,), 1e-12, dtype=torch.float64)
    # 1 + 1e-12 - 1 is 0 in float32.
    (composed,) = ak.compose([base.double()], [[delta]], torch.ones(1))
    assert torch.equal(composed, torch.full((3,), 1 + 1e-12, dtype=torch.float64))
    (composed,) = ak.compose([base], [[delta], [delta * 1e6]], torch.ones(2))
    assert composed.dtype == torch.float32
    assert torch.equal(composed, torch.full((3,), 1 + 1e-6 + 1e-12, dtype=torch.float64).float())


def simple(size: int = TILE + 5) -> tuple[list[Tensor], list[list[Tensor]], Tensor]:
    base = [torch.randn(size), torch.randn(3, 5), torch.tensor(0.5)]
    deltas = [[torch.randn_like(block) for block in base] for _ in range(2)]
    return base, deltas, torch.randn(2, 3)


@on_each_backend
def test_double_backward_against_the_hessian_in_float64(backend: str) -> None:
    base, deltas, coef = simple(37)

    def loss(coef: Tensor, compose: Callable[..., Any]) -> Tensor:
        return sum((block**3).sum() for block in compose(coef))  # type: ignore[return-value]

    def composed(coef: Tensor) -> tuple[Tensor, ...]:
        return ak.compose(base, deltas, coef, backend=backend)

    def oracle(coef: Tensor) -> list[Tensor]:
        return [
            float64_sum(block, [vector[b] for vector in deltas], coef[:, b])
            for b, block in enumerate(base)
        ]

    def magnitudes(coef: Tensor) -> list[Tensor]:
        return [
            float64_sum(block.abs(), [vector[b].abs() for vector in deltas], coef[:, b])
            for b, block in enumerate(base)
        ]

    hessian = torch.autograd.functional.hessian
    error = hessian(lambda c: loss(c, composed), coef) - hessian(
        lambda c: loss(c, oracle), coef.double()
    )
    # Terms 6 * theta * tau_i * tau_j, theta by three roundings of its terms' magnitudes, four
    # products, a sum of up to 37 in any order: 44 times eps/2 of it with all signs positive.
    bound = 22 * EPS * hessian(lambda c: loss(c, magnitudes), coef.double().abs())
    assert (error.abs() <= 1.01 * bound).all()
    assert (bound[:, range(3), :, range(3)] > 0).all()


@on_each_backend
def test_third_derivative(backend: str) -> None:
    coef = torch.tensor([[0.5]], requires_grad=True)
    (composed,) = ak.compose([torch.ones(3)], [[torch.full((3,), 2.0)]], coef, backend=backend)
    value = (composed**3).sum()
    # 3 (1 + 2c)^3 -> 18 (1 + 2c)^2 -> 72 (1 + 2c) -> 144
    for expected in (72.0, 144.0, 144.0):
        (value,) = torch.autograd.grad(value.sum(), coef, create_graph=True)
        assert value.item() == expected


# -- torch.compile, torch.func and contexts --------------------------------------------------------


def bank_arguments(base: list[Tensor], deltas: list[list[Tensor]]) -> tuple[Tensor, Tensor, Layout]:
    members = {str(b): block for b, block in enumerate(base)}
    vectors = {
        str(i): ak.TaskVector(dict(zip(members, vector, strict=True)))
        for i, vector in enumerate(deltas)
    }
    (segment,) = ak.TaskVectorBank.from_task_vectors(members, vectors, codec="fp32").segments
    return segment.base, segment.deltas, segment.layout


def forms(backend: str) -> Iterator[tuple[str, Callable[[Tensor], Any], Tensor]]:
    """List and bank form as functions of coef that return the same blocks."""
    base, deltas, coef = simple(40 if backend in INTERPRETED else TILE + 5)
    flat_base, flat_deltas, layout = bank_arguments(base, deltas)
    yield "list", lambda coef: ak.compose(base, deltas, coef, backend=backend), coef
    yield (
        "bank",
        lambda coef: layout.split(
            differentiable(flat_base, (flat_deltas, None, 0), coef, layout, backend)
        ),
        coef,
    )


def value_and_gradient(
    function: Callable[[Tensor], Any], coef: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    coef = coef.detach().clone().requires_grad_()
    composed = function(coef)
    cotangents = [torch.ones_like(block) * (b + 1) for b, block in enumerate(composed)]
    (gradient,) = torch.autograd.grad(composed, coef, cotangents)
    return composed, gradient


def assert_same_results(function: Callable[[Tensor], Any], other: Any, coef: Tensor) -> None:
    (composed, gradient), (expected, expected_gradient) = (
        value_and_gradient(each, coef) for each in (other, function)
    )
    assert len(composed) == len(expected)
    assert all(same_bits(*pair) for pair in zip(composed, expected, strict=True))
    assert same_bits(gradient, expected_gradient)
    assert gradient.abs().min() > 0


@on_each_backend
def test_compile(backend: str) -> None:
    for _, function, coef in forms(backend):
        for shape in (coef, coef[:, 0].contiguous()):
            torch._dynamo.reset()
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            assert_same_results(function, compiled, shape)
            assert_same_results(function, compiled, shape + 1)


def test_compile_by_inductor() -> None:
    """Once: it treats every backend's operators alike."""
    for _, function, coef in forms("torch"):
        torch._dynamo.reset()
        assert_same_results(function, torch.compile(function, fullgraph=True), coef)


def test_compile_with_gradients_in_base_and_deltas() -> None:
    torch._dynamo.reset()
    base, deltas, coef = simple(40)
    leaves = [*base, *itertools.chain(*deltas), coef]

    def function(*leaves: Tensor) -> Tensor:
        *tensors, coef = leaves
        composed = ak.compose(tensors[:3], [tensors[3:6], tensors[6:9]], coef, backend="torch")
        return sum((block * block).sum() for block in composed)  # type: ignore[return-value]

    expected = torch.func.grad(function, argnums=tuple(range(10)))(*leaves)
    for leaf in leaves:
        leaf.requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(same_bits(*pair) for pair in zip(gradients, expected, strict=True))


@on_each_backend
def test_func_grad_and_jacrev(backend: str) -> None:
    for form, function, coef in forms(backend):
        gradient = torch.func.grad(lambda c, f=function: sum(block.sum() for block in f(c)))(coef)
        leaf = coef.clone().requires_grad_()
        sum(block.sum() for block in function(leaf)).backward()
        assert leaf.grad is not None
        assert same_bits(gradient, leaf.grad), form

        jacobian = torch.func.jacrev(lambda c, f=function: f(c)[1])(coef)
        # Every entry is one product with 1 among zeros: exact.
        eye = torch.zeros(3, 5, 2, 3)
        zero, one = coef.new_zeros(2, 3), function(coef.new_zeros(2, 3))[1]
        assert jacobian.shape == eye.shape
        assert jacobian[..., [0, 2]].eq(0).all(), form
        for i in range(2):
            unit = zero.clone()
            unit[i, 1] = 1.0
            # theta0 + delta - theta0 rounds twice.
            error = (jacobian[..., i, 1] - (function(unit)[1] - one)).abs()
            assert (error <= 4 * EPS * (one.abs() + jacobian[..., i, 1].abs())).all(), form


@on_each_backend
def test_jacobian_in_coef_is_the_deltas_bit_for_bit(backend: str) -> None:
    deltas = [[torch.randn(4, 3), torch.randn(2)] for _ in range(2)]
    base = [torch.randn(4, 3), torch.randn(2)]
    jacobian = torch.func.jacrev(lambda c: ak.compose(base, deltas, c, backend=backend)[0])(
        torch.randn(2, 2)
    )
    for i in range(2):
        assert torch.equal(jacobian[:, :, i, 0], deltas[i][0])
        assert jacobian[:, :, i, 1].eq(0).all()


@on_each_backend
@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap_over_coef(backend: str, in_dim: int) -> None:
    for form, function, coef in forms(backend):
        batch = torch.stack([coef, -coef, 2 * coef], dim=in_dim)
        samples = batch.unbind(in_dim)
        together = torch.func.vmap(function, in_dims=in_dim)(batch)
        for b, blocks in enumerate(together):
            expected = torch.stack([function(sample)[b] for sample in samples])
            assert same_bits(blocks, expected), form

        def loss(coef: Tensor, function: Callable[[Tensor], Any] = function) -> Tensor:
            return sum((block * block).sum() for block in function(coef))  # type: ignore[return-value]

        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=in_dim)(batch)
        # The losses' own gradients round alike: vmap changes no operation, only its batch.
        expected = torch.stack([torch.func.grad(loss)(sample) for sample in samples])
        assert torch.allclose(gradients, expected, rtol=1e-5, atol=1e-4), form
        assert not torch.allclose(gradients[0], gradients[1], rtol=1e-2)


def test_per_sample_gradients_of_one_coef() -> None:
    base, deltas, coef = (
        [torch.randn(2, 3)],
        [[torch.randn(2, 3)] for _ in range(2)],
        torch.randn(2),
    )
    inputs = torch.randn(5, 3)

    def loss(coef: Tensor, x: Tensor) -> Tensor:
        return (ak.compose(base, deltas, coef)[0] @ x).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(coef, inputs)
    expected = torch.stack([torch.func.grad(loss)(coef, x) for x in inputs])
    assert torch.allclose(gradients, expected, rtol=1e-5, atol=1e-5)


def test_vmap_of_tensors_other_than_coef() -> None:
    base, delta = torch.randn(4, 3), torch.randn(4, 3)

    def function(base: Tensor, delta: Tensor) -> Tensor:
        return ak.compose([base], [[delta]], torch.tensor([0.5]))[0]

    assert torch.equal(torch.func.vmap(function)(base, delta), function(base, delta))


@on_each_backend
def test_forward_mode_raises_and_never_gives_zeros(backend: str) -> None:
    for form, function, coef in forms(backend):
        with pytest.raises(NotImplementedError):
            torch.func.jvp(function, (coef,), (torch.ones_like(coef),))
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises(NotImplementedError),
        ):
            function(torch.autograd.forward_ad.make_dual(coef, torch.ones_like(coef)))
        # The same on the way back: forward over reverse.
        with pytest.raises(NotImplementedError):
            torch.func.jacfwd(
                torch.func.grad(lambda c, f=function: sum(block.square().sum() for block in f(c)))
            )(coef)
        assert form


@on_each_backend
def test_contexts_change_nothing(backend: str) -> None:
    for form, function, coef in forms(backend):
        expected, expected_gradient = value_and_gradient(function, coef)

        with torch.autocast("cpu", torch.bfloat16):
            composed, gradient = value_and_gradient(function, coef)
        assert all(same_bits(*pair) for pair in zip(composed, expected, strict=True)), form
        assert same_bits(gradient, expected_gradient)

        for context in (torch.inference_mode, torch.no_grad):
            with context():
                composed = function(coef.requires_grad_())
                assert not any(block.requires_grad for block in composed)
            assert all(same_bits(*pair) for pair in zip(composed, expected, strict=True)), form

        composed, gradient = value_and_gradient(
            lambda c, f=function: checkpoint(f, c, use_reentrant=False), coef
        )
        assert all(same_bits(*pair) for pair in zip(composed, expected, strict=True)), form
        assert same_bits(gradient, expected_gradient)


@on_each_backend
def test_opcheck(backend: str) -> None:
    resolve(backend, "cpu", False)
    namespace = getattr(torch.ops, ops.namespace(backend))
    # No arguments without storage: opcheck wraps each in a fresh tensor.
    base = [torch.randn(3, 5), torch.randn(17).bfloat16(), torch.tensor(1.5)]
    deltas = [torch.randn(3, 5), torch.randn(17).half(), torch.tensor(1.0)]
    deltas += [torch.randn(5, 3).t(), torch.empty(ops.ABSENT), torch.tensor(1.0).bfloat16()]
    coef = torch.randn(2, 3)
    arena, packed, layout = bank_arguments(*simple(40)[:2])
    stored = (arena, packed, None, 0, *layout.tables, None)
    for op, arguments in (
        (namespace.compose, (base, deltas, coef)),
        (namespace.coef_grad, (base, deltas, torch.float32)),
        (namespace.arena_compose, (*stored, coef)),
        (namespace.arena_coef_grad, (*stored, 2, 0, torch.float32)),
    ):
        torch.library.opcheck(op.default, arguments)


# -- the same bits ---------------------------------------------------------------------------------


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_same_bits_for_any_number_of_threads(backend: str) -> None:
    need(backend)
    # More than PyTorch's grain of 32768 elements per thread, and no multiple of anything.
    base = [torch.randn(400_003), torch.randn(7), torch.randn(301, 503).bfloat16()]
    deltas = [[torch.randn(block.shape).bfloat16() for block in base] for _ in range(3)]
    arena, packed, layout = bank_arguments(
        [block.float() for block in base], [[d.float() for d in vector] for vector in deltas]
    )
    coef = torch.randn(3, 3)
    weights = [torch.randn(block.shape).to(block.dtype) for block in base]

    def results() -> list[Tensor]:
        leaf = coef.clone().requires_grad_()
        composed = ak.compose(base, deltas, leaf, backend=backend)
        gradient = torch.autograd.grad(composed, leaf, weights)
        flat = differentiable(arena, (packed, None, 0), leaf, layout, backend)
        bank_gradient = torch.autograd.grad(flat, leaf, torch.sin(arena))
        return [*composed, *gradient, flat, *bank_gradient]

    expected = results()
    for count in (1, 2, 3):
        with threads(count):
            for _ in range(2):
                again = results()
                assert all(same_bits(*pair) for pair in zip(again, expected, strict=True)), count


@on_each_backend
def test_same_bits_on_every_call(backend: str) -> None:
    for _, function, coef in forms(backend):
        assert_same_results(function, function, coef)


@on_each_backend
def test_list_and_bank_form_agree(backend: str) -> None:
    (_, listed, coef), (_, banked, _) = forms(backend)
    pairs = zip(listed(coef), banked(coef), strict=True)
    assert all(same_bits(*pair) for pair in pairs)


def test_auto_serves_cpu_tensors_like_the_reference() -> None:
    base, deltas, coef = simple()
    composed = ak.compose(base, deltas, coef)
    expected = reference.compose(base, list(itertools.chain(*deltas)), coef)
    assert all(same_bits(*pair) for pair in zip(composed, expected, strict=True))


# -- nothing is kept alive -------------------------------------------------------------------------


@on_each_backend
def test_no_copy_of_a_delta_is_saved(backend: str) -> None:
    base = [torch.randn(100, 100), torch.randn(5000)]
    deltas = [
        [torch.randn(100, 100).t(), torch.randn(10_000)[::2]],
        [torch.randn(100, 100).bfloat16(), torch.randn(5000)],
    ]
    owned = {delta.untyped_storage().data_ptr() for vector in deltas for delta in vector}
    coef = torch.randn(2, 2, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        composed = ak.compose(base, deltas, coef, backend=backend)
    assert {t.untyped_storage().data_ptr() for t in saved if t.numel() > coef.numel()} == owned
    del saved[:]
    torch.autograd.backward(composed, [torch.ones_like(block) for block in base])
    references = [weakref.ref(tensor) for tensor in (*base, *itertools.chain(*deltas), *composed)]
    del base, deltas, composed
    gc.collect()
    assert [ref() for ref in references] == [None] * len(references)


@on_each_backend
def test_a_changed_tensor_is_read_anew(backend: str) -> None:
    """A cached table of pointers must not outlive the tensors that it points to."""
    coef = torch.ones(1, 1)
    for step in range(3):
        base, delta = torch.full((50,), float(step)), torch.full((50,), 10.0 * step)
        (composed,) = ak.compose([base], [[delta]], coef, backend=backend)
        assert torch.equal(composed, torch.full((50,), 11.0 * step))
        delta.fill_(7.0)
        (composed,) = ak.compose([base], [[delta]], coef, backend=backend)
        assert torch.equal(composed, torch.full((50,), 7.0 + step))
        delta.data = torch.full((50,), -1.0)
        (composed,) = ak.compose([base], [[delta]], coef, backend=backend)
        assert torch.equal(composed, torch.full((50,), step - 1.0))


def test_changing_a_delta_before_the_backward_is_noticed() -> None:
    base, delta, coef = torch.ones(3), torch.ones(3), torch.ones(1, 1, requires_grad=True)
    (composed,) = ak.compose([base], [[delta]], coef)
    delta.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        composed.sum().backward()


# -- bad input -------------------------------------------------------------------------------------


class NoWork(TorchDispatchMode):
    """Inside, any tensor operation is a failure: bad input must be refused before any work."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} ran before the arguments were refused")


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


GOOD = ([tensor(2, 3), tensor(4)], [[tensor(2, 3), tensor(4)], [tensor(2, 3), None]], tensor(2, 2))


def changed(
    *, base: Any = None, deltas: Any = None, coef: Any = None, kwargs: Any = None
) -> tuple[Any, ...]:
    return (
        GOOD[0] if base is None else base,
        GOOD[1] if deltas is None else deltas,
        GOOD[2] if coef is None else coef,
        kwargs or {},
    )


def vector_with(block: Any) -> list[list[Any]]:
    """The good deltas, with `block` as block 1 of task vector 0."""
    return [[tensor(2, 3), block], [tensor(2, 3), None]]


BAD_INPUT = {
    "one block too few": (
        changed(deltas=[[tensor(2, 3), tensor(4)], [tensor(2, 3)]]),
        ValueError,
        ["task vector 1", "1 block", "expected 2"],
    ),
    "one block too many": (
        changed(deltas=[[tensor(2, 3), tensor(4), tensor(4)], [tensor(2, 3), None]]),
        ValueError,
        ["task vector 0", "3 blocks", "expected 2"],
    ),
    "no block at all": (changed(deltas=[[], []]), ValueError, ["task vector 0", "0 blocks"]),
    "blocks without base": (
        changed(base=[], coef=tensor(2, 0)),
        ValueError,
        ["task vector 0", "2 blocks", "expected 0"],
    ),
    "shape": (
        changed(deltas=vector_with(tensor(5))),
        ValueError,
        ["task vector 0", "block 1", "(5,)", "(4,)"],
    ),
    "shape with as many elements": (
        changed(deltas=[[tensor(3, 2), tensor(4)], [tensor(2, 3), None]]),
        ValueError,
        ["task vector 0", "block 0", "(3, 2)", "(2, 3)"],
    ),
    "shape that would broadcast": (
        changed(deltas=vector_with(tensor(1))),
        ValueError,
        ["task vector 0", "block 1", "(1,)", "(4,)"],
    ),
    "0-d for 1-d": (
        changed(deltas=vector_with(tensor())),
        ValueError,
        ["task vector 0", "block 1", "()", "(4,)"],
    ),
    "empty for full": (
        changed(deltas=vector_with(tensor(0))),
        ValueError,
        ["task vector 0", "block 1", "(0,)", "(4,)"],
    ),
    "integer delta": (
        changed(deltas=vector_with(tensor(4, dtype=torch.int64))),
        TypeError,
        ["task vector 0", "block 1", "torch.int64", "float32", "bfloat16", "float16"],
    ),
    "complex delta": (
        changed(deltas=vector_with(tensor(4, dtype=torch.complex64))),
        TypeError,
        ["task vector 0", "block 1", "torch.complex64"],
    ),
    "8-bit float delta": (
        changed(deltas=vector_with(tensor(4, dtype=torch.float8_e4m3fn))),
        TypeError,
        ["task vector 0", "block 1", "torch.float8_e4m3fn"],
    ),
    "integer base": (
        changed(base=[tensor(2, 3), tensor(4, dtype=torch.int32)]),
        TypeError,
        ["base block 1", "torch.int32", "float32"],
    ),
    "boolean base": (
        changed(base=[tensor(2, 3, dtype=torch.bool), tensor(4)]),
        TypeError,
        ["base block 0", "torch.bool"],
    ),
    "sparse delta": (
        changed(deltas=vector_with(torch.zeros(4).to_sparse())),
        TypeError,
        ["task vector 0", "block 1", "sparse", "dense"],
    ),
    "delta on another device": (
        changed(deltas=vector_with(tensor(4, device="meta"))),
        ValueError,
        ["task vector 0", "block 1", "meta", "cpu"],
    ),
    "base on two devices": (
        changed(base=[tensor(2, 3), tensor(4, device="meta")]),
        ValueError,
        ["base block 1", "meta", "cpu"],
    ),
    "a number as a delta": (
        changed(deltas=vector_with(1.5)),
        TypeError,
        ["task vector 0", "block 1", "float", "tensor"],
    ),
    "a list as a base block": (
        changed(base=[[1.0, 2.0], tensor(4)]),
        TypeError,
        ["base block 0", "list", "tensor"],
    ),
    "no base block": (changed(base=[None, tensor(4)]), TypeError, ["base block 0", "NoneType"]),
    "coef transposed": (
        changed(deltas=[*GOOD[1], GOOD[1][1]], coef=tensor(2, 3)),
        ValueError,
        ["coef", "(2, 3)", "(3, 2)", "(3,)", "3 task vectors", "2 blocks"],
    ),
    "coef for one vector too many": (
        changed(coef=tensor(3)),
        ValueError,
        ["coef", "(3,)", "(2, 2)", "(2,)"],
    ),
    "coef with one dimension too many": (
        changed(coef=tensor(2, 2, 1)),
        ValueError,
        ["coef", "(2, 2, 1)", "(2, 2)"],
    ),
    "coef 0-d": (changed(coef=tensor()), ValueError, ["coef", "()", "(2, 2)"]),
    "integer coef": (
        changed(coef=tensor(2, 2, dtype=torch.int64)),
        TypeError,
        ["coef", "torch.int64", "floating"],
    ),
    "complex coef": (
        changed(coef=tensor(2, 2, dtype=torch.complex64)),
        TypeError,
        ["coef", "torch.complex64", "floating"],
    ),
    "coef on another device": (
        changed(coef=tensor(2, 2, device="meta")),
        ValueError,
        ["coef", "meta", "cpu"],
    ),
    "coef as a list": (
        changed(coef=[[1.0, 1.0], [1.0, 1.0]]),
        TypeError,
        ["coef", "list", "tensor"],
    ),
    "unknown backend": (
        changed(kwargs={"backend": "fast"}),
        ValueError,
        ["'fast'", "'auto'", "'torch'", "'cpp'", "'triton'", "'cuda'"],
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_in_words_before_any_work(name: str) -> None:
    (base, deltas, coef, kwargs), exception, parts = BAD_INPUT[name]
    with NoWork(), pytest.raises(exception) as raised:
        ak.compose(base, deltas, coef, **kwargs)
    message = str(raised.value)
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message
    assert type(raised.value) is exception


def test_float64_is_refused_by_backends_that_lack_it() -> None:
    need("cpp")
    base, delta = [torch.zeros(3)], [[torch.zeros(3, dtype=torch.float64)]]
    coef = torch.zeros(1)
    with NoWork(), pytest.raises(ValueError, match=r"'cpp' does not compute in float64.*'torch'"):
        ak.compose(base, delta, coef, backend="cpp")


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_an_empty_delta_of_another_shape_is_not_an_absent_one(backend: str) -> None:
    base = [torch.zeros(2, 3)]
    with pytest.raises(
        ValueError, match=r"task vector 0, block 0 has shape \(0,\), expected \(2, 3\)"
    ):
        ak.compose(base, [[torch.empty(0)]], torch.zeros(1, 1), backend=backend)


@pytest.mark.parametrize("backend", ["auto", "torch", "cpp"])
@pytest.mark.parametrize("place", ["base", "delta", "coef"])
def test_a_meta_tensor_among_others_is_refused(backend: str, place: str) -> None:
    """Offloaded checkpoints leave them behind; the dispatcher would take a fake for a kernel."""
    if backend == "cpp":
        need(backend)
    base, delta, coef = [torch.ones(4, 4), torch.ones(3)], torch.zeros(4, 4), torch.ones(1, 2)
    if place == "base":
        base[1] = base[1].to("meta")
    elif place == "delta":
        delta = delta.to("meta")
    else:
        coef = coef.to("meta")
    with pytest.raises(ValueError, match="meta"):
        ak.compose(base, [[delta, torch.zeros(3)]], coef, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_operators_refuse_a_meta_tensor_among_others(backend: str) -> None:
    need(backend)
    resolve(backend, "cpu", False)
    operators = getattr(torch.ops, ops.namespace(backend))
    layout = Layout.from_shapes([(5,)])
    wide = torch.ones(layout.numel)
    fields = [wide, wide, None, 0, *layout.tables, None]
    for index in (0, 1, 4, 7):
        mixed = [field.to("meta") if k == index else field for k, field in enumerate(fields)]
        with pytest.raises(RuntimeError, match="two devices"):
            operators.arena_compose(*mixed, torch.ones(1, 1))
        with pytest.raises(RuntimeError, match="two devices"):
            operators.arena_coef_grad(*mixed, 1, 0, torch.float32)
    with pytest.raises(RuntimeError, match="two devices"):
        operators.coef_grad([wide], [wide.to("meta")], torch.float32)


@pytest.mark.parametrize("base", [{"w": torch.ones(2)}, torch.ones(2, 2)])
def test_a_base_that_is_no_list_says_so(base: Any) -> None:
    with pytest.raises(TypeError, match="expected a list of one tensor per block"):
        ak.compose(base, [], torch.ones(0, 2))
