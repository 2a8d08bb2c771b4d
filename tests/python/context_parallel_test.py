#!/usr/bin/env python3
"""posenc::context_parallel_alibi_attention among several processes, held against the whole sequence in one.

What is expected is worked out by tensor operations in float64, with the scores in memory and nothing of posenc. Each
world of processes starts once and runs all of its cases.

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

# Harmless, and said on import.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ALL_SKIPPED = 77  # what ctest is told to take for "skipped"
TIMEOUT = datetime.timedelta(seconds=60)  # of a rank that waits for one that has failed


# --- Calls and what they give -----------------------------------------------------------------------------------------


class Case:
    """One call on the whole sequence. `slopes` are multiples of 2^-6, which every dtype holds."""

    def __init__(self, dtype=torch.float64, causal=True, batch=2, chunk=3, q_heads=4, k_heads=2, head_dim=8, scale=None):
        self.dtype, self.causal, self.scale = dtype, causal, scale
        self.batch, self.chunk, self.q_heads, self.k_heads, self.head_dim = batch, chunk, q_heads, k_heads, head_dim

    def __str__(self):
        return ", ".join(f"{name}={value}" for name, value in vars(self).items())

    def seq_len(self, ranks):
        return 2 * ranks * self.chunk

    def inputs(self, ranks):
        """q, k, v, slopes and the gradient of the output, of the whole sequence, float64 numbers of `dtype`."""
        generator = torch.Generator().manual_seed(20210420)
        tokens = self.batch, self.seq_len(ranks)
        shapes = [(*tokens, heads, self.head_dim) for heads in (self.q_heads, self.k_heads, self.k_heads, self.q_heads)]
        q, k, v, grad = (torch.randn(s, generator=generator, dtype=torch.float64).to(self.dtype).double() for s in shapes)
        slopes = (torch.arange(self.q_heads, dtype=torch.float64) + 1) / 64
        return q, k, v, slopes, grad


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
    """Chunks `rank` and `2 ranks - 1 - rank` of `2 ranks`."""
    chunks = torch.arange(seq_len).chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


class Rank:
    """One process of a group."""

    def __init__(self, device):
        self.device = device
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.group = dist.group.WORLD.group_name

    def call(self, *args, **kwargs):
        return torch.ops.posenc.context_parallel_alibi_attention(*args[:4], *(args[4:] or [self.group]), **kwargs)[0]

    def shard(self, x, seq_len):
        return x.index_select(1, my_tokens(seq_len, self.rank, self.ranks).to(x.device))

    def arguments(self, case, inputs):
        """Of this rank: leaves, and the gradient of the output."""
        *qkv, grad = (self.shard(x, case.seq_len(self.ranks)).to(case.dtype) for x in (*inputs[:3], inputs[4]))
        slopes = inputs[3].to(torch.float64 if case.dtype == torch.float64 else torch.float32)
        return [x.detach().requires_grad_() for x in (*qkv, slopes)], grad

    def check(self, case):
        inputs = [x.to(self.device) for x in case.inputs(self.ranks)]
        leaves, grad = self.arguments(case, inputs)
        out = self.call(*leaves, causal=case.causal, scale=case.scale)
        grads = list(torch.autograd.grad(out, leaves, grad))
        assert out.dtype == case.dtype and [g.dtype for g in grads] == [x.dtype for x in leaves]
        dist.all_reduce(grads[3])  # as of every parameter
        values = expected(case, inputs)
        bounds = tolerances(case, inputs, values)
        for name, actual, value, bound in zip(("out", "dq", "dk", "dv", "dslopes"), (out, *grads), values, bounds):
            if name != "dslopes":
                value, bound = (self.shard(x.expand_as(value), case.seq_len(self.ranks)) for x in (value, bound))
            excess = ((actual.double() - value).abs() / bound).max().item()
            assert excess <= 1, f"{name} is off by {excess:.3g} times its bound ({case})"


def tolerances(case, inputs, values):
    """Bounds of the errors of output and gradients, each a tensor that broadcasts against its value.

    Results are rounded to the dtype once by the block and once at the end, and so are the gradients of a block; the fused
    kernels round probabilities and their gradients on the way into a product. All of it is a few roundings of terms
    whose sum has the size of the largest values.
    """
    sums = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps
    roundoff = max(torch.finfo(case.dtype).eps, 64 * sums)
    bounds = [4 * roundoff * value.abs().amax() for value in values[:4]]
    # Sums of as many terms as there are scores, each a probability times its gradient times a distance.
    q, _, v, _, grad = inputs
    terms = q.size(0) * q.size(1) * q.size(1) * (grad.norm(dim=-1).mean() * v.norm(dim=-1).mean())
    return [*bounds, roundoff * terms]
