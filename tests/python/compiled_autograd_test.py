#!/usr/bin/env python3
"""Compiled autograd over every autograd node of libposenc: gradients equal those of eager mode.

POSENC_LIBRARY names the library. Plain unittest: python3 tests/python/compiled_autograd_test.py [cpu | cuda]
"""

import sys
import unittest

from support import Inputs, OnDevice, finite, main, operator, outputs

import torch
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from operator_cases import CASES

# Of attention only alibi_attention: operators of its gradients have no gradients, or nodes that cannot be traced.
NAMES = sorted(name for name in CASES if "attention" not in name or name == "alibi_attention")


def weights(x):
    return torch.linspace(-1, 1.5, x.numel(), dtype=x.dtype, device=x.device).cos().view(x.shape)


def loss(sample, op):
    results = [finite(x) for x in outputs(sample.function(op)(*sample.leaves()))]
    return sum((x * weights(x)).sum() for x in results) if results else None


def captured():
    """Compiled autograd that runs the captured graph without compiling it."""
    torch._dynamo.reset()
    return compiled_autograd._enable(torch.compile(backend="eager"))


class CompiledAutograd(OnDevice):
    def for_each_loss(self, check, names):
        def with_loss(name, case, sample):
            if sample.leaves() and loss(sample, operator(name)) is not None:
                check(name, case, sample)

        # One case of each operator: a compilation takes a second. The last case has the most arguments.
        self.for_each_sample(with_loss, {name: CASES[name][-1:] for name in CASES}, size=4, names=names)

    def accumulated(self, sample, op, backend=None, **kw):
        """The .grad of each leaf after one backward pass, under compiled autograd if `backend` is given."""
        for leaf in sample.leaves():
            leaf.grad = None
        result = loss(sample, op)
        if backend is None:
            result.backward(**kw)
        else:
            torch._dynamo.reset()
            with compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True)):
                result.backward(**kw)
        return [leaf.grad for leaf in sample.leaves()]

    def check_backend(self, backend, names):
        def check(name, _, sample):
            expected = self.accumulated(sample, operator(name))
            torch.testing.assert_close(self.accumulated(sample, operator(name), backend), expected, rtol=0, atol=0)

        self.for_each_loss(check, names)

    def test_gradients_of_the_captured_graph_are_those_of_eager_mode(self):
        self.check_backend("eager", NAMES)

    def test_gradients_of_the_traced_graph_are_those_of_eager_mode(self):
        self.check_backend("aot_eager", ["rotary_embedding_qk", "rotary_embedding_tables_backward", "alibi_softmax"])

    def test_each_input_alone_gets_its_gradient(self):
        for name in ("rotary_embedding_qkv", "rotary_embedding_pack", "qk_norm_rotary_embedding"):
            op, sample = operator(name), CASES[name][0](Inputs(self.device, 4))
            leaves = sample.leaves()
            expected = self.accumulated(sample, op)
            for number, leaf in enumerate(leaves):
                result = loss(sample, op)
                for other in leaves:
                    other.grad = None
                with self.subTest(operator=name, input=number), captured():
                    result.backward(inputs=[leaf])
                    torch.testing.assert_close(leaf.grad, expected[number], rtol=0, atol=0)
                    self.assertEqual([other.grad for other in leaves if other is not leaf], [None] * (len(leaves) - 1))

    def test_growing_lengths_take_two_graphs(self):
        for name in ("rotary_embedding_qkv", "rotary_tables", "alibi_slopes_backward"):
            counter = CompileCounterWithBackend("eager")
            torch._dynamo.reset()
            for size in range(4, 9):
                sample = CASES[name][0](Inputs(self.device, size))
                expected = self.accumulated(sample, operator(name))
                for leaf in sample.leaves():
                    leaf.grad = None
                result = loss(sample, operator(name))
                with compiled_autograd._enable(torch.compile(backend=counter, fullgraph=True)):
                    result.backward()
                torch.testing.assert_close([leaf.grad for leaf in sample.leaves()], expected, rtol=0, atol=0)
            self.assertLessEqual(counter.frame_count, 2, name)

    def test_an_offset_of_queries_reaches_the_captured_graph(self):
        for name in ("alibi_attention", "alibi_add", "alibi_softmax"):
            for offset in (-1, 2):
                op, sample = operator(name), CASES[name][1](Inputs(self.device, 4))
                sample.kwargs.update(causal=True, query_offset=offset)
                expected = self.accumulated(sample, op)
                with self.subTest(operator=name, offset=offset):
                    actual = self.accumulated(sample, op, "eager")
                    torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    def sample(self):
        return CASES["rotary_embedding_qk"][1](Inputs(self.device, 4))

    def test_a_graph_that_is_kept_gives_the_same_gradients_again(self):
        sample, op = self.sample(), operator("rotary_embedding_qk")
        expected = self.accumulated(sample, op)
        result = loss(sample, op)
        for _ in range(2):
            for leaf in sample.leaves():
                leaf.grad = None
            with captured():
                result.backward(retain_graph=True)
            torch.testing.assert_close([leaf.grad for leaf in sample.leaves()], expected, rtol=0, atol=0)

    def test_the_graph_is_released(self):
        result = loss(self.sample(), operator("rotary_embedding_qk"))
        with captured():
            result.backward()
        with self.assertRaisesRegex(RuntimeError, "second time|already been freed"):
            result.backward()

    def test_saved_tensor_hooks_run(self):
        sample, op = self.sample(), operator("rotary_embedding_qk")
        expected = self.accumulated(sample, op)
        unpacked = []

        def unpack(x):
            unpacked.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), unpack):
            result = loss(sample, op)
        for leaf in sample.leaves():
            leaf.grad = None
        with captured():
            result.backward()
        torch.testing.assert_close([leaf.grad for leaf in sample.leaves()], expected, rtol=0, atol=0)
        self.assertGreater(len(unpacked), 0)

    def test_a_saved_tensor_that_changed_is_noticed(self):
        sample, op = self.sample(), operator("rotary_embedding_qk")
        result = loss(sample, op)
        with torch.no_grad():
            sample.args[2].add_(1)
        with captured(), self.assertRaisesRegex(RuntimeError, "modified by an inplace operation"):
            result.backward()

    def test_rotation_of_a_view_in_place(self):
        i = Inputs(self.device, 5)
        cos, sin = i.normal(5, 3).detach(), i.normal(5, 3).detach()
        x = i.normal(2, 5, 3, 8)

        def backward():
            x.grad = None
            y = x.clone()
            torch.ops.posenc.rotary_embedding_(y[:, :, 1:], cos, sin)
            (y * weights(y)).sum().backward()
            return x.grad

        expected = backward()
        with captured():
            torch.testing.assert_close(backward(), expected, rtol=0, atol=0)


class CpuTest(CompiledAutograd, unittest.TestCase):
    pass


class CudaTest(CompiledAutograd, unittest.TestCase):
    device = "cuda"


if __name__ == "__main__":
    sys.exit(main())
