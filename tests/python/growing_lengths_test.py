#!/usr/bin/env python3
"""torch.compile with lengths that grow: two graphs at most, forward and backward, for every rotary operator.

The first length is compiled as a number, the second one as a symbol that serves all others.

POSENC_LIBRARY names the library. Plain unittest: python3 tests/python/growing_lengths_test.py [cpu | cuda]
"""

import sys
import unittest

from support import Inputs, OnDevice, Sample, functional, main, operator, outputs

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

from operator_cases import CASES

NAMES = sorted(name for name in CASES if "rotary" in name)
LENGTHS = range(4, 24)
ROWS = 40


class GrowingLengths(OnDevice):
    def check_graphs(self, case, name):
        op = functional(operator(name))
        counter = CompileCounterWithBackend("aot_eager")
        torch._dynamo.reset()
        compiled = None
        for length in LENGTHS:
            sample = case(Inputs(self.device, length))
            flat, spec = pytree.tree_flatten((sample.args, sample.kwargs))

            def call(*flat):
                args, kwargs = pytree.tree_unflatten(list(flat), spec)
                return op(*args, **kwargs)

            compiled = compiled or torch.compile(call, fullgraph=True, backend=counter)
            leaves = sample.leaves()
            results = []
            for function in (call, compiled):
                found = outputs(function(*flat))
                ones = [torch.ones_like(x) for x in found]
                grads = torch.autograd.grad(found, leaves, ones, allow_unused=True) if found else ()
                results.append((found, grads))
            torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
        self.assertLessEqual(counter.frame_count, 2)

    def test_operators_make_two_graphs(self):
        self.for_each_sample(lambda name, case, _: self.check_graphs(case, name), CASES, names=NAMES)

    def test_operators_on_rows_of_longer_tables_make_two_graphs(self):
        """Trainable tables of a fixed number of rows."""

        def of_rows(name, make):
            for positions in (False, True):

                def case(i):
                    kw = {"positions": torch.arange(i.size, device=i.device)} if positions else {}
                    return make(i, i.normal(ROWS, 3), i.normal(ROWS, 3), **kw)

                with self.subTest(operator=name, positions=positions):
                    self.check_graphs(case, name)

        of_rows("rotary_embedding", lambda i, *t, **kw: Sample(i.normal(2, i.size, 2, 8), *t, **kw))
        of_rows(
            "rotary_embedding_qk",
            lambda i, *t, **kw: Sample(i.normal(2, i.size, 4, 8), i.normal(2, i.size, 2, 8), *t, **kw),
        )
        of_rows("rotary_embedding_qkv", lambda i, *t, **kw: Sample(i.normal(i.size, 64), 4, 2, *t, **kw))
        of_rows("rotary_embedding_qkv", lambda i, *t, **kw: Sample(i.normal(i.size, 3, 2, 8), 2, 2, *t, **kw))
        of_rows(
            "rotary_embedding_pack",
            lambda i, *t, **kw: Sample(*[i.normal(2, i.size, heads, 8) for heads in (4, 2, 2)], *t, **kw),
        )
        of_rows(
            "qk_norm_rotary_embedding",
            lambda i, *t, **kw: Sample(
                i.normal(2, i.size, 4, 8), i.normal(2, i.size, 2, 8), i.normal(8), i.normal(8), *t, **kw
            ),
        )


class CpuTest(GrowingLengths, unittest.TestCase):
    pass


class CudaTest(GrowingLengths, unittest.TestCase):
    device = "cuda"


if __name__ == "__main__":
    sys.exit(main())
