#!/usr/bin/env python3
"""Every operator of libposenc as Python sees it: torch.library.opcheck, gradcheck, torch.compile.

POSENC_LIBRARY names the library. Plain unittest: python3 tests/python/operators_test.py [cpu | cuda]
"""

import os
import pathlib
import shutil
import sys
import sysconfig
import unittest
import warnings

# Harmless, and said on import.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
import torch.distributed
from torch.utils import _pytree as pytree

ALL_SKIPPED = 77  # what ctest is told to take for "skipped"

torch.ops.load_library(os.environ["POSENC_LIBRARY"])


class Sample:
    """One call: positional and keyword arguments of an operator."""

    def __init__(self, *args, **kwargs):
        self.args = args
        self.kwargs = kwargs

    def leaves(self):
        """The tensors that require a gradient."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if differentiable(leaf)]

    def function(self, op):
        """`op` of the tensors that require a gradient, alone. One that mutates its first argument returns a copy."""
        flat, spec = pytree.tree_flatten((self.args, self.kwargs))
        op = functional(op)

        def call(*leaves):
            remaining = iter(leaves)
            args, kwargs = pytree.tree_unflatten(
                [next(remaining) if differentiable(leaf) else leaf for leaf in flat], spec
            )
            return op(*args, **kwargs)

        return call


def functional(op):
    """`op`; of one in place, what has become of copies of the arguments that it changes."""
    if not op._schema.is_mutable:
        return op
    # Looked up here: torch.compile traces what is below.
    changes = [argument.alias_info is not None and argument.alias_info.is_write for argument in op._schema.arguments]

    def call(*args, **kwargs):
        args = [arg.clone() if change else arg for arg, change in zip(args, changes)]
        op(*args, **kwargs)
        return tuple(arg for arg, change in zip(args, changes) if change)

    return call


def differentiable(value):
    return isinstance(value, torch.Tensor) and value.requires_grad


class Inputs:
    """Draws the tensors of one call. `size` is what varies between the calls of one compiled function."""

    def __init__(self, device, size, grad=True):
        self.device = device
        self.size = size
        self.grad = grad
        self.generator = torch.Generator().manual_seed(20210420)

    def normal(self, *shape):
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device)
        return x.requires_grad_(self.grad)

    def positive(self, *shape):
        return (self.normal(*shape).detach().abs() + 0.1).requires_grad_(self.grad)

    def probabilities(self, *shape):
        return self.normal(*shape).detach().softmax(-1).requires_grad_(self.grad)

    def integers(self, values):
        return torch.tensor(values, device=self.device)


# --- Cases ------------------------------------------------------------------------------------------------------------
# For each operator, functions from Inputs to a Sample. Every operator that the library registers must be here.


def rotary(make):
    """Calls of the rotary operators: `make(inputs, (cos, sin), **keywords)` with and without the options."""
    return [
        lambda i: make(i, (i.normal(i.size, 3), i.normal(i.size, 3))),
        lambda i: make(
            i,
            (i.normal(9, 2), i.normal(9, 2)),
            positions=torch.arange(i.size, device=i.device).flip(0) % 9,
            interleaved=True,
            conjugate=True,
        ),
    ]


def on_axes(make):
    """The same with positions on three axes."""

    def sample(i):
        positions = torch.arange(3 * i.size, device=i.device).view(3, i.size) % 9
        return make(i, (i.normal(9, 3), i.normal(9, 3)), positions=positions, pair_axes=[0, 2, 1])

    return [sample]


def in_place(make):
    """Calls whose tables require no gradient: it would need the input, which is gone."""

    def without_table_gradients(i, tables, **kw):
        return make(i, [table.detach() for table in tables], **kw)

    return rotary(without_table_gradients) + on_axes(without_table_gradients)


def qk_norm(make):
    return rotary(lambda i, tables, **kw: make(i, tables, unit_offset=bool(kw), **kw))


def rotary_embedding(i, tables, **kw):
    return Sample(i.normal(2, i.size, 2, 8), *tables, **kw)


def rotary_embedding_qk(i, tables, **kw):
    return Sample(i.normal(2, i.size, 4, 8), i.normal(2, i.size, 2, 8), *tables, **kw)


def rotary_embedding_qkv(i, tables, **kw):
    return Sample(i.normal(2, i.size, (4 + 2 * 2) * 8), 4, 2, *tables, **kw)


def rotary_embedding_qkv_stacked(i, tables, **kw):
    return Sample(i.normal(2, i.size, 3, 2, 8), 2, 2, *tables, **kw)


def rotary_embedding_pack(i, tables, **kw):
    return Sample(*[i.normal(2, i.size, heads, 8) for heads in (4, 2, 2)], *tables, **kw)


def rotary_embedding_backward(i, tables, **kw):
    shapes = [(2, i.size, 4, 8), (2, i.size, 2, 8)]
    return Sample([i.normal(*s) for s in shapes], [i.normal(*s) for s in shapes], *tables, **kw)


def rotary_embedding_tables_backward(i, tables, **kw):
    shapes = [(2, i.size, 4, 8), (2, i.size, 2, 8)]
    # The table says its shape and nothing else.
    return Sample([i.normal(*s) for s in shapes], [i.normal(*s) for s in shapes], tables[0].detach(), **kw)


def qk_norm_rotary_embedding(i, tables, **kw):
    return Sample(i.normal(2, i.size, 4, 8), i.normal(2, i.size, 2, 8), i.normal(8), i.normal(8), *tables, **kw)


def qk_norm_rotary_embedding_backward(i, tables, **kw):
    shapes = [(2, i.size, 4, 8), (2, i.size, 2, 8)] * 2
    tables = [table.detach() for table in tables]
    return Sample(*[i.normal(*s) for s in shapes], i.normal(8), i.normal(8), *tables, **kw)


def attention(i, **kw):
    return Sample(
        i.normal(2, i.size, 4, 8), i.normal(2, i.size, 2, 8), i.normal(2, i.size, 2, 8), i.positive(4), **kw
    )


def attention_backward(i, **kw):
    forward = attention(i, **kw)
    q, k, v, slopes = (x.detach() for x in forward.args)
    out, lse = torch.ops.posenc.alibi_attention(q, k, v, slopes, **kw)
    return Sample(torch.ones_like(out), torch.ones_like(lse), q, k, v, slopes, out, lse, **kw)


def attention_slope_sums(i, **kw):
    forward = attention(i, **kw)
    q, k, v, slopes = (x.detach() for x in forward.args)
    out, lse = torch.ops.posenc.alibi_attention(q, k, v, slopes, **kw)
    return Sample(torch.ones_like(out), q, k, v, slopes, lse, **kw)


def group_of_one():
    """The name of a group that needs no communication; tests/python/context_parallel_test.py has larger ones."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return torch.distributed.group.WORLD.group_name


