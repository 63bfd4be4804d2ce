"""Counter-based random numbers (`uniform`): a draw depends only on its stream and key, never on device or number of workers."""

import hashlib

import torch
from torch import Tensor


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # int64 shifts arithmetically; the mask makes it the logical shift that the mixer is defined with.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014): int64 of any shape to well-mixed int64 of that shape."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def stream(*names: int | str) -> int:
    """A 63-bit id of a named use, as `stream(seed, "views", epoch)`; different names give independent draws."""
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=8).digest(), "big") >> 1


def uniform(stream_id: int, keys: Tensor, count: int) -> Tensor:
    """`count` draws from [0, 1) for each key.

    Args:
        stream_id: from `stream`.
        keys: int64 (...,), one for each set of draws: a position in the epoch, or an image's hash.
        count: draws per key.

    Returns:
        float32 (..., count) on the keys' device, multiples of 2**-24: bit-equal on every device.
    """
    golden = _signed(0x9E3779B97F4A7C15)
    counters = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device)
    state = mix(mix(keys * golden + _signed(stream_id))[..., None] + counters * golden)
    return _shift_right(state, 40).to(torch.float32) * 2.0**-24


def text_keys(texts: tuple[str, ...]) -> Tensor:
    """int64 (len(texts),): a stable 63-bit hash of each text, such as an image id."""
    digests = [hashlib.blake2b(t.encode(), digest_size=8).digest() for t in texts]
    return torch.tensor([int.from_bytes(d, "big") >> 1 for d in digests], dtype=torch.int64)
