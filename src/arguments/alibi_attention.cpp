#include <arguments/alibi.h>
#include <arguments/alibi_attention.h>
#include <arguments/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

namespace posenc::arguments {
namespace {

using at::Tensor;

/// `alibi_shape` refuses calls with a larger distance between a query and a key.
constexpr int64_t kMaxDistance = std::numeric_limits<int32_t>::max();

/// Checks int32 or int64 `[size]` on the device of q; a negative size means `[N + 1]`.
void check_lengths(const char* op, const char* name, const Tensor& lengths, int64_t size, const Tensor& q) {
  check_defined(op, name, lengths);
  TORCH_CHECK(
      lengths.scalar_type() == at::kInt || lengths.scalar_type() == at::kLong, op, ": expected ", name,
      " of dtype int32 or int64, got ", lengths.scalar_type());
  TORCH_CHECK(
      lengths.device() == q.device(), op, ": expected ", name, " on the device of q, ", q.device(), ", got ",
      lengths.device());
  TORCH_CHECK(
      lengths.dim() == 1 && (size < 0 ? lengths.size(0) > 0 : lengths.size(0) == size), op, ": expected ", name,
      " of shape ", size < 0 ? std::string("[N + 1]") : c10::str("[B] = [", size, "]"), ", got ", lengths.sizes());
}

/// The values of a tensor on the CPU.
std::vector<int64_t> values_on_cpu(const Tensor& tensor) {
  const Tensor wide = tensor.to(at::kLong).contiguous();
  return {wide.const_data_ptr<int64_t>(), wide.const_data_ptr<int64_t>() + wide.numel()};
}

Tensor sequence_lengths(
    const char* op,
    const char* name,
    const std::optional<Tensor>& lengths,
    int64_t batch,
    int64_t most,
    const Tensor& q) {
  if (!lengths.has_value()) {
    return {};
  }
  check_lengths(op, name, *lengths, batch, q);
  if (lengths->is_cpu()) {
    for (const int64_t length : values_on_cpu(*lengths)) {
      TORCH_CHECK(length >= 0 && length <= most, op, ": expected ", name, " from 0 to ", most, ", got ", length);
    }
  }
  return *lengths;
}

/// `max_seqlen` of the call: the given one, or on a CPU the length of the longest packed sequence.
int64_t longest(
    const char* op,
    const std::string& which,
    const Tensor& cu_seqlens,
    int64_t tokens,
    const std::optional<int64_t>& given) {
  TORCH_CHECK(
      !given.has_value() || *given >= 0, op, ": expected max_seqlen_", which, " that is not negative, got ",
      given.value_or(0));
  if (!cu_seqlens.is_cpu()) {
    // On Meta no result depends on it.
    TORCH_CHECK(
        given.has_value() || cu_seqlens.is_meta(), op, ": expected max_seqlen_", which,
        " with packed sequences on a GPU: the host cannot see cu_seqlens_", which, " there without waiting");
    return given.value_or(tokens);
  }
  const std::vector<int64_t> begins = values_on_cpu(cu_seqlens);
  int64_t most = 0;
  for (size_t i = 0; i < begins.size(); ++i) {
    const int64_t before = i == 0 ? 0 : begins[i - 1];
    TORCH_CHECK(
        begins[i] >= before && begins[i] <= tokens, op, ": expected cu_seqlens_", which,
        " that rise from 0 to at most ", tokens, " tokens, got ", begins[i], " after ", before);
    most = i == 0 ? 0 : std::max(most, begins[i] - before);
  }
  TORCH_CHECK(
      !given.has_value() || *given >= most, op, ": expected max_seqlen_", which, " of at least ", most,
      ", the longest sequence, got ", given.value_or(0));
  return given.value_or(most);
}

void check_packed(
    const char* op,
    AlibiAttention& call,
    const Tensor& q,
    const Tensor& k,
    const ConcreteAttentionOptions& o) {
  TORCH_CHECK(o.cu_seqlens_q.has_value(), op, ": expected cu_seqlens_q with packed q of shape [T, Hq, D], got none");
  TORCH_CHECK(
      !o.seqlens_q.has_value() && !o.seqlens_k.has_value(), op,
      ": expected seqlens_q and seqlens_k with q of shape [B, Sq, Hq, D] alone, got them with packed sequences");
  call.cu_seqlens_q = *o.cu_seqlens_q;
  check_lengths(op, "cu_seqlens_q", call.cu_seqlens_q, /*size=*/-1, q);
  call.batch = call.cu_seqlens_q.size(0) - 1;
  call.q_len = longest(op, "q", call.cu_seqlens_q, q.size(0), o.max_seqlen_q);
  if (!o.cu_seqlens_k.has_value()) {
    TORCH_CHECK(
        k.size(0) == q.size(0), op, ": expected cu_seqlens_k, or k and v of as many tokens as q, ", q.size(0), ", got ",
        k.size(0));
    call.cu_seqlens_k = call.cu_seqlens_q;
    call.query_offset = o.query_offset.value_or(0);
    call.k_len =
        o.max_seqlen_k.has_value() ? longest(op, "k", call.cu_seqlens_k, k.size(0), o.max_seqlen_k) : call.q_len;
    return;
  }
  call.cu_seqlens_k = *o.cu_seqlens_k;
  check_lengths(op, "cu_seqlens_k", call.cu_seqlens_k, /*size=*/-1, q);
  TORCH_CHECK(
      call.cu_seqlens_k.size(0) == call.cu_seqlens_q.size(0), op,
      ": expected cu_seqlens_k of shape [N + 1] = ", call.cu_seqlens_q.sizes(), ", got ", call.cu_seqlens_k.sizes());
  call.k_len = longest(op, "k", call.cu_seqlens_k, k.size(0), o.max_seqlen_k);
  if (call.cu_seqlens_k.is_same(call.cu_seqlens_q)) {
    call.query_offset = o.query_offset.value_or(0);
  }
}

void check_padded(
    const char* op,
    AlibiAttention& call,
    const Tensor& q,
    const Tensor& k,
    const ConcreteAttentionOptions& o) {
  TORCH_CHECK(
      !o.cu_seqlens_q.has_value() && !o.cu_seqlens_k.has_value() && !o.max_seqlen_q.has_value() &&
          !o.max_seqlen_k.has_value(),
      op, ": expected cu_seqlens and max_seqlen with packed q of shape [T, Hq, D] alone, got them with ", q.sizes());
  call.batch = q.size(0);
  call.q_len = q.size(1);
  call.k_len = k.size(1);
  TORCH_CHECK(k.size(0) == call.batch, op, ": expected k of the batch size of q, ", call.batch, ", got ", k.sizes());
  call.seqlens_q = sequence_lengths(op, "seqlens_q", o.seqlens_q, call.batch, call.q_len, q);
  call.seqlens_k = sequence_lengths(op, "seqlens_k", o.seqlens_k, call.batch, call.k_len, q);
  TORCH_CHECK(
      call.seqlens_q.defined() == call.seqlens_k.defined() || call.query_offset.has_value(), op,
      ": expected both seqlens_q and seqlens_k, or one of them with a query_offset, got ",
      call.seqlens_q.defined() ? "seqlens_q" : "seqlens_k", " alone: where queries sit is not known");
  if (!call.query_offset.has_value()) {
    if (!call.seqlens_q.defined()) {
      call.query_offset = call.k_len - call.q_len;
    } else if (call.seqlens_q.is_same(call.seqlens_k)) {
      call.query_offset = 0;
    }
  }
}

void check_like(
    const char* op,
    const char* name,
    const Tensor& tensor,
    at::IntArrayRef sizes,
    at::ScalarType dtype,
    c10::Device device) {
  check_defined(op, name, tensor);
  TORCH_CHECK(
      tensor.sizes() == sizes && tensor.scalar_type() == dtype && tensor.device() == device, op, ": expected ", name,
      " of ", sizes, " ", dtype, " on ", device, ", got ", tensor.sizes(), " ", tensor.scalar_type(), " on ",
      tensor.device());
}

/// One side of a window; nullopt if it is at least the largest distance.
std::optional<int64_t> window_side(const char* op, const char* name, const std::optional<int64_t>& given) {
  TORCH_CHECK(given.value_or(0) >= 0, op, ": expected ", name, " that is not negative, got ", given.value_or(0));
  return given.value_or(kMaxDistance) < kMaxDistance ? given : std::nullopt;
}

/// Checks slopes `[Hq]`, or `[B, Hq]` with one row for each sequence.
void check_slopes(const char* op, const Tensor& slopes, const AlibiAttention& call, const Tensor& q) {
  check_defined(op, "slopes", slopes);
  const bool of_heads = slopes.dim() == 1 && slopes.size(0) == call.q_heads;
  const bool of_sequences = slopes.dim() == 2 && slopes.size(0) == call.batch && slopes.size(1) == call.q_heads;
  TORCH_CHECK(
      of_heads || of_sequences, op, ": expected slopes of shape [Hq] = [", call.q_heads, "] or ",
      call.packed() ? "[N, Hq]" : "[B, Hq]", " = [", call.batch, ", ", call.q_heads, "], got ", slopes.sizes());
  const bool is_double = q.scalar_type() == at::kDouble;
  TORCH_CHECK(
      slopes.scalar_type() == at::kFloat || (is_double && slopes.scalar_type() == at::kDouble), op,
      ": expected slopes of dtype float32", is_double ? " or float64" : "", " with ", q.scalar_type(), ", got ",
      slopes.scalar_type());
  TORCH_CHECK(
      slopes.device() == q.device(), op, ": expected slopes on the device of q, ", q.device(), ", got ",
      slopes.device());
}

/// Checks a tensor of the shape of lse.
void check_rows(const char* op, const char* name, const Tensor& tensor, const AlibiAttention& call, const Tensor& q) {
  const std::vector<int64_t> sizes = call.packed() ? std::vector<int64_t>{call.q_heads, q.size(0)}
                                                   : std::vector<int64_t>{call.batch, call.q_heads, call.q_len};
  check_like(op, name, tensor, sizes, alibi_slopes_dtype(q.scalar_type()), q.device());
}

}  // namespace

void check_slopes_argument(const char* op, const Tensor& slopes, const std::optional<Tensor>& in_options) {
  check_defined(op, "slopes", slopes);
  TORCH_CHECK(
      !in_options.has_value(), op, ": expected options without slopes, which are an argument of this function, got ",
      "slopes in both");
}

AlibiAttention check_attention(
    const char* op,
    const AttentionTensors& inputs,
    const ConcreteAttentionOptions& options) {
  const auto& [q, k, v, slopes] = inputs;
  check_defined(op, "q", q);
  check_defined(op, "k", k);
  check_defined(op, "v", v);
  TORCH_CHECK(q.dim() == 4 || q.dim() == 3, op, ": expected q of shape [B, Sq, Hq, D] or [T, Hq, D], got ", q.sizes());
  TORCH_CHECK(
      is_served(q.scalar_type()), op, ": expected q of dtype float16, bfloat16, float32 or float64, got ",
      q.scalar_type());
  TORCH_CHECK(
      k.dim() == q.dim(), op, ": expected k of shape ", q.dim() == 4 ? "[B, Sk, Hk, D]" : "[Tk, Hk, D]", " with q of ",
      q.sizes(), ", got ", k.sizes());
  TORCH_CHECK(
      k.scalar_type() == q.scalar_type() && k.device() == q.device(), op, ": expected k of the dtype and device of q, ",
      q.scalar_type(), " on ", q.device(), ", got ", k.scalar_type(), " on ", k.device());
  TORCH_CHECK(
      v.sizes() == k.sizes() && v.scalar_type() == k.scalar_type() && v.device() == k.device(), op,
      ": expected v of the shape, dtype and device of k, ", k.sizes(), " ", k.scalar_type(), " on ", k.device(),
      ", got ", v.sizes(), " ", v.scalar_type(), " on ", v.device());
  AlibiAttention call{};
  call.q_heads = q.size(-2);
  call.k_heads = k.size(-2);
  call.head_dim = q.size(-1);
  TORCH_CHECK(
      call.head_dim > 0 && k.size(-1) == call.head_dim, op, ": expected q and k of the same positive head size, got ",
      call.head_dim, " and ", k.size(-1));
  TORCH_CHECK(
      call.k_heads > 0 ? call.q_heads % call.k_heads == 0 : call.q_heads == 0, op,
      ": expected a number of query heads that is a multiple of that of key heads, got ", call.q_heads, " and ",
      call.k_heads);
  call.causal = options.causal;
  call.scale = options.scale.value_or(1 / std::sqrt(static_cast<double>(call.head_dim)));
  call.query_offset = options.query_offset;
  TORCH_CHECK(
      options.softcap.value_or(1) > 0 && std::isfinite(options.softcap.value_or(1)), op,
      ": expected softcap to be a positive finite number, got ", options.softcap.value_or(1));
  call.softcap = options.softcap;
  call.window_left = window_side(op, "window_left", options.window_left);
  call.window_right = window_side(op, "window_right", options.window_right);
  if (q.dim() == 3) {
    check_packed(op, call, q, k, options);
  } else {
    check_padded(op, call, q, k, options);
  }
  if (slopes.has_value()) {
    check_slopes(op, *slopes, call, q);
  }
  alibi_shape({op, call.causal, call.query_offset}, call.batch, call.q_heads, call.q_len, call.k_len);
  return call;
}

AlibiAttention check_attention_backward(
    const char* op,
    const AttentionBackwardArguments& a,
    const ConcreteAttentionOptions& options) {
  const AlibiAttention call = check_attention(op, a.inputs(), options);
  check_like(op, "grad_out", a.grad_out, a.q.sizes(), a.q.scalar_type(), a.q.device());
  check_like(op, "out", a.out, a.q.sizes(), a.q.scalar_type(), a.q.device());
  check_rows(op, "lse", a.lse, call, a.q);
  if (a.grad_lse.has_value()) {
    check_rows(op, "grad_lse", *a.grad_lse, call, a.q);
  }
  return call;
}

AlibiAttention check_attention_double_backward(
    const char* op,
    const AttentionDoubleBackwardArguments& a,
    const ConcreteAttentionOptions& options) {
  const AlibiAttention call = check_attention(op, a.inputs(), options);
  check_like(op, "grad_out", a.grad_out, a.q.sizes(), a.q.scalar_type(), a.q.device());
  if (a.grad_lse.has_value()) {
    check_rows(op, "grad_lse", *a.grad_lse, call, a.q);
  }
  for (const auto& [name, given, input] :
       {std::tuple("grad_grad_q", &a.grad_grad_q, &a.q), std::tuple("grad_grad_k", &a.grad_grad_k, &a.k),
        std::tuple("grad_grad_v", &a.grad_grad_v, &a.v)}) {
    if (given->has_value()) {
      check_like(op, name, **given, input->sizes(), input->scalar_type(), input->device());
    }
  }
  if (a.grad_grad_slopes.has_value()) {
    TORCH_CHECK(a.slopes.has_value(), op, ": expected slopes with grad_grad_slopes, got none");
    check_like(
        op, "grad_grad_slopes", *a.grad_grad_slopes, a.slopes->sizes(), alibi_slopes_dtype(a.q.scalar_type()),
        a.q.device());
  }
  return call;
}

void check_attention_sinks(const char* op, const AttentionSinksArguments& a) {
  check_defined(op, "out", a.out);
  check_defined(op, "lse", a.lse);
  check_defined(op, "sinks", a.sinks);
  TORCH_CHECK(
      a.out.dim() == 4 || a.out.dim() == 3, op, ": expected out of shape [B, Sq, Hq, D] or [T, Hq, D], got ",
      a.out.sym_sizes());
  TORCH_CHECK(
      a.lse.dim() == a.out.dim() - 1, op, ": expected lse of shape ", a.out.dim() == 4 ? "[B, Hq, Sq]" : "[Hq, T]",
      ", got ", a.lse.sym_sizes());
  TORCH_CHECK(
      a.sinks.dim() == 1 && a.sinks.sym_size(0) == a.out.sym_size(-2), op, ": expected sinks of shape [Hq] = [",
      a.out.sym_size(-2), "], got ", a.sinks.sym_sizes());
  const bool is_double = a.out.scalar_type() == at::kDouble;
  TORCH_CHECK(
      a.sinks.scalar_type() == at::kFloat || (is_double && a.sinks.scalar_type() == at::kDouble), op,
      ": expected sinks of dtype float32", is_double ? " or float64" : "", " with ", a.out.scalar_type(), ", got ",
      a.sinks.scalar_type());
  TORCH_CHECK(
      a.sinks.device() == a.out.device(), op, ": expected sinks on the device of out, ", a.out.device(), ", got ",
      a.sinks.device());
}

AlibiAttention check_attention_slope_sums(
    const char* op,
    const AttentionSlopeSumsArguments& a,
    const ConcreteAttentionOptions& options) {
  check_defined(op, "q", a.q);
  TORCH_CHECK(a.q.dim() == 4, op, ": expected q of shape [B, Sq, Hq, D], got ", a.q.sizes());
  TORCH_CHECK(a.slopes.has_value(), op, ": expected slopes, whose gradient has these sums, got none");
  const AlibiAttention call = check_attention(op, a.inputs(), options);
  check_like(op, "grad_out", a.grad_out, a.q.sizes(), a.q.scalar_type(), a.q.device());
  check_rows(op, "lse", a.lse, call, a.q);
  return call;
}

}  // namespace posenc::arguments
