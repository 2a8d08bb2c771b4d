#!/usr/bin/env python3
"""posenc::context_parallel_alibi_attention in several processes, compared with attention over the whole sequence.

Expected values are computed by tensor operations in float64, with the scores in memory and without posenc.

POSENC_LIBRARY names the library. Plain unittest: python3 tests/python/context_parallel_test.py [cpu | cuda]
"""

import datetime
import os
import pathlib
import sys
import tempfile
import traceback
import unittest
import warnings

# A harmless warning on import.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ALL_SKIPPED = 77  # exit status that ctest reports as skipped
TIMEOUT = datetime.timedelta(seconds=60)  # for a rank that waits for one that has failed


# --- Calls and expected results ---------------------------------------------------------------------------------------


class Case:
    """One call on the whole sequence. `slopes` are multiples of 2^-6, which are exact in every dtype."""

    def __init__(
        self, dtype=torch.float64, causal=True, batch=2, chunk=3, q_heads=4, k_heads=2, head_dim=8, scale=None
    ):
        self.dtype, self.causal, self.scale = dtype, causal, scale
        self.batch, self.chunk, self.q_heads, self.k_heads, self.head_dim = batch, chunk, q_heads, k_heads, head_dim

    def __str__(self):
        return ", ".join(f"{name}={value}" for name, value in vars(self).items())

    def seq_len(self, ranks):
        return 2 * ranks * self.chunk

    def inputs(self, ranks):
        """float64 q, k, v, slopes and gradient of the output for the whole sequence, with values exact in `dtype`."""
        generator = torch.Generator().manual_seed(20210420)
        tokens = self.batch, self.seq_len(ranks)
        shapes = [(*tokens, heads, self.head_dim) for heads in (self.q_heads, self.k_heads, self.k_heads, self.q_heads)]
        drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        q, k, v, grad = (x.to(self.dtype).double() for x in drawn)
        slopes = (torch.arange(self.q_heads, dtype=torch.float64) + 1) / 64
        return q, k, v, slopes, grad


@torch.inference_mode(False)
@torch.enable_grad()
def expected(case, inputs):
    """Output and gradients of q, k, v and slopes, float64."""
    q, k, v, slopes = (x.detach().requires_grad_() for x in inputs[:4])
    times = case.q_heads // case.k_heads
    heads_first = [x.repeat_interleave(n, 2).transpose(1, 2) for x, n in ((q, 1), (k, times), (v, times))]
    position = torch.arange(q.size(1), device=q.device)
    distance = position[:, None] - position
    scores = heads_first[0] @ heads_first[1].transpose(-1, -2) * (case.scale or case.head_dim**-0.5)
    scores = scores - slopes[:, None, None] * distance.abs()
    if case.causal:
        scores = scores.masked_fill(distance < 0, -float("inf"))
    out = (scores.softmax(-1) @ heads_first[2]).transpose(1, 2)
    return out.detach(), *torch.autograd.grad(out, (q, k, v, slopes), inputs[4])


def my_tokens(seq_len, rank, ranks):
    """Token indices of chunks `rank` and `2 ranks - 1 - rank` of `2 ranks` chunks."""
    chunks = torch.arange(seq_len).chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


def bounds(case, ranks):
    """Bounds of the errors of output and gradients, relative to their norms.

    The output is rounded to its dtype, as is the partial output of each block and, in fused kernels, the probabilities.
    Gradients also see the rounding of the output and of the gradient of the scores. These roundings are independent:
    2 or 3 of them bound the error. Sums in the wider dtype over the keys and the channels come on top; the gradient of
    the scores is a difference of two sums over the channels. The gradient of a slope sums terms as large as the
    distances, most of which cancel, on tensor cores too.
    """
    narrow = case.dtype in (torch.float16, torch.bfloat16)
    roundoff = torch.finfo(case.dtype).eps / 2 if narrow else 0
    of_term = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps / 2
    of_out = (case.seq_len(ranks) + case.head_dim) * of_term
    of_gradients = (case.seq_len(ranks) + 2 * case.head_dim) * of_term
    of_slopes = 0.01 if narrow and case.head_dim >= 32 else case.seq_len(ranks) * of_gradients
    return [of_out + 2 * roundoff] + 3 * [of_gradients + 3 * roundoff] + [of_slopes]


