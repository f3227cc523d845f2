import torch

from atlas_kernels.models.live_memory import PeakMemory


def test_peak_memory_counts_storages_once_and_only_while_alive() -> None:
    outside = torch.ones(1000)
    with PeakMemory() as memory:
        view = outside[10:]
        assert (memory.live, memory.peak) == (0, 0)
        a = view + 1
        b = a.view(990, 1)
        assert memory.live == 990 * 4
        del a
        assert memory.live == 990 * 4
        b.add_(1)
        c = b.double()
        assert memory.live == memory.peak == 990 * 12
        del b, c
        assert memory.live == 0
        assert memory.peak == 990 * 12


def test_peak_memory_sees_the_backward_pass() -> None:
    weight = torch.ones(256, 256, requires_grad=True)
    with PeakMemory() as memory:
        weight.exp().sum().backward()
    # exp's result, the incoming gradient and their product.
    assert memory.peak >= 2 * weight.nbytes
    assert memory.live == weight.nbytes
