"""Shared code of the Python tests of the operators: the library, sample calls, devices and the main program.

POSENC_LIBRARY names the library.
"""

import os
import sys
import unittest
import warnings

# A harmless warning on import.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
import torch.distributed
from torch.utils import _pytree as pytree

ALL_SKIPPED = 77  # exit status that ctest reports as skipped

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
        """`op` as a function of the tensors that require a gradient. In place, it changes and returns copies."""
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
    """`op`, or for an operator in place a function that changes copies of its arguments and returns them."""
    if not isinstance(op, torch._ops.OpOverload) or not op._schema.is_mutable:
        return op
    # Not inside of `call`, which torch.compile traces.
    changes = [argument.alias_info is not None and argument.alias_info.is_write for argument in op._schema.arguments]

    def call(*args, **kwargs):
        args = [arg.clone() if change else arg for arg, change in zip(args, changes)]
        op(*args, **kwargs)
        return tuple(arg for arg, change in zip(args, changes) if change)

    return call


def differentiable(value):
    return isinstance(value, torch.Tensor) and value.requires_grad


class Inputs:
    """Draws the tensors of one call. `size` is the length that varies between calls of a compiled function."""

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


def registered():
    """The names of all operators of the library."""
    names = (schema.name for schema in torch._C._jit_get_all_schemas())
    return sorted({name.split("::")[1] for name in names if name.startswith("posenc::")})


def operator(name):
    return getattr(torch.ops.posenc, name).default


def mutable(name):
    return operator(name)._schema.is_mutable


def outputs(result):
    """The differentiable tensors of a result."""
    return tuple(x for x in pytree.tree_leaves(result) if differentiable(x))


def finite(x):
    """x with 0 for infinity (hidden keys), because differences of infinities are NaN."""
    return x.masked_fill(x.isinf(), 0)


class OnDevice:
    """Base of a suite of tests that runs once on each device: `CpuTest` and `CudaTest` derive from it."""

    device = "cpu"

    def setUp(self):
        if self.device == "cpu" or torch.cuda.is_available():
            return
        if os.environ.get("POSENC_REQUIRE_CUDA", "0") not in ("", "0"):
            self.fail("no CUDA device, and POSENC_REQUIRE_CUDA is set")
        self.skipTest("no CUDA device")

    def for_each_sample(self, check, cases, size=5, grad=True, names=None):
        """Runs `check(name, case, sample)` as a subtest for every case of `cases`, a dictionary of lists."""
        for name in sorted(cases) if names is None else names:
            for number, case in enumerate(cases[name]):
                with self.subTest(operator=name, case=number):
                    check(name, case, case(Inputs(self.device, size, grad)))


def main():
    """Runs the suite of the device that the command line names, `cpu` or `cuda`, or both."""
    suites = {"cpu": "CpuTest", "cuda": "CudaTest"}
    program = unittest.main(argv=[suites.get(arg, arg) for arg in sys.argv], exit=False, verbosity=2)
    result = program.result
    status = 1
    if result.wasSuccessful():
        status = ALL_SKIPPED if result.testsRun == len(result.skipped) else 0
    if torch.cuda.is_initialized():
        # LibTorch's thread for the backward passes of a device may still take the GIL while the interpreter shuts down,
        # which sometimes aborts the process (pytorch/pytorch#38228). os._exit skips the shutdown.
        torch.cuda.synchronize()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
