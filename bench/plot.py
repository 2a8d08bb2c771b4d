"""Draws the pictures of the README from the JSON that posenc_bench wrote with --benchmark_out.

Run by ./dev plot, which has matplotlib. All times, the device and the versions in the pictures come from that file.
"""

import argparse
import collections
import json
import pathlib

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "posenc"  # fixed ids, so that equal input gives equal files
import matplotlib.pyplot as plt  # noqa: E402

PASSES = ("forward", "backward")
COLORS = {"forward": "tab:blue", "backward": "tab:orange"}
# Timed by the benchmark for comparison, but not an implementation of the operator in LibTorch.
YARDSTICKS = {"copy", "fill", "bare_cudnn", "without_bias"}
OPERATORS = (
    "RoPE",
    "RoPE in place",
    "RoPE packed",
    "M-RoPE",
    "QK-norm + RoPE",
    "ALiBi bias",
    "ALiBi add",
    "ALiBi softmax",
)


def read(path):
    """`(context, times)`: `times[operator, configuration][pass, implementation]` in seconds."""
    data = json.loads(path.read_text())
    times = collections.defaultdict(dict)
    for row in data["benchmarks"]:
        operator, passed, implementation, *configuration = row["name"].split("/")
        if passed in PASSES:
            times[operator, tuple(configuration)][passed, implementation] = row["median_s"]
    return data["context"], times


def ratios(times, operator, passed, others):
    """Time of the fastest implementation accepted by `others`, divided by posenc's, per configuration with both."""
    result = []
    for (of_operator, _), row in times.items():
        own = row.get((passed, "posenc"))
        beside = [t for (p, name), t in row.items() if p == passed and name != "posenc" and others(name)]
        if of_operator == operator and own is not None and beside:
            result.append(min(beside) / own)
    return result


def draw_ratios(axes, times, others, title):
    """One point for each configuration, and a line at their median."""
    for i, operator in enumerate(OPERATORS):
        for offset, passed in zip((-0.17, 0.17), PASSES):
            values = sorted(ratios(times, operator, passed, others))
            if values:
                axes.plot(values, [i + offset] * len(values), "o", ms=4, alpha=0.4, mew=0, color=COLORS[passed])
                median = values[len(values) // 2]
                axes.plot([median] * 2, [i + offset - 0.15, i + offset + 0.15], lw=2, color=COLORS[passed])
    axes.set_yticks(range(len(OPERATORS)), OPERATORS)
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(title, fontsize=10)


def subtitle(context):
    return f"{context['device']}\n{context['versions']}"


def operators(context, times, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    draw_ratios(left, times, lambda name: name not in YARDSTICKS, "speedup over the fastest tensor code in LibTorch")
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    title = "time of a copy of its input over the time of posenc"
    draw_ratios(right, times, lambda name: name in {"copy", "fill"}, title)
    right.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    right.set_xlim(0, None)
    right.invert_yaxis()  # of both panels, which share the axis
    for passed in PASSES:
        right.plot([], [], lw=2, color=COLORS[passed], label=f"{passed}, median of its configurations")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(subtitle(context), fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def attention(context, times, path):
    """Time against sequence length at the same number of tokens: causal, fixed slopes."""
    names = {
        "posenc": "posenc, ALiBi",
        "stored_bias": "LibTorch, the bias as a mask in memory",
        "without_bias": "LibTorch, without a bias",
    }
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axes, passed in zip(panels, PASSES):
        for name, label in names.items():
            points = []
            for (operator, configuration), row in times.items():
                if operator == "ALiBi attention" and {"causal", "fixed"} <= set(configuration):
                    length = next(int(part[1:]) for part in configuration if part[0] == "S")
                    points.append((length, 1e3 * row[passed, name]))
            axes.plot(*zip(*sorted(points)), "o-", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([length for length, _ in sorted(points)], [str(length) for length, _ in sorted(points)])
        axes.set_xlabel("sequence length; 16384 tokens in all")
        axes.set_ylabel("ms")
        axes.set_title(f"attention, {passed}, causal", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(subtitle(context), fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=pathlib.Path, help="the JSON of posenc_bench")
    parser.add_argument("folder", type=pathlib.Path, help="where the pictures go")
    arguments = parser.parse_args()
    context, times = read(arguments.results)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    operators(context, times, arguments.folder / "operators.svg")
    attention(context, times, arguments.folder / "attention.svg")


if __name__ == "__main__":
    main()
