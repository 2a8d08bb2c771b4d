"""Sample calls: `CASES` maps the name of every operator to functions from Inputs to a Sample."""

import torch
import torch.distributed

from support import Inputs, Sample


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
    """A call with positions on three axes."""

    def sample(i):
        positions = torch.arange(3 * i.size, device=i.device).view(3, i.size) % 9
        return make(i, (i.normal(9, 3), i.normal(9, 3)), positions=positions, pair_axes=[0, 2, 1])

    return [sample]


def in_place(make):
    """Calls whose tables require no gradient: it would need the input, which is overwritten."""

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
    # The operator reads only shape and dtype of the tables.
    return Sample([i.normal(*s) for s in shapes], [i.normal(*s) for s in shapes], *[t.detach() for t in tables], **kw)


def qk_norm_rotary_embedding(i, tables, **kw):
    return Sample(i.normal(2, i.size, 4, 8), i.normal(2, i.size, 2, 8), i.normal(8), i.normal(8), *tables, **kw)


def qk_norm_rotary_embedding_backward(i, tables, **kw):
    shapes = [(2, i.size, 4, 8), (2, i.size, 2, 8)] * 2
    tables = [table.detach() for table in tables]
    return Sample(*[i.normal(*s) for s in shapes], i.normal(8), i.normal(8), *tables, **kw)


def drawn_slopes(i, slopes, heads, sequences):
    """`slopes`: None, "heads" for one slope for each head, "sequences" for one for each head of each sequence."""
    shapes = {"heads": (heads,), "sequences": (sequences, heads)}
    return None if slopes is None else i.positive(*shapes[slopes])


def attention(i, heads=(4, 2), slopes="heads", **kw):
    q_heads, k_heads = heads
    shapes = [(2, i.size, n, 8) for n in (q_heads, k_heads, k_heads)]
    return Sample(*[i.normal(*shape) for shape in shapes], drawn_slopes(i, slopes, q_heads, 2), **kw)


def packed_attention(i, slopes="heads", **kw):
    """Three sequences, one of them empty, then tokens of no sequence. cu_seqlens_q and cu_seqlens_k differ."""
    shapes = [(i.size, heads, 8) for heads in (4, 2, 2)]
    cuts = {"cu_seqlens_q": i.integers([0, 2, 2, i.size - 1]), "cu_seqlens_k": i.integers([0, 1, 2, i.size - 1])}
    longest = {"max_seqlen_q": i.size, "max_seqlen_k": i.size}
    qkv = [i.normal(*shape) for shape in shapes]
    return Sample(*qkv, drawn_slopes(i, slopes, 4, 3), **cuts, **longest, **kw)


def detached(tensors):
    return [x if x is None else x.detach() for x in tensors]


def attention_backward(i, make=attention, **kw):
    forward = make(i, **kw)
    kw = forward.kwargs
    q, k, v, slopes = detached(forward.args)
    out, lse = torch.ops.posenc.alibi_attention(q, k, v, slopes, **kw)
    return Sample(torch.ones_like(out), torch.ones_like(lse), q, k, v, slopes, out, lse, **kw)


def attention_double_backward(i, make=attention, **kw):
    backward = attention_backward(i, make, **kw)
    grad_out, grad_lse, q, k, v, slopes, _, _ = backward.args
    of_slopes = None if slopes is None else slopes.cos()
    return Sample(q.cos(), k.cos(), v.cos(), of_slopes, grad_out, grad_lse, q, k, v, slopes, **backward.kwargs)


def attention_slope_sums(i, **kw):
    forward = attention(i, **kw)
    q, k, v, slopes = detached(forward.args)
    out, lse = torch.ops.posenc.alibi_attention(q, k, v, slopes, **kw)
    return Sample(torch.ones_like(out), q, k, v, slopes, lse, **kw)


