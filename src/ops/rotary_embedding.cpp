#include <ops/rotary_embedding.h>

#include <posenc/rotary_embedding.h>

#include <string>

namespace posenc {

using at::Tensor;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  const std::string tables = "Tensor cos, Tensor sin, Tensor? positions=None, *";
  const std::string options = "bool interleaved=False, bool conjugate=False, int[] pair_axes=[]";
  const std::string rotation = tables + ", " + options;
  define(m, "rotary_embedding(Tensor x, " + rotation + ") -> Tensor");
  define(m, "rotary_embedding_qk(Tensor q, Tensor k, " + rotation + ") -> (Tensor, Tensor)");
  define(m, "rotary_embedding_(Tensor(a!) x, " + rotation + ") -> ()");
  define(m, "rotary_embedding_qk_(Tensor(a!) q, Tensor(b!) k, " + rotation + ") -> ()");
  define(
      m,
      "rotary_embedding_qkv(Tensor qkv, int num_q_heads, int num_kv_heads, " + rotation +
          ") -> (Tensor, Tensor, Tensor)");
  define(
      m,
      "rotary_embedding_pack(Tensor q, Tensor k, Tensor v, " + tables + ", bool stacked=False, " + options +
          ") -> Tensor");
  define(
      m, "rotary_embedding_backward(Tensor[] grads, Tensor[] inputs, " + rotation + ") -> (Tensor[], Tensor, Tensor)");
  define(m, "rotary_embedding_tables_backward(Tensor[] grads, Tensor[] inputs, " + rotation + ") -> (Tensor, Tensor)");
}

Tensor rotary_embedding(
    const Tensor& x,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  return dispatch::rotary_embedding({cos, sin, positions, interleaved, conjugate, pair_axes}, x);
}

std::tuple<Tensor, Tensor> rotary_embedding_qk(
    const Tensor& q,
    const Tensor& k,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  return dispatch::rotary_embedding_qk({cos, sin, positions, interleaved, conjugate, pair_axes}, q, k);
}

Tensor& rotary_embedding_(
    Tensor& x,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  dispatch::rotary_embedding_({cos, sin, positions, interleaved, conjugate, pair_axes}, x);
  return x;
}

std::tuple<Tensor&, Tensor&> rotary_embedding_qk_(
    Tensor& q,
    Tensor& k,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  dispatch::rotary_embedding_qk_({cos, sin, positions, interleaved, conjugate, pair_axes}, q, k);
  return {q, k};
}

std::tuple<Tensor, Tensor, Tensor> rotary_embedding_qkv(
    const Tensor& qkv,
    int64_t num_q_heads,
    int64_t num_kv_heads,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  return dispatch::rotary_embedding_qkv(
      {cos, sin, positions, interleaved, conjugate, pair_axes}, qkv, num_q_heads, num_kv_heads);
}

Tensor rotary_embedding_pack(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool stacked,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  return dispatch::rotary_embedding_pack({cos, sin, positions, stacked, interleaved, conjugate, pair_axes}, q, k, v);
}

}  // namespace posenc
