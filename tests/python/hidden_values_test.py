#!/usr/bin/env python3
"""NaN and infinity in hidden (masked) elements reach no visible result of libposenc's operators and no gradient.

Expected values come from the same call with zeros in the hidden elements. POSENC_LIBRARY names the library.
Plain unittest: python3 tests/python/hidden_values_test.py [cpu | cuda]
"""

import sys
import unittest

from support import OnDevice, main

import torch

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
VALUES = [torch.nan, torch.inf, -torch.inf]
BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 6, 4, 2, 64


def over_trailing(mask, x):
    """A mask over the leading dimensions of x, in a shape that broadcasts to x."""
    return mask.view(mask.shape + (1,) * (x.dim() - mask.dim()))


class HiddenValues(OnDevice):
    def drawn(self, *shape):
        self.generator = getattr(self, "generator", None) or torch.Generator().manual_seed(20210420)
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def for_each_value(self, check):
        for dtype in DTYPES:
            for value in VALUES:
                with self.subTest(dtype=dtype, value=value):
                    check(dtype, value)

    def check(self, call, tensors, hidden, seen, value, dtype):
        """Compares `call(*tensors)` with `value` where the mask in `hidden` is true to the call with zeros there.

        `seen(result)` is the part that depends on no hidden element. Its gradients are compared as well, and must be
        zero in hidden elements.
        """

        def run(filler):
            slopes_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            dtypes = [dtype if mask is not None else slopes_dtype for mask in hidden]
            leaves = [x.to(of_x, copy=True) for x, of_x in zip(tensors, dtypes)]
            for x, mask in zip(leaves, hidden):
                if mask is not None:
                    x.masked_fill_(over_trailing(mask, x), filler)
            leaves = [x.to(self.device).requires_grad_() for x in leaves]
            result = seen(call(*leaves))
            weights = torch.linspace(-1, 1.5, result.numel(), dtype=torch.float64).cos().to(result)
            return result, torch.autograd.grad(result, leaves, weights.view_as(result))

        actual, grads = run(value)
        expected, expected_grads = run(0)
        self.assertTrue(expected.isfinite().all())
        torch.testing.assert_close(actual, expected)
        for number, (grad, expected_grad, mask) in enumerate(zip(grads, expected_grads, hidden)):
            self.assertTrue(grad.isfinite().all(), f"gradient {number}")
            # The gradient of the slopes sums all rows, and its last bits depend on the order.
            torch.testing.assert_close(grad, expected_grad, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-3)
            if mask is not None:
                self.assertFalse(grad[mask.to(self.device)].any(), f"gradient {number} of hidden values")

    # --- Attention ---

    def attention_tensors(self, *tokens, head_dim=HEAD_DIM):
        q, k, v = (self.drawn(*tokens, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS))
        return [q, k, v, torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)]

    def integers(self, values):
        return torch.tensor(values, device=self.device)

    def check_attention(self, tensors, hidden, options, seen=lambda out: out):
        """`hidden`: masks over the tokens of q, k and v; None hides no token."""
        masks = [
            torch.zeros(x.shape[:-2], dtype=torch.bool) if mask is None else mask for x, mask in zip(tensors, hidden)
        ] + [None]

        def call(*tensors):
            return torch.ops.posenc.alibi_attention(*tensors, **options)[0]

        self.for_each_value(lambda dtype, value: self.check(call, tensors, masks, seen, value, dtype))

    def check_values(self, tensors, mask, options, seen, fused_too=True):
        """Compares outputs of the queries in `seen` alone: other queries see the hidden keys, so gradients are NaN."""

        def check(dtype, value):
            if not fused_too and self.device == "cuda" and dtype.itemsize == 2:
                self.skipTest("fused on a GPU")
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            q, k, v, slopes = (x.to(self.device, wide if x.dim() == 1 else dtype) for x in tensors)
            hidden = [x.masked_fill(over_trailing(mask.to(self.device), x), value) for x in (k, v)]
            actual, expected = (
                torch.ops.posenc.alibi_attention(q, *keys, slopes, **options)[0][seen.to(self.device)]
                for keys in (hidden, (k, v))
            )
            torch.testing.assert_close(actual, expected)

        self.for_each_value(check)

    def behind(self, lengths):
        return torch.arange(LENGTH) >= torch.tensor(lengths)[:, None]

    def lengths(self, seqlens_q, seqlens_k, **options):
        return dict(seqlens_q=self.integers(seqlens_q), seqlens_k=self.integers(seqlens_k), **options)

    def test_keys_behind_their_length(self):
        tensors, mask = self.attention_tensors(BATCH, LENGTH), self.behind([1, 3])
        self.check_attention(tensors, [None, mask, None], self.lengths([6, 6], [1, 3]))

    def test_values_behind_their_length(self):
        tensors, mask = self.attention_tensors(BATCH, LENGTH), self.behind([1, 3])
        self.check_attention(tensors, [None, None, mask], self.lengths([6, 6], [1, 3]))

    def test_queries_keys_and_values_behind_their_length(self):
        tensors, of_q, of_k = self.attention_tensors(BATCH, LENGTH), self.behind([2, 4]), self.behind([3, 6])
        self.check_attention(tensors, [of_q, of_k, of_k], self.lengths([2, 4], [3, 6], causal=True))

    def test_keys_of_a_sequence_without_any(self):
        tensors, mask = self.attention_tensors(BATCH, LENGTH), self.behind([0, 3])
        self.check_attention(tensors, [None, mask, mask], self.lengths([6, 6], [0, 3]))

    def test_keys_that_no_query_sees(self):
        tensors, mask = self.attention_tensors(BATCH, LENGTH), self.behind([4, 4])
        tensors[0] = tensors[0][:, :2]
        self.check_attention(tensors, [None, mask, mask], {"causal": True, "query_offset": 2})

    def test_keys_that_later_queries_see(self):
        # 16-bit dtypes are fused on a GPU: fused attention multiplies such values by probabilities of 0.
        tensors, mask = self.attention_tensors(BATCH, LENGTH, head_dim=5), self.behind([4, 4])
        self.check_values(tensors, mask, {"causal": True}, ~mask, fused_too=False)

    def test_packed_tokens_of_no_sequence(self):
        mask = torch.tensor([True, False, False, False, False, True, True])
        cuts = {"cu_seqlens_q": self.integers([1, 2, 5]), "max_seqlen_q": 3}
        self.check_attention(self.attention_tensors(7), [mask] * 3, cuts)

    def test_packed_keys_of_another_sequence(self):
        mask = torch.tensor([False, False, True, True, True, False, False])
        options = {"cu_seqlens_q": self.integers([0, 2, 5, 7]), "max_seqlen_q": 3, "causal": True}
        self.check_values(self.attention_tensors(7), mask, options, ~mask)

    # --- Scores ---

    def scores(self):
        return [self.drawn(BATCH, HEADS, LENGTH, LENGTH), torch.tensor([0.5, 0.25, 0.125, 0.0625]).double()]

    def above_diagonal(self):
        return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1).expand(BATCH, HEADS, LENGTH, LENGTH)

    def check_scores(self, call, hidden):
        tensors = self.scores()
        seen = lambda result: result[~hidden.to(self.device)]
        self.for_each_value(lambda dtype, value: self.check(call, tensors, [hidden, None], seen, value, dtype))

    def test_softmax_of_scores_beyond_the_query(self):
        self.check_scores(lambda *x: torch.ops.posenc.alibi_softmax(*x, causal=True), self.above_diagonal())

    def test_softmax_of_scores_of_padding(self):
        padding = self.behind([1, 4])
        call = lambda *x: torch.ops.posenc.alibi_softmax(*x, key_padding_mask=padding.to(self.device))
        self.check_scores(call, padding[:, None, None, :].expand(BATCH, HEADS, LENGTH, LENGTH))

    def test_softmax_of_rows_that_see_no_key(self):
        padding = self.behind([0, 4])
        call = lambda *x: torch.ops.posenc.alibi_softmax(*x, key_padding_mask=padding.to(self.device), causal=True)
        hidden = padding[:, None, None, :].expand(BATCH, HEADS, LENGTH, LENGTH) | self.above_diagonal()
        self.check_scores(call, hidden)

    def test_sum_of_scores_beyond_the_query(self):
        self.check_scores(lambda *x: torch.ops.posenc.alibi_add(*x, causal=True), self.above_diagonal())


class CpuTest(HiddenValues, unittest.TestCase):
    pass


class CudaTest(HiddenValues, unittest.TestCase):
    device = "cuda"


if __name__ == "__main__":
    sys.exit(main())
