#include <posenc/modules/rotary_embedding.h>

#include "detail/layout.h"

#include <posenc/frequencies.h>
#include <posenc/logging.h>
#include <posenc/rotary_embedding.h>

#include <torch/utils.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <vector>

namespace posenc {

using torch::Tensor;

/// The tables of one set of frequencies, by device and dtype. Tables are never replaced in place nor freed before
/// this object is: kernels in flight on other streams and captured graphs may still read the shorter ones. As the
/// length at least doubles, all of them together hold less than two of the last.
class RotaryEmbeddingImpl::Tables {
 public:
  struct Table {
    torch::Device device;
    torch::Dtype dtype;
    Tensor cos, sin;

    int64_t length() const { return cos.size(0); }
  };

  Tables(int64_t rotary_dim, double base, int64_t initial_length)
      : rotary_dim_(rotary_dim),
        base_(base),
        initial_length_(initial_length),
        inv_freq_(rotary_inv_freq(rotary_dim, base)) {}

  /// Whether these are the tables that the constructor would start with the same arguments.
  bool serve(int64_t rotary_dim, double base, int64_t initial_length) const {
    return rotary_dim_ == rotary_dim && base_ == base && initial_length_ == initial_length;
  }

  /// `cos` and `sin` of at least `length` rows.
  std::tuple<Tensor, Tensor> get(int64_t length, const torch::Device& device, torch::Dtype dtype) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Table* table = find(device, dtype);
    if (table == nullptr || table->length() < length) {
      const int64_t doubled = table == nullptr ? initial_length_ : 2 * table->length();
      table = &built_.emplace_back(build(std::max(length, doubled), device, dtype));
    }
    return {table->cos, table->sin};
  }

  int64_t length(const torch::Device& device, torch::Dtype dtype) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Table* table = find(device, dtype);
    return table == nullptr ? 0 : table->length();
  }

 private:
  /// The last one built, which is the longest. There are a handful at most.
  const Table* find(const torch::Device& device, torch::Dtype dtype) const {
    const auto found = std::find_if(built_.rbegin(), built_.rend(), [&](const Table& table) {
      return table.device == device && table.dtype == dtype;
    });
    return found == built_.rend() ? nullptr : &*found;
  }

  /// Built on the CPU, so that every device has the same bits, and copied with a wait, so that no other stream
  /// reads a table before it is there. Not under the caller's inference mode: a training step may use it next.
  Table build(int64_t length, const torch::Device& device, torch::Dtype dtype) const {
    const torch::InferenceMode no_inference(false);
    const torch::NoGradGuard no_grad;
    const auto [cos, sin] = rotary_tables(inv_freq_, length, dtype);
    if (log_level() <= LogLevel::debug) {
      log(LogLevel::debug, c10::str("RotaryEmbedding: built ", dtype, " tables of ", length, " positions on ", device));
    }
    return {device, dtype, cos.to(device), sin.to(device)};
  }

  int64_t rotary_dim_;
  double base_;
  int64_t initial_length_;
  Tensor inv_freq_;
  mutable std::mutex mutex_;
  std::vector<Table> built_;
};

namespace {

constexpr const char* kName = "posenc::RotaryEmbedding";

/// A device as tensors report it: `cuda` is the current one.
torch::Device resolved(const torch::Device& device) {
  return device.has_index() || device.is_cpu() ? device : torch::empty({0}, device).device();
}

/// Rows that the tables must have; none where positions cannot be read, on an accelerator without waiting for it.
std::optional<int64_t> needed_length(const Tensor& x, const std::optional<Tensor>& positions) {
  if (!positions.has_value()) {
    return x.size(-3);
  }
  const bool readable =
      positions->defined() && positions->is_cpu() && positions->numel() > 0 && !positions->is_floating_point();
  if (!readable) {
    return std::nullopt;
  }
  const auto last = positions->max().item<int64_t>();
  TORCH_CHECK_INDEX(
      last < std::numeric_limits<int32_t>::max(), "posenc::RotaryEmbedding: expected positions below 2^31 - 1, got ",
      last);
  return last + 1;
}

}  // namespace

