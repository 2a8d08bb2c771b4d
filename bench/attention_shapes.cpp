#include "cases.h"
#include "eager_alibi.h"

#include <posenc/alibi.h>
#include <posenc/attention.h>

#ifdef POSENC_CUDNN
#include <cuda/detail/cudnn_graph.h>
#endif

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

// Attention with slopes on packed sequences, with a window, and in decoding.
namespace posenc::bench {
namespace {

constexpr const char* kEncoding = "Attention";

struct Sizes {
  at::ScalarType dtype;
  int64_t heads, head_dim;

  std::string name() const { return dtype == at::kFloat ? "fp32" : "bf16"; }
  std::string title() const { return name() + ", " + std::to_string(heads) + " heads of " + std::to_string(head_dim); }
};

Sizes sizes_on(c10::Device device) {
  return device.is_cpu() ? Sizes{at::kFloat, 4, 64} : Sizes{at::kBFloat16, 16, 128};
}

/// q, k and v, leaves `[.., H, D]`, the gradient of the result, and slopes.
struct Tensors {
  Tensors(const Sizes& sizes, std::vector<int64_t> tokens, c10::Device device)
      : slopes(alibi_slopes(sizes.heads).to(device)) {
    tokens.insert(tokens.end(), {sizes.heads, sizes.head_dim});
    for (at::Tensor* x : {&q, &k, &v, &gradient}) {
      *x = at::randn(tokens, at::TensorOptions().dtype(sizes.dtype).device(device));
    }
    for (const at::Tensor& x : {q, k, v}) {
      x.requires_grad_();
    }
  }

  at::Tensor q, k, v, gradient, slopes;
};

/// An implementation: attention of `Tensors`.
using Call = std::function<at::Tensor(const Tensors&)>;

Timing time_pass(Device& device, const Tensors& x, const Call& call, Pass pass) {
  device.release_memory();
  if (pass == Pass::forward) {
    return measure([&] { return device.time([&] { call(x); }); });
  }
  const at::Tensor out = call(x);
  return measure([&] {
    return device.time([&] { torch::autograd::grad({out}, {x.q, x.k, x.v}, {x.gradient}, /*retain_graph=*/true); });
  });
}

// --- Packed sequences ---------------------------------------------------------------------------------------------

/// Lengths at the quantiles of a log-normal distribution, the usual one of documents, in an order that is not sorted.
std::vector<int64_t> log_normal_lengths(int64_t count, double median, int64_t longest) {
  const at::Tensor quantiles = (at::arange(count, at::kDouble) + 0.5) / count;
  const at::Tensor lengths = (at::special_ndtri(quantiles).exp() * median).round().clamp(1, longest).to(at::kLong);
  const at::Tensor order = (at::arange(count, at::kLong) * 7).remainder(count);  // 7 has no common factor with count
  const at::Tensor shuffled = lengths.index_select(0, order).contiguous();
  const auto* const first = shuffled.const_data_ptr<int64_t>();
  return {first, first + count};
}

void add_packed(Suite& suite, Device& device) {
  const c10::Device on = device.torch_device();
  const Sizes sizes = sizes_on(on);
  constexpr int64_t kCount = 32;
  const std::vector<int64_t> lengths =
      on.is_cpu() ? log_normal_lengths(kCount, 64, 512) : log_normal_lengths(kCount, 512, 4096);
  const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  const at::Tensor seqlens = at::tensor(lengths, at::kLong);
  const int64_t tokens = seqlens.sum().item<int64_t>();
  const at::Tensor offsets = at::cat({at::zeros({1}, at::kLong), seqlens.cumsum(0)}).to(at::kInt).to(on);
  const at::Tensor on_device = seqlens.to(at::kInt).to(on);
  const Call packed = [offsets, longest](const Tensors& x) {
    return attention(
        x.q, x.k, x.v, AttentionOptions().slopes(x.slopes).causal(true).cu_seqlens_q(offsets).max_seqlen_q(longest));
  };
  const Call one_by_one = [lengths](const Tensors& x) {
    const std::vector<at::Tensor> q = x.q.unsqueeze(0).split_with_sizes(lengths, 1);
    const std::vector<at::Tensor> k = x.k.unsqueeze(0).split_with_sizes(lengths, 1);
    const std::vector<at::Tensor> v = x.v.unsqueeze(0).split_with_sizes(lengths, 1);
    std::vector<at::Tensor> results;
    for (size_t i = 0; i < lengths.size(); ++i) {
      results.push_back(attention(q[i], k[i], v[i], AttentionOptions().slopes(x.slopes).causal(true)));
    }
    return at::cat(results, 1).squeeze(0);
  };
  const Call padded = [on_device](const Tensors& x) {
    return attention(
        x.q, x.k, x.v,
        AttentionOptions().slopes(x.slopes).causal(true).query_offset(0).seqlens_q(on_device).seqlens_k(on_device));
  };
  double scores = 0;
  for (const int64_t length : lengths) {
    scores += 0.5 * static_cast<double>(sizes.heads) * static_cast<double>(length) * static_cast<double>(length);
  }
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    const auto add = [&](const char* name, const std::vector<int64_t>& shape, const Call& call) {
      Case described{
          kEncoding,
          sizes.name() + "/packed",
          sizes.title() + ", causal, " + std::to_string(kCount) + " packed sequences of log-normal lengths, " +
              std::to_string(tokens) + " tokens, the longest of " + std::to_string(longest),
          pass,
          name,
          /*bytes=*/0};
      described.operations = (pass == Pass::forward ? 4 : 10) * scores * static_cast<double>(sizes.head_dim);
      suite.add(described, [&device, sizes, shape, call, pass, on] {
        return time_pass(device, Tensors(sizes, shape, on), call, pass);
      });
    };
    add(kPosenc, {tokens}, packed);
    add(kPosencOneByOne, {tokens}, one_by_one);
    add(kPosencPadded, {kCount, longest}, padded);
  }
}

// --- Windows ------------------------------------------------------------------------------------------------------

/// The causal bias `[1, H, S, S]`, -infinity for keys that are `window` or more tokens before the query.
at::Tensor windowed_bias(const at::Tensor& slopes, int64_t sequence, int64_t window, at::ScalarType dtype) {
  const at::Tensor bias = alibi_bias(slopes, sequence, sequence, /*causal=*/true, dtype);
  const at::Tensor before = at::ones({sequence, sequence}, slopes.options().dtype(at::kBool)).tril_(-window);
  return bias.masked_fill_(before, -std::numeric_limits<double>::infinity()).unsqueeze(0);
}

void add_windows(Suite& suite, Device& device) {
  const c10::Device on = device.torch_device();
  const Sizes sizes = sizes_on(on);
  const int64_t sequence = on.is_cpu() ? 2048 : 8192;
  const int64_t window = on.is_cpu() ? 256 : 1024;  // keys that a query sees, itself included
  Call windowed = [window](const Tensors& x) {
    return attention(x.q, x.k, x.v, AttentionOptions().slopes(x.slopes).causal(true).window(window - 1, std::nullopt));
  };
  Call all_keys = [](const Tensors& x) {
    return attention(x.q, x.k, x.v, AttentionOptions().slopes(x.slopes).causal(true));
  };
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    const auto add = [&](const char* name, const std::function<Call()>& make) {
      suite.add(
          {kEncoding, sizes.name() + "/window",
           sizes.title() + ", causal, sequence " + std::to_string(sequence) + ", window of " + std::to_string(window),
           pass, name, /*bytes=*/0},
          [&device, sizes, sequence, make, pass, on] {
            return time_pass(device, Tensors(sizes, {1, sequence}, on), make(), pass);
          });
    };
    add(kPosenc, [windowed] { return windowed; });
    add(kPosencAllKeys, [all_keys] { return all_keys; });
    add("stored_bias", [sizes, sequence, window, on]() -> Call {
      const at::Tensor bias = windowed_bias(alibi_slopes(sizes.heads).to(on), sequence, window, sizes.dtype);
      return [bias](const Tensors& x) { return library_attention(x.q, x.k, x.v, bias, /*causal=*/false); };
    });
  }
}

