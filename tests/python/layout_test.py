#!/usr/bin/env python3
"""Results of libposenc's operators have the size, stride and dtype of Meta, for any memory layout of the inputs.

POSENC_LIBRARY names the library. Plain unittest: python3 tests/python/layout_test.py [cpu | cuda]
"""

import itertools
import sys
import unittest

from support import OnDevice, main, operator

import torch
from torch.utils import _pytree as pytree

from operator_cases import CASES

# Arguments that are float32 if the inputs have 16 bits.
WIDE = {"grad_grad_slopes", "cos", "sin", "table", "slopes", "sinks", "inv_freq", "lse", "grad_lse"}
WIDE |= {"grad_cos", "grad_sin"}
# Operators of tables of cosines and sines, which have no 16-bit dtype.
WIDE_OPERATORS = {"rotary_tables", "rotary_tables_backward"}


def in_memory_order(x, order):
    """A copy of x whose dimensions lie in memory in the given order, the last one dense."""
    back = sorted(range(x.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


def layouts(x):
    """x in every order of its dimensions in memory, and with every dimension in turn expanded from its first index."""
    if not x.is_floating_point():
        return []
    orders = [in_memory_order(x, order) for order in itertools.permutations(range(x.dim()))]
    return orders[1:] + [x.narrow(d, 0, 1).expand_as(x) for d in range(x.dim())]


def described(results):
    """Size, stride and dtype of each result. Leaves out strides of dimensions of size 1, which have no meaning."""

    def of_tensor(x):
        return tuple(x.shape), [stride for size, stride in zip(x.shape, x.stride()) if size > 1], x.dtype

    return [of_tensor(x) if isinstance(x, torch.Tensor) else x for x in pytree.tree_leaves(results)]


def on_meta(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class Arguments:
    """The arguments of one call in one dtype, as a flat list in which single tensors can be replaced."""

    def __init__(self, name, sample, dtype, slopes_dtype=None):
        self.op = operator(name)
        self.schema = self.op._schema.arguments
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        names = [argument.name for argument in self.schema]

        def converted(argument, value):
            target = wide if argument in WIDE or name in WIDE_OPERATORS else dtype
            if argument == "dtype":
                return target
            if argument == "slopes" and slopes_dtype is not None:
                target = slopes_dtype
            floating = lambda x: x.detach().to(target) if x.is_floating_point() else x
            return pytree.tree_map_only(torch.Tensor, floating, value)

        args = [converted(argument, value) for argument, value in zip(names, sample.args)]
        kwargs = {argument: converted(argument, value) for argument, value in sample.kwargs.items()}
        self.flat, self.spec = pytree.tree_flatten((args, kwargs))
        # Tensors that the operator writes to cannot be expanded.
        written = [x for x, argument in zip(args, self.schema) if argument.alias_info is not None]
        self.written = [any(x is one for one in written) for x in self.flat]

    def call(self, flat):
        args, kwargs = pytree.tree_unflatten(flat, self.spec)
        return self.op(*args, **kwargs)

    def replaced(self, one_by_one):
        """Flat arguments: unchanged; if `one_by_one`, one tensor in each layout; all tensors in the n-th layout."""
        yield list(self.flat)
        others = {
            number: [y for y in layouts(x) if not (self.written[number] and 0 in y.stride())]
            for number, x in enumerate(self.flat)
            if isinstance(x, torch.Tensor)
        }
        for number, many in others.items() if one_by_one else ():
            for one in many:
                yield [one if n == number else x for n, x in enumerate(self.flat)]
        for turn in range(max(map(len, others.values()), default=0)):
            yield [
                others[n][turn % len(others[n])] if others.get(n) else x for n, x in enumerate(self.flat)
            ]


class Layout(OnDevice):
    def check_dtype(self, dtype, slopes_dtype=None, one_by_one=False):
        def check(name, _, sample):
            arguments = Arguments(name, sample, dtype, slopes_dtype)
            for flat in arguments.replaced(one_by_one):
                meta = pytree.tree_map_only(torch.Tensor, on_meta, flat)
                # Operators in place get copies in the same layout, so that the next call sees the original values.
                real = [x.clone() if written else x for x, written in zip(flat, arguments.written)]
                actual, promised = described(arguments.call(real)), described(arguments.call(meta))
                strides = [x.stride() for x in flat if isinstance(x, torch.Tensor)]
                self.assertEqual(actual, promised, f"inputs of strides {strides}")

        names = [name for name in sorted(CASES) if name != "alibi_slopes"]  # has no tensors
        if slopes_dtype is not None:
            names = [name for name in names if any(a.name == "slopes" for a in operator(name)._schema.arguments)]
        self.for_each_sample(check, CASES, size=4, grad=False, names=names)

    def test_results_in_float16_are_as_meta_promises(self):
        self.check_dtype(torch.float16)

    def test_results_in_bfloat16_are_as_meta_promises(self):
        self.check_dtype(torch.bfloat16)

    def test_results_in_float32_are_as_meta_promises(self):
        self.check_dtype(torch.float32, one_by_one=True)

    def test_results_in_float64_are_as_meta_promises(self):
        self.check_dtype(torch.float64)

    def test_results_in_float64_of_float32_slopes_are_as_meta_promises(self):
        self.check_dtype(torch.float64, slopes_dtype=torch.float32)

    def test_inductor_compiles_attention(self):
        """Padded and packed attention, with heads before tokens in memory, as projections leave them.

        Compiled without other operations: Inductor's code that checks the layouts then needs no C++ compiler.
        """

        def both(padded, packed, cuts):
            return (
                *torch.ops.posenc.alibi_attention(*padded, causal=True),
                *torch.ops.posenc.alibi_attention(*packed, cu_seqlens_q=cuts, max_seqlen_q=6, causal=True),
            )

        generator = torch.Generator().manual_seed(20210420)
        drawn = torch.randn(3, 2, 4, 6, 8, generator=generator).transpose(2, 3).to(self.device)
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=self.device)
        cuts = torch.tensor([0, 2, 6], device=self.device)

        def run(f):
            padded = [x.detach().requires_grad_() for x in (*drawn, slopes)]
            packed = [x.detach().requires_grad_() for x in (*drawn[:, 0], slopes)]
            results = f(padded, packed, cuts)
            return results, torch.autograd.grad([x.sin().sum() for x in results], padded + packed)

        torch._dynamo.reset()
        compiled = torch.compile(both, fullgraph=True, backend="inductor")
        torch.testing.assert_close(run(compiled), run(both), rtol=0, atol=0)


class CpuTest(Layout, unittest.TestCase):
    pass


class CudaTest(Layout, unittest.TestCase):
    device = "cuda"


if __name__ == "__main__":
    sys.exit(main())
