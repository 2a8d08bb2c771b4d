#!/usr/bin/env python3
"""Every operator of libposenc from Python: torch.library.opcheck, gradcheck, Inductor.

POSENC_LIBRARY names the library. Plain unittest: python3 tests/python/operators_test.py [cpu | cuda]
"""

import pathlib
import shutil
import sys
import sysconfig
import unittest

from support import Inputs, OnDevice, finite, main, mutable, operator, outputs, registered

import torch

from operator_cases import CASES

# Operators without a second derivative: differentiating their gradients is an error.
ONCE = {"context_parallel_alibi_attention"}


class Operators(OnDevice):
    """Tests of all operators on one device."""

    def test_each_operator_passes_opcheck(self):
        def check(name, case, sample):
            # A leaf that requires a gradient cannot change in place.
            if mutable(name):
                sample = case(Inputs(self.device, 3, grad=False))
            torch.library.opcheck(operator(name), sample.args, sample.kwargs)

        self.for_each_sample(check, CASES, size=3)

    def check_differences(self, gradcheck, **options):
        """Checks one random direction. derivatives_test.py checks every element for the forward operators."""

        def check(name, _, sample):
            call = sample.function(operator(name))
            if sample.leaves():
                results = lambda *leaves: tuple(finite(x) for x in outputs(call(*leaves)))
                self.assertTrue(gradcheck(results, sample.leaves(), atol=1e-6, fast_mode=True))

        self.for_each_sample(check, CASES, **options)

    def test_gradients_are_those_of_differences(self):
        self.check_differences(torch.autograd.gradcheck, size=4)

    def test_second_gradients_are_those_of_differences(self):
        self.check_differences(torch.autograd.gradgradcheck, size=3, names=sorted(set(CASES) - ONCE))

    def test_compiled_by_inductor_is_eager(self):
        header = pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h"
        if shutil.which("c++") is None or not header.exists():
            self.skipTest("Inductor needs a C++ compiler and Python's headers")
        rotated = torch.ops.posenc.rotary_embedding_qk.default
        biased = torch.ops.posenc.alibi_add.default

        def both(rotary, alibi):
            return *rotated(*rotary), biased(*alibi)

        def run(f):
            calls = [CASES[name][0](Inputs(self.device, 5)) for name in ("rotary_embedding_qk", "alibi_add")]
            results = f(*[call.args for call in calls])
            leaves = [leaf for call in calls for leaf in call.leaves()]
            return results, torch.autograd.grad([x.sin().sum() for x in results], leaves)

        torch._dynamo.reset()
        compiled = torch.compile(both, fullgraph=True, backend="inductor")
        torch.testing.assert_close(run(compiled), run(both), rtol=0, atol=0)


class CpuTest(Operators, unittest.TestCase):
    def test_each_operator_has_a_case(self):
        self.assertEqual(registered(), sorted(CASES))


class CudaTest(Operators, unittest.TestCase):
    device = "cuda"


if __name__ == "__main__":
    sys.exit(main())
