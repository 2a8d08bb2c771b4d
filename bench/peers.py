#!/usr/bin/env python3
"""Compares posenc with other Python packages: ./dev peers

Prints a table per configuration. Attention is compared with FlexAttention and LibTorch's own attention, the other
operators with eager tensor operations and torch.compile of them, and rotations also with Liger, flash-attn,
TransformerEngine, FlashInfer and transformers, if they can be imported. Every implementation is checked against float64
before it is timed; if it fails, its row shows the error. The protocol is `kernel` of README.md: device time between
CUDA events, the L2 cache flushed and the host ahead of the device, gradients given, median.
"""

import argparse
import importlib.metadata
import os
import pathlib
import re
import statistics
import subprocess
import time
import warnings

# A harmless warning on import.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
import torch._functorch.config

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ["torch", "triton", "liger-kernel", "flash-attn", "transformer-engine", "flashinfer-python", "transformers"]
HEAD_DIM = 128


# --- Timing -----------------------------------------------------------------------------------------------------------


class Clock:
    """The time of a call in milliseconds: median of `samples` after warm-ups."""

    def __init__(self, device, samples):
        self.device = device
        self.samples = samples
        if device == "cuda":
            flush_bytes = 2 * torch.cuda.get_device_properties(0).L2_cache_size
            self.flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def __call__(self, call):
        for _ in range(3):
            call()
        sample = self.on_device if self.device == "cuda" else self.on_host
        return statistics.median(sample(call) for _ in range(self.samples))

    def on_device(self, call):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(4_000_000)  # cycles, about 2 ms: the host enqueues everything meanwhile
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    @staticmethod
    def on_host(call):
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)


# --- Problems ---------------------------------------------------------------------------------------------------------
# A problem has inputs (some require gradients), gradients of the outputs, and `exact`, the expected outputs.


class Problem:
    def compared(self, outputs):
        """The part of the outputs that `exact` computes."""
        return outputs

    def operations(self):
        """Floating point operations forward and backward, if the problem is compute-bound; else None."""
        return None


def angles(seq_len, device, dtype=torch.float64):
    inv_freq = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64, device=device) / HEAD_DIM)
    return torch.outer(torch.arange(seq_len, dtype=torch.float64, device=device), inv_freq).to(dtype)


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def rotated(x, cos, sin):
    """The usual formulation, for x [B, S, H, D] and tables [S, 1, D]."""
    return x * cos + rotate_half(x) * sin


class Rotary(Problem):
    """q and k, [1, S, H, 128] each; tables of posenc and of the usual formulation."""

    encoding = "RoPE"

    def __init__(self, device, dtype, seq_len, heads):
        self.title = f"RoPE, q and k: {name_of(dtype)}, batch 1, sequence {seq_len}, {heads} heads of {HEAD_DIM}"
        self.seq_len, self.heads, self.dtype, self.device = seq_len, heads, dtype, device
        shape = (1, seq_len, heads, HEAD_DIM)
        self.inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
        self.grads = [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]
        theta = angles(seq_len, device)
        self.cos, self.sin = theta.cos().float(), theta.sin().float()
        wide = torch.cat((theta, theta), -1)[:, None]
        self.wide_cos, self.wide_sin = wide.cos(), wide.sin()
        # Tables as models keep them: in the dtype of the activations.
        self.usual = self.wide_cos.to(dtype), self.wide_sin.to(dtype)

    def exact(self, *inputs):
        return tuple(rotated(x.double(), self.wide_cos, self.wide_sin) for x in inputs)


class QkNormRotary(Rotary):
    """RMSNorm over each head, then the rotation."""

    encoding = "QK norm + RoPE"

    def __init__(self, device, dtype, seq_len, heads):
        super().__init__(device, dtype, seq_len, heads)
        self.title = f"QK norm + {self.title}"
        self.inputs += [torch.ones(HEAD_DIM, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]

    def exact(self, q, k, q_weight, k_weight):
        normed = [rms_norm(x.double(), w.double()) for x, w in ((q, q_weight), (k, k_weight))]
        return tuple(rotated(x, self.wide_cos, self.wide_sin) for x in normed)


def rms_norm(x, weight):
    wide = x.float() if x.dtype != torch.float64 else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


class AlibiSoftmax(Problem):
    """Softmax over scaled scores [1, H, S, S] and the causal bias."""

    encoding = "ALiBi softmax"

    def __init__(self, device, dtype, seq_len, heads):
        self.title = f"ALiBi softmax: {name_of(dtype)}, batch 1, sequence {seq_len}, {heads} heads, causal"
        self.dtype, self.seq_len, self.device = dtype, seq_len, device
        shape = (1, heads, seq_len, seq_len)
        self.inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True)]
        self.grads = [torch.randn(shape, device=device, dtype=dtype)]
        self.slopes = torch.ops.posenc.alibi_slopes(heads).to(device)

    def exact(self, scores):
        return (alibi_softmax(scores.double(), self.slopes.double()),)


