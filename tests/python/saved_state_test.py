#!/usr/bin/env python3
"""The backward passes of libposenc's operators read saved variables and nothing else.

A saved variable detects that its tensor has changed, goes through saved-tensor hooks, and is released by the backward
pass. POSENC_LIBRARY names the library. Plain unittest: python3 tests/python/saved_state_test.py [cpu | cuda]
"""

import gc
import sys
import unittest
import weakref

from support import OnDevice, differentiable, finite, main, mutable, operator

import torch
from torch.utils import _pytree as pytree

from operator_cases import CASES

# Operators of attention's gradients, whose samples require none: attention is differentiated by create_graph.
NO_GRADIENTS = {
    name for name in CASES if "attention" in name and ("backward" in name or name.endswith("slope_sums"))
}
ONCE = {"context_parallel_alibi_attention"}


def change(x):
    """Changes x in place to other valid values: lengths and positions get smaller, masks are inverted."""
    if x.dtype == torch.bool:
        x.logical_not_()
    elif x.is_floating_point():
        x.mul_(1.25).add_(0.5)
    else:
        x.clamp_(max=x.max().item() - 1)


class Pass:
    """A forward pass of one sample. `inputs`: all tensor arguments. `results`: the outputs that have a grad_fn."""

    def __init__(self, name, sample):
        # Copies: a leaf that requires a gradient cannot change in place.
        copied = pytree.tree_map_only(torch.Tensor, lambda x: x.clone(), (sample.args, sample.kwargs))
        self.leaves = sample.leaves()
        self.inputs = [x for x in pytree.tree_leaves(copied) if isinstance(x, torch.Tensor)]
        args, kwargs = copied
        results = operator(name)(*args, **kwargs)
        if mutable(name):
            written = [argument.alias_info is not None for argument in operator(name)._schema.arguments]
            results = [arg for arg, changes in zip(args, written) if changes]
            self.inputs = [x for x in self.inputs if not any(x is result for result in results)]
        self.results = [x for x in pytree.tree_leaves(results) if differentiable(x)]

    def tensors(self):
        return self.inputs + self.results

    def gradients(self, **kw):
        results = [finite(result) for result in self.results]
        weights = [torch.linspace(-1, 1.5, x.numel()).cos().view(x.shape).to(x) for x in results]
        found = torch.autograd.grad(results, self.leaves, weights, allow_unused=True, **kw)
        return [None if grad is None else grad.detach().clone() for grad in found]


class Kept:
    """The object that a pack hook returns for a tensor."""

    def __init__(self, tensor):
        self.tensor = tensor.detach().clone()


class SavedState(OnDevice):
    def for_each_operator(self, check):
        names = [name for name in sorted(CASES) if name not in NO_GRADIENTS]
        self.for_each_sample(
            lambda name, _, sample: check(name, sample) if sample.leaves() else None, CASES, size=4, names=names
        )

    def for_each_graph(self, check):
        """Runs `check` without `create_graph` and, for operators with second derivatives, with it."""
        self.for_each_operator(lambda name, sample: check(name, sample, False))
        self.for_each_operator(lambda name, sample: None if name in ONCE else check(name, sample, True))

    def test_a_tensor_that_changes_before_the_backward_pass_is_noticed(self):
        def check(name, sample, create_graph):
            expected = Pass(name, sample).gradients(create_graph=create_graph)
            for number in range(len(Pass(name, sample).tensors())):
                forward = Pass(name, sample)
                # Clones from before the change: only the operator's backward pass may read the tensor that changes.
                results = forward.results
                forward.results = [x.clone() for x in results]
                with torch.no_grad():
                    change((forward.inputs + results)[number])
                try:
                    found = forward.gradients(create_graph=create_graph)
                except RuntimeError as error:
                    self.assertIn("modified by an inplace operation", str(error))
                    continue
                message = f"tensor {number} changed, create_graph={create_graph}"
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda m: f"{message}: {m}")

        self.for_each_graph(check)

    def test_saved_tensor_hooks_see_all_that_the_backward_pass_reads(self):
        def check(name, sample, create_graph):
            expected = Pass(name, sample).gradients(create_graph=create_graph)
            with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
                forward = Pass(name, sample)
            originals = forward.tensors()
            forward.results = [x.clone() for x in forward.results]
            for x in originals:
                change(x.data)  # no version counter sees it: reading the tensor itself gives wrong values
            found = forward.gradients(create_graph=create_graph)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

        self.for_each_graph(check)

    def test_the_backward_pass_releases_what_was_saved(self):
        def check(name, sample):
            kept = []

            def pack(tensor):
                kept.append(Kept(tensor))
                return kept[-1]

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
                forward = Pass(name, sample)
            alive = [weakref.ref(one) for one in kept]
            kept.clear()
            loss = sum(finite(result).sum() for result in forward.results)
            loss.backward(retain_graph=True)
            loss.backward()
            gc.collect()
            self.assertEqual([one for one in alive if one() is not None], [])
            if alive:
                with self.assertRaisesRegex(RuntimeError, "second time|already been freed"):
                    sum(result.sum() for result in forward.results).backward()

        self.for_each_operator(check)


class CpuTest(SavedState, unittest.TestCase):
    pass


class CudaTest(SavedState, unittest.TestCase):
    device = "cuda"


if __name__ == "__main__":
    sys.exit(main())
