"""Compares results of posenc_bench before and after a change: prints the rows of posenc that differ the most.

    python3 bench/compare.py --before a.json [b.json ...] --after c.json [d.json ...]

The files are written by posenc_bench --benchmark_out, all of them on one machine. If a side has several files, each row
takes the smallest of their medians, because times, above all those of the host, vary from run to run.
"""

import argparse
import json
import pathlib
import statistics

LIMIT = 1.02  # ratios between 1 / LIMIT and LIMIT are within the variation of a GPU


def read(paths):
    """`(versions, device, seconds)`: `seconds[name]` of the rows that time posenc or the host."""
    seconds = {}
    for path in paths:
        data = json.loads(path.read_text())
        for row in data["benchmarks"]:
            name = row["name"].split("/iterations:")[0]
            if row.get("median_s", 0) > 0 and ("/posenc/" in name or name.startswith("host/")):
                seconds[name] = min(row["median_s"], seconds.get(name, row["median_s"]))
    return data["context"]["versions"], data["context"]["device"], seconds


def table(title, names, before, after):
    print(f"\n| {title} | Before (us) | After (us) | After / before |\n|---|---:|---:|---:|")
    for name in names:
        ratio = after[name] / before[name]
        print(f"| {name} | {before[name] * 1e6:.1f} | {after[name] * 1e6:.1f} | {ratio:.3f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=pathlib.Path, nargs="+", required=True)
    parser.add_argument("--after", type=pathlib.Path, nargs="+", required=True)
    arguments = parser.parse_args()
    old_versions, device, before = read(arguments.before)
    versions, _, after = read(arguments.after)
    common = [name for name in before if name in after]
    rows = [name for name in common if not name.startswith("host/")]
    ratios = {name: after[name] / before[name] for name in rows}
    slower = [name for name in rows if ratios[name] > LIMIT]
    faster = [name for name in rows if ratios[name] < 1 / LIMIT]
    print(f"{device}  \nBefore: {old_versions}  \nAfter: {versions}\n")
    print(
        f"{len(rows)} rows of posenc, median ratio {statistics.median(ratios.values()):.3f}; "
        f"{len(slower)} slower and {len(faster)} faster by more than {100 * (LIMIT - 1):.0f} %."
    )
    by_ratio = sorted(rows, key=ratios.get, reverse=True)
    table("Slowest rows", by_ratio[: max(5, len(slower))], before, after)
    table("Fastest rows", by_ratio[-5:], before, after)
    table("Host cost of a call", [name for name in common if name.startswith("host/")], before, after)


if __name__ == "__main__":
    main()
