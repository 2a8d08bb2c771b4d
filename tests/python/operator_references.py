"""Every forward operator in plain PyTorch operations, without posenc and differentiable by autograd.

`REFERENCES` maps the name of each operator to a function of its arguments. Functions of operators in place return the
new values of the arguments. All functions compute in the dtype of their inputs, which is float64 in the tests.
"""

import torch


# --- Rotary embedding -------------------------------------------------------------------------------------------------


def rows(table, positions, pair_axes, seq_len):
    """The row of the table that each token reads, with a dimension for the heads: [.., S, 1, R/2]."""
    if positions is None:
        return table.narrow(-2, 0, seq_len).unsqueeze(-2)
    if pair_axes:
        index = positions.long()[list(pair_axes)].movedim(0, -1)
        return table[index, torch.arange(table.size(-1), device=table.device)].unsqueeze(-2)
    return table[positions.long()].unsqueeze(-2)


def rotary_embedding(x, cos, sin, positions=None, *, interleaved=False, conjugate=False, pair_axes=()):
    c, s = (rows(table, positions, pair_axes, x.size(-3)) for table in (cos, sin))
    s = -s if conjugate else s
    pairs = cos.size(-1)
    rotated, tail = x.split([2 * pairs, x.size(-1) - 2 * pairs], -1)
    # Make the two channels of each pair the last dimension, and split it.
    a, b = (rotated.unflatten(-1, (pairs, 2)) if interleaved else rotated.unflatten(-1, (2, pairs)).mT).unbind(-1)
    turned = torch.stack([a * c - b * s, a * s + b * c], -1)
    return torch.cat([(turned if interleaved else turned.mT).flatten(-2), tail], -1)


def rotary_embedding_qk(q, k, *tables, **kw):
    return rotary_embedding(q, *tables, **kw), rotary_embedding(k, *tables, **kw)


