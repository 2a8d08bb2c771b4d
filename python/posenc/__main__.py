"""python -m posenc: where the parts of the installed package are, for build systems."""

import argparse
import importlib.metadata

import posenc


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m posenc", description=__doc__)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--cmake-dir", action="store_true", help="print the folder of posencConfig.cmake")
    group.add_argument("--include-dir", action="store_true", help="print the folder of the headers")
    group.add_argument("--library", action="store_true", help="print the file of the library")
    group.add_argument("--version", action="store_true", help="print the version")
    arguments = parser.parse_args()
    if arguments.cmake_dir:
        print(posenc.cmake_dir())
    elif arguments.include_dir:
        print(posenc.include_dir())
    elif arguments.library:
        print(posenc.library_path())
    else:
        print(importlib.metadata.version("posenc"))


if __name__ == "__main__":
    main()