def attention_sinks(i, make=attention, **kw):
    """Results as those of attention, one row without a visible key included."""
    q, k, v, slopes = detached(make(i, **kw).args)
    out, lse = torch.ops.posenc.alibi_attention(q, k, v, slopes, **make(i, **kw).kwargs)
    return Sample(out.requires_grad_(i.grad), lse.requires_grad_(i.grad), i.normal(4))


def group_of_one():
    """The name of a group of one rank; tests/python/context_parallel_test.py has larger groups."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return torch.distributed.group.WORLD.group_name


def even(i):
    """Inputs with an even number of tokens: a rank holds two chunks."""
    return Inputs(i.device, 2 * (i.size // 2), i.grad)


def context_parallel_attention(i, slopes="heads", **kw):
    return Sample(*attention(even(i), slopes=slopes).args, group_of_one(), **kw)


def context_parallel_attention_backward(i, grad_mask=(True, True, True, True), slopes="heads", **kw):
    q, k, v, slopes = detached(attention(even(i), slopes=slopes).args)
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
        lambda i: attention(i, seqlens_q=i.integers([3, 2]), seqlens_k=i.integers([2, 3])),
        lambda i: attention(i, heads=(2, 2), causal=True),
        lambda i: packed_attention(i),
        lambda i: packed_attention(i, causal=True, scale=0.5),
        lambda i: attention(i, slopes=None, causal=True, query_offset=1),
        lambda i: packed_attention(i, slopes=None),
        lambda i: attention(i, slopes="sequences"),
        lambda i: packed_attention(i, slopes="sequences", causal=True),
        lambda i: attention(i, window_left=1, window_right=0),
        lambda i: packed_attention(i, slopes=None, window_left=1, window_right=1),
        lambda i: attention(i, softcap=0.75, causal=True),
    ],
    "alibi_attention_backward": [
        lambda i: attention_backward(i),
        lambda i: attention_backward(i, scale=0.5, causal=True, query_offset=1),
        lambda i: attention_backward(i, seqlens_q=i.integers([3, 2]), seqlens_k=i.integers([2, 3])),
        lambda i: attention_backward(i, packed_attention, causal=True),
        lambda i: attention_backward(i, slopes=None, causal=True),
        lambda i: attention_backward(i, packed_attention, slopes="sequences"),
        lambda i: attention_backward(i, window_left=1, causal=True),
        lambda i: attention_backward(i, softcap=0.75),
    ],
    "alibi_attention_double_backward": [
        lambda i: attention_double_backward(i),
        lambda i: attention_double_backward(i, scale=0.5, causal=True, query_offset=1),
        lambda i: attention_double_backward(i, seqlens_q=i.integers([3, 2]), seqlens_k=i.integers([2, 3])),
        lambda i: attention_double_backward(i, packed_attention, causal=True),
        lambda i: attention_double_backward(i, packed_attention, slopes=None),
        lambda i: attention_double_backward(i, slopes="sequences"),
        lambda i: attention_double_backward(i, window_left=0, window_right=1),
        lambda i: attention_double_backward(i, softcap=0.75),
    ],
    "alibi_attention_slope_sums": [
        lambda i: attention_slope_sums(i),
        lambda i: attention_slope_sums(i, scale=0.5, causal=True, query_offset=1),
        lambda i: attention_slope_sums(i, window_left=1, window_right=1),
    ],
    "attention_sinks": [
        lambda i: attention_sinks(i),
        lambda i: attention_sinks(i, causal=True, query_offset=-1),
        lambda i: attention_sinks(i, packed_attention),
    ],
    "context_parallel_alibi_attention": [
        lambda i: context_parallel_attention(i),
        lambda i: context_parallel_attention(i, scale=0.5, causal=True),
        lambda i: context_parallel_attention(i, slopes=None, causal=True),
        lambda i: context_parallel_attention(i, slopes="sequences"),
    ],
    "context_parallel_alibi_attention_backward": [
        lambda i: context_parallel_attention_backward(i, causal=True),
        lambda i: context_parallel_attention_backward(i, grad_mask=(True, False, True, False)),
        lambda i: context_parallel_attention_backward(i, slopes=None),
    ],
}
