#!/usr/bin/env python3
"""Derivatives of every differentiable operator of libposenc, with independent and with dependent inputs.

Expected values come from plain PyTorch operations in float64 (operator_references.py), never from posenc.

POSENC_LIBRARY names the library. Plain unittest: python3 tests/python/derivatives_test.py [cpu | cuda]
"""

import itertools
import sys
import unittest
import warnings

from support import OnDevice, finite, main, mutable, operator, outputs

import torch

from operator_cases import CASES
from operator_references import REFERENCES

DIFFERENTIABLE = sorted(set(REFERENCES) - {"alibi_slopes"})
# Gradients of context-parallel attention cannot be differentiated again: an error says so.
TWICE = [name for name in DIFFERENTIABLE if name != "context_parallel_alibi_attention"]


def weighted(results, which=None):
    """A scalar of all results, or of result number `which`, with a different weight for each element.

    Not linear, so that the gradients which enter the backward pass depend on the inputs as well.
    """
    total = 0
    for number, result in enumerate(results):
        if which in (None, number):
            result = finite(result)
            weights = torch.linspace(-1, 1.5, result.numel(), dtype=result.dtype, device=result.device).cos()
            total = total + (result * weights.view(result.shape)).sum() + result.square().sum() / 4
    return total


def as_tuple(result):
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def resized(x, shape):
    """The elements of x in another shape, repeated if x has too few."""
    count = shape.numel()
    return x.flatten().repeat(-(-count // x.numel()))[:count].view(shape)


# --- How inputs depend on each other ----------------------------------------------------------------------------------
# Each function takes the shapes of the inputs of a call. It returns the shapes of the independent tensors, and a
# function that computes the inputs from them.


def separate(shapes):
    return shapes, lambda *tensors: tensors


def one_tensor_for_each_shape(shapes):
    """Inputs of one shape are one tensor: f(x, x, x), k and v, cos and sin."""
    distinct = list(dict.fromkeys(shapes))
    return distinct, lambda *tensors: [tensors[distinct.index(shape)] for shape in shapes]


def functions_of_the_first(shapes):
    """k = g(q) and v = h(k), with q passed as well."""

    def inputs(x):
        result = [x]
        for shape in shapes[1:]:
            result.append(resized(result[-1], shape).sin() + 0.5)
        return result

    return shapes[:1], inputs


def views_of_one_projection(shapes):
    sizes = [shape.numel() for shape in shapes]

    def inputs(x):
        return [part.view(shape) for part, shape in zip(x.split(sizes), shapes)]

    return [torch.Size([sum(sizes)])], inputs


ARRANGEMENTS = [separate, one_tensor_for_each_shape, functions_of_the_first, views_of_one_projection]


class Call:
    """An operator and its reference as scalar functions of independent tensors."""

    def __init__(self, name, sample, arrangement=separate):
        leaves = sample.leaves()
        shapes, inputs = arrangement([leaf.shape for leaf in leaves])
        generator = torch.Generator().manual_seed(20210420)
        self.tensors = [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(leaves[0].device).requires_grad_()
            for shape in shapes
        ]
        actual, expected = sample.function(operator(name)), sample.function(REFERENCES[name])
        self.actual = lambda *tensors, which=None: weighted(as_tuple(actual(*inputs(*tensors))), which)
        self.expected = lambda *tensors, which=None: weighted(as_tuple(expected(*inputs(*tensors))), which)
        self.num_outputs = len(outputs(expected(*inputs(*self.tensors))))

    def towards(self, directions=2):
        """Both as functions of a vector t that moves each tensor along `directions` lines. Keeps Jacobians small."""
        generator = torch.Generator().manual_seed(1)
        lines = [torch.randn(directions, *x.shape, generator=generator, dtype=x.dtype).to(x) for x in self.tensors]
        start = [x.detach() for x in self.tensors]

        def along(f):
            return lambda t: f(*[x + torch.tensordot(t, line, 1) for x, line in zip(start, lines)])

        t = torch.linspace(0.1, 0.2, directions, dtype=torch.float64, device=start[0].device)
        return along(self.actual), along(self.expected), t


def gradients(f, tensors, **kw):
    return torch.autograd.grad(f(*tensors), tensors, allow_unused=True, materialize_grads=True, **kw)


class Derivatives(OnDevice):
    def assert_equal(self, actual, expected, rtol=1e-9):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol, check_dtype=rtol < 1e-6)

    def for_each_call(self, check, names=DIFFERENTIABLE, arrangements=(separate,), size=4):
        """Runs `check(call)` for every case and each arrangement of its inputs."""
        for arrangement in arrangements:
            with self.subTest(inputs=arrangement.__name__):
                self.for_each_sample(
                    lambda name, _, sample: check(Call(name, sample, arrangement)) if sample.leaves() else None,
                    CASES,
                    size=size,
                    names=names,
                )

    # --- First derivatives ---

    def check_first(self, create_graph, names):
        def check(call):
            expected = gradients(call.expected, call.tensors)
            self.assert_equal(gradients(call.actual, call.tensors, create_graph=create_graph), expected)

        self.for_each_call(check, names, ARRANGEMENTS)

    def test_first_derivatives_are_right(self):
        self.check_first(create_graph=False, names=DIFFERENTIABLE)

    def test_first_derivatives_that_can_be_differentiated_are_right(self):
        self.check_first(create_graph=True, names=TWICE)

    def test_every_subset_of_inputs_gets_its_gradients(self):
        def check(name, _, sample):
            call = Call(name, sample)
            expected = gradients(call.expected, call.tensors)
            numbers = range(len(call.tensors))
            for count in numbers:
                for subset in itertools.combinations(numbers, count):
                    if subset:
                        tensors = [x.detach().requires_grad_(n in subset) for n, x in enumerate(call.tensors)]
                        wanted = [tensors[n] for n in subset]
                        for create_graph in (False, True) if name in TWICE else (False,):
                            found = torch.autograd.grad(call.actual(*tensors), wanted, create_graph=create_graph)
                            self.assert_equal(found, tuple(expected[n] for n in subset))

        # Without operators in place, whose first input always requires a gradient here.
        self.for_each_sample(check, CASES, size=3, names=[name for name in DIFFERENTIABLE if not mutable(name)])

    def test_gradients_flow_through_each_output_alone(self):
        def check(name, _, sample):
            call = Call(name, sample)
            for which in range(call.num_outputs):
                expected = gradients(lambda *x: call.expected(*x, which=which), call.tensors)
                for create_graph in (False, True) if name in TWICE else (False,):
                    found = gradients(
                        lambda *x: call.actual(*x, which=which), call.tensors, create_graph=create_graph
                    )
                    self.assert_equal(found, expected)

        self.for_each_sample(check, CASES, size=4, names=[name for name in DIFFERENTIABLE if not mutable(name)])

    def test_backward_with_a_graph_in_an_autocast_region_keeps_the_precision(self):
        def check(call):
            tensors = [x.detach().float().requires_grad_() for x in call.tensors]
            result = call.actual(*tensors)
            with torch.autocast(self.device, dtype=torch.bfloat16):
                found = torch.autograd.grad(result, tensors, create_graph=True, allow_unused=True)
            expected = gradients(call.expected, [x.detach().double().requires_grad_() for x in tensors])
            for actual, value, x in zip(found, expected, tensors):
                self.assertEqual(actual.dtype, x.dtype)
                self.assert_equal(actual.double(), value, rtol=1e-4)

        # Without operators whose cases ask for float64 results.
        names = [name for name in TWICE if name not in ("alibi_bias", "rotary_tables") and not mutable(name)]
        self.for_each_call(check, names)

    # --- Second derivatives ---

    def test_second_derivatives_are_right(self):
        def second(f, tensors):
            first = gradients(f, tensors, create_graph=True)
            return gradients(lambda *_: weighted(first), tensors)

        def check(call):
            self.assert_equal(second(call.actual, call.tensors), second(call.expected, call.tensors))

        self.for_each_call(check, TWICE, ARRANGEMENTS)

    def test_a_gradient_penalty_trains_a_small_model(self):
        def trained(f, tensors):
            """Gradients of the parameters of a model that scales its inputs, for a loss with a gradient penalty."""
            factors = torch.linspace(0.5, 1.5, len(tensors), dtype=tensors[0].dtype, device=tensors[0].device)
            factors.requires_grad_()
            loss = f(*[(x * factor).sin() for x, factor in zip(tensors, factors)])
            found = torch.autograd.grad(loss, tensors, create_graph=True)
            (loss + sum(grad.square().sum() for grad in found)).backward()
            return factors.grad

        self.for_each_call(
            lambda call: self.assert_equal(trained(call.actual, call.tensors), trained(call.expected, call.tensors)),
            TWICE,
            ARRANGEMENTS[:2],
        )

    def test_second_derivatives_over_processes_are_refused(self):
        name = "context_parallel_alibi_attention"

        def check(call):
            with self.assertRaisesRegex(RuntimeError, "expected gradients that are not differentiated again"):
                gradients(lambda *x: weighted(gradients(call.actual, x, create_graph=True)), call.tensors)

        self.for_each_call(check, [name])

    # --- torch.func and batched gradients ---

    def check_transform(self, transform):
        def check(call):
            actual, expected, t = call.towards()
            self.assert_equal(transform(actual)(t), transform(expected)(t))

        self.for_each_call_of_vmap(check, TWICE)

    def for_each_call_of_vmap(self, check, names):
        with warnings.catch_warnings():
            # vmap loops over operators without a batching rule, and warns that this is slow.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            self.for_each_call(check, [name for name in names if not mutable(name)], ARRANGEMENTS[:2], size=3)

    def test_func_grad(self):
        self.check_transform(torch.func.grad)

    def test_func_vjp(self):
        self.check_transform(lambda f: lambda t: torch.func.vjp(f, t)[1](torch.ones_like(t[0])))

    def test_func_jacrev(self):
        self.check_transform(lambda f: torch.func.jacrev(lambda t: torch.stack([f(t), f(2 * t)])))

    def test_func_jacrev_of_jacrev(self):
        self.check_transform(lambda f: torch.func.jacrev(torch.func.jacrev(f)))

    def test_func_vmap_of_grad(self):
        self.check_transform(lambda f: lambda t: torch.func.vmap(torch.func.grad(f))(torch.stack([t, -t])))

    def test_batched_gradients(self):
        def check(call):
            actual, expected, t = call.towards()
            t.requires_grad_()
            results = torch.stack([actual(t), actual(2 * t)])
            (found,) = torch.autograd.grad(results, t, torch.eye(2).to(results), is_grads_batched=True)
            one_by_one = [torch.autograd.grad(expected(factor * t), t)[0] for factor in (1, 2)]
            self.assert_equal(found, torch.stack(one_by_one))

        self.for_each_call_of_vmap(check, DIFFERENTIABLE)

    # --- Known values of attention without a mask: one head of one channel, slope 0.5, scale 1 ---

    def attention(self, q, k, v):
        def sequence(x):
            x = x if isinstance(x, torch.Tensor) else self.tensor(x)
            return x.view(1, -1, 1, 1)

        slopes = self.tensor([0.5])
        return torch.ops.posenc.alibi_attention(sequence(q), sequence(k), sequence(v), slopes, scale=1.0)[0]

    def tensor(self, values):
        return torch.tensor(values, dtype=torch.float64, device=self.device)

    def test_attention_whose_keys_are_its_values(self):
        x = self.tensor([1, 3]).requires_grad_()
        for create_graph in (False, True):
            with self.subTest(create_graph=create_graph):
                (grad,) = torch.autograd.grad(self.attention([1, 2], x, x).sum(), x, create_graph=create_graph)
                self.assert_equal(grad.detach(), self.tensor([-0.14835, 2.14835]), rtol=1e-5)

    def test_attention_of_values_alone(self):
        v = self.tensor([1, 3]).requires_grad_()
        for create_graph in (False, True):
            with self.subTest(create_graph=create_graph):
                (grad,) = torch.autograd.grad(self.attention([1, 2], [1, 3], v).sum(), v, create_graph=create_graph)
                self.assert_equal(grad.detach(), self.tensor([0.19341, 1.80659]), rtol=1e-5)

    def test_jacobian_of_the_jacobian_of_attention(self):
        f = lambda q: self.attention(q, [1, 3], [1, 3]).sum()
        hessian = torch.func.jacrev(torch.func.jacrev(f))(self.tensor([1, 2]))
        self.assert_equal(hessian, self.tensor([[-0.75784, 0], [0, -0.08502]]), rtol=1e-5)


class CpuTest(Derivatives, unittest.TestCase):
    pass


class CudaTest(Derivatives, unittest.TestCase):
    device = "cuda"


if __name__ == "__main__":
    sys.exit(main())