def even(i):
    """Inputs of an even number of tokens, the two chunks of a rank."""
    return Inputs(i.device, 2 * (i.size // 2), i.grad)


def context_parallel_attention(i, **kw):
    return Sample(*attention(even(i)).args, group_of_one(), **kw)


def context_parallel_attention_backward(i, grad_mask=(True, True, True, True), **kw):
    q, k, v, slopes = (x.detach() for x in attention(even(i)).args)
    out, lse = torch.ops.posenc.context_parallel_alibi_attention(q, k, v, slopes, group_of_one(), **kw)
    grads = torch.ones_like(out), torch.ones_like(lse)
    return Sample(*grads, q, k, v, slopes, out, lse, group_of_one(), grad_mask=list(grad_mask), **kw)


CASES = {
    "rotary_embedding": rotary(rotary_embedding) + on_axes(rotary_embedding),
    "rotary_embedding_qk": rotary(rotary_embedding_qk) + on_axes(rotary_embedding_qk),
    "rotary_embedding_": in_place(rotary_embedding),
    "rotary_embedding_qk_": in_place(rotary_embedding_qk),
    "rotary_embedding_qkv": rotary(rotary_embedding_qkv)
    + on_axes(rotary_embedding_qkv)
    + rotary(rotary_embedding_qkv_stacked),
    "rotary_embedding_pack": rotary(rotary_embedding_pack) + on_axes(rotary_embedding_pack),
    "rotary_embedding_backward": rotary(rotary_embedding_backward) + on_axes(rotary_embedding_backward),
    "rotary_embedding_tables_backward": rotary(rotary_embedding_tables_backward)
    + on_axes(rotary_embedding_tables_backward),
    "rotary_tables": [
        lambda i: Sample(i.positive(3), i.size, dtype=torch.float64),
        lambda i: Sample(i.positive(3), i.size, dtype=torch.float64, attention_factor=1.25),
    ],
    "rotary_tables_backward": [
        lambda i: Sample(*[i.normal(i.size, 3) for _ in range(4)], dtype=torch.float64),
    ],
    "qk_norm_rotary_embedding": qk_norm(qk_norm_rotary_embedding) + on_axes(qk_norm_rotary_embedding),
    "qk_norm_rotary_embedding_backward": qk_norm(qk_norm_rotary_embedding_backward)
    + on_axes(qk_norm_rotary_embedding_backward),
    "alibi_slopes": [lambda i: Sample(12), lambda i: Sample(8, max_bias=4.0)],
    "alibi_bias": [
        lambda i: Sample(i.positive(3), i.size, i.size + 1, dtype=torch.float64),
        lambda i: Sample(i.positive(3), i.size, i.size, causal=True, dtype=torch.float64, query_offset=1),
    ],
    "alibi_add": [
        lambda i: Sample(i.normal(2, 3, i.size, i.size + 1), i.positive(3)),
        lambda i: Sample(i.normal(3, i.size, i.size), i.positive(3), causal=True, query_offset=1),
    ],
    "alibi_add_": [
        lambda i: Sample(i.normal(2, 3, i.size, i.size + 1), i.positive(3)),
        lambda i: Sample(i.normal(3, i.size, i.size), i.positive(3), causal=True, query_offset=1),
    ],
    "alibi_mask": [
        lambda i: Sample(i.normal(2, 3, i.size, i.size + 1)),
        lambda i: Sample(i.normal(3, i.size, i.size), query_offset=1),
    ],
    "alibi_slopes_backward": [
        lambda i: Sample(i.normal(2, 3, i.size, i.size + 1)),
        lambda i: Sample(i.normal(3, i.size, i.size), causal=True, query_offset=1),
    ],
    "alibi_softmax": [
        lambda i: Sample(i.normal(2, 3, i.size, i.size + 1), i.positive(3), scale=0.5),
        lambda i: Sample(
            i.normal(1, 3, i.size, i.size),
            i.positive(3),
            causal=True,
            query_offset=1,
            key_padding_mask=(torch.arange(i.size, device=i.device) == 2)[None],
        ),
    ],
    "alibi_softmax_backward": [
        lambda i: Sample(i.normal(2, 3, i.size, i.size + 1), i.probabilities(2, 3, i.size, i.size + 1), scale=0.5),
        lambda i: Sample(i.normal(3, i.size, i.size), i.probabilities(3, i.size, i.size), slopes_grad=False),
    ],
    "alibi_attention": [
        lambda i: attention(i),
        lambda i: attention(i, scale=0.5, causal=True, query_offset=1),
        lambda i: attention(i, seqlens_q=i.integers([3, 4]), seqlens_k=i.integers([2, 4])),
    ],
    "alibi_attention_backward": [
        lambda i: attention_backward(i),
        lambda i: attention_backward(i, scale=0.5, causal=True, query_offset=1),
    ],
    "alibi_attention_slope_sums": [
        lambda i: attention_slope_sums(i),
        lambda i: attention_slope_sums(i, scale=0.5, causal=True, query_offset=1),
    ],
    "context_parallel_alibi_attention": [
        lambda i: context_parallel_attention(i),
        lambda i: context_parallel_attention(i, scale=0.5, causal=True),
    ],
    "context_parallel_alibi_attention_backward": [
        lambda i: context_parallel_attention_backward(i, causal=True),
        lambda i: context_parallel_attention_backward(i, grad_mask=(True, False, True, False)),
    ],
}

# Operators without a second derivative of their own: the gradients of attention say so when they are differentiated.
ONCE = {"alibi_attention", "context_parallel_alibi_attention"}


def registered():
    names = (schema.name for schema in torch._C._jit_get_all_schemas())
    return sorted({name.split("::")[1] for name in names if name.startswith("posenc::")})


def operator(name):
    return getattr(torch.ops.posenc, name).default


def outputs(result):
    """The differentiable tensors of a result."""
    return tuple(x for x in pytree.tree_leaves(result) if differentiable(x))


def finite(x):
    """Zero where a key is hidden: differences of infinities are none."""
    return x.masked_fill(x.isinf(), 0)


class Operators:
    """Tests of all operators on one device."""

    device = "cpu"

    def for_each_sample(self, check, size=5, grad=True, names=None):
        """`check(name, case, sample)` of every case, each a subtest."""
        for name in sorted(CASES) if names is None else names:
            for number, case in enumerate(CASES[name]):
                with self.subTest(operator=name, case=number):
                    check(name, case, case(Inputs(self.device, size, grad)))

    def test_each_operator_passes_opcheck(self):
        def check(name, _, sample):
            torch.library.opcheck(operator(name), sample.args, sample.kwargs)

        self.for_each_sample(check, grad=False)
        # A leaf that requires a gradient cannot change in place.
        self.for_each_sample(check, names=[name for name in sorted(CASES) if not operator(name)._schema.is_mutable])

    def check_differences(self, gradcheck, **options):
        def check(name, _, sample):
            op = operator(name)
            call = sample.function(op)
            if sample.leaves():
                results = lambda *leaves: tuple(finite(x) for x in outputs(call(*leaves)))
                self.assertTrue(gradcheck(results, sample.leaves(), atol=1e-6))

        self.for_each_sample(check, **options)

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
            lambda name, case, _: self.expect_compiled_is_eager(name, case, sizes, **options), names=names
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

    def setUp(self):
        if torch.cuda.is_available():
            return
        if os.environ.get("POSENC_REQUIRE_CUDA", "0") not in ("", "0"):
            self.fail("no CUDA device, and POSENC_REQUIRE_CUDA is set")
        self.skipTest("no CUDA device")


def main():
    suites = {"cpu": "CpuTest", "cuda": "CudaTest"}
    program = unittest.main(argv=[suites.get(arg, arg) for arg in sys.argv], exit=False, verbosity=2)
    result = program.result
    if not result.wasSuccessful():
        return 1
    return ALL_SKIPPED if result.testsRun == len(result.skipped) else 0


if __name__ == "__main__":
    sys.exit(main())
