"""Buckets made before their transfer: order, equality, how many exist at once, and every way it can end."""

import threading
import time

import pytest
import torch

from megatron_jackpot.sync.prefetcher import BucketPrefetcher, FlatBucket

CPU = torch.device("cpu")


def tensors(number=12):
    generator = torch.Generator().manual_seed(0)
    made = [(f"t{i}", torch.randn(i % 3 + 1, 5, generator=generator)) for i in range(number)]
    return [*made, ("half", torch.randn(3, generator=generator).bfloat16())]


def unpacked(bucket: FlatBucket) -> dict[str, torch.Tensor]:
    found, start = {}, 0
    for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        dtype = getattr(torch, dtype)
        size = torch.Size(shape).numel() * dtype.itemsize
        found[name] = bucket.flat[start : start + size].view(dtype).view(shape)
        start += size
    assert start == bucket.flat.numel()
    return found


def test_every_tensor_arrives_once_in_order_and_bit_for_bit():
    named = tensors()
    with BucketPrefetcher(named, 100, CPU, 10) as made:
        received = [unpacked(bucket) for bucket in made]
    assert len(received) > 4
    assert [name for bucket in received for name in bucket] == [name for name, _ in named]
    together = {name: tensor for bucket in received for name, tensor in bucket.items()}
    assert all(
        torch.equal(together[name], tensor) and together[name].dtype == tensor.dtype for name, tensor in named
    )


def test_the_next_buckets_are_made_while_one_travels_and_then_no_more():
    read = []

    def source():
        for name, tensor in tensors(20)[:-1]:
            read.append(name)
            yield name, tensor

    with BucketPrefetcher(source(), 1, CPU, 10) as made:
        for number, bucket in enumerate(made):
            assert bucket.names == [f"t{number}"]
            # This one travels, one waits, one is made; that it is full shows in the tensor after it.
            wanted, deadline = min(number + 4, 20), time.monotonic() + 60
            while len(read) < wanted and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.01)
            assert len(read) == wanted


def test_an_error_of_the_export_is_raised_where_the_buckets_are_taken():
    def source():
        yield "a", torch.zeros(2)
        raise KeyError("no such layer")

    with pytest.raises(KeyError, match="no such layer"):
        with BucketPrefetcher(source(), 1, CPU, 10) as made:
            list(made)


def test_whoever_gives_up_leaves_an_export_that_was_read_to_its_end():
    """The other ranks are in the same collectives."""
    read = []

    def source():
        for pair in tensors():
            read.append(pair[0])
            yield pair

    with pytest.raises(ZeroDivisionError):
        with BucketPrefetcher(source(), 1, CPU, 10) as made:
            for _ in made:
                raise ZeroDivisionError
    assert len(read) == len(tensors())


def test_an_export_that_hangs_is_named_at_the_time_limit():
    hold = threading.Event()

    def source():
        hold.wait(60)
        yield "a", torch.zeros(1)

    with pytest.raises(TimeoutError, match="Waited 0.2 s for the next bucket of weights"):
        with BucketPrefetcher(source(), 1, CPU, 0.2) as made:
            list(made)
    # The export still hangs: nobody waited for its end.
    assert not hold.is_set() and made._thread.is_alive()
    hold.set()