# --- Functions that run in the processes ------------------------------------------------------------------------------


class Rank:
    """One process of a group."""

    def __init__(self, device):
        self.device = device
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.group = dist.group.WORLD.group_name

    def call(self, q, k, v, slopes, group=None, **kwargs):
        group = self.group if group is None else group
        return torch.ops.posenc.context_parallel_alibi_attention(q, k, v, slopes, group, **kwargs)[0]

    def shard(self, x):
        return x.index_select(1, my_tokens(x.size(1), self.rank, self.ranks).to(x.device))

    def inputs(self, case):
        return [x.to(self.device) for x in case.inputs(self.ranks)]

    def arguments(self, case, inputs):
        """Leaves q, k, v and slopes of this rank, and its part of the gradient of the output."""
        *qkv, grad = (self.shard(x).to(case.dtype) for x in (*inputs[:3], inputs[4]))
        slopes = inputs[3].to(torch.float64 if case.dtype == torch.float64 else torch.float32)
        return [x.detach().requires_grad_() for x in (*qkv, slopes)], grad

    def compare(self, case, names, actual, inputs):
        of_name = dict(zip(NAMES, zip(expected(case, inputs), bounds(case, self.ranks))))
        for name, x in zip(names, actual):
            value, bound = of_name[name]
            if name != "dslopes":
                value = self.shard(value)
            error = ((x.double() - value).norm() / value.norm()).item()
            assert error <= bound, f"{name} is off by {error:.3g}, more than {bound:.3g} ({case})"


NAMES = ("out", "dq", "dk", "dv", "dslopes")


def equals_the_whole(rank, case):
    inputs = rank.inputs(case)
    leaves, grad = rank.arguments(case, inputs)
    out = rank.call(*leaves, causal=case.causal, scale=case.scale)
    grads = list(torch.autograd.grad(out, leaves, grad))
    assert out.dtype == case.dtype and [g.dtype for g in grads] == [x.dtype for x in leaves]
    dist.all_reduce(grads[3])  # as for every parameter
    rank.compare(case, NAMES, (out, *grads), inputs)


def slopes_get_their_own_share(rank, case):
    """Without the all-reduce, the gradient of the slopes is what the queries of this rank contribute."""
    inputs = rank.inputs(case)
    leaves, grad = rank.arguments(case, inputs)
    (own,) = torch.autograd.grad(rank.call(*leaves, causal=case.causal), leaves[3:], grad)
    of_others = inputs[4].clone()
    mine = my_tokens(of_others.size(1), rank.rank, rank.ranks).to(rank.device)
    alone = torch.zeros_like(of_others).index_copy_(1, mine, of_others.index_select(1, mine))
    value = expected(case, [*inputs[:4], alone])[4]
    torch.testing.assert_close(own, value, rtol=1e-11, atol=1e-13)


def each_gradient_alone(rank, case):
    inputs = rank.inputs(case)
    for number, name in enumerate(NAMES[1:]):
        leaves, grad = rank.arguments(case, inputs)
        for leaf in leaves[:number] + leaves[number + 1 :]:
            leaf.requires_grad_(False)
        out = rank.call(*leaves, causal=case.causal)
        grads = list(torch.autograd.grad(out, [leaves[number]], grad))
        if name == "dslopes":
            dist.all_reduce(grads[0])
        rank.compare(case, [name], grads, inputs)


def log_sum_exp_has_gradients(rank, case):
    """Gradients of lse, compared with finite differences along (1, ..., 1) of one argument on all ranks at once."""
    inputs = rank.inputs(case)
    leaves, _ = rank.arguments(case, inputs)
    lse = torch.ops.posenc.context_parallel_alibi_attention(*leaves, rank.group, causal=case.causal)[1]
    weights = torch.randn(lse.shape, generator=torch.Generator().manual_seed(rank.rank), dtype=lse.dtype)
    grads = torch.autograd.grad((lse * weights.to(lse.device)).sum(), leaves)
    step = 1e-5
    for leaf, grad in zip(leaves, grads):
        values = []
        for sign in (1, -1):
            moved = [x.detach() + sign * step * (x is leaf) for x in leaves]
            value = torch.ops.posenc.context_parallel_alibi_attention(*moved, rank.group, causal=case.causal)[1]
            values.append((value * weights.to(lse.device)).sum())
        difference = (values[0] - values[1]) / (2 * step)
        pair = torch.stack([grad.sum(), difference])
        dist.all_reduce(pair)  # a key of one rank changes the rows of all ranks
        torch.testing.assert_close(pair[0], pair[1], rtol=1e-6, atol=1e-6)


