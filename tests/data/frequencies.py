#!/usr/bin/env python3
"""Writes frequencies.h beside this file: what the tests of posenc/frequencies.h expect.

Worked out from the published formulas with 50 decimal digits, without torch and without transformers, and printed to
17 digits, which name one float64. Run it again after a change: python3 tests/data/frequencies.py
"""

import decimal
import pathlib
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

decimal.getcontext().prec = 50

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def number(x):
    return Decimal(repr(x)) if isinstance(x, float) else Decimal(x)


def power(base, exponent):
    return (number(exponent) * number(base).ln()).exp()


def default(dim, base):
    """RoFormer, https://arxiv.org/abs/2104.09864, section 3.2.2."""
    return [power(base, -Decimal(2 * i) / dim) for i in range(dim // 2)]


def linear(dim, base, factor):
    """https://arxiv.org/abs/2306.15595, equation 4, on the frequencies instead of the positions."""
    return [w / number(factor) for w in default(dim, base)], Decimal(1)


def ntk(dim, base, stretch):
    """https://arxiv.org/abs/2309.00071, equation 16, with its stretch of the base."""
    return default(dim, number(base) * power(stretch, Decimal(dim) / (dim - 2))), Decimal(1)


def dynamic_ntk(dim, base, factor, max_positions, seq_len):
    """The same paper, appendix B.2, with the factor of transformers' `dynamic`."""
    n = max(seq_len, max_positions)
    return ntk(dim, base, number(factor) * n / max_positions - (number(factor) - 1))


def yarn(dim, base, factor, original, fast=32, slow=1, truncate=True, attention=None, mscale=0, mscale_all_dim=0):
    """The same paper, equations 17 to 23; mscale as in the code of DeepSeek-V2 (https://arxiv.org/abs/2405.04434)."""
    s = number(factor)

    def pair(turns):
        return dim * (original / (2 * PI * number(turns))).ln() / (2 * number(base).ln())

    lo, hi = pair(fast), pair(slow)
    if truncate:
        lo, hi = lo.to_integral_value(ROUND_FLOOR), hi.to_integral_value(ROUND_CEILING)
    lo, hi = max(lo, Decimal(0)), min(hi, Decimal(dim - 1))
    if lo == hi:
        hi += Decimal("0.001")

    def m(k):
        return Decimal(1) if s <= 1 else Decimal("0.1") * number(k) * s.ln() + 1

    if attention is not None:
        a = number(attention)
    elif mscale and mscale_all_dim:
        a = m(mscale) / m(mscale_all_dim)
    else:
        a = m(1)
    frequencies = []
    for i, w in enumerate(default(dim, base)):
        g = min(max((i - lo) / (hi - lo), Decimal(0)), Decimal(1))
        frequencies.append(g * w / s + (1 - g) * w)
    return frequencies, a


def llama3(dim, base, factor, low, high, original):
    """apply_scaling of https://github.com/meta-llama/llama-models."""
    s, low, high = number(factor), number(low), number(high)
    frequencies = []
    for w in default(dim, base):
        wavelength = 2 * PI / w
        if wavelength < original / high:
            frequencies.append(w)
        elif wavelength > original / low:
            frequencies.append(w / s)
        else:
            t = (original / wavelength - low) / (high - low)
            frequencies.append((1 - t) * w / s + t * w)
    return frequencies, Decimal(1)


def longrope(dim, base, factors, original, extended):
    """https://arxiv.org/abs/2402.13753, equation 2; the attention factor as in the code of Phi-3."""
    s = Decimal(extended) / original
    a = Decimal(1) if s <= 1 else (1 + s.ln() / Decimal(original).ln()).sqrt()
    return [w / number(e) for w, e in zip(default(dim, base), factors, strict=True)], a


def proportional(dim, base, part, factor):
    """`proportional` of transformers 5 (Gemma 4)."""
    rotated = int(number(part) * dim / 2)
    frequencies = [w / number(factor) if i < rotated else Decimal(0) for i, w in enumerate(default(dim, base))]
    return frequencies, Decimal(1)


def xpos(dim, length):
    """https://arxiv.org/abs/2212.10554, section 3.2; all positions one after the other."""
    rows = []
    for t in range(length):
        exponent = Decimal(t - length // 2) / 512
        rows += [power((2 * i + Decimal("0.4") * dim) / (Decimal("1.4") * dim), exponent) for i in range(dim // 2)]
    return rows, Decimal(1)


# The size of Phi-3 mini's lists, and like them growing from 1 to about 2 and 64; these can be written down exactly.
PHI3_SHORT = [1 + i / 32 for i in range(48)]
PHI3_LONG = [1 + i * i / 32 for i in range(48)]

CASES = {
    "Llama2": (default(128, 10000), Decimal(1)),
    "Llama3_1": llama3(128, 500000, 8, 1, 4, 8192),
    "Llama3_2_1B": llama3(64, 500000, 32, 1, 4, 8192),
    "Llama4": llama3(128, 500000, 16, 1, 1, 8192),
    "Qwen2Vl": (default(128, 1000000), Decimal(1)),
    "Qwen3Yarn": yarn(128, 1000000, 4, 32768),
    "DeepSeekV2": yarn(64, 10000, 40, 4096, mscale=0.707, mscale_all_dim=0.707),
    "DeepSeekV3": yarn(64, 10000, 40, 4096, mscale=1.0, mscale_all_dim=1.0),
    "YarnWithTwoMscales": yarn(64, 10000, 40, 4096, mscale=1.0, mscale_all_dim=0.707),
    "YarnWithAttentionFactor": yarn(32, 10000, 4.5, 2048, fast=16, slow=2, attention=1.25),
    "YarnWithoutTruncation": yarn(64, 150000, 32, 4096, truncate=False),  # gpt-oss
    "YarnWithOneBoundary": yarn(8, 10000, 2, 4),  # lo and hi are both 0
    "Phi3Short": longrope(96, 10000, PHI3_SHORT, 4096, 131072),
    "Phi3Long": longrope(96, 10000, PHI3_LONG, 4096, 131072),
    "Gemma3Full": linear(256, 1000000, 8),
    "Gemma3Sliding": (default(256, 10000), Decimal(1)),
    "DynamicNtkAt4096": dynamic_ntk(128, 10000, 2, 4096, 4096),
    "DynamicNtkAt4097": dynamic_ntk(128, 10000, 2, 4096, 4097),
    "DynamicNtkAt16384": dynamic_ntk(128, 10000, 2.5, 4096, 16384),
    "StaticNtk": ntk(128, 10000, 1000),  # HunYuan
    "Proportional": proportional(512, 1000000, 0.25, 1),  # Gemma 4
    "ProportionalWithFactor": proportional(64, 10000, 0.3, 2),
    "Xpos": xpos(8, 5),
}


def main():
    lines = [
        "#pragma once",
        "",
        "// Written by frequencies.py, which says how; not by hand.",
        "",
        "#include <vector>",
        "",
        "namespace posenc::test::data {",
        "",
        "struct Frequencies {",
        "  std::vector<double> inv_freq;",
        "  double attention_factor;",
        "};",
        "",
        "// clang-format off",
    ]
    for name, (values, attention_factor) in CASES.items():
        lines.append(f"inline const Frequencies k{name} = {{")
        lines.append("    {")
        for row in range(0, len(values), 4):
            lines.append("        " + " ".join(f"{value:.17g}," for value in map(float, values[row : row + 4])))
        lines.append(f"    }}, {float(attention_factor):.17g}}};")
    lines += ["// clang-format on", "", "}  // namespace posenc::test::data", ""]
    pathlib.Path(__file__).with_name("frequencies.h").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
