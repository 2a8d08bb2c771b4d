#include "alibi_attention_support.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

namespace posenc::test {
namespace {

/// Tokens of a sequence, where tokens are numbered consecutively over the batch. `offset` is its query_offset.
struct Sequence {
  int64_t q_begin, k_begin, q_len, k_len, offset;
};

std::vector<int64_t> values_of(const std::optional<at::Tensor>& tensor) {
  if (!tensor) {
    return {};
  }
  const at::Tensor wide = tensor->to(at::kCPU, at::kLong).contiguous();
  return {wide.data_ptr<int64_t>(), wide.data_ptr<int64_t>() + wide.numel()};
}

std::vector<Sequence> sequences_of(const AttentionInputs& in) {
  const ALiBiAttentionOptions& o = in.options;
  std::vector<Sequence> result;
  if (in.q.dim() == 3) {
    const std::vector<int64_t> q = values_of(o.cu_seqlens_q());
    const std::vector<int64_t> k = o.cu_seqlens_k() ? values_of(o.cu_seqlens_k()) : q;
    for (size_t n = 0; n + 1 < q.size(); ++n) {
      result.push_back({q[n], k[n], q[n + 1] - q[n], k[n + 1] - k[n], 0});
    }
  } else {
    const std::vector<int64_t> q = values_of(o.seqlens_q());
    const std::vector<int64_t> k = values_of(o.seqlens_k());
    for (int64_t b = 0; b < in.q.size(0); ++b) {
      const auto index = static_cast<size_t>(b);
      result.push_back(
          {b * in.q.size(1), b * in.k.size(1), q.empty() ? in.q.size(1) : q[index], k.empty() ? in.k.size(1) : k[index],
           0});
    }
  }
  for (Sequence& sequence : result) {
    sequence.offset = o.query_offset().value_or(sequence.k_len - sequence.q_len);
  }
  return result;
}

/// A contiguous float64 copy `[tokens, heads, channels]`, to read and write by index.
struct Table {
  explicit Table(const at::Tensor& tensor)
      : data(tensor.detach().to(at::kCPU, at::kDouble).contiguous().view({-1, tensor.size(-2), tensor.size(-1)})) {}

  double* at(int64_t token, int64_t head) const {
    return data.data_ptr<double>() + (token * data.size(1) + head) * data.size(2);
  }