def any_strides(rank, case):
    """q is [B, H, S, D] in memory, k and v are channels of wider tensors, and the gradient of sum() is expanded."""
    inputs = rank.inputs(case)
    inputs[4] = torch.ones_like(inputs[4])
    leaves, _ = rank.arguments(case, inputs)
    q = leaves[0].transpose(1, 2).contiguous().transpose(1, 2)
    k, v = (torch.cat([x, x], -1)[..., : case.head_dim] for x in leaves[1:3])
    out = rank.call(q, k, v, leaves[3], causal=case.causal)
    grads = list(torch.autograd.grad(out.sum(), leaves))
    dist.all_reduce(grads[3])
    assert out.stride() == q.stride()
    rank.compare(case, NAMES, (out, *grads), inputs)


def layers_share_a_group(rank, case):
    """Two calls, the second on the output of the first, and their backward passes. Two runs give the same bits."""
    leaves, grad = rank.arguments(case, rank.inputs(case))

    def step():
        first = rank.call(*leaves, causal=case.causal)
        second = rank.call(first, *leaves[1:], causal=not case.causal)
        return [second, *torch.autograd.grad(second, leaves, grad)]

    for a, b in zip(step(), step()):
        assert torch.equal(a, b)
    inputs = rank.inputs(case)
    first = expected(case, inputs)[0]
    other = Case(**{**vars(case), "causal": not case.causal})
    rank.compare(other, ["out"], [step()[0]], [first, *inputs[1:]])


def no_gradient_is_recorded(rank, case):
    inputs = rank.inputs(case)
    leaves, _ = rank.arguments(case, inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = rank.call(*leaves, causal=case.causal)
            assert not out.requires_grad
            rank.compare(case, ["out"], [out.clone()], inputs)


def a_subgroup_is_a_world_of_its_own(rank, case):
    """The last two ranks call the operator in a group of their own. The others do not take part."""
    members = [rank.ranks - 2, rank.ranks - 1]
    group = dist.new_group(members)
    if rank.rank not in members:
        return
    inner = Rank(rank.device)
    inner.rank, inner.ranks, inner.group = members.index(rank.rank), 2, group.group_name
    inputs = inner.inputs(case)
    leaves, grad = inner.arguments(case, inputs)
    out = inner.call(*leaves, causal=case.causal)
    grads = torch.autograd.grad(out, leaves[:3], grad)
    inner.compare(case, NAMES[:4], (out, *grads), inputs)


def autocast_computes_in_its_dtype(rank, case):
    leaves, grad = rank.arguments(case, rank.inputs(case))
    with torch.autocast(rank.device.split(":")[0], torch.bfloat16):
        out = rank.call(*leaves, causal=case.causal)
    assert out.dtype == torch.bfloat16, out.dtype
    grads = torch.autograd.grad(out, leaves, grad.bfloat16())
    assert [g.dtype for g in grads] == [x.dtype for x in leaves]
    narrow = [x.detach().bfloat16() for x in leaves[:3]]
    assert torch.equal(out, rank.call(*narrow, leaves[3].detach(), causal=case.causal))


def empty_batches_give_empty_results(rank, case):
    leaves, _ = rank.arguments(case, rank.inputs(case))
    empty = [x.detach()[:0].requires_grad_() for x in leaves[:3]]
    out = rank.call(*empty, leaves[3])
    out.sum().backward()
    assert out.shape == empty[0].shape and all(x.grad.shape == x.shape for x in empty)
    assert leaves[3].grad.eq(0).all()


def errors_name_the_argument(rank, case):
    leaves, grad = rank.arguments(case, rank.inputs(case))
    q, k, v, slopes = (x.detach() for x in leaves)

    def expect(text, *args, **kwargs):
        try:
            rank.call(*args, **kwargs)
        except Exception as error:
            assert text in str(error) and "posenc::context_parallel_alibi_attention: expected" in str(error), error
        else:
            raise AssertionError(f"no error that says {text}")

    expect("group_name to be the name of a registered process group, got \"nobody\"", q, k, v, slopes, "nobody")
    expect("q of shape [B, S / C, Hq, D]", q[0], k, v, slopes)
    expect("q of an even number of tokens", q[:, 1:], k[:, 1:], v[:, 1:], slopes)
    expect("k and v of as many tokens as q", q, k[:, 2:], v[:, 2:], slopes)
    expect("k of the dtype and device of q", q, k.half(), v, slopes)
    expect("v of the shape, dtype and device of k", q, k, v[:, 2:], slopes)
    expect("q of dtype", q.int(), k.int(), v.int(), slopes)
    expect("multiple of that of key heads", q[:, :, :3], k, v, slopes[:3])
    expect("slopes of shape", q, k, v, slopes[1:])
    expect("slopes of dtype", q, k, v, slopes.half())
    if rank.device != "cpu":
        expect("slopes on the device", q, k, v, slopes.cpu())
    # No rank has sent anything, so the group still works.
    equals_the_whole(rank, case)


def second_derivatives_are_refused(rank, case):
    leaves, grad = rank.arguments(case, rank.inputs(case))
    out = rank.call(*leaves, causal=case.causal)
    plain = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    first = torch.autograd.grad(out, leaves, grad, create_graph=True)
    torch.testing.assert_close(first, plain, rtol=0, atol=0)
    try:
        torch.autograd.grad(first[0].sum(), leaves[0])
    except RuntimeError as error:
        assert "expected gradients that are not differentiated again" in str(error), error
    else:
        raise AssertionError("no error")


# --- Processes --------------------------------------------------------------------------------------------------------


def serve(rank, ranks, device, backend, store, pipe):
    """Runs each function that comes through the pipe, and answers with the traceback of its error, or None."""
    torch.set_num_threads(1)
    if device == "cuda":
        device = f"cuda:{rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=TIMEOUT
    )
    member = Rank(device)
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            function(member, *arguments)
            pipe.send(None)
        except Exception:
            pipe.send(traceback.format_exc())
    dist.destroy_process_group()


