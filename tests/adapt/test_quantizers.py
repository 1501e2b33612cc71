import heapq
import math

import numpy as np
import pytest
import torch
from torch import nn

from stillroom.adapt import quantizers as q
from stillroom.core.errors import UserError
from stillroom.nets.build import build
from stillroom.nets.packed import Coded, load_packed, pack, save_packed, unpack


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(w: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Q(w), bucket by bucket in numpy."""
    flat, steps = w.reshape(-1), 2**bits - 1
    out = np.empty_like(flat)
    for start in range(0, len(flat), size or len(flat)):
        part = flat[start : start + (size or len(flat))]
        low, span = part.min(), np.ptp(part)
        span = 1.0 if span < 1e-10 else span
        out[start : start + len(part)] = np.round((part - low) / span * steps) / steps * span + low
    return out.reshape(w.shape)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("size", [0, 7, 16, 100])
def test_uniform_quantization_by_hand(bits, size):
    w = double(5, 7)
    value = q.uniform(w, bits, size)
    np.testing.assert_allclose(value.numpy(), by_hand(w.numpy(), bits, size), atol=1e-12)
    for row in q.buckets(value, size):
        assert len(row.unique()) <= 2**bits
    rows, flat = q.buckets(w, size), q.buckets(value, size)
    torch.testing.assert_close(flat.min(1).values, rows.min(1).values)  # extremes are levels
    torch.testing.assert_close(flat.max(1).values, rows.max(1).values)


def test_padding_repeats_the_last_element_and_moves_no_range():
    w = torch.tensor([5.0, 6.0, 7.0, 8.0, 9.0])  # zeros in the second bucket would stretch it down to 0
    assert q.buckets(w, 3).tolist() == [[5, 6, 7], [8, 9, 9]]
    assert q.scale(w, 3).beta.flatten().tolist() == [5, 8]
    assert q.buckets(w, 8).shape == (1, 5)  # a short tensor is not padded
    assert torch.equal(q.uniform(w, 1, 3), torch.tensor([5.0, 5.0, 7.0, 8.0, 9.0]))  # one half goes to even


def test_constant_tensors_survive():
    w = torch.full((4,), 0.3)
    assert torch.equal(q.uniform(w, 2), w)
    assert q.scale(w).alpha.item() == 1


def test_straight_through_is_the_identity_though_alpha_depends_on_w():
    w, g = double(40).requires_grad_(), double(40, seed=1)
    (gradient,) = torch.autograd.grad((q.uniform(w, 2, 16) * g).sum(), w)
    assert torch.equal(gradient, g)


def test_truncated_gradients_vanish_outside_of_one():
    w = torch.tensor([-3.0, -0.5, 0.2, 1.5], requires_grad=True)
    value = q.uniform(w, 1, backward="truncated")
    assert value.tolist() == [-1, -1, 1, 1]
    (gradient,) = torch.autograd.grad((value * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(), w)
    assert gradient.tolist() == [0, 2, 3, 0]


def test_exact_gradients_reach_the_extremes_of_each_bucket():
    w, g = double(40).requires_grad_(), double(40, seed=1)
    (gradient,) = torch.autograd.grad((q.uniform(w, 2, 16, backward="exact") * g).sum(), w)
    expected = g.clone()
    for start in (0, 16, 32):
        part, slope = w.detach()[start : start + 16], g[start : start + 16]
        v = (part - part.min()) / (part.max() - part.min())
        pull = (slope * (torch.round(v * 3) / 3 - v)).sum()
        expected[start + part.argmax()] += pull
        expected[start + part.argmin()] -= pull
    torch.testing.assert_close(gradient, expected)


def test_stochastic_rounding_is_unbiased_and_stays_on_neighbouring_levels():
    w = torch.tensor([0.0, 0.1, 0.45, 0.8, 1.0])
    torch.manual_seed(0)
    draws = torch.stack([q.uniform(w, 2, stochastic=True) for _ in range(4000)])
    torch.testing.assert_close(draws.mean(0), w, atol=0.01, rtol=0)
    assert ((draws - w).abs() <= 1 / 3 + 1e-6).all()


def test_learned_points_are_the_nearest_and_get_the_sum_of_alpha_g():
    w, g = double(3, 9), double(3, 9, seed=1)
    scaled = q.scale(w, 10)  # 27 elements: the last bucket is padded
    points = torch.tensor([-0.1, 0.3, 0.6, 1.2], dtype=torch.float64, requires_grad=True)  # they may lie outside of [0, 1]
    value = q.learned(scaled, points, w)
    (gradient,) = torch.autograd.grad((value * g).sum(), points)
    expected_value, expected = torch.empty(27, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for i, (x, slope) in enumerate(zip(w.flatten(), g.flatten())):
        alpha, beta = scaled.alpha[i // 10, 0], scaled.beta[i // 10, 0]
        j = ((x - beta) / alpha - points.detach()).abs().argmin()
        expected_value[i] = alpha * points.detach()[j] + beta
        expected[j] += alpha * slope
    torch.testing.assert_close(value.flatten(), expected_value)
    torch.testing.assert_close(gradient, expected)


def test_points_start_at_quantiles_of_the_scaled_weights():
    w = double(3, 9)
    scaled = q.scale(w, 10)
    v = scaled.v.flatten()[:27].numpy()  # without the padding
    np.testing.assert_allclose(q.initial_points(scaled, 5, "quantiles", w).numpy(), np.percentile(v, np.linspace(0, 100, 5)))
    assert q.initial_points(scaled, 3, "uniform", w).tolist() == [0, 0.5, 1]
    assert q.initial_points(q.scale(torch.ones(1)), 4, "quantiles", torch.ones(1)).tolist() == [0] * 4


def test_dealing_points_keeps_their_total():
    assert q.allocate([4, 4, 4], [10, 20, 30], [1.0, 1.0, 1.0]) == [4, 4, 4]
    assert q.allocate([4, 4], [10, 20], [3.0, 1.0]) == [5, 3]
    assert q.allocate([4, 4, 4], [10, 20, 30], [1.0, 0.0, 0.0]) == [8, 2, 2]
    assert q.allocate([4, 4, 4], [10, 20, 30], [1.5, 1.5, 1.0]) == [4, 4, 4]
    assert sum(q.allocate([16, 4, 16, 4], [100, 5, 300, 7], [0.7, 0.1, 0.13, 0.01])) == 40
    assert q.allocate([5, 5, 5], [30, 10, 20], [1.0, 1.0, 1.0]) == [5, 5, 5]
    assert q.allocate([4, 4], [10, 20], [0.0, 0.0]) == [4, 4]


def test_dealing_bits_takes_no_more_room_and_serves_the_steepest_first():
    def room(dealt: list[int], sizes: list[int]) -> int:
        return sum(size * bits + 32 * 2**bits for bits, size in zip(dealt, sizes, strict=True))

    sizes, norms = [1000, 4000, 10, 300], [0.7, 0.2, 0.1, 0.4]
    for bits in (1, 2, 4, 6):
        dealt = q.allocate_bits(bits, sizes, norms)
        assert room(dealt, sizes) <= room([bits] * 4, sizes)
        assert all(1 <= b <= 8 for b in dealt)
    assert q.allocate_bits(2, [100, 100], [1.0, 1.0]) == [2, 2]
    # Beyond one bit each there is room for 2 (1000 + 64) bits: the second bit of one leaves 1064, where its third costs 1000 + 128.
    assert q.allocate_bits(2, [1000, 1000], [1.0, 8.0]) == [2, 2]
    assert q.allocate_bits(3, [1000, 1000], [1.0, 64.0]) == [1, 4]
    assert q.allocate_bits(2, [100, 100], [0.0, 1.0], most=2) == [1, 2]
    # A bit is worth norm 2^-bits for its price, so half as much at each step and at each doubling of the tensor.
    assert q.allocate_bits(4, [10**6, 10**6], [1.0, 2.9]) == [4, 4]
    assert q.allocate_bits(4, [10**6, 2 * 10**6], [4.0, 1.0]) == [5, 3]


def huffman_tree(counts: list[int]) -> float:
    """Mean code length from explicit codes."""
    heap = [(count, i, {i: 0}) for i, count in enumerate(counts) if count]
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, i, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (a + b, i, {k: depth + 1 for k, depth in (left | right).items()}))
    return sum(counts[k] * depth for k, depth in heap[0][2].items()) / sum(counts)


@pytest.mark.parametrize("counts", [[5, 5, 5, 5], [90, 5, 3, 2], [1, 0, 0, 7], [3]])
def test_entropy_coded_bits(counts):
    assert q.entropy_coded_bits(counts) == pytest.approx(huffman_tree(counts))
    share = [c / sum(counts) for c in counts if c]
    assert -sum(s * math.log2(s) for s in share) <= q.entropy_coded_bits(counts) + 1e-12


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_pack_and_unpack(bits):
    codes = torch.randint(2**bits, (77,), generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == math.ceil(77 * bits / 8)
    assert torch.equal(unpack(packed, bits, 77), codes)
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))  # one long little-endian number
    assert bytes(packed.tolist()) == number.to_bytes(len(packed), "little")


def coded_net(bits: int = 2, bucket: int = 16) -> tuple[nn.Module, dict[str, Coded]]:
    torch.manual_seed(0)
    net = build("convnet-w4", classes=3, channels=1, size=8, mean=(0.5,), std=(0.25,))
    coded = {}
    for name, p in list(net.named_parameters())[1:]:  # the first one stays in full precision
        scaled = q.scale(p.detach(), bucket)
        coded[name] = Coded(q.codes(p, bits, bucket), torch.linspace(0, 1, 2**bits), scaled.alpha, scaled.beta, bucket)
        p.data.copy_(q.uniform(p.detach(), bits, bucket))
    net(torch.rand(4, 1, 8, 8))  # batch norm's buffers move
    return net, coded


def test_a_packed_file_gives_the_net_back(tmp_path):
    net, coded = coded_net()
    save_packed(net, coded, tmp_path / "x")
    twin = build(**net.spec)
    load_packed(twin, tmp_path / "x")
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], tensor)
    weights = sum(len(item.codes) for item in coded.values())
    rest = sum(t.numel() * t.element_size() for name, t in net.state_dict().items() if name not in coded)
    scales = sum(8 * len(item.alpha) + 4 * len(item.levels) for item in coded.values())
    assert (tmp_path / "x").stat().st_size < weights / 4 + rest + scales + len(coded) + 700


def test_packed_files_of_other_nets_and_damaged_ones_are_named(tmp_path):
    net, coded = coded_net()
    save_packed(net, coded, tmp_path / "x")
    for name in ("convnet-w8", "mlp-4"):
        with pytest.raises(UserError, match="another net's"):
            load_packed(build(**net.spec | {"name": name}), tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-40])
    with pytest.raises(UserError, match="damaged"):
        load_packed(net, tmp_path / "x")
    with pytest.raises(UserError, match="could not be read"):
        load_packed(net, tmp_path / "nothing")