RotaryEmbeddingOptions::RotaryEmbeddingOptions(int64_t head_dim) : head_dim_(head_dim) {
}

RotaryEmbeddingImpl::RotaryEmbeddingImpl(RotaryEmbeddingOptions options_) : options(options_) {
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
  if (parameters_.contains("inv_freq")) {  // a second call; clones come without
    parameters_.erase("inv_freq");
  }
  if (options.learnable_frequencies()) {
    tables_ = nullptr;
    rows_on_device_ = std::max(rows_on_device_, options.max_position_embeddings());
    const torch::InferenceMode no_inference(false);
    inv_freq = register_parameter("inv_freq", rotary_inv_freq(rotary_dim, options.base()).to(torch::kFloat32));
    return;
  }
  inv_freq = Tensor();
  // Cloneable resets every clone: it keeps the tables it shares with the original.
  if (tables_ == nullptr || !tables_->serve(rotary_dim, options.base(), options.max_position_embeddings())) {
    tables_ = std::make_shared<Tables>(rotary_dim, options.base(), options.max_position_embeddings());
  }
}

std::tuple<Tensor, Tensor> RotaryEmbeddingImpl::tables_for(const Tensor& x, const std::optional<Tensor>& positions) {
  const std::optional<int64_t> length = needed_length(x, positions);
  const torch::Dtype dtype = rotary_table_dtype(x.scalar_type());
  if (!inv_freq.defined()) {
    return tables_->get(length.value_or(0), x.device(), dtype);
  }
  TORCH_CHECK(
      inv_freq.device() == x.device(), "posenc::RotaryEmbedding: expected the learnable frequencies on ", x.device(),
      ", got them on ", inv_freq.device(), "; move the module there");
  return rotary_tables(inv_freq, length.value_or(rows_on_device_), dtype);
}

std::tuple<Tensor, Tensor> RotaryEmbeddingImpl::forward(
    const Tensor& q,
    const Tensor& k,
    const std::optional<Tensor>& positions) {
  detail::check_input(kName, "q", q, options);
  detail::check_input(kName, "k", k, options);
  const Layout layout = options.layout();
  const Tensor q_view = detail::reordered(q, layout);
  const auto [cos, sin] = tables_for(q_view, positions);
  auto [q_out, k_out] =
      rotary_embedding_qk(q_view, detail::reordered(k, layout), cos, sin, positions, options.interleaved());
  return {detail::reordered(q_out, layout), detail::reordered(k_out, layout)};
}

Tensor RotaryEmbeddingImpl::rotate(const Tensor& x, const std::optional<Tensor>& positions) {
  detail::check_input(kName, "x", x, options);
  const Tensor view = detail::reordered(x, options.layout());
  const auto [cos, sin] = tables_for(view, positions);
  return detail::reordered(rotary_embedding(view, cos, sin, positions, options.interleaved()), options.layout());
}

void RotaryEmbeddingImpl::reserve(int64_t length, const torch::Device& device, torch::Dtype dtype) {
  TORCH_CHECK(length >= 0, "posenc::RotaryEmbedding: expected a length that is not negative, got ", length);
  if (inv_freq.defined()) {
    rows_on_device_ = std::max(rows_on_device_, length);
    return;
  }
  tables_->get(length, resolved(device), rotary_table_dtype(dtype));
}

int64_t RotaryEmbeddingImpl::table_length(const torch::Device& device, torch::Dtype dtype) const {
  return inv_freq.defined() ? rows_on_device_ : tables_->length(resolved(device), rotary_table_dtype(dtype));
}

void RotaryEmbeddingImpl::pretty_print(std::ostream& stream) const {
  stream << "posenc::RotaryEmbedding(head_dim=" << options.head_dim()
         << ", rotary_dim=" << options.rotary_dim().value_or(options.head_dim()) << ", base=" << options.base()
         << ", max_position_embeddings=" << options.max_position_embeddings() << std::boolalpha
         << ", interleaved=" << options.interleaved() << ", layout=" << detail::name_of(options.layout())
         << ", learnable_frequencies=" << options.learnable_frequencies() << ")";
}

}  // namespace posenc