class World:
    """Processes of one group, started again after a failure: other ranks may wait for what a rank did not send."""

    worlds = {}

    @classmethod
    def run(cls, ranks, device, backend, function, *arguments):
        key = ranks, device, backend
        if key not in cls.worlds:
            cls.worlds[key] = World(*key)
        failures = cls.worlds[key].all_ranks(function, arguments)
        if failures:
            cls.worlds.pop(key).end(kill=True)
            raise AssertionError("\n".join(failures))

    @classmethod
    def end_all(cls):
        while cls.worlds:
            cls.worlds.popitem()[1].end()

    def __init__(self, ranks, device, backend):
        self.folder = tempfile.TemporaryDirectory()
        store = str(pathlib.Path(self.folder.name) / "store")
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            arguments = rank, ranks, device, backend, store, there
            self.processes.append(context.Process(target=serve, args=arguments, daemon=True))
            self.processes[-1].start()
            there.close()
            self.pipes.append(here)

    def all_ranks(self, function, arguments):
        failures = []
        try:
            for pipe in self.pipes:
                pipe.send((function, arguments))
        except OSError:
            failures.append("a process has ended")
        for rank, pipe in enumerate(self.pipes):
            try:
                failure = pipe.recv()
            except EOFError:
                failure = "the process has ended"
            if failure is not None:
                failures.append(f"rank {rank}: {failure}")
        return failures

    def end(self, kill=False):
        for pipe, process in zip(self.pipes, self.processes):
            if kill:
                process.kill()
            else:
                pipe.send(None)
        for process in self.processes:
            process.join()
        self.folder.cleanup()


# --- Tests ------------------------------------------------------------------------------------------------------------