def alibi_softmax(scores, slopes):
    token = torch.arange(scores.size(-1), device=scores.device)
    distance = token[:, None] - token
    bias = (-slopes[:, None, None] * distance).masked_fill(distance < 0, -float("inf"))
    return torch.softmax(scores.to(bias.dtype) / HEAD_DIM**0.5 + bias, -1).to(scores.dtype)


class AlibiAttention(Problem):
    """Attention of q, k and v [B, S, H, 128] with the ALiBi bias. Only ROWS rows of one sequence are compared: the
    float64 scores of all rows would not fit in memory."""

    encoding = "ALiBi attention"
    ROWS = 256

    def __init__(self, device, dtype, batch, seq_len, heads, causal, learnable=False):
        self.title = (
            f"ALiBi attention: {name_of(dtype)}, batch {batch}, sequence {seq_len}, {heads} heads of {HEAD_DIM}, "
            f"{'causal' if causal else 'symmetric'}{', learnable slopes' if learnable else ''}"
        )
        self.dtype, self.device, self.causal, self.learnable = dtype, device, causal, learnable
        self.batch, self.seq_len, self.heads = batch, seq_len, heads
        shape = (batch, seq_len, heads, HEAD_DIM)
        self.slopes = torch.ops.posenc.alibi_slopes(heads).to(device)
        self.inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        self.inputs += [self.slopes.clone().requires_grad_()] if learnable else []
        self.grads = [torch.randn(shape, device=device, dtype=dtype)]
        self.rows = torch.randint(seq_len, (self.ROWS,), device=device)

    def exact(self, q, k, v, slopes=None):
        q, k, v = q[-1, self.rows].double(), k[-1].double(), v[-1].double()
        distance = self.rows[:, None] - torch.arange(self.seq_len, device=self.device)
        scores = torch.einsum("ihd,jhd->hij", q, k) / HEAD_DIM**0.5
        scores -= self.slopes.double()[:, None, None] * distance.abs()
        if self.causal:
            scores.masked_fill_(distance < 0, -float("inf"))
        return (torch.einsum("hij,jhd->ihd", scores.softmax(-1), v),)

    def compared(self, outputs):
        return (outputs[0][-1, self.rows],)

    def operations(self):
        # Matrix products: two forward, five backward, over all scores or, if causal, over half of them.
        product = 2 * self.batch * self.heads * self.seq_len**2 * HEAD_DIM / (2 if self.causal else 1)
        return 2 * product, 5 * product


# --- Implementations --------------------------------------------------------------------------------------------------
# From names to functions that take a problem and return the call to time, a function of the problem's inputs.


def posenc_rotary(p):
    return lambda q, k: torch.ops.posenc.rotary_embedding_qk(q, k, p.cos, p.sin)


def eager_rotary(p):
    return lambda q, k: (rotated(q, *p.usual), rotated(k, *p.usual))


def liger_rotary(p):
    from liger_kernel.ops.rope import LigerRopeFunction

    cos, sin = (table[:, 0][None] for table in p.usual)  # [1, S, D]

    def call(q, k):
        # [B, H, S, D], in memory [B, S, H, D], as in Liger's model code.
        out = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return tuple(x.transpose(1, 2) for x in out)

    return call


def flash_attn_rotary(p):
    from flash_attn.layers.rotary import apply_rotary_emb

    cos, sin = p.cos.to(p.dtype), p.sin.to(p.dtype)
    return lambda q, k: (apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin))


def transformer_engine_rotary(p):
    try:
        from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb
    except ImportError:
        from transformer_engine.pytorch.attention import apply_rotary_pos_emb

    theta = angles(p.seq_len, p.device, torch.float32)
    freqs = torch.cat((theta, theta), -1)[:, None, None]  # [S, 1, 1, D]
    return lambda q, k: tuple(apply_rotary_pos_emb(x, freqs, tensor_format="bshd", fused=True) for x in (q, k))


def flashinfer_rotary(p):
    import flashinfer

    cache = torch.cat((p.cos, p.sin), -1)
    positions = torch.arange(p.seq_len, device=p.device)

    def call(q, k):
        flat = [x.detach().view(p.seq_len, -1) for x in (q, k)]
        out = flashinfer.apply_rope_with_cos_sin_cache(positions, *flat, HEAD_DIM, cache, is_neox=True)
        return tuple(x.view(1, p.seq_len, p.heads, HEAD_DIM) for x in out)

    return call


