"""Position encodings for PyTorch: the operators of libposenc as typed functions.

Example::

    import posenc
    import torch

    cos, sin = posenc.rotary_tables(1 / 10000 ** (torch.arange(0, 128, 2) / 128), 4096)
    q = posenc.rotary_embedding(torch.randn(1, 4096, 32, 128), cos, sin)

``python -m posenc --cmake-dir`` prints the folder of the CMake package for C++.
"""

import os
import pathlib

import torch

from posenc.alibi import (
    alibi_add,
    alibi_add_,
    alibi_bias,
    alibi_slopes,
    alibi_softmax,
)
from posenc.attention import (
    alibi_attention,
    alibi_attention_with_lse,
    attention,
    attention_with_lse,
    context_parallel_alibi_attention,
    context_parallel_attention,
)
from posenc.rotary import (
    qk_norm_rotary_embedding,
    rotary_embedding,
    rotary_embedding_,
    rotary_embedding_pack,
    rotary_embedding_qk,
    rotary_embedding_qk_,
    rotary_embedding_qkv,
    rotary_tables,
)

__all__ = [
    "alibi_add",
    "alibi_add_",
    "alibi_attention",
    "alibi_attention_with_lse",
    "alibi_bias",
    "alibi_slopes",
    "alibi_softmax",
    "attention",
    "attention_with_lse",
    "cmake_dir",
    "context_parallel_alibi_attention",
    "context_parallel_attention",
    "include_dir",
    "library_path",
    "qk_norm_rotary_embedding",
    "rotary_embedding",
    "rotary_embedding_",
    "rotary_embedding_pack",
    "rotary_embedding_qk",
    "rotary_embedding_qk_",
    "rotary_embedding_qkv",
    "rotary_tables",
]

_package = pathlib.Path(__file__).resolve().parent


def library_path() -> str:
    """Path of libposenc: the environment variable POSENC_LIBRARY if it is set, else the library of this package."""
    built = os.environ.get("POSENC_LIBRARY")
    if built:
        return built
    for name in ("libposenc.so", "libposenc.dylib"):
        if (_package / "lib" / name).exists():
            return str(_package / "lib" / name)
    raise ImportError(
        f"posenc: expected libposenc.so in {_package / 'lib'}, where pip installs it, found none. To use a build "
        "folder, set POSENC_LIBRARY to the library in it."
    )


def include_dir() -> str:
    """Path of the folder of the C++ headers."""
    return str(_package / "include")


def cmake_dir() -> str:
    """Path of the folder of posencConfig.cmake, for ``find_package(posenc)`` with ``-Dposenc_DIR=``."""
    return str(_package / "lib" / "cmake" / "posenc")


def _load() -> None:
    path = library_path()
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"posenc: {path} does not load with torch {torch.__version__}: {error}. A library works with the release "
            "of torch that it was built with: pip install --no-build-isolation --no-deps --force-reinstall posenc"
        ) from error


_load()