class Worlds:
    """Tests of groups of `sizes` on one device."""

    device = "cpu"
    backend = "gloo"
    sizes = (1, 2, 3, 4)
    small = Case()

    def everywhere(self, function, *cases, sizes=None):
        for ranks in sizes or self.sizes:
            for case in cases or (self.small,):
                with self.subTest(ranks=ranks, case=str(case)):
                    World.run(ranks, self.device, self.backend, function, case)

    def test_causal_equals_the_whole(self):
        self.everywhere(equals_the_whole, Case(causal=True), Case(causal=True, chunk=1, q_heads=3, k_heads=1))

    def test_symmetric_equals_the_whole(self):
        self.everywhere(equals_the_whole, Case(causal=False), Case(causal=False, chunk=1, q_heads=3, k_heads=3))

    def test_the_scale_is_the_callers(self):
        self.everywhere(equals_the_whole, Case(scale=0.5))

    def test_float32_equals_the_whole(self):
        self.everywhere(equals_the_whole, *[Case(torch.float32, causal, chunk=17) for causal in (True, False)])

    def test_bfloat16_equals_the_whole(self):
        self.everywhere(equals_the_whole, *[Case(torch.bfloat16, causal, chunk=16) for causal in (True, False)])

    def test_float16_equals_the_whole(self):
        self.everywhere(equals_the_whole, Case(torch.float16, chunk=16))

    def test_the_gradient_of_slopes_is_the_share_of_the_rank(self):
        self.everywhere(slopes_get_their_own_share)

    def test_each_gradient_alone_is_the_same(self):
        self.everywhere(each_gradient_alone, Case(causal=True), Case(causal=False))

    def test_log_sum_exp_has_gradients(self):
        self.everywhere(log_sum_exp_has_gradients)

    def test_any_strides(self):
        self.everywhere(any_strides)

    def test_layers_share_a_group(self):
        self.everywhere(layers_share_a_group)

    def test_without_gradients(self):
        self.everywhere(no_gradient_is_recorded)

    def test_autocast(self):
        self.everywhere(autocast_computes_in_its_dtype, Case(torch.float32))

    def test_empty(self):
        self.everywhere(empty_batches_give_empty_results)

    def test_errors(self):
        self.everywhere(errors_name_the_argument)

    def test_second_derivatives_are_refused(self):
        self.everywhere(second_derivatives_are_refused)


class CpuTest(Worlds, unittest.TestCase):
    def test_subgroups(self):
        self.everywhere(a_subgroup_is_a_world_of_its_own, sizes=(3,))


class Cuda(Worlds):
    """Groups of two ranks. Also shapes that are fused: chunks (half a shard) of 256 tokens, head_dim 128."""

    device = "cuda"
    sizes = (2,)

    def test_fused_attention_equals_the_whole(self):
        fused = dict(batch=1, q_heads=4, k_heads=2, head_dim=128)
        self.everywhere(
            equals_the_whole,
            *[
                Case(dtype, causal, chunk=chunk, **fused)
                for dtype, causal, chunk in (
                    (torch.bfloat16, True, 256),
                    (torch.bfloat16, False, 256),
                    (torch.bfloat16, True, 320),  # not a multiple of a tile
                    (torch.bfloat16, False, 320),
                    (torch.float16, True, 256),
                )
            ],
        )

    def require(self, count, what):
        """Skips the test if there are fewer than `count` GPUs. Processes share a GPU if the backend allows it."""
        if torch.cuda.device_count() >= count:
            return
        # POSENC_REQUIRE_CUDA asks for one GPU only: without a second one, tests that need two are skipped.
        if os.environ.get("POSENC_REQUIRE_CUDA", "0") not in ("", "0") and not torch.cuda.is_available():
            self.fail("no CUDA device, and POSENC_REQUIRE_CUDA is set")
        self.skipTest(f"{what}, got {torch.cuda.device_count()}")


class CudaGlooTest(Cuda, unittest.TestCase):
    def setUp(self):
        self.require(1, "Gloo between tensors of GPUs needs one")


class CudaNcclTest(Cuda, unittest.TestCase):
    backend = "nccl"

    def setUp(self):
        self.require(2, "NCCL needs two GPUs")


def main():
    suites = {"cpu": ["CpuTest"], "cuda": ["CudaGlooTest", "CudaNcclTest"]}
    argv = [name for argument in sys.argv for name in suites.get(argument, [argument])]
    try:
        program = unittest.main(argv=argv, exit=False, verbosity=2)
    finally:
        World.end_all()
    result = program.result
    if not result.wasSuccessful():
        return 1
    return ALL_SKIPPED if result.testsRun == len(result.skipped) else 0


torch.ops.load_library(os.environ["POSENC_LIBRARY"])

if __name__ == "__main__":
    sys.exit(main())
