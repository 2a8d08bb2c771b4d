#!/usr/bin/env python3
"""The Python package: its functions agree with the schemas and operators; output of `python -m posenc`.

Plain unittest: python3 tests/python/package_test.py, with posenc installed or with python/ on PYTHONPATH and
POSENC_LIBRARY.
"""

import inspect
import os
import pathlib
import subprocess
import sys
import unittest
import warnings

# A harmless warning on import.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import posenc
import torch

# Functions whose operator has another name.
OPERATORS = {
    "alibi_attention_with_lse": "alibi_attention",
    "attention": "alibi_attention",
    "attention_with_lse": "alibi_attention",
    "context_parallel_attention": "context_parallel_alibi_attention",
}
# Functions whose slopes are an optional keyword; in the schema they are positional.
OPTIONAL_SLOPES = ("attention", "attention_with_lse", "context_parallel_attention")
# Keywords that are an operator of their own.
COMPOSED = {"sinks"}
# Functions that return the first result of their operator.
FIRST_RESULT = ("attention", "alibi_attention")
# Suffixes of operators that only backward passes call.
INTERNAL = ("_backward", "_slope_sums", "_sinks", "alibi_mask")
PLACES = ("cmake_dir", "include_dir", "library_path")
FUNCTIONS = [name for name in posenc.__all__ if name not in PLACES]


def operator(name):
    """The operator behind a function."""
    return getattr(torch.ops.posenc, OPERATORS.get(name, name))


def schema(name):
    return operator(name).default._schema


class Signatures(unittest.TestCase):
    def test_every_public_operator_has_a_function(self):
        names = {
            s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("posenc::")
        }
        public = {name for name in names if not name.endswith(INTERNAL)}
        self.assertGreater(len(public), 10)
        self.assertEqual(public, set(FUNCTIONS) - set(OPERATORS))

    def test_arguments_are_those_of_the_schema(self):
        for name in FUNCTIONS:
            with self.subTest(name):
                arguments = schema(name).arguments
                parameters = [
                    p for p in inspect.signature(getattr(posenc, name)).parameters.values() if p.name not in COMPOSED
                ]
                if name in OPTIONAL_SLOPES:
                    (slopes,) = (p for p in parameters if p.name == "slopes")
                    self.assertEqual((slopes.kind, slopes.default), (inspect.Parameter.KEYWORD_ONLY, None))
                    parameters.remove(slopes)
                    arguments = [a for a in arguments if a.name != "slopes"]
                renamed = {"group": "group_name"}
                self.assertEqual([renamed.get(p.name, p.name) for p in parameters], [a.name for a in arguments])
                for parameter, argument in zip(parameters, arguments):
                    keyword = parameter.kind == inspect.Parameter.KEYWORD_ONLY
                    self.assertEqual(keyword, argument.kwarg_only, parameter.name)
                    self.assertNotEqual(parameter.annotation, inspect.Parameter.empty, parameter.name)
                    optional = parameter.default is not inspect.Parameter.empty
                    self.assertEqual(optional, argument.has_default_value(), parameter.name)
                    if optional:
                        expected = argument.default_value
                        if str(argument.real_type) == "ScalarType" or parameter.name == "dtype":
                            expected = torch.float32  # which is number 6 in a schema
                            self.assertEqual(argument.default_value, 6)
                        elif isinstance(expected, list):
                            expected = tuple(expected)
                        self.assertEqual(parameter.default, expected, parameter.name)

    def test_documentation_names_every_argument(self):
        for name in FUNCTIONS:
            function = getattr(posenc, name)
            documentation = inspect.getdoc(function) + inspect.getmodule(function).__doc__
            for parameter in inspect.signature(function).parameters:
                with self.subTest(f"{name}({parameter})"):
                    self.assertIn(parameter, documentation)


