"""Randomness by key: a number is a function of what it is for, never of what was drawn before.

A generator's state depends on how many draws came before it, hence on the number of ranks, on
the batch and on where a run resumed. Here every number is hashed from (stream, seed, epoch,
sample, index), so augmentation and CQMix repeat exactly on any number of ranks, after any resume
and on any device.
"""

import hashlib

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


# Increment and multipliers of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
# number generators", OOPSLA 2014), as the signed numbers that torch's int64 can hold.
_STRIDE = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shift_xor(value: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask clears the copies of the sign.
    return value ^ ((value >> bits) & ((1 << (64 - bits)) - 1))


def _mix(value: Tensor) -> Tensor:
    value = _shift_xor(value, 30) * _FIRST
    value = _shift_xor(value, 27) * _SECOND
    return _shift_xor(value, 31)


def uniform(seed: int, epoch: int, keys: Tensor, count: int, stream: str) -> Tensor:
    """Uniform numbers that depend on nothing but their key.

    Args:
        seed: the run's seed, any integer.
        epoch: the epoch, any integer.
        keys: int64 tensor N, one key a sample (its row number in the split).
        count: how many numbers each sample gets. A sample's first numbers do not depend on it.
        stream: what the numbers are for, such as "augment" or "cqmix"; streams are independent.

    Returns:
        float64 tensor N,count with values in [0, 1) on the grid of 2**-53, on keys.device; the
        same bits on every device.

    Raises:
        ValueError: keys is not a one-dimensional int64 tensor, or count is negative.
    """
    if keys.dtype != torch.int64 or keys.dim() != 1:
        shape = tuple(keys.shape)
        raise ValueError(f"keys must be a 1-D int64 tensor, got {keys.dtype} of shape {shape}")
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    digest = hashlib.blake2b(f"{int(seed)}/{int(epoch)}/{stream}".encode(), digest_size=8).digest()
    base = int.from_bytes(digest, "little", signed=True)
    # Two rounds part neighbouring keys before the index is added, so that the sequences of two
    # samples are not shifted copies of each other.
    state = _mix(_mix(keys * _STRIDE) ^ base)
    index = torch.arange(1, count + 1, device=keys.device) * _STRIDE
    bits = _mix(state[:, None] + index[None, :])
    return ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53
