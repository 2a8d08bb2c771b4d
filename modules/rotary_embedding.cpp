#include <posenc/modules/rotary_embedding.h>

#include "detail/layout.h"
#include "detail/resolved_device.h"
#include "detail/rotary_table_cache.h"

#include <posenc/detail/first_index.h>
#include <posenc/frequencies.h>
#include <posenc/pair_axes.h>
#include <posenc/rotary_embedding.h>

#include <algorithm>
#include <limits>
#include <utility>

namespace posenc {

using torch::Tensor;

namespace {

constexpr const char* kRotaryName = "posenc::RotaryEmbedding";

/// The number of table rows that a call needs: the number of tokens, or the largest position plus one. Positions on a
/// CPU are read and checked here. nullopt for positions on an accelerator, which cannot be read without waiting.
std::optional<int64_t> visible_length(const Tensor& x, const std::optional<Tensor>& positions) {
  if (!positions.has_value()) {
    return x.size(-3);
  }
  if (!positions->defined() || positions->numel() == 0 || positions->is_floating_point()) {
    return 0;
  }
  if (!positions->is_cpu()) {
    return std::nullopt;
  }
  const auto [lowest, highest] = positions->aminmax();
  const auto first = lowest.item<int64_t>();
  const auto last = highest.item<int64_t>();
  TORCH_CHECK_INDEX(
      first >= 0, kRotaryName, ": expected positions of at least 0, got ", first, " at index ",
      torch::IntArrayRef(detail::first_index(positions->eq(first))),
      "; a token of padding may have any position that there is, such as 0");
  TORCH_CHECK_INDEX(
      last < std::numeric_limits<int32_t>::max(), kRotaryName, ": expected positions below 2^31 - 1, got ", last,
      " at index ", torch::IntArrayRef(detail::first_index(positions->eq(last))));
  return last + 1;
}

/// The length of the sequence, which frequencies may depend on and which tables must cover. nullopt if it is not known
/// on the host.
std::optional<int64_t> sequence_length(
    const Tensor& x,
    const std::optional<Tensor>& positions,
    std::optional<int64_t> seq_len,
    const RotaryScaling& scaling) {
  const std::optional<int64_t> visible = visible_length(x, positions);
  if (seq_len) {
    TORCH_CHECK(
        *seq_len >= visible.value_or(0) && *seq_len <= std::numeric_limits<int32_t>::max(),
        "posenc::RotaryEmbedding: expected a seq_len of at least ", visible.value_or(0),
        ", what the positions need, and below 2^31, got ", *seq_len);
    return seq_len;
  }
  TORCH_CHECK(
      visible || !depends_on_length(scaling),
      "posenc::RotaryEmbedding: expected seq_len, since the frequencies depend on it (", to_string(scaling),
      ") and positions on ", positions->device(), " cannot be read without waiting for it, got none");
  return visible;
}

}  // namespace

RotaryEmbeddingOptions::RotaryEmbeddingOptions(int64_t head_dim) : head_dim_(head_dim) {
}

RotaryEmbeddingImpl::RotaryEmbeddingImpl(RotaryEmbeddingOptions options_) : options(std::move(options_)) {
  // NOLINTNEXTLINE(clang-analyzer-optin.cplusplus.VirtualCall): as LibTorch's own modules do
  reset();
}

void RotaryEmbeddingImpl::reset() {
  const int64_t rotary_dim = options.rotary_dim().value_or(options.head_dim());
  TORCH_CHECK(
      options.head_dim() > 0, "posenc::RotaryEmbedding: expected a positive head_dim, got ", options.head_dim());
  TORCH_CHECK(
      rotary_dim > 0 && rotary_dim % 2 == 0 && rotary_dim <= options.head_dim(),
      "posenc::RotaryEmbedding: expected an even rotary_dim of 2 to head_dim = ", options.head_dim(), ", got ",
      rotary_dim);
  TORCH_CHECK(options.base() > 0, "posenc::RotaryEmbedding: expected a positive base, got ", options.base());
  TORCH_CHECK(
      options.max_position_embeddings() > 0,
      "posenc::RotaryEmbedding: expected a positive max_position_embeddings, got ", options.max_position_embeddings());
  set_pairs(rotary_dim / 2);
  if (parameters_.contains("inv_freq")) {  // on a second call; clones have no parameters yet
    parameters_.erase("inv_freq");
  }
  if (options.learnable_frequencies()) {
    TORCH_CHECK(
        !depends_on_length(options.scaling()),
        "posenc::RotaryEmbedding: expected learnable frequencies to start with a plan that does not depend on "
        "the length of the sequence, got ",
        to_string(options.scaling()));
    tables_ = nullptr;
    rows_on_device_ = std::max(rows_on_device_, options.max_position_embeddings());
    const torch::InferenceMode no_inference(false);
    const RotaryFrequencies start = rotary_frequencies(rotary_dim, options.base(), options.scaling());
    attention_factor_ = start.attention_factor;
    const Tensor of_pairs = detail::frequencies_of_pairs(start.inv_freq, options.pair_frequencies());
    inv_freq = register_parameter("inv_freq", of_pairs.to(torch::kFloat32));
    return;
  }
  inv_freq = Tensor();
  // Cloneable calls reset() on every clone, which keeps the tables that it shares with the original.
  detail::RotaryTableSource source{rotary_dim, options.base(), options.scaling(), options.pair_frequencies()};
  const int64_t length = options.max_position_embeddings();
  if (tables_ == nullptr || !tables_->serves(source, length)) {
    tables_ = std::make_shared<detail::RotaryTableCache>(std::move(source), length);
  }
}

void RotaryEmbeddingImpl::set_pairs(int64_t num_pairs) {
  pair_axes_.clear();
  num_axes_ = 1;
  TORCH_CHECK(
      options.sections().empty() || options.pair_axes().empty(), kRotaryName,
      ": expected sections or pair_axes, got both: ", torch::IntArrayRef(options.sections()), " and ",
      torch::IntArrayRef(options.pair_axes()));
  if (!options.sections().empty()) {
    pair_axes_ = mrope_pair_axes(options.sections(), options.interleaved_sections());
    num_axes_ = static_cast<int64_t>(options.sections().size());
    TORCH_CHECK(
        static_cast<int64_t>(pair_axes_.size()) == num_pairs,
        "posenc::RotaryEmbedding: expected sections that add up to rotary_dim / 2 = ", num_pairs, ", got ",
        torch::IntArrayRef(options.sections()));
  }
  const auto check_pairs = [num_pairs](const char* name, torch::IntArrayRef values, int64_t end) {
    TORCH_CHECK(
        static_cast<int64_t>(values.size()) == num_pairs &&
            std::all_of(values.begin(), values.end(), [end](int64_t value) { return value >= 0 && value < end; }),
        kRotaryName, ": expected ", name, " to be rotary_dim / 2 = ", num_pairs, " values of 0 to ", end - 1, ", got ",
        values);
  };
  if (!options.pair_axes().empty()) {
    constexpr int64_t kMostAxes = 4;  // limit of the operators
    check_pairs("pair_axes", options.pair_axes(), kMostAxes);
    pair_axes_ = options.pair_axes();
    num_axes_ = 1 + *std::max_element(pair_axes_.begin(), pair_axes_.end());
  }
  if (!options.pair_frequencies().empty()) {
    check_pairs("pair_frequencies", options.pair_frequencies(), num_pairs);
  }
}

std::tuple<Tensor, Tensor> RotaryEmbeddingImpl::tables_for(
    const Tensor& x,
    const std::optional<Tensor>& positions,
    std::optional<int64_t> seq_len) {
  const std::optional<int64_t> length = sequence_length(x, positions, seq_len, options.scaling());
  const torch::Dtype dtype = rotary_table_dtype(x.scalar_type());
  if (!inv_freq.defined()) {
    return tables_->get(length.value_or(0), x.device(), dtype);
  }
  TORCH_CHECK(
      inv_freq.device() == x.device(), "posenc::RotaryEmbedding: expected the learnable frequencies on ", x.device(),
      ", got them on ", inv_freq.device(), "; move the module there");
  return rotary_tables(inv_freq, length.value_or(rows_on_device_), dtype, attention_factor_);
}

std::tuple<Tensor, Tensor> RotaryEmbeddingImpl::forward(
    const Tensor& q,
    const Tensor& k,
    const std::optional<Tensor>& positions,
    std::optional<int64_t> seq_len) {
  detail::check_input(kRotaryName, "q", q, options);
  detail::check_input(kRotaryName, "k", k, options);
  const Layout layout = options.layout();
  const Tensor q_view = detail::reordered(q, layout);
  const auto [cos, sin] = tables_for(q_view, positions, seq_len);
  auto [q_out, k_out] = rotary_embedding_qk(
      q_view, detail::reordered(k, layout), cos, sin, positions, options.interleaved(), options.conjugate(),
      axes_for(positions));
  return {detail::reordered(q_out, layout), detail::reordered(k_out, layout)};
}

Tensor RotaryEmbeddingImpl::rotate(
    const Tensor& x,
    const std::optional<Tensor>& positions,
    std::optional<int64_t> seq_len) {
  detail::check_input(kRotaryName, "x", x, options);
  const Tensor view = detail::reordered(x, options.layout());
  const auto [cos, sin] = tables_for(view, positions, seq_len);
  return detail::reordered(
      rotary_embedding(view, cos, sin, positions, options.interleaved(), options.conjugate(), axes_for(positions)),
      options.layout());
}

void RotaryEmbeddingImpl::forward_(
    Tensor& q,
    Tensor& k,
    const std::optional<Tensor>& positions,
    std::optional<int64_t> seq_len) {
  detail::check_input(kRotaryName, "q", q, options);
  detail::check_input(kRotaryName, "k", k, options);
  Tensor q_view = detail::reordered(q, options.layout());
  Tensor k_view = detail::reordered(k, options.layout());
  const auto [cos, sin] = tables_for(q_view, positions, seq_len);
  rotary_embedding_qk_(
      q_view, k_view, cos, sin, positions, options.interleaved(), options.conjugate(), axes_for(positions));
}

void RotaryEmbeddingImpl::rotate_(Tensor& x, const std::optional<Tensor>& positions, std::optional<int64_t> seq_len) {
  detail::check_input(kRotaryName, "x", x, options);
  Tensor view = detail::reordered(x, options.layout());
  const auto [cos, sin] = tables_for(view, positions, seq_len);
  rotary_embedding_(view, cos, sin, positions, options.interleaved(), options.conjugate(), axes_for(positions));
}

std::tuple<Tensor, Tensor, Tensor> RotaryEmbeddingImpl::forward_qkv(
    const Tensor& qkv,
    int64_t num_q_heads,
    int64_t num_kv_heads,
    const std::optional<Tensor>& positions,
    std::optional<int64_t> seq_len) {
  TORCH_CHECK(qkv.defined(), kRotaryName, ": expected qkv to be a tensor, got an undefined one");
  const Layout layout = options.layout();
  const int64_t of_tokens = layout == Layout::thd ? 1 : 2;  // number of token dimensions, [T] or [B, S]
  const int64_t head_dim = options.head_dim();
  const bool stacked = qkv.dim() == of_tokens + 3;
  const bool flat = qkv.dim() == of_tokens + 1;
  // The limits on the numbers of heads keep their sum from overflowing.
  const bool heads_fit = flat && num_q_heads >= 1 && num_kv_heads >= 1 && num_q_heads <= qkv.size(-1) &&
      num_kv_heads <= qkv.size(-1) && qkv.size(-1) == (num_q_heads + 2 * num_kv_heads) * head_dim;
  TORCH_CHECK(
      heads_fit || (stacked && qkv.size(-1) == head_dim), kRotaryName, ": expected qkv in layout ",
      detail::name_of(layout), " with ", of_tokens,
      " dimensions of tokens, then (num_q_heads + 2 num_kv_heads) head_dim channels or 3, heads ", "and head_dim, for ",
      num_q_heads, " and ", num_kv_heads, " heads of ", head_dim, ", got ", qkv.sizes());
  const Tensor view = layout == Layout::sbhd ? qkv.transpose(0, 1) : qkv;
  // A view with one head for each token: `tables_for` reads the number of tokens in dimension -3.
  const Tensor tokens = stacked ? view.select(-3, 0) : view.unsqueeze(-2);
  const auto [cos, sin] = tables_for(tokens, positions, seq_len);
  const auto [q, k, v] = rotary_embedding_qkv(
      view, num_q_heads, num_kv_heads, cos, sin, positions, options.interleaved(), options.conjugate(),
      axes_for(positions));
  return {detail::reordered(q, layout), detail::reordered(k, layout), detail::reordered(v, layout)};
}

torch::IntArrayRef RotaryEmbeddingImpl::axes_for(const std::optional<Tensor>& positions) const {
  const int64_t of_tokens = options.layout() == Layout::thd ? 1 : 2;
  if (pair_axes_.empty() || !positions.has_value() || !positions->defined() || positions->dim() <= of_tokens) {
    return {};
  }
  TORCH_CHECK(
      positions->size(0) == num_axes_, kRotaryName, ": expected positions with an axis for each of the ", num_axes_,
      options.sections().empty() ? " axes of pair_axes" : " sections", " in front, got ", positions->sizes());
  return pair_axes_;
}

void RotaryEmbeddingImpl::reserve(int64_t length, const torch::Device& device, torch::Dtype dtype) {
  TORCH_CHECK(length >= 0, "posenc::RotaryEmbedding: expected a length that is not negative, got ", length);
  if (inv_freq.defined()) {
    rows_on_device_ = std::max(rows_on_device_, length);
    return;
  }
  tables_->reserve(length, detail::resolved(device), rotary_table_dtype(dtype));
}

int64_t RotaryEmbeddingImpl::table_length(const torch::Device& device, torch::Dtype dtype) const {
  return inv_freq.defined() ? rows_on_device_ : tables_->length(detail::resolved(device), rotary_table_dtype(dtype));
}

void RotaryEmbeddingImpl::pretty_print(std::ostream& stream) const {
  stream << "posenc::RotaryEmbedding(head_dim=" << options.head_dim()
         << ", rotary_dim=" << options.rotary_dim().value_or(options.head_dim()) << ", base=" << options.base()
         << ", max_position_embeddings=" << options.max_position_embeddings() << std::boolalpha
         << ", interleaved=" << options.interleaved() << ", layout=" << detail::name_of(options.layout())
         << ", scaling=" << to_string(options.scaling())
         << ", learnable_frequencies=" << options.learnable_frequencies();
  if (!options.sections().empty()) {
    stream << ", sections=" << torch::IntArrayRef(options.sections())
           << ", interleaved_sections=" << options.interleaved_sections();
  }
  if (!options.pair_axes().empty()) {
    stream << ", pair_axes=" << torch::IntArrayRef(options.pair_axes());
  }
  if (!options.pair_frequencies().empty()) {
    stream << ", pair_frequencies=" << torch::IntArrayRef(options.pair_frequencies());
  }
  if (options.conjugate()) {
    stream << ", conjugate=" << options.conjugate();
  }
  stream << ")";
}

}  // namespace posenc
