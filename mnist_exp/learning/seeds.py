"""Seeds. All randomness derives from (seed, phase, epoch, step), so that a resumed run equals one that never stopped."""

import hashlib

import torch


def derive_seed(*parts: object) -> int:
    """Return the 63-bit seed of `parts`, such as (seed, phase, epoch): equal parts, equal seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded with `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