  at::Tensor data;
};

Table zeros_like(const Table& table) {
  return Table(at::zeros_like(table.data));
}

/// `rows_last`: `[B, H, S]` or `[H, T]` to `[tokens, heads, 1]`. `rows_first` is its inverse.
at::Tensor rows_last(const at::Tensor& x, const at::Tensor& q) {
  return q.dim() == 3 ? x.t().unsqueeze(-1) : x.transpose(1, 2).unsqueeze(-1);
}
at::Tensor rows_first(const Table& table, const at::Tensor& q) {
  return q.dim() == 3 ? table.data.squeeze(-1).t() : table.data.view({q.size(0), q.size(1), -1}).transpose(1, 2);
}

/// `error` plus that of rounding the result to `dtype`, including values that are subnormal in `dtype`.
at::Tensor stored(const at::Tensor& error, const at::Tensor& value, at::ScalarType dtype) {
  const double smallest = dtype == at::kHalf ? 0x1p-25 : dtype == at::kDouble ? 0 : 0x1p-126;
  return error + (error + value.abs()) * unit_roundoff(dtype) + smallest;
}

}  // namespace

// Let u be the unit roundoff of sums. A sum of n products in any order has an error of at most (n + 1) u times the sum
// of their absolute values (Higham, section 3.1). The exponent of a probability has the errors of its logit and of the
// lse of its row; exp itself, the sum and the quotient add (n + 32) u.
ScalarAttention scalar_attention(
    const AttentionInputs& in,
    const at::Tensor& grad_out,
    const at::Tensor& grad_lse,
    double probability_roundoff) {
  const at::ScalarType dtype = in.q.scalar_type();
  const double u = unit_roundoff(dtype == at::kDouble ? at::kDouble : at::kFloat);
  const Table q(in.q);
  const Table k(in.k);
  const Table v(in.v);
  const Table go(grad_out);
  const Table gl(rows_last(grad_lse, in.q));
  const int64_t heads = in.q.size(-2);
  const std::vector<Sequence> sequences = sequences_of(in);
  const std::vector<int64_t> of_sequences{static_cast<int64_t>(sequences.size()), heads};
  const at::Tensor slopes = in.slopes.defined()
      ? in.slopes.detach().to(at::kCPU, at::kDouble).expand(of_sequences).contiguous()
      : at::zeros(of_sequences, at::kDouble);
  const int64_t group = heads / std::max<int64_t>(1, in.k.size(-2));
  const int64_t channels = in.q.size(-1);
  const double scale = in.options.scale().value_or(1 / std::sqrt(static_cast<double>(channels)));
  const Table out = zeros_like(q);
  const Table dq = zeros_like(q);
  const Table dk = zeros_like(k);
  const Table dv = zeros_like(k);
  const Table out_error = zeros_like(q);
  const Table dq_error = zeros_like(q);
  const Table dk_error = zeros_like(k);
  const Table dv_error = zeros_like(k);
  const Table lse = zeros_like(gl);
  const Table lse_error = zeros_like(gl);
  lse.data.fill_(-std::numeric_limits<double>::infinity());
  at::Tensor dslopes = at::zeros_like(slopes);
  at::Tensor dslopes_error = at::zeros_like(slopes);
  const double of_dot = static_cast<double>(channels + 1) * u;
  // Kernels may round smaller exponentials to 0: twice the smallest normal number.
  const double vanishing = 2 * (dtype == at::kDouble ? std::numeric_limits<double>::min() : 0x1p-126);
  for (size_t number = 0; number < sequences.size(); ++number) {
    const Sequence& s = sequences[number];
    const int64_t first_slope = static_cast<int64_t>(number) * heads;
    const double n = static_cast<double>(s.k_len);
    const double rows = static_cast<double>(s.q_len * group);
    std::vector<double> x(static_cast<size_t>(s.k_len));
    std::vector<double> x_error(x.size());
    std::vector<double> cap(x.size(), 1);  // the derivative of softcap by the scaled score
    std::vector<double> cap_error(x.size());
    for (int64_t i = 0; i < s.q_len; ++i) {
      const int64_t position = s.offset + i;
      // The row sees keys first to end - 1.
      const auto& [left, right] = std::tie(in.options.window_left(), in.options.window_right());
      const int64_t first = left ? std::max<int64_t>(0, position - *left) : 0;
      int64_t end = right && *right < s.k_len - position ? position + *right + 1 : s.k_len;
      end = in.options.causal() ? std::min(end, position + 1) : end;
      if (first >= end) {
        continue;
      }
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t g = h / group;
        const double slope = slopes.data_ptr<double>()[first_slope + h];
        const double* qi = q.at(s.q_begin + i, h);
        const double* goi = go.at(s.q_begin + i, h);
        double top = -std::numeric_limits<double>::infinity();
        double top_error = 0;
        for (int64_t j = first; j < end; ++j) {
          const double* kj = k.at(s.k_begin + j, g);
          double dot = 0;
          double magnitude = 0;
          for (int64_t d = 0; d < channels; ++d) {
            dot += qi[d] * kj[d];
            magnitude += std::abs(qi[d] * kj[d]);
          }
          const auto index = static_cast<size_t>(j);
          const double bias = slope * static_cast<double>(std::abs(position - j));
          double scaled = scale * dot;
          double scaled_error = std::abs(scale) * magnitude * (of_dot + 2 * u);
          if (in.options.softcap().has_value()) {
            // tanh has an error of at most four units in the last place, 8 u, and a derivative of at most 1. The
            // derivative of 1 - tanh^2 is at most 1.
            const double softcap = *in.options.softcap();
            const double tanh = std::tanh(scaled / softcap);
            scaled_error += (8 * u + 3 * u) * std::abs(scaled);
            cap[index] = 1 - tanh * tanh;
            cap_error[index] = scaled_error / softcap + 16 * u;
            scaled = softcap * tanh;
          }
          x[index] = scaled - bias;
          x_error[index] = scaled_error + 3 * u * std::abs(bias) + u * std::abs(scaled);
          top = std::max(top, x[index]);
          top_error = std::max(top_error, x_error[index]);
        }
        double sum = 0;
        double mean_error = 0;
        for (int64_t j = first; j < end; ++j) {
          const double e = std::exp(x[static_cast<size_t>(j)] - top);
          sum += e;
          mean_error += e * x_error[static_cast<size_t>(j)];
        }
        mean_error /= sum;
        const double row_lse = top + std::log(sum);
        // Includes the rounding of the lse itself, from which the probabilities are recomputed.
        const double row_error = mean_error + (n + 32) * u + 2 * u * std::abs(row_lse) + 2 * u * std::abs(top);
        *lse.at(s.q_begin + i, h) = row_lse;
        *lse_error.at(s.q_begin + i, h) = row_error;
        double* outi = out.at(s.q_begin + i, h);
        double* outi_error = out_error.at(s.q_begin + i, h);
        const auto p_of = [&](int64_t j) { return std::exp(x[static_cast<size_t>(j)] - row_lse); };
        const auto p_error = [&](int64_t j) {
          const auto index = static_cast<size_t>(j);
          return x_error[index] + row_error + u * (std::abs(x[index]) + std::abs(row_lse));
        };
        for (int64_t j = first; j < end; ++j) {
          const double* vj = v.at(s.k_begin + j, g);
          const double p = p_of(j);
          const double relative = p_error(j) + probability_roundoff + (n + 1) * u;
          for (int64_t d = 0; d < channels; ++d) {
            outi[d] += p * vj[d];
            outi_error[d] += (p * relative + vanishing) * std::abs(vj[d]);
          }
        }
        double delta = 0;
        double delta_error = 0;
        for (int64_t d = 0; d < channels; ++d) {
          delta += goi[d] * outi[d];
          // The backward pass reads the output after its rounding to `dtype`.
          delta_error += std::abs(goi[d]) *
              (outi_error[d] + std::abs(outi[d]) * (unit_roundoff(dtype) + of_dot) +
               (dtype == at::kHalf ? 0x1p-25 : 0));
        }
        const double cotangent = *gl.at(s.q_begin + i, h);
        double* dqi = dq.at(s.q_begin + i, h);
        double* dqi_error = dq_error.at(s.q_begin + i, h);
        for (int64_t j = first; j < end; ++j) {
          const double* kj = k.at(s.k_begin + j, g);
          const double* vj = v.at(s.k_begin + j, g);
          double dp = 0;
          double dp_magnitude = 0;
          for (int64_t d = 0; d < channels; ++d) {
            dp += goi[d] * vj[d];
            dp_magnitude += std::abs(goi[d] * vj[d]);
          }
          const double p = p_of(j);
          const double factor = dp - delta + cotangent;
          const double ds = p * factor;
          const double ds_error = vanishing * std::abs(factor) +
              p *
                  ((p_error(j) + probability_roundoff + 2 * u) * std::abs(factor) + dp_magnitude * of_dot +
                   delta_error + 3 * u * (std::abs(dp) + std::abs(delta) + std::abs(cotangent)));
          const double of_score = ds * cap[static_cast<size_t>(j)];
          const double of_score_error =
              ds_error * cap[static_cast<size_t>(j)] + (std::abs(ds) + ds_error) * cap_error[static_cast<size_t>(j)];
          double* dkj = dk.at(s.k_begin + j, g);
          double* dvj = dv.at(s.k_begin + j, g);
          double* dkj_error = dk_error.at(s.k_begin + j, g);
          double* dvj_error = dv_error.at(s.k_begin + j, g);
          for (int64_t d = 0; d < channels; ++d) {
            dqi[d] += scale * of_score * kj[d];
            dqi_error[d] += std::abs(scale * kj[d]) * (of_score_error + std::abs(of_score) * (n + 3) * u);
            dkj[d] += scale * of_score * qi[d];
            dkj_error[d] += std::abs(scale * qi[d]) * (of_score_error + std::abs(of_score) * (rows + 3) * u);
            dvj[d] += p * goi[d];
            dvj_error[d] += std::abs(goi[d]) * (vanishing + p * (p_error(j) + probability_roundoff + (rows + 1) * u));
          }
          const double distance = static_cast<double>(std::abs(position - j));
          dslopes.data_ptr<double>()[first_slope + h] -= ds * distance;
          dslopes_error.data_ptr<double>()[first_slope + h] += distance * (ds_error + std::abs(ds) * 4 * u);
        }
      }
    }
  }
  const auto shaped = [](const Table& table, const at::Tensor& like) { return table.data.view(like.sizes()); };
  const auto bound = [&](const Table& error, const Table& value, const at::Tensor& like) {
    return stored(shaped(error, like), shaped(value, like), dtype);
  };
  ScalarAttention result;
  result.values = {shaped(out, in.q), rows_first(lse, in.q), shaped(dq, in.q), shaped(dk, in.k), shaped(dv, in.k), {}};
  result.bounds = {bound(out_error, out, in.q), rows_first(lse_error, in.q), bound(dq_error, dq, in.q),
                   bound(dk_error, dk, in.k),   bound(dv_error, dv, in.k),   {}};
  if (in.slopes.defined()) {
    if (in.slopes.dim() == 1) {
      dslopes = dslopes.sum(0);
      dslopes_error = dslopes_error.sum(0);
    }
    result.values.dslopes = dslopes;
    result.bounds.dslopes = stored(dslopes_error, dslopes, in.slopes.scalar_type());
  }
  return result;
}

}  // namespace posenc::test
