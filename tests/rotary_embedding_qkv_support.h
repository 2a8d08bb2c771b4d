#pragma once

#include "support.h"

#include <tuple>
#include <vector>

/// Shared by the tests of rotary_embedding_qkv and rotary_embedding_pack.
namespace posenc::test {

using Parts = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

/// Arguments of `rotary_embedding_qkv`. q and k of `in` are not used.
struct Packed {
  RotaryInputs in;
  at::Tensor qkv;
  int64_t q_heads;
  int64_t kv_heads;
  bool stacked;
};

/// Arguments for `c`. `stacked`: qkv is `[.., 3, H, D]` with H = q_heads; otherwise `[.., (Hq + 2 Hkv) * D]`.
Packed make_packed(const RotaryCase& c, bool stacked, const Target& target, Strides strides = Strides::dense);

Parts split(const Packed& p, const at::Tensor& qkv);

at::Tensor pack(const Packed& p, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

Packed backwards(const Packed& p);

/// q, k and v as views of `qkv`, by narrowing the heads.
Parts views(const Packed& p, const at::Tensor& qkv);

at::Tensor joined(const Packed& p, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

std::vector<RotaryCase> packed_cases();

}  // namespace posenc::test
