import hashlib

import numpy as np
import pytest
import torch

from sr4ir_dist.keyed import uniform

KEYS = torch.arange(20000)
GOLDEN = [
    [4752829688333138, 1171479234775266, 3696381432535728],
    [2479433184854173, 1221693318841928, 2846526176956612],
    [4653338958802658, 4676045816564027, 2565406114688600],
]


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return abs(float(np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1]))


def test_the_numbers_are_these_for_ever():
    # Golden: another value here would change every augmentation of every run.
    drawn = uniform(7, 3, torch.tensor([0, 1, 2**40]), 3, "crop")
    assert (drawn * 2**53).to(torch.int64).tolist() == GOLDEN


def splitmix(seed: int, epoch: int, key: int, index: int, stream: str) -> int:
    """The same hash in Python's unbounded integers, modulo 2**64."""
    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    text = f"{seed}/{epoch}/{stream}".encode()
    base = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    stride = 0x9E3779B97F4A7C15
    state = mix(mix(key * stride & mask) ^ base)
    return mix((state + (index + 1) * stride) & mask) >> 11


def test_equals_unsigned_arithmetic():
    drawn = (uniform(-5, 2, torch.arange(50), 4, "a") * 2**53).to(torch.int64)
    expected = [[splitmix(-5, 2, key, i, "a") for i in range(4)] for key in range(50)]
    assert drawn.tolist() == expected


def test_shape_type_range():
    drawn = uniform(0, 1, KEYS, 5, "crop")
    assert drawn.shape == (20000, 5)
    assert drawn.dtype == torch.float64
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert uniform(0, 1, KEYS[:0], 5, "crop").shape == (0, 5)
    assert uniform(0, 1, KEYS[:3], 0, "crop").shape == (3, 0)


def test_uniform_in_every_column():
    drawn = uniform(11, 1, KEYS, 6, "cqmix").numpy()
    for column in drawn.T:
        counts, _ = np.histogram(column, bins=50, range=(0, 1))
        chi2 = ((counts - 400) ** 2 / 400).sum()
        assert 20 < chi2 < 95  # 49 degrees of freedom: p within 1e-4 of either end
    assert len(np.unique(drawn)) == drawn.size


@pytest.mark.parametrize(
    ("seed", "epoch", "stream"), [(1, 1, "crop"), (0, 2, "crop"), (0, 1, "flip"), (1, 0, "crop")]
)
def test_other_seeds_epochs_and_streams_are_unrelated(seed, epoch, stream):
    a, b = uniform(0, 1, KEYS, 4, "crop"), uniform(seed, epoch, KEYS, 4, stream)
    assert not (a == b).any()
    assert correlation(a, b) < 0.02  # 80,000 pairs: 5.6 standard deviations


def test_neighbouring_keys_and_numbers_are_unrelated():
    drawn = uniform(3, 1, KEYS, 4, "crop")
    assert correlation(drawn[1:], drawn[:-1]) < 0.02
    assert correlation(drawn[1:, :-1], drawn[:-1, 1:]) < 0.02
    assert correlation(drawn[:, 1:], drawn[:, :-1]) < 0.02
    bits = (drawn < 0.5).to(torch.float64)
    assert correlation(bits[1:], bits[:-1]) < 0.02


def test_a_number_depends_on_its_key_alone():
    whole = uniform(5, 9, KEYS, 6, "crop")
    chosen = torch.randperm(20000, generator=torch.Generator().manual_seed(0))[:100]
    assert torch.equal(uniform(5, 9, KEYS[chosen], 6, "crop"), whole[chosen])
    assert torch.equal(uniform(5, 9, KEYS, 2, "crop"), whole[:, :2])


@pytest.mark.gpu
def test_same_bits_on_the_gpu():
    there = uniform(5, 9, KEYS.cuda(), 6, "crop")
    assert there.is_cuda
    assert torch.equal(there.cpu(), uniform(5, 9, KEYS, 6, "crop"))


@pytest.mark.parametrize("keys", [torch.zeros(3), torch.zeros(3, 1, dtype=torch.int64)])
def test_refuses_other_keys(keys):
    with pytest.raises(ValueError, match="keys must be a 1-D int64 tensor"):
        uniform(0, 1, keys, 2, "crop")


def test_refuses_a_negative_count():
    with pytest.raises(ValueError, match="count must be 0 or more, got -1"):
        uniform(0, 1, KEYS, -1, "crop")
