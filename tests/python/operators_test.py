#!/usr/bin/env python3
"""Every operator of libposenc as Python sees it: torch.library.opcheck, gradcheck, torch.compile.

POSENC_LIBRARY names the library. Plain unittest: python3 tests/python/operators_test.py [cpu | cuda]
"""

import pathlib
import shutil
import sys
import sysconfig
import unittest

from support import Inputs, OnDevice, finite, functional, main, mutable, operator, outputs, registered

import torch
from torch.utils import _pytree as pytree

from operator_cases import CASES

# Operators without a second derivative of their own: the gradients of attention say so when they are differentiated.
ONCE = {"alibi_attention", "context_parallel_alibi_attention"}


class Operators(OnDevice):
    """Tests of all operators on one device."""

    def test_each_operator_passes_opcheck(self):
        def check(name, _, sample):
            torch.library.opcheck(operator(name), sample.args, sample.kwargs)

        self.for_each_sample(check, CASES, grad=False)
        # A leaf that requires a gradient cannot change in place.
        self.for_each_sample(check, CASES, names=[name for name in sorted(CASES) if not mutable(name)])

    def check_differences(self, gradcheck, **options):
        def check(name, _, sample):
            op = operator(name)
            call = sample.function(op)
            if sample.leaves():
                results = lambda *leaves: tuple(finite(x) for x in outputs(call(*leaves)))
                self.assertTrue(gradcheck(results, sample.leaves(), atol=1e-6))

        self.for_each_sample(check, CASES, **options)

    def test_gradients_are_those_of_differences(self):
        self.check_differences(torch.autograd.gradcheck, size=4)

    def test_second_gradients_are_those_of_differences(self):
        self.check_differences(torch.autograd.gradgradcheck, size=3, names=sorted(set(CASES) - ONCE))

    def expect_compiled_is_eager(self, name, case, sizes, **options):
        op = functional(operator(name))
        compiled = None
        torch._dynamo.reset()
        for size in sizes:
            sample = case(Inputs(self.device, size))
            flat, spec = pytree.tree_flatten((sample.args, sample.kwargs))

            def call(*flat):
                args, kwargs = pytree.tree_unflatten(list(flat), spec)
                return op(*args, **kwargs)

            compiled = compiled or torch.compile(call, fullgraph=True, **options)
            expected, actual = call(*flat), compiled(*flat)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
            leaves = sample.leaves()
            if leaves:
                ones = [torch.ones_like(x) for x in outputs(expected)]
                grads = [
                    torch.autograd.grad(outputs(result), leaves, ones, allow_unused=True) if ones else ()
                    for result in (expected, actual)
                ]
                torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)

    def check_compiled(self, sizes, names=None, **options):
        self.for_each_sample(
            lambda name, case, _: self.expect_compiled_is_eager(name, case, sizes, **options), CASES, names=names
        )

    def test_compiled_with_static_shapes_is_eager(self):
        self.check_compiled([5], backend="aot_eager", dynamic=False)

    def test_compiled_with_dynamic_shapes_is_eager(self):
        self.check_compiled([5, 7, 4], backend="aot_eager", dynamic=True)

    def test_compiled_by_inductor_is_eager(self):
        header = pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h"
        if shutil.which("c++") is None or not header.exists():
            self.skipTest("Inductor needs a C++ compiler and Python's headers")
        self.check_compiled([5], names=["rotary_embedding_qk", "alibi_add"], backend="inductor")


class CpuTest(Operators, unittest.TestCase):
    def test_each_operator_has_a_case(self):
        self.assertEqual(registered(), sorted(CASES))


class CudaTest(Operators, unittest.TestCase):
    device = "cuda"


if __name__ == "__main__":
    sys.exit(main())
