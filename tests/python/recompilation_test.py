#!/usr/bin/env python3
"""torch.compile makes at most two graphs of libposenc's operators while offsets and lengths grow.

The graph of the first step has that step's numbers as constants. In the second step torch.compile makes symbols of the
numbers that have changed. 0 and 1 are always constants, so no number starts there.

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
    def check(self, name, step, cases):
        """Runs the compiled operator forward and backward in each step, and compares with eager mode.

        `step(case, number)` gives the sample of a step. All cases of the operator are one graph, to save time.
        torch.compile raises an error if it needs more than MOST_GRAPHS graphs.
        """
        op = functional(operator(name))

        def every_case(calls):
            return [op(*args, **kwargs) for args, kwargs in calls]

        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(every_case, fullgraph=True, backend=counter)
        for number in range(STEPS):
            samples = [step(case, number) for case in cases]
            calls = [(sample.args, sample.kwargs) for sample in samples]
            expected = every_case(calls)
            with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
                actual = compiled(calls)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
            leaves = [leaf for sample in samples for leaf in sample.leaves()]
            if outputs(expected):
                # Dense gradients for both: LibTorch may sum products of expanded matrices in another order.
                found = [
                    torch.autograd.grad(
                        outputs(y), leaves, [torch.ones_like(x) for x in outputs(y)], allow_unused=True
                    )
                    for y in (actual, expected)
                ]
                torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
        self.assertLessEqual(counter.frame_count, MOST_GRAPHS)

    def for_each_operator(self, names, step, takes=lambda sample: True):
        """Checks the cases whose sample `takes` accepts."""
        for name in names:
            cases = [case for case in CASES[name] if takes(case(Inputs(self.device, 5)))]
            with self.subTest(operator=name):
                self.check(name, step, cases)

    def test_decoding_with_a_growing_offset(self):
        def step(case, number):
            sample = case(Inputs(self.device, 5))
            sample.kwargs["query_offset"] = 3 + number
            return sample

        self.for_each_operator(with_argument("query_offset"), step)

    def test_packed_sequences_with_growing_maxima(self):
        def step(case, number):
            sample = case(Inputs(self.device, 5))
            # Different numbers: equal ones would be one symbol.
            sample.kwargs.update(max_seqlen_q=5 + number, max_seqlen_k=30 + 2 * number)
            return sample

        self.for_each_operator(with_argument("max_seqlen_q"), step, lambda sample: "max_seqlen_q" in sample.kwargs)

    def test_growing_sequences(self):
        names = [name for name in sorted(CASES) if name != "alibi_slopes"]
        self.for_each_operator(names, lambda case, number: case(Inputs(self.device, 4 + 2 * number)))


class CpuTest(Recompilation, unittest.TestCase):
    pass


class CudaTest(Recompilation, unittest.TestCase):
    device = "cuda"


if __name__ == "__main__":
    sys.exit(main())