def rotary_embedding_qkv(qkv, num_q_heads, num_kv_heads, *tables, **kw):
    heads = num_q_heads + 2 * num_kv_heads
    per_head = qkv.flatten(-3, -2) if qkv.dim() == 5 else qkv.unflatten(-1, (heads, qkv.size(-1) // heads))
    q, k, v = per_head.split([num_q_heads, num_kv_heads, num_kv_heads], -2)
    return rotary_embedding(q, *tables, **kw), rotary_embedding(k, *tables, **kw), v.clone()


def rotary_embedding_pack(q, k, v, *tables, stacked=False, **kw):
    parts = [rotary_embedding(q, *tables, **kw), rotary_embedding(k, *tables, **kw), v]
    return torch.stack(parts, -3) if stacked else torch.cat(parts, -2).flatten(-2)


def rotary_tables(inv_freq, length, *, dtype=torch.float32, attention_factor=1.0):
    angles = torch.arange(length, device=inv_freq.device, dtype=torch.float64)[:, None] * inv_freq.double()
    return (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)


def qk_norm_rotary_embedding(q, k, q_weight, k_weight, *tables, eps=1e-6, unit_offset=False, **kw):
    def normalised(x, weight):
        weight = 1 + weight if unit_offset else weight
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    return rotary_embedding_qk(normalised(q, q_weight), normalised(k, k_weight), *tables, **kw)


# --- ALiBi ------------------------------------------------------------------------------------------------------------


def alibi_slopes(num_heads, max_bias=8.0):
    power = 2 ** (num_heads.bit_length() - 1)
    exponents = [(h + 1) / power for h in range(power)]
    exponents += [(2 * h + 1) / (2 * power) for h in range(num_heads - power)]
    return torch.tensor([2 ** (-max_bias * exponent) for exponent in exponents], dtype=torch.float32)


def offsets(q_len, k_len, query_offset, device):
    """Position of each query minus that of each key, [Sq, Sk]."""
    begin = k_len - q_len if query_offset is None else query_offset
    return torch.arange(begin, begin + q_len, device=device)[:, None] - torch.arange(k_len, device=device)


def alibi_bias(slopes, q_len, k_len, *, causal=False, dtype=torch.float32, query_offset=None):
    offset = offsets(q_len, k_len, query_offset, slopes.device)
    bias = -slopes[:, None, None] * offset.abs()
    return (bias.masked_fill(offset < 0, -torch.inf) if causal else bias).to(dtype)


def alibi_add(scores, slopes, *, causal=False, query_offset=None):
    offset = offsets(*scores.shape[-2:], query_offset, scores.device)
    biased = scores - slopes[:, None, None] * offset.abs()
    return biased.masked_fill(offset < 0, -torch.inf) if causal else biased


def alibi_mask(grad, *, query_offset=None):
    return grad.masked_fill(offsets(*grad.shape[-2:], query_offset, grad.device) < 0, 0)


def visible_softmax(logits, hidden):
    """Probabilities and lse; they are 0 and -infinity in rows that see no key."""
    blind = hidden.all(-1, keepdim=True)
    logits = logits.masked_fill(hidden, -torch.inf).masked_fill(blind, 0)
    lse = logits.logsumexp(-1).masked_fill(blind.squeeze(-1), -torch.inf)
    return logits.softmax(-1).masked_fill(blind, 0), lse


def alibi_softmax(scores, slopes, *, scale=1.0, causal=False, key_padding_mask=None, query_offset=None):
    offset = offsets(*scores.shape[-2:], query_offset, scores.device)
    hidden = (offset < 0) & causal
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None, :]
        hidden = hidden | (padding if scores.dim() == 4 else padding[0])
    return visible_softmax(scale * scores - slopes[:, None, None] * offset.abs(), hidden.expand_as(scores))[0]


def one_sequence(q, k, v, slopes, scale, causal, query_offset, window_left, window_right, softcap):
    """Attention of one sequence: q is [Sq, Hq, D], k and v are [Sk, Hk, D]. Returns ([Sq, Hq, D], [Hq, Sq])."""
    times = q.size(1) // k.size(1)
    k, v = (x.repeat_interleave(times, 1).transpose(0, 1) for x in (k, v))
    offset = offsets(q.size(0), k.size(1), query_offset, q.device)
    scale = q.size(-1) ** -0.5 if scale is None else scale
    logits = scale * (q.transpose(0, 1) @ k.mT)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if slopes is not None:
        logits = logits - slopes[:, None, None] * offset.abs()
    hidden = (offset < 0) & causal
    if window_left is not None:
        hidden = hidden | (offset > window_left)
    if window_right is not None:
        hidden = hidden | (-offset > window_right)
    p, lse = visible_softmax(logits, hidden.expand_as(logits))
    return (p @ v).transpose(0, 1), lse


def slopes_of(slopes, sequence):
    """[Hq] of one sequence, from slopes that are None, [Hq] or [B, Hq]."""
    return slopes if slopes is None or slopes.dim() == 1 else slopes[sequence]


def integers(x):
    """The elements of x as Python integers. LibTorch 2.8 has no Tensor.tolist inside of torch.func's transforms."""
    return [element.item() for element in x]


def rows_behind(out, lse, count):
    """Appends `count` queries that see no key: output 0, lse -infinity."""
    out = torch.cat([out, out.new_zeros(count, *out.shape[1:])])
    return out, torch.cat([lse, lse.new_full((lse.size(0), count), -torch.inf)], -1)


def alibi_attention(
    q,
    k,
    v,
    slopes,
    *,
    scale=None,
    causal=False,
    query_offset=None,
    seqlens_q=None,
    seqlens_k=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    window_left=None,
    window_right=None,
    softcap=None,
):
    options = scale, causal, query_offset, window_left, window_right, softcap
    if q.dim() == 4:
        q_lens = [q.size(1)] * q.size(0) if seqlens_q is None else integers(seqlens_q)
        k_lens = [k.size(1)] * k.size(0) if seqlens_k is None else integers(seqlens_k)
        each = []
        for b, (m, n) in enumerate(zip(q_lens, k_lens)):
            part = one_sequence(q[b, :m], k[b, :n], v[b, :n], slopes_of(slopes, b), *options)
            each.append(rows_behind(*part, q.size(1) - m))
        outs, lses = zip(*each)
        return torch.stack(outs), torch.stack(lses)
    q_cuts = integers(cu_seqlens_q)
    k_cuts = q_cuts if cu_seqlens_k is None else integers(cu_seqlens_k)
    out, lse = rows_behind(q[:0], q.new_zeros(q.size(1), 0), q_cuts[0])
    for b, (i, j, m, n) in enumerate(zip(q_cuts, q_cuts[1:], k_cuts, k_cuts[1:])):
        part = one_sequence(q[i:j], k[m:n], v[m:n], slopes_of(slopes, b), *options)
        out, lse = torch.cat([out, part[0]]), torch.cat([lse, part[1]], -1)
    return rows_behind(out, lse, q.size(0) - q_cuts[-1])


def attention_sinks(out, lse, sinks):
    total = torch.logaddexp(lse, sinks[:, None].expand_as(lse))
    share = (lse - total).exp()
    return out * share.transpose(-1, -2)[..., None], total


def context_parallel_alibi_attention(q, k, v, slopes, group_name, *, scale=None, causal=False):
    """For a group of one rank, which holds the whole sequence."""
    return alibi_attention(q, k, v, slopes, scale=scale, causal=causal)


REFERENCES = {
    "rotary_embedding": rotary_embedding,
    "rotary_embedding_": rotary_embedding,
    "rotary_embedding_qk": rotary_embedding_qk,
    "rotary_embedding_qk_": rotary_embedding_qk,
    "rotary_embedding_qkv": rotary_embedding_qkv,
    "rotary_embedding_pack": rotary_embedding_pack,
    "rotary_tables": rotary_tables,
    "qk_norm_rotary_embedding": qk_norm_rotary_embedding,
    "alibi_slopes": alibi_slopes,
    "alibi_bias": alibi_bias,
    "alibi_add": alibi_add,
    "alibi_add_": alibi_add,
    "alibi_mask": alibi_mask,
    "alibi_softmax": alibi_softmax,
    "alibi_attention": alibi_attention,
    "attention_sinks": attention_sinks,
    "context_parallel_alibi_attention": context_parallel_alibi_attention,
}