class Calls(unittest.TestCase):
    def setUp(self):
        self.generator = torch.Generator().manual_seed(1)
        self.q, self.k, self.v = (self.random(2, 6, heads, 8) for heads in (4, 2, 2))
        self.cos, self.sin = posenc.rotary_tables(self.random(4).abs(), 6)
        self.weight = self.random(8)
        self.slopes = posenc.alibi_slopes(4)
        self.scores = self.random(2, 4, 6, 6)

    def random(self, *sizes):
        return torch.randn(*sizes, generator=self.generator)

    def calls(self):
        """Arguments of each function, by position and by keyword; every keyword differs from its default."""
        rotation = {"interleaved": True, "conjugate": True}
        tables = (self.cos, self.sin, torch.arange(6).flip(0))
        qkv = torch.cat([self.q.flatten(2), self.k.flatten(2), self.v.flatten(2)], -1)
        attention = {"scale": 0.3, "causal": True, "query_offset": -1, "window_left": 3, "window_right": 2}
        attention["softcap"] = 5.0
        lengths = {"seqlens_q": torch.tensor([6, 3]), "seqlens_k": torch.tensor([5, 4])}
        packed = [x.flatten(0, 1) for x in (self.q, self.k, self.v)]
        starts = torch.tensor([0, 5, 12])
        sequences = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 7, "max_seqlen_k": 8}
        return [
            ("rotary_embedding", (self.q, *tables), rotation),
            ("rotary_embedding", (self.q, *tables[:2], torch.arange(12).view(2, 6) % 6), {"pair_axes": [0, 1, 1, 0]}),
            ("rotary_embedding_", (self.q.clone(), *tables), rotation),
            ("rotary_embedding_qk", (self.q, self.k, *tables), rotation),
            ("rotary_embedding_qk_", (self.q.clone(), self.k.clone(), *tables), rotation),
            ("rotary_embedding_qkv", (qkv, 4, 2, *tables), rotation),
            ("rotary_embedding_pack", (self.k, self.k, self.v, *tables), {"stacked": True, **rotation}),
            ("rotary_tables", (self.random(4), 5), {"dtype": torch.float64, "attention_factor": 1.5}),
            (
                "qk_norm_rotary_embedding",
                (self.q, self.k, self.weight, self.weight, *tables),
                {"eps": 0.1, "unit_offset": True, **rotation},
            ),
            ("alibi_slopes", (6, 4.0), {}),
            ("alibi_bias", (self.slopes, 3, 5), {"causal": True, "dtype": torch.float16, "query_offset": 1}),
            ("alibi_add", (self.scores, self.slopes), {"causal": True, "query_offset": 1}),
            ("alibi_add_", (self.scores.clone(), self.slopes), {"causal": True, "query_offset": 1}),
            (
                "alibi_softmax",
                (self.scores, self.slopes),
                {
                    "scale": 0.3,
                    "causal": True,
                    "key_padding_mask": torch.arange(6).expand(2, 6) == 2,
                    "query_offset": 1,
                },
            ),
            ("alibi_attention_with_lse", (self.q, self.k, self.v, self.slopes), {**attention, **lengths}),
            ("alibi_attention_with_lse", (*packed, self.slopes), sequences),
            ("alibi_attention", (self.q, self.k, self.v, self.slopes), {**attention, **lengths}),
            ("alibi_attention", (*packed, self.slopes), sequences),
            ("attention", (self.q, self.k, self.v), {**attention, **lengths}),
            ("attention", packed, sequences),
            ("attention_with_lse", (self.q, self.k, self.v), {"slopes": self.slopes, **attention, **lengths}),
            ("attention_with_lse", packed, {"slopes": self.slopes, **sequences}),
        ]

    def test_functions_are_the_operators(self):
        called = set()
        for name, args, kwargs in self.calls():
            with self.subTest(name):
                called.add(name)
                ours = [a.clone() if torch.is_tensor(a) else a for a in args]
                theirs = [a.clone() if torch.is_tensor(a) else a for a in args]
                result = getattr(posenc, name)(*ours, **kwargs)
                options = dict(kwargs)
                if name in OPTIONAL_SLOPES:
                    theirs.append(options.pop("slopes", None))
                expected = operator(name)(*theirs, **options)
                if expected is None:  # in place
                    expected = theirs[: len(result) if isinstance(result, tuple) else 1]
                    for tensor, argument in zip(result if isinstance(result, tuple) else [result], ours):
                        self.assertIs(tensor, argument)
                if name in FIRST_RESULT:
                    expected = expected[0]
                result = result if isinstance(result, (tuple, list)) else [result]
                expected = expected if isinstance(expected, (tuple, list)) else [expected]
                self.assertEqual(len(result), len(expected))
                for one, other in zip(result, expected):
                    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        # The next test calls it in a group of one process.
        self.assertEqual(called, {name for name in FUNCTIONS if not name.startswith("context_parallel")})

    def test_a_group_of_one_process_is_attention(self):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            group = torch.distributed.group.WORLD
            expected = posenc.alibi_attention(self.q, self.k, self.v, self.slopes, scale=0.3, causal=True)
            for named in (group, group.group_name):
                result = posenc.context_parallel_alibi_attention(
                    self.q, self.k, self.v, self.slopes, named, scale=0.3, causal=True
                )
                torch.testing.assert_close(result, expected, rtol=0, atol=0)
                for slopes in (None, self.slopes):
                    options = {"slopes": slopes, "scale": 0.3, "causal": True}
                    torch.testing.assert_close(
                        posenc.context_parallel_attention(self.q, self.k, self.v, named, **options),
                        posenc.attention(self.q, self.k, self.v, **options),
                        rtol=0,
                        atol=0,
                    )
        finally:
            torch.distributed.destroy_process_group()

    def test_sinks_are_an_operator_on_the_results(self):
        sinks = self.random(4)
        arguments = (self.q, self.k, self.v)
        results = torch.ops.posenc.attention_sinks(*posenc.attention_with_lse(*arguments), sinks)
        torch.testing.assert_close(posenc.attention_with_lse(*arguments, sinks=sinks), results, rtol=0, atol=0)
        torch.testing.assert_close(posenc.attention(*arguments, sinks=sinks), results[0], rtol=0, atol=0)
        self.assertFalse(torch.equal(results[0], posenc.attention(*arguments)))
        torch.testing.assert_close(
            posenc.alibi_attention_with_lse(*arguments, self.slopes, sinks=sinks),
            posenc.attention_with_lse(*arguments, slopes=self.slopes, sinks=sinks),
            rtol=0,
            atol=0,
        )
        torch.testing.assert_close(
            posenc.alibi_attention(*arguments, self.slopes, sinks=sinks),
            posenc.attention(*arguments, slopes=self.slopes, sinks=sinks),
            rtol=0,
            atol=0,
        )

    def test_gradients_flow(self):
        q = self.q.clone().requires_grad_()
        posenc.rotary_embedding(q, self.cos, self.sin).sum().backward()
        torch.testing.assert_close(
            q.grad, posenc.rotary_embedding(torch.ones_like(q), self.cos, self.sin, conjugate=True)
        )

    def test_compiled_without_a_break(self):
        compiled = torch.compile(posenc.alibi_attention, backend="eager", fullgraph=True)
        arguments = (self.q, self.k, self.v, self.slopes)
        torch.testing.assert_close(compiled(*arguments, causal=True), posenc.alibi_attention(*arguments, causal=True))
        compiled = torch.compile(posenc.attention, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*arguments[:3]), posenc.attention(*arguments[:3]))


class Places(unittest.TestCase):
    def printed(self, option):
        return subprocess.run(
            [sys.executable, "-m", "posenc", option], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.strip()

    @unittest.skipIf("POSENC_LIBRARY" in os.environ, "a build folder, not an installed package (POSENC_LIBRARY)")
    def test_installed_files_are_there(self):
        self.assertTrue((pathlib.Path(self.printed("--cmake-dir")) / "posencConfig.cmake").exists())
        self.assertTrue((pathlib.Path(self.printed("--include-dir")) / "posenc" / "posenc.h").exists())
        self.assertEqual(self.printed("--library"), posenc.library_path())
        self.assertRegex(self.printed("--version"), r"^\d+\.\d+\.\d+$")

    def test_a_missing_library_is_named(self):
        environment = dict(os.environ, POSENC_LIBRARY="/nowhere/libposenc.so")
        process = subprocess.run(
            [sys.executable, "-c", "import posenc"], env=environment, stderr=subprocess.PIPE, text=True
        )
        self.assertNotEqual(process.returncode, 0)
        self.assertIn("ImportError: posenc: /nowhere/libposenc.so does not load with torch", process.stderr)


if __name__ == "__main__":
    unittest.main()