def transformers_rotary(p):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = (table[:, 0][None] for table in p.usual)
    return lambda q, k: apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)


def compiled(make):
    return lambda p: torch.compile(make(p), fullgraph=True, dynamic=False)


def posenc_qk_norm(p):
    return lambda q, k, q_weight, k_weight: torch.ops.posenc.qk_norm_rotary_embedding(
        q, k, q_weight, k_weight, p.cos, p.sin
    )


def eager_qk_norm(p):
    return lambda q, k, q_weight, k_weight: (
        rotated(rms_norm(q, q_weight), *p.usual),
        rotated(rms_norm(k, k_weight), *p.usual),
    )


def posenc_alibi(p):
    return lambda scores: (torch.ops.posenc.alibi_softmax(scores, p.slopes, scale=HEAD_DIM**-0.5, causal=True),)


def eager_alibi(p):
    return lambda scores: (alibi_softmax(scores, p.slopes),)


def posenc_attention(p):
    return lambda q, k, v, slopes=p.slopes: torch.ops.posenc.alibi_attention(q, k, v, slopes, causal=p.causal)[:1]


def flex_attention(p):
    from torch.nn.attention import flex_attention as flex

    # The block mask is made once, as a model keeps it.
    visible = None
    if p.causal:
        visible = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, p.seq_len, p.seq_len, device=p.device)

    def call(q, k, v, slopes=p.slopes):
        def biased(score, b, h, i, j):
            return score + slopes[h] * (j - i if p.causal else -(i - j).abs())

        if p.device == "cpu":
            q, k, v, slopes = (x.detach() for x in (q, k, v, slopes))  # FlexAttention has no backward pass on a CPU
        out = flex.flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), score_mod=biased, block_mask=visible)
        return (out.transpose(1, 2),)

    return call


def library_attention(q, k, v, **options):
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return (torch.nn.functional.scaled_dot_product_attention(*heads_first, **options).transpose(1, 2),)


def stored_bias_attention(p):
    def bias_of(slopes):
        return torch.ops.posenc.alibi_bias(slopes, p.seq_len, p.seq_len, causal=p.causal, dtype=p.dtype)[None]

    if p.learnable:
        return lambda q, k, v, slopes: library_attention(q, k, v, attn_mask=bias_of(slopes))
    bias = bias_of(p.slopes)
    return lambda q, k, v: library_attention(q, k, v, attn_mask=bias)


def attention_without_bias(p):
    return lambda q, k, v, slopes=None: library_attention(q, k, v, is_causal=p.causal)


IMPLEMENTATIONS = {
    Rotary: {
        "posenc": posenc_rotary,
        "eager rotate_half": eager_rotary,
        "torch.compile": compiled(eager_rotary),
        "Liger": liger_rotary,
        "flash-attn": flash_attn_rotary,
        "TransformerEngine": transformer_engine_rotary,
        "FlashInfer": flashinfer_rotary,
        "transformers": transformers_rotary,
    },
    QkNormRotary: {
        "posenc": posenc_qk_norm,
        "eager": eager_qk_norm,
        "torch.compile": compiled(eager_qk_norm),
    },
    AlibiSoftmax: {
        "posenc": posenc_alibi,
        "eager": eager_alibi,
        "torch.compile": compiled(eager_alibi),
    },
    AlibiAttention: {
        "posenc": posenc_attention,
        "FlexAttention": compiled(flex_attention),
        "SDPA, bias stored": stored_bias_attention,
        "SDPA without bias": attention_without_bias,
    },
}

# Attention without a bias. It bounds the speed of attention with one, and is not checked against float64.
YARDSTICKS = [attention_without_bias]


# --- Runs -------------------------------------------------------------------------------------------------------------


def check(problem, call):
    """Raises if an output differs from float64 by more than 8 eps of its dtype: tables of that dtype cost a few eps."""
    copies = [x.detach().clone().requires_grad_() for x in problem.inputs]  # some implementations work in place
    with torch.no_grad():
        expected = problem.exact(*problem.inputs)
    # Copies that are not leaves: leaves cannot change in place.
    actual = problem.compared(call(*[x * 1 for x in copies]))
    for a, e in zip(actual, expected, strict=True):
        worst = (a.double() - e).abs().max().item()
        bound = 8 * torch.finfo(problem.dtype).eps * e.abs().max().item()
        if not worst <= bound:
            raise ArithmeticError(f"off by {worst:.3g}, more than {bound:.3g}")


