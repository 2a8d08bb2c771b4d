#!/usr/bin/env python3
"""torch.func.vmap over every operator of libposenc, forward and backward, equals a loop over the batch.

POSENC_LIBRARY names the library. Plain unittest: python3 tests/python/vmap_test.py [cpu | cuda]
"""

import os
import sys
import tempfile
import unittest

from support import Inputs, OnDevice, functional, main, operator

import torch
from torch.utils import _pytree as pytree

from operator_cases import CASES

# Without operators that cannot be batched: they communicate with other processes, or have no tensors.
NAMES = sorted(name for name in CASES if not name.startswith("context_parallel") and name != "alibi_slopes")
BATCH = 3


set_warning = torch._C._functorch._set_vmap_fallback_warning_enabled


def variants(x):
    """BATCH valid variants of x. Ascending integers are repeated unchanged: they may be cu_seqlens."""
    if x.dtype == torch.bool:
        return torch.stack([x, ~x, x.roll(1, -1)])
    if not x.is_floating_point() and x.dim() == 1 and (x.diff() >= 0).all():
        return torch.stack([x, x, x])
    if not x.is_floating_point():
        return torch.stack([x, x.flip(-1), x.roll(1, -1)])
    return torch.stack([x, x * 0.5, x * 0.75])


class Vmap(OnDevice):
    def setUp(self):
        super().setUp()
        set_warning(False)
        self.addCleanup(set_warning, True)

    def for_each_call(self, check, names=NAMES):
        """Runs `check(function, tensors, name)` for every case. `function` takes all tensors among the arguments."""

        def with_function(name, _, sample):
            flat, spec = pytree.tree_flatten((sample.args, sample.kwargs))
            op = functional(operator(name))

            def function(*tensors):
                remaining = iter(tensors)
                args, kwargs = pytree.tree_unflatten(
                    [next(remaining) if isinstance(x, torch.Tensor) else x for x in flat], spec
                )
                return tuple(x for x in pytree.tree_leaves(op(*args, **kwargs)) if x is not None)

            check(function, [x for x in flat if isinstance(x, torch.Tensor)], name)

        self.for_each_sample(with_function, CASES, size=4, grad=False, names=names)

    def expect_a_loop(self, function, tensors, in_dims):
        slices = [[x if d is None else x.select(d, b) for x, d in zip(tensors, in_dims)] for b in range(BATCH)]
        expected = [torch.stack(results) for results in zip(*[function(*each) for each in slices])]
        actual = torch.func.vmap(function, in_dims=tuple(in_dims))(*tensors)
        torch.testing.assert_close(list(actual), expected, rtol=0, atol=0, equal_nan=True)

    def test_all_arguments_batched(self):
        def expect(function, tensors, _):
            self.expect_a_loop(function, [variants(x) for x in tensors], [0] * len(tensors))

        self.for_each_call(expect)

    def test_each_argument_alone_batched(self):
        def check(function, tensors, name):
            written = [a.alias_info is not None for a in operator(name)._schema.arguments]
            for number, x in enumerate(tensors):
                if any(written) and not written[number]:
                    continue
                in_dims = [0 if n == number else None for n in range(len(tensors))]
                if sum(written) > 1:
                    in_dims = [0 if write else None for write, _ in zip(written, tensors)]
                batched = [variants(y) if d == 0 else y for y, d in zip(tensors, in_dims)]
                self.expect_a_loop(function, batched, in_dims)

        self.for_each_call(check)

    def test_the_last_dimension_as_the_batch(self):
        def check(function, tensors, _):
            batched = [variants(x).movedim(0, -1).contiguous() for x in tensors]
            self.expect_a_loop(function, batched, [x.dim() - 1 for x in batched])

        self.for_each_call(check)

    def test_nested(self):
        def check(function, tensors, _):
            batched = [torch.stack([variants(x), variants(x).flip(0)]) for x in tensors]
            each = [[function(*[x[a, b] for x in batched]) for b in range(BATCH)] for a in range(2)]
            inner = [[torch.stack(results) for results in zip(*row)] for row in each]
            expected = [torch.stack(results) for results in zip(*inner)]
            actual = torch.func.vmap(torch.func.vmap(function))(*batched)
            for value, other in zip(actual, expected):
                torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True)

        self.for_each_call(check)

    def test_an_empty_batch_has_the_shapes_of_the_others(self):
        def check(function, tensors, _):
            full = torch.func.vmap(function)(*[variants(x) for x in tensors])
            empty = torch.func.vmap(function)(*[variants(x)[:0] for x in tensors])
            self.assertEqual([x.shape[1:] for x in empty], [x.shape[1:] for x in full])
            self.assertEqual([x.shape[0] for x in empty], [0] * len(full))

        # Without attention, whose lengths must fit the tokens that there are.
        self.for_each_call(check, [name for name in NAMES if "attention" not in name])

    def test_one_tensor_for_the_whole_batch_cannot_change_in_place(self):
        i = Inputs(self.device, 4, grad=False)
        x, cos, sin = i.normal(4, 2, 8), i.normal(BATCH, 4, 3), i.normal(4, 3)
        with self.assertRaisesRegex(RuntimeError, "expected x, which changes in place, to be batched"):
            torch.func.vmap(lambda c: torch.ops.posenc.rotary_embedding_(x, c, sin))(cos)

        q, k = i.normal(BATCH, 4, 2, 8), i.normal(4, 2, 8)
        with self.assertRaisesRegex(RuntimeError, "expected k, which changes in place, to be batched"):
            torch.func.vmap(lambda y: torch.ops.posenc.rotary_embedding_qk_(y, k, cos[0], sin), out_dims=None)(q)

    def test_a_batch_changes_in_place(self):
        i = Inputs(self.device, 4, grad=False)
        x, cos, sin = i.normal(BATCH, 4, 2, 8), i.normal(4, 3), i.normal(4, 3)
        expected = torch.stack([torch.ops.posenc.rotary_embedding(y, cos, sin) for y in x])
        torch.func.vmap(lambda y: torch.ops.posenc.rotary_embedding_(y, cos, sin), out_dims=None)(x)
        torch.testing.assert_close(x, expected, rtol=0, atol=0)

    def test_that_it_is_slow_is_said_unless_switched_off(self):
        i = Inputs(self.device, 4, grad=False)
        x, cos, sin = i.normal(BATCH, 4, 2, 8), i.normal(4, 3), i.normal(4, 3)

        def said():
            """What a call writes to standard error. Warnings of an operator are not Python warnings."""
            with tempfile.TemporaryFile() as file:
                before = os.dup(2)
                os.dup2(file.fileno(), 2)
                try:
                    torch.func.vmap(torch.ops.posenc.rotary_embedding, in_dims=(0, None, None))(x, cos, sin)
                finally:
                    os.dup2(before, 2)
                    os.close(before)
                file.seek(0)
                return file.read().decode()

        self.assertEqual(said(), "")
        set_warning(True)
        self.assertIn("posenc::rotary_embedding has no batching rule", said())


class CpuTest(Vmap, unittest.TestCase):
    pass


class CudaTest(Vmap, unittest.TestCase):
    device = "cuda"


if __name__ == "__main__":
    sys.exit(main())
