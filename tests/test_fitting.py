"""Batches that do not fit into memory: made smaller, by the same in all processes, and nothing else changes."""

import resource
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from peft_talora.fitting import find_batch_size

MIB = 2**20


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def little_memory():
    """500 MiB more than this process has: PyTorch's own allocator fails beyond."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 500 * MIB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_largest_divisor_that_fits_is_found(accelerator, little_memory):
    tried = []

    def attempt(size):
        tried.append(size)
        torch.rand(3)
        return torch.empty(size * 200 * MIB, dtype=torch.uint8)

    state = torch.get_rng_state()
    assert find_batch_size(accelerator, 12, attempt) == 2
    assert tried == [12, 6, 4, 3, 2]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="not even one image fits into memory: lower `image_size`"):
        find_batch_size(accelerator, 2, lambda size: attempt(4 * size))


def test_other_errors_are_not_taken_for_it(accelerator):
    with pytest.raises(RuntimeError, match="shapes"):
        find_batch_size(accelerator, 4, lambda size: (_ for _ in ()).throw(RuntimeError("shapes")))


def test_nothing_is_tried_with_deepspeed(accelerator, monkeypatch):
    monkeypatch.setitem(accelerator.state.__dict__, "distributed_type", DistributedType.DEEPSPEED)
    assert find_batch_size(accelerator, 4, lambda size: 1 / 0) == 4