// --- Decoding -----------------------------------------------------------------------------------------------------

/// A cache of keys and values that grows by one token in each step.
struct Decoding {
  int64_t steps, first, capacity;

  /// Calls `step(n)` for each number of keys.
  void run(const std::function<void(int64_t keys)>& step) const {
    for (int64_t i = 0; i < steps; ++i) {
      step(first + i);
    }
  }
};

int64_t plans_built() {
#ifdef POSENC_CUDNN
  return cuda::cudnn_plans_built();
#else
  return 0;
#endif
}

void add_decoding(Suite& suite, Device& device) {
  const c10::Device on = device.torch_device();
  const Sizes sizes = sizes_on(on);
  const Decoding decoding = on.is_cpu() ? Decoding{100, 1948, 2048} : Decoding{1000, 3096, 4096};
  const auto add = [&](const char* name, const std::function<void(const Tensors&, const at::Tensor& query)>& loop) {
    suite.add(
        {kEncoding, sizes.name() + "/decoding",
         sizes.title() + ", " + std::to_string(decoding.steps) + " steps of decoding, cache of " +
             std::to_string(decoding.first) + " to " + std::to_string(decoding.first + decoding.steps - 1) +
             " keys, by the clock of the host",
         Pass::forward, name, /*bytes=*/0},
        [&device, sizes, decoding, loop, on] {
          const at::NoGradGuard no_grad;
          const Tensors cache(sizes, {1, decoding.capacity}, on);
          const at::Tensor query = cache.q.narrow(1, 0, 1);
          const int64_t before = plans_built();
          // A loop of so many calls does not fit into the queue of a GPU, which device.time() fills in advance.
          Timing timing = measure([&] { return wall_time(device, [&] { loop(cache, query); }); });
          timing.plans = plans_built() - before;
          return timing;
        });
  };
  add(kPosenc, [decoding](const Tensors& cache, const at::Tensor& query) {
    const auto options = AttentionOptions().slopes(cache.slopes).causal(true);
    decoding.run(
        [&](int64_t keys) { attention(query, cache.k.narrow(1, 0, keys), cache.v.narrow(1, 0, keys), options); });
  });
  add("stored_bias", [decoding](const Tensors& cache, const at::Tensor& query) {
    // The distance to the last key: a row of the bias, of which a step reads the end.
    const at::Tensor bias =
        alibi_bias(cache.slopes, 1, decoding.capacity, /*causal=*/true, query.scalar_type()).unsqueeze(0);
    const at::Tensor k = cache.k.transpose(1, 2);
    const at::Tensor v = cache.v.transpose(1, 2);
    const at::Tensor q = query.transpose(1, 2);
    decoding.run([&](int64_t keys) {
      at::scaled_dot_product_attention(
          q, k.narrow(2, 0, keys), v.narrow(2, 0, keys),
          bias.narrow(3, decoding.capacity - keys, keys).contiguous());  // LibTorch's cuDNN fails for other addresses
    });
  });
}

}  // namespace

void add_attention_shapes(Suite& suite, Device& device) {
  add_packed(suite, device);
  add_windows(suite, device);
  add_decoding(suite, device);
}

}  // namespace posenc::bench