def measure(problem, make, clock):
    """Milliseconds of the forward and backward pass. The second is None if there is no backward pass."""
    call = make(problem)
    if make not in YARDSTICKS:
        check(problem, call)
    inputs = problem.inputs
    if any(x.requires_grad for x in call(*[x * 1 for x in inputs])):
        inputs = [x * 1 for x in inputs]  # not leaves: Liger writes to its inputs
    forward = clock(lambda: call(*inputs))
    outputs = call(*inputs)
    if not outputs[0].requires_grad:
        return forward, None
    backward = clock(
        lambda: torch.autograd.grad(outputs, inputs, problem.grads, retain_graph=True, allow_unused=True)
    )
    return forward, backward


def row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def table(problem, clock):
    print(f"#### {problem.title}\n")
    passes = ["Forward", "Backward"]
    operations = problem.operations()
    columns = [f"{name} (ms)" for name in (*passes, "Total")]
    columns += [f"{name} (TFLOP/s)" for name in passes] if operations else []
    columns += [f"posenc is faster by: {name}" for name in ("forward", "backward", "total")]
    row("Implementation", *columns)
    print("|---|" + "---:|" * len(columns))
    own = None
    for name, make in IMPLEMENTATIONS[type(problem)].items():
        try:
            times = measure(problem, make, clock)
        except ImportError:
            row(name, "not installed", *[""] * (len(columns) - 1))
            continue
        except Exception as error:  # shown in its row; the others still run
            reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:120].replace("|", "/")
            row(name, reason, *[""] * (len(columns) - 1))
            continue
        # Without a backward pass there is no total: None.
        times = [*times, None if None in times else sum(times)]
        cells = ["none" if ms is None else f"{ms:.4f}" for ms in times]
        if operations:
            rates = [ms and 1e-9 * count / ms for ms, count in zip(times, operations)]
            cells += ["" if rate is None else f"{rate:.{0 if rate >= 10 else 3}f}" for rate in rates]
        cells += [f"{ms / ours:.2f}x" if ms and ours else "" for ms, ours in zip(times, own or [None] * 3)]
        row(name, *cells)
        if name == "posenc":
            own = times
    print(flush=True)


def name_of(dtype):
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def problems(device):
    """Yields classes with their arguments, so that only one problem is in memory at a time."""
    if device == "cuda":
        for dtype in (torch.float16, torch.bfloat16):
            for seq_len, heads in ((2048, 32), (4096, 40), (4096, 64), (8192, 64)):
                yield Rotary, dtype, seq_len, heads
        if hasattr(torch.ops.posenc, "qk_norm_rotary_embedding"):
            for seq_len, heads in ((2048, 32), (8192, 64)):
                yield QkNormRotary, torch.bfloat16, seq_len, heads
        yield AlibiSoftmax, torch.bfloat16, 2048, 32
        yield AlibiSoftmax, torch.bfloat16, 4096, 40
        for causal in (True, False):
            for batch, seq_len in ((8, 2048), (4, 4096), (1, 16384)):
                yield AlibiAttention, torch.bfloat16, batch, seq_len, 16, causal
            yield AlibiAttention, torch.bfloat16, 4, 4096, 16, causal, True
    else:
        yield Rotary, torch.float32, 512, 8
        yield QkNormRotary, torch.float32, 512, 8
        yield AlibiSoftmax, torch.float32, 512, 8
        for causal in (True, False):
            for learnable in (False, True):
                yield AlibiAttention, torch.float32, 1, 512, 4, causal, learnable


def commit():
    """The commit as posenc_bench prints it. POSENC_COMMIT names it if the checkout has no history."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return os.environ.get("POSENC_COMMIT") or found.stdout.strip() or "unknown"


def posenc_version():
    version_header = (ROOT / "include/posenc/version.h").read_text()
    return ".".join(re.findall(r"#define POSENC_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", version_header))


def heading(device):
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        print(f"{properties.name}, CUDA run time {torch.version.cuda}  ")
        print("Device time between CUDA events, L2 flushed before each call; gradients given; median  ")
    else:
        print("No GPU here: small sizes on the CPU, by the host's clock  ")
    packages = []
    for package in PACKAGES:
        try:
            packages.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    print(f"posenc {posenc_version()} ({commit()}), {', '.join(packages)}\n", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, help="libposenc.so")
    parser.add_argument("--samples", type=int, default=31, help="calls per figure (default 31)")
    parser.add_argument("--filter", default="", help="regular expression on the titles of the tables")
    arguments = parser.parse_args()
    torch.ops.load_library(str(pathlib.Path(arguments.library).resolve()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # the backward pass of a graph is run several times
    heading(device)
    clock = Clock(device, arguments.samples)
    for make, *parameters in problems(device):
        problem = make(device, *parameters)
        if re.search(arguments.filter, problem.title):
            table(problem, clock)
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
