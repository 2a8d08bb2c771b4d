#!/usr/bin/env python3
"""Memory of packed attention depends on the number of tokens, not on the lengths of the sequences.

On the CPU the allocations that the profiler recorded are summed. On a GPU the caching allocator gives the requested
bytes. Both are the same in every run. The sizes of its blocks are not: they depend on what was freed before.
POSENC_LIBRARY names the library. Plain unittest: python3 tests/python/packed_memory_test.py [cpu | cuda]
"""

import sys
import unittest

from support import OnDevice, main

import torch

HEADS, HEAD_DIM = 2, 128
# Bound on the peak, divided by the peak of one padded sequence of as many tokens. On a GPU, where the host does not see
# the lengths, a batch of padded length L has room for as many sequences as may have that length: twice the tokens, and
# up to a quarter more. q, k, v, results and gradients also exist as batches, so a fused call holds 24 tensors of the
# size of q at its peak. A padded call holds 6: a ratio of 4.0.
MOST = {"cpu": 2.0, "cuda": 4.5}


def cuts(lengths):
    return [0] + torch.tensor(lengths).cumsum(0).tolist()


# Name, lengths of the sequences.
DISTRIBUTIONS = [
    ("one sequence", [128]),
    ("one long sequence and many of one token", [128] + [1] * 128),
    ("many of one token and one long sequence", [1] * 128 + [128]),
    ("one long sequence and many empty ones", [128] + [0] * 128),
    ("one long, many short and many empty ones", [128] + [3, 0] * 64),
    ("several of each length", [1, 2, 4, 8, 16, 32, 64, 128] * 4),
]


def host_peak(run):
    """Peak of the bytes that `run` holds on the host."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def device_peak(run):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    run()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


class PackedMemory(OnDevice):
    def peak(self, lengths, packed, dtype, k_heads=HEADS):
        """Peak bytes of a forward and a backward pass over sum(lengths) tokens."""
        tokens = sum(lengths)
        shapes = [(tokens, HEADS, HEAD_DIM), (tokens, k_heads, HEAD_DIM), (tokens, k_heads, HEAD_DIM)]
        q, k, v = (torch.ones(shape, dtype=dtype, device=self.device, requires_grad=True) for shape in shapes)
        slopes = torch.ones(HEADS, device=self.device, requires_grad=True)
        grad = torch.ones_like(q)
        kw = {"causal": True}
        if packed:
            kw["cu_seqlens_q"] = torch.tensor(cuts(lengths), device=self.device)
            kw["max_seqlen_q"] = max(lengths)

        def run():
            arguments = (q, k, v) if packed else [x.unsqueeze(0) for x in (q, k, v)]
            out, _ = torch.ops.posenc.alibi_attention(*arguments, slopes, **kw)
            torch.autograd.grad(out, (q, k, v, slopes), grad.view_as(out))

        # Backward passes in this thread: another thread may free the first run's gradients during the second run.
        with torch.autograd.set_multithreading_enabled(False):
            run()  # makes allocations that are kept
            return device_peak(run) if self.device == "cuda" else host_peak(run)

    def check(self, dtype, **kw):
        for name, lengths in DISTRIBUTIONS:
            with self.subTest(name):
                padded = self.peak(lengths, packed=False, dtype=dtype, **kw)
                packed = self.peak(lengths, packed=True, dtype=dtype, **kw)
                self.assertGreater(padded, sum(lengths) * HEADS * HEAD_DIM * dtype.itemsize)
                times = f"{packed / padded:.2f} times as much as padded"
                self.assertLessEqual(packed, MOST[self.device] * padded, times)

    def test_float32(self):
        self.check(torch.float32)

    def test_float16(self):
        self.check(torch.float16)

    def test_heads_that_share_keys(self):
        self.check(torch.bfloat16, k_heads=1)


class CpuTest(PackedMemory, unittest.TestCase):
    pass


class CudaTest(PackedMemory, unittest.TestCase):
    device = "cuda"


if __name__ == "__main__":
    sys.exit(main())
