"""Randomness as a function of what it is for, so that an interrupted run can be continued exactly.

Nothing here depends on what was drawn before: an image's augmentation is seeded by (seed, epoch, place in the epoch),
an iteration's drop path and mixing by (seed, iteration, rank). Neither the number of loader workers nor the point at
which a run was resumed changes a bit.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from integers and words; different parts give unrelated seeds, on every platform the same."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch, GPUs included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 -- timm's transforms and Mixup draw from the global generator
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the CPU generators of Python, NumPy and PyTorch inside the block and restores them behind it."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for the GPUs as well
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
