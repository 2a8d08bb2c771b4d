#!/usr/bin/env python3
"""Compares libposenc's rotary operators with plain PyTorch: tangents under all flags, NaN and infinity.

POSENC_LIBRARY names the library. Plain unittest: python3 tests/python/rotary_test.py [cpu | cuda]
"""

import itertools
import sys
import unittest

from support import Inputs, OnDevice, functional, main, operator

import torch

from operator_cases import CASES
from operator_references import REFERENCES

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def as_tuple(result):
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


class Rotary(OnDevice):
    # --- Forward mode ---

    def grid(self):
        """Keyword arguments: all flags, without positions and with positions of one or three axes."""
        for interleaved, conjugate, positions in itertools.product((False, True), (False, True), (None, 1, 3)):
            kw = {"interleaved": interleaved, "conjugate": conjugate}
            if positions is not None:
                kw["positions"] = torch.tensor([[3, 0, 8, 1], [1, 1, 0, 7], [2, 6, 5, 4]], device=self.device)
            if positions == 1:
                kw["positions"] = kw["positions"][0]
            if positions == 3:
                kw["pair_axes"] = [2, 0, 1]
            yield kw

    def test_tangents_of_every_subset_of_inputs_under_all_flags(self):
        i = Inputs(self.device, 4, grad=False)
        tables = i.normal(9, 3), i.normal(9, 3)
        for name, inputs in (
            ("rotary_embedding", [i.normal(2, 4, 2, 8)]),
            ("rotary_embedding_qk", [i.normal(2, 4, 3, 8), i.normal(2, 4, 1, 8)]),
        ):
            primals = [*inputs, *tables]
            tangents = [i.normal(*x.shape) for x in primals]
            for kw in self.grid():
                for moved in itertools.product((False, True), repeat=len(primals)):
                    if not any(moved):
                        continue

                    def along(f):
                        def of_moved(*some):
                            remaining = iter(some)
                            return as_tuple(f(*[next(remaining) if m else x for m, x in zip(moved, primals)], **kw))

                        chosen = [[x for m, x in zip(moved, xs) if m] for xs in (primals, tangents)]
                        return torch.func.jvp(of_moved, *map(tuple, chosen))

                    with self.subTest(operator=name, moved=moved, **kw):
                        torch.testing.assert_close(
                            along(operator(name)), along(REFERENCES[name]), rtol=1e-12, atol=1e-12
                        )

    # --- NaN and infinity ---

    def expect_same_classes(self, actual, expected):
        """NaN where NaN is expected, infinities of the same sign, and finite values elsewhere."""
        for value, other in zip(as_tuple(actual), as_tuple(expected)):
            self.assertTrue(torch.equal(value.isnan(), other.isnan()))
            self.assertTrue(torch.equal(value == torch.inf, other == torch.inf))
            self.assertTrue(torch.equal(value == -torch.inf, other == -torch.inf))

    def samples_with(self, special, dtype, names):
        """`(name, arguments, keywords)`, each with one element of one floating-point argument replaced by `special`."""
        table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        for name in names:
            for case in CASES[name]:
                sample = case(Inputs(self.device, 4, grad=False))
                arguments = operator(name)._schema.arguments
                args = [
                    x.to(table_dtype if argument.name in ("cos", "sin") else dtype)
                    if isinstance(x, torch.Tensor) and x.is_floating_point()
                    else x
                    for x, argument in zip(sample.args, arguments)
                ]
                for number, x in enumerate(args):
                    if isinstance(x, torch.Tensor) and x.is_floating_point():
                        for element in {0, x.numel() // 2, x.numel() - 1}:
                            changed = list(args)
                            changed[number] = x.contiguous().clone()
                            changed[number].view(-1)[element] = special
                            with self.subTest(operator=name, special=special, dtype=dtype, input=number):
                                yield name, changed, sample.kwargs

    def check_special(self, special):
        names = sorted(name for name in REFERENCES if "rotary_embedding" in name)
        for dtype in DTYPES:
            for name, args, kw in self.samples_with(special, dtype, names):
                wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
                self.expect_same_classes(functional(operator(name))(*args, **kw), REFERENCES[name](*wide, **kw))

    def test_nan_in_each_input_reaches_what_the_formula_says(self):
        self.check_special(float("nan"))

    def test_infinity_in_each_input_reaches_what_the_formula_says(self):
        self.check_special(float("inf"))
        self.check_special(float("-inf"))

    def test_nan_in_each_input_reaches_the_gradients_that_the_formula_says(self):
        names = sorted(
            name for name in REFERENCES if "rotary_embedding" in name and not operator(name)._schema.is_mutable
        )

        def gradients(f, args, kw):
            args = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
            leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
            results = as_tuple(f(*args, **kw))
            ones = [torch.linspace(1, 2, x.numel(), device=x.device).view(x.shape).to(x.dtype) for x in results]
            return torch.autograd.grad(results, leaves, ones)

        for dtype in DTYPES:
            for name, args, kw in self.samples_with(float("nan"), dtype, names):
                wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
                actual = gradients(operator(name), [x.clone() if isinstance(x, torch.Tensor) else x for x in args], kw)
                self.expect_same_classes(actual, gradients(REFERENCES[name], wide, kw))

    def test_nan_in_each_gradient_stays_in_its_pair(self):
        i = Inputs(self.device, 4, grad=False)
        x, cos, sin = i.normal(2, 4, 2, 8), i.normal(4, 3), i.normal(4, 3)
        for interleaved, element in itertools.product((False, True), range(8)):
            grad = i.normal(*x.shape)
            grad[1, 2, 1, element] = torch.nan
            found, expected = [], []
            for f, results in ((operator("rotary_embedding"), found), (REFERENCES["rotary_embedding"], expected)):
                leaves = [y.clone().requires_grad_() for y in (x, cos, sin)]
                results += torch.autograd.grad(f(*leaves, interleaved=interleaved), leaves, grad)
            self.expect_same_classes(found, expected)
            self.assertEqual(found[0].isnan().sum().item(), 2 if element < 6 else 1)
            self.assertEqual([g.isnan().sum().item() for g in found[1:]], [1, 1] if element < 6 else [0, 0])


class CpuTest(Rotary, unittest.TestCase):
    pass


class CudaTest(Rotary, unittest.TestCase):
    device = "cuda"


if __name__ == "__main__":
    sys.exit(main())
