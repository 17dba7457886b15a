"""Parity runs on one thread, as the tolerances were measured.

With more threads PyTorch sums in another order; in a random network one pixel at probability
0.5 can then change sides, and a small mask's mean probability moves by more than rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
