#!/usr/bin/env python3
"""Compares context_parallel_alibi_attention on two GPUs with alibi_attention on one: ./dev context-parallel

Prints one table: bf16, batch 1, 16 heads of 128, causal, gradients given. Every figure is the median time of several
calls, each between CUDA events after a barrier, with the host ahead of the device. Of two GPUs the slower one counts.
Results are compared with those of one GPU. Without two GPUs, it runs two processes at small sizes on the CPU and uses
the host's clock.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
import warnings

# A harmless warning on import.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from peers import commit, posenc_version

RANKS = 2
HEADS = 16
HEAD_DIM = 128
RESULTS = ("out", "dq", "dk", "dv", "dslopes")


class Clock:
    """Median milliseconds of a call. With a group all ranks make the call, and the slowest rank counts."""

    def __init__(self, device, group, samples):
        self.device, self.group, self.samples = device, group, samples

    def __call__(self, call):
        call()  # makes the cuDNN plans
        times = torch.tensor([self.sample(call) for _ in range(self.samples)], device=self.device)
        if self.group is not None:
            dist.all_reduce(times, dist.ReduceOp.MAX, group=self.group)
        return statistics.median(times.tolist())

    def together(self):
        if self.group is not None:
            dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)

    def sample(self, call):
        if self.device.type == "cpu":
            self.together()
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        torch.cuda.synchronize()
        self.together()
        torch.cuda._sleep(4_000_000)  # cycles, about 2 ms: the host enqueues meanwhile
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


class Problem:
    """q, k, v and the gradient of the output for the whole sequence, `[1, S, 16, 128]`, the same on every rank."""

    def __init__(self, seq_len, device, dtype, slopes_grad):
        torch.manual_seed(0)
        self.q, self.k, self.v, self.grad = (
            torch.randn(1, seq_len, HEADS, HEAD_DIM, device=device, dtype=dtype) for _ in range(4)
        )
        self.slopes = torch.ops.posenc.alibi_slopes(HEADS).to(device)
        self.slopes_grad = slopes_grad

    def part(self, tokens):
        """Leaves q, k, v and slopes, and the gradient of the output, for the tokens given; None: all tokens."""
        take = (lambda x: x) if tokens is None else (lambda x: x.index_select(1, tokens))
        leaves = [take(x).detach().requires_grad_() for x in (self.q, self.k, self.v)]
        leaves.append(self.slopes.detach().requires_grad_(self.slopes_grad))
        return leaves, take(self.grad)


def measure(clock, call, leaves, grad):
    """Milliseconds of both passes, and the results in the order of RESULTS."""
    forward = clock(lambda: call(*leaves))
    out = call(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    backward = clock(lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True))
    return (forward, backward), [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def my_tokens(seq_len, rank, device):
    """The tokens of a rank in the load-balanced division of posenc/positions.h."""
    chunks = torch.arange(seq_len, device=device).chunk(2 * RANKS)
    return torch.cat([chunks[rank], chunks[2 * RANKS - 1 - rank]])


def errors(results, expected, tokens):
    """Errors of the ranks' results, relative to the norm of `expected`, which rank 0 has from one device."""
    relative = []
    for name, x, whole in zip(RESULTS, results, expected):
        dist.broadcast(whole, 0)
        if name == "dslopes":
            dist.all_reduce(x)
            part = whole
        else:
            part = whole.index_select(1, tokens)
        squares = torch.stack([(x.float() - part.float()).square().sum(), part.float().square().sum()])
        dist.all_reduce(squares)
        relative.append((squares[0] / squares[1]).sqrt().item())
    return relative


def table(rank, device, dtype, group, seq_len, samples, slopes_grad):
    problem = Problem(seq_len, device, dtype, slopes_grad)
    whole = None
    if rank == 0:
        leaves, grad = problem.part(None)
        alone, whole = measure(
            Clock(device, None, samples),
            lambda *x: torch.ops.posenc.alibi_attention(*x, causal=True)[0],
            leaves,
            grad,
        )
        del leaves, grad
    else:
        whole = [torch.empty_like(problem.q) for _ in range(4)] + [torch.empty_like(problem.slopes)] * slopes_grad
    dist.barrier()
    tokens = my_tokens(seq_len, rank, device)
    leaves, grad = problem.part(tokens)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    together, results = measure(
        Clock(device, group, samples),
        lambda *x: torch.ops.posenc.context_parallel_alibi_attention(*x, group.group_name, causal=True)[0],
        leaves,
        grad,
    )
    found = errors(results, whole, tokens)
    if rank != 0:
        return
    for name, one, two in zip(("Forward", "Backward"), alone, together):
        print(f"| {seq_len} | {name} | {one:.3f} | {two:.3f} | {one / two:.2f}x |")
    print(f"| {seq_len} | Total | {sum(alone):.3f} | {sum(together):.3f} | {sum(alone) / sum(together):.2f}x |")
    differences = ", ".join(f"{name} {error:.1e}" for name, error in zip(RESULTS, found))
    note = f"S {seq_len}: relative difference to one device: {differences}"
    if device.type == "cuda":
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        note += f"; peak memory of a rank beyond its inputs {peak:.2f} GiB"
    return note


def heading(device, slopes_grad):
    print("#### Context parallelism: causal ALiBi attention, batch 1, 16 heads of 128, one device and two\n")
    if device.type == "cuda":
        name = torch.cuda.get_device_properties(0).name
        print(f"2 x {name}, CUDA run time {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}  ")
        print("bf16; device time between CUDA events; gradients given; median; of two devices the slower  ")
    else:
        print("No two GPUs here: small sizes in float32 in two processes on the CPU, by the host's clock  ")
    print(f"posenc {posenc_version()} ({commit()}), torch {torch.__version__}{', learnable slopes' * slopes_grad}\n")
    print("| S | Pass | One (ms) | Two (ms) | Speedup |")
    print("|---:|---|---:|---:|---:|", flush=True)


def run(rank, library, store, slopes_grad):
    torch.ops.load_library(library)
    if torch.cuda.device_count() >= RANKS:
        device, backend, dtype = torch.device("cuda", rank), "nccl", torch.bfloat16
        torch.cuda.set_device(device)
        sizes = {32768: 11, 131072: 5}
    else:
        device, backend, dtype = torch.device("cpu"), "gloo", torch.float32
        torch.set_num_threads(1)
        sizes = {512: 5, 1024: 5}
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, RANKS),
        rank=rank,
        world_size=RANKS,
        device_id=device if backend == "nccl" else None,
    )
    if rank == 0:
        heading(device, slopes_grad)
    notes = [
        table(rank, device, dtype, dist.group.WORLD, seq_len, samples, slopes_grad)
        for seq_len, samples in sizes.items()
    ]
    if rank == 0:
        print("\n" + "  \n".join(notes), flush=True)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, help="libposenc.so")
    parser.add_argument("--slopes", action="store_true", help="slopes require a gradient too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = str(pathlib.Path(folder) / "store")
        mp.spawn(run, (str(pathlib.Path(arguments.library).resolve()), store, arguments.slopes), RANKS)


if __name__ == "__main__":
    main()
