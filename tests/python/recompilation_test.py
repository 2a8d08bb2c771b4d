#!/usr/bin/env python3
"""How many graphs torch.compile makes of libposenc's operators while offsets and lengths grow: at most two.

The first step is a graph of its own numbers; at the second one torch.compile takes what has changed for a symbol. Zero
and one are always graphs of their own, so no number starts there.

POSENC_LIBRARY names the library. Plain unittest: python3 tests/python/recompilation_test.py [cpu | cuda]
"""

import sys
import unittest

from support import Inputs, OnDevice, functional, main, operator, outputs

import torch
import torch._dynamo.testing
from torch.utils import _pytree as pytree

from operator_cases import CASES

STEPS = 20
MOST_GRAPHS = 2


def arguments_of(name):
    return {argument.name for argument in operator(name)._schema.arguments}


def with_argument(*names):
    return [name for name in sorted(CASES) if arguments_of(name).intersection(names)]


class Recompilation(OnDevice):
    def count_graphs(self, name, samples, grad):
        """Calls the operator once for each sample, forward and backward, compiled; compares with eager.

        torch.compile stops with an error at the first graph too many.
        """
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        op = functional(operator(name))
        compiled = torch.compile(lambda args, kwargs: op(*args, **kwargs), fullgraph=True, backend=counter)
        for sample in samples:
            expected = op(*sample.args, **sample.kwargs)
            with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
                actual = compiled(sample.args, sample.kwargs)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
            leaves = sample.leaves()
            if grad and outputs(expected):
                found = [
                    torch.autograd.grad([x.sum() for x in outputs(y)], leaves, allow_unused=True)
                    for y in (actual, expected)
                ]
                torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
        return counter.frame_count

    def check(self, name, samples, grad=True):
        self.assertLessEqual(self.count_graphs(name, samples, grad), MOST_GRAPHS)

    def test_decoding_with_a_growing_offset(self):
        def check(name, case, sample):
            samples = [case(Inputs(self.device, 5)) for _ in range(STEPS)]
            for step, one in enumerate(samples):
                one.kwargs["query_offset"] = 3 + step
            self.check(name, samples)

        self.for_each_sample(check, CASES, names=with_argument("query_offset"))

    def test_packed_sequences_with_growing_maxima(self):
        def check(name, case, sample):
            if "max_seqlen_q" not in sample.kwargs:
                return
            samples = [case(Inputs(self.device, 5)) for _ in range(STEPS)]
            for step, one in enumerate(samples):
                # Two numbers: equal ones would be one symbol.
                one.kwargs.update(max_seqlen_q=5 + step, max_seqlen_k=30 + 2 * step)
            self.check(name, samples)

        self.for_each_sample(check, CASES, names=with_argument("max_seqlen_q"))

    def test_growing_sequences(self):
        def check(name, case, _):
            sizes = [4 + 2 * step for step in range(STEPS)]
            self.check(name, [case(Inputs(self.device, size)) for size in sizes])

        self.for_each_sample(check, CASES, names=[name for name in sorted(CASES) if name != "alibi_slopes"])


class CpuTest(Recompilation, unittest.TestCase):
    pass


class CudaTest(Recompilation, unittest.TestCase):
    device = "cuda"


if __name__ == "__main__":
    sys.exit(main())
