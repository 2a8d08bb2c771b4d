#!/usr/bin/env python3
"""Operators of the ALiBi family under torch.compile where lengths and offsets grow from call to call.

POSENC_LIBRARY names the library. Plain unittest: python3 tests/python/alibi_test.py [cpu | cuda]
"""

import os
import sys
import unittest
import warnings

# Harmless, and said on import.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
import torch._dynamo.testing

ALL_SKIPPED = 77  # what ctest is told to take for "skipped"
STEPS = 20
HEADS = 3

torch.ops.load_library(os.environ["POSENC_LIBRARY"])
ops = torch.ops.posenc


def in_place(scores, slopes, offset):
    scores = scores.clone()
    ops.alibi_add_(scores, slopes, causal=True, query_offset=offset)
    return scores


# Functions of scores `[1, H, Sq, Sk]`, slopes `[H]` and the position of query 0.
FUNCTIONS = {
    "alibi_bias": lambda scores, slopes, offset: ops.alibi_bias(
        slopes, scores.shape[-2], scores.shape[-1], causal=True, dtype=scores.dtype, query_offset=offset
    ),
    "alibi_add": lambda scores, slopes, offset: ops.alibi_add(scores, slopes, causal=True, query_offset=offset),
    "alibi_add_": in_place,
    "alibi_softmax": lambda scores, slopes, offset: ops.alibi_softmax(
        scores, slopes, scale=0.5, causal=True, query_offset=offset
    ),
    "alibi_mask": lambda scores, slopes, offset: ops.alibi_mask(scores, query_offset=offset),
    "alibi_slopes_backward": lambda scores, slopes, offset: ops.alibi_slopes_backward(
        scores, causal=True, query_offset=offset
    ),
    "alibi_softmax_backward": lambda scores, slopes, offset: ops.alibi_softmax_backward(
        scores, scores.softmax(-1), scale=0.5, causal=True, query_offset=offset
    ),
}


def flat(result):
    return result if isinstance(result, tuple) else (result,)


class Growing:
    """Twenty steps of decoding make at most two graphs: one for the first numbers, one for all others."""

    device = "cpu"

    def check(self, name, sizes_of, grad):
        """`sizes_of(step)` gives queries, keys and offset."""
        function = FUNCTIONS[name]
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, backend=counter, fullgraph=True)
        for step in range(STEPS):
            queries, keys, offset = sizes_of(step)
            scores = torch.randn(1, HEADS, queries, keys, device=self.device).requires_grad_(grad)
            slopes = (torch.rand(HEADS, device=self.device) + 0.1).requires_grad_(grad)
            expected, actual = flat(function(scores, slopes, offset)), flat(compiled(scores, slopes, offset))
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
            if grad:
                found = [
                    torch.autograd.grad(
                        [x.masked_fill(x.isinf(), 0).square().sum() for x in result if x.requires_grad],
                        (scores, slopes),
                        allow_unused=True,
                    )
                    for result in (expected, actual)
                ]
                torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
        self.assertLessEqual(counter.frame_count, 2)

    def for_each(self, sizes_of):
        for name in FUNCTIONS:
            for grad in (False, True):
                with self.subTest(operator=name, grad=grad):
                    self.check(name, sizes_of, grad)

    def test_a_growing_offset_in_a_cache_of_fixed_size(self):
        self.for_each(lambda step: (2, 64, 5 + step))

    def test_a_growing_cache(self):
        self.for_each(lambda step: (2, 8 + step, 6 + step))

    def test_growing_sequences(self):
        self.for_each(lambda step: (4 + step, 4 + step, 3))


class CpuTest(Growing, unittest.TestCase):
    pass


class CudaTest(Growing, unittest.TestCase):
    device = "cuda"

    def setUp(self):
        if torch.cuda.is_available():
            return
        if os.environ.get("POSENC_REQUIRE_CUDA", "0") not in ("", "0"):
            self.fail("no CUDA device, and POSENC_REQUIRE_CUDA is set")
        self.skipTest("no CUDA device")


def main():
    suites = {"cpu": "CpuTest", "cuda": "CudaTest"}
    program = unittest.main(argv=[suites.get(arg, arg) for arg in sys.argv], exit=False, verbosity=2)
    result = program.result
    if not result.wasSuccessful():
        return 1
    return ALL_SKIPPED if result.testsRun == len(result.skipped) else 0


if __name__ == "__main__":
    sys.exit(main())
