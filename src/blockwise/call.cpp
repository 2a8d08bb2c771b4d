#include <arguments/alibi.h>
#include <blockwise/batches.h>
#include <blockwise/call.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <limits>
#include <vector>

namespace posenc::blockwise {
namespace {

using arguments::AlibiAttention;
using arguments::AttentionBackwardArguments;
using arguments::AttentionSlopeSumsArguments;
using arguments::AttentionTensors;
using at::Tensor;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// The slopes of batch number `i`: those of its sequences if they are `[N, Hq]`.
Tensor slopes_of_batch(const PackedBatches& batches, size_t i, const Tensor& slopes) {
  return slopes.dim() == 1 ? slopes : batches.sequences(i).pad(slopes).squeeze(1);
}

/// Adds the gradient of these slopes to the gradient of all slopes.
void add_slopes_of_batch(const PackedBatches& batches, size_t i, const Tensor& of_batch, const Tensor& total) {
  if (total.dim() == 1) {
    total.add_(of_batch);
  } else {
    batches.sequences(i).unpad(of_batch.unsqueeze(1), total);  // each sequence is in one batch
  }
}

/// Batch number `i` of a packed call, padded.
Padded padded_batch(
    const AlibiAttention& call,
    const PackedBatches& batches,
    size_t i,
    const PackedBatches::Batch& batch,
    const AttentionTensors& inputs) {
  Padded result(call);
  if (inputs.slopes.has_value()) {
    result.slopes = slopes_of_batch(batches, i, *inputs.slopes);
  }
  result.q = batch.of_q.pad(inputs.q);
  result.k = batch.of_k.pad(inputs.k);
  result.v = batch.of_k.pad(inputs.v);
  result.seqlens_q = batch.of_q.seqlens();
  result.seqlens_k = batch.of_k.seqlens();
  return result;
}

/// Copies a tensor of the shape of lse, `[Hq, T]`, to a padded batch `[B, Hq, S]`, and back.
Tensor pad_lse(const Packing& packing, const Tensor& lse) {
  return lse.defined() ? packing.pad(lse.t()).transpose(1, 2) : lse;
}

void unpad_lse(const Packing& packing, const Tensor& padded, const Tensor& lse) {
  packing.unpad(padded.transpose(1, 2), lse.t());
}

/// A result for packed tokens, from the results of padded batches.
class PackedResult {
 public:
  /// Adds the result of a batch. Tokens that are in no batch are zero.
  /// @param like  the packed tensor whose shape, dtype and memory layout the result has.
  void add(const Packing& packing, const Tensor& padded, const Tensor& like) {
    if (packing.is_whole()) {
      value_ = padded.squeeze(0);
      return;
    }
    if (!value_.defined()) {
      value_ = at::zeros_like(like);
    }
    packing.unpad(padded, value_);
  }
  Tensor value(const Tensor& like) const { return value_.defined() ? value_ : at::zeros_like(like); }

 private:
  Tensor value_;
};

Tensor filled_lse(const AlibiAttention& call, const Tensor& q, double value) {
  const auto wide = q.options().dtype(arguments::alibi_slopes_dtype(q.scalar_type()));
  return at::full({q.size(0), call.q_heads}, value, wide).t();
}

/// Sets tokens to NaN whose sequence is longer than `max_seqlen` or not within the tensor.
void set_nan(const Tensor& x, const Tensor& invalid_tokens) {
  if (invalid_tokens.defined()) {
    x.masked_fill_(invalid_tokens.view({-1, 1, 1}), kNaN);
  }
}

void set_lse_nan(const Tensor& lse, const Tensor& invalid_tokens) {
  if (invalid_tokens.defined()) {
    lse.masked_fill_(invalid_tokens.unsqueeze(0), kNaN);
  }
}

void set_slopes_nan(const Tensor& grad_slopes, const PackedBatches& batches) {
  if (batches.invalid_q().defined()) {
    grad_slopes.masked_fill_(
        grad_slopes.dim() == 1 ? batches.invalid_q().any() : batches.invalid_sequences().unsqueeze(1), kNaN);
  }
}

Tensor zeros_of_slopes(const Tensor& slopes, const Tensor& q) {
  return at::zeros(slopes.sizes(), q.options().dtype(arguments::alibi_slopes_dtype(q.scalar_type())));
}

/// `x` with zeros past `seqlens` in `dim`, the dimension of the tokens; `x` itself if `seqlens` is undefined.
Tensor zeros_behind(const Tensor& x, const Tensor& seqlens, int64_t dim) {
  if (!seqlens.defined() || !x.defined()) {
    return x;
  }
  const Tensor behind = at::arange(x.size(dim), seqlens.options()) >= seqlens.unsqueeze(1);  // [B, S]
  std::vector<int64_t> sizes(x.dim(), 1);
  sizes[0] = x.size(0);
  sizes[dim] = x.size(dim);
  return x.clone().masked_fill_(behind.view(sizes), 0);  // clone() keeps the memory layout, masked_fill() would not
}

/// A call of padded tensors, with zeros past the lengths. A NaN there would reach other rows as 0 * NaN.
Padded padded_call(const AlibiAttention& call, const AttentionTensors& inputs) {
  Padded result = padded_view(call, inputs);
  Tensor broken;
  const auto lengths = [&broken](const Tensor& given, int64_t most) {
    if (!given.defined()) {
      return given;
    }
    Tensor wide = given.to(at::kLong);
    const Tensor beyond = (wide < 0).logical_or_(wide > most);
    broken = broken.defined() ? broken.logical_or_(beyond) : beyond;
    return wide;
  };
  result.seqlens_q = lengths(call.seqlens_q, call.q_len);
  result.seqlens_k = lengths(call.seqlens_k, call.k_len);
  result.q = zeros_behind(inputs.q, result.seqlens_q, 1);
  result.k = zeros_behind(inputs.k, result.seqlens_k, 1);
  result.v = zeros_behind(inputs.v, result.seqlens_k, 1);
  // On a CPU the checks have thrown for a length beyond its tensor.
  if (broken.defined() && !broken.is_cpu()) {
    const auto wide = inputs.q.options().dtype(arguments::alibi_slopes_dtype(inputs.q.scalar_type()));
    result.nan_if_too_long = at::zeros({call.batch}, wide).masked_fill_(broken, kNaN);
  }
  return result;
}

}  // namespace

Padded padded_view(const AlibiAttention& call, const AttentionTensors& inputs) {
  Padded result(call);
  result.q = inputs.q;
  result.k = inputs.k;
  result.v = inputs.v;
  result.slopes = inputs.slopes.value_or(Tensor());
  result.seqlens_q = call.seqlens_q;
  result.seqlens_k = call.seqlens_k;
  return result;
}

std::tuple<Tensor, Tensor> forward(const AlibiAttention& call, const AttentionTensors& inputs, Forward compute) {
  if (!call.packed()) {
    return compute(padded_call(call, inputs));
  }
  const Tensor& q = inputs.q;
  const Tensor& k = inputs.k;
  const PackedBatches batches(call, q.size(0), k.size(0));
  PackedResult rows_of_out;
  Tensor lse = filled_lse(call, q, -kInfinity);
  for (size_t i = 0; i < batches.size(); ++i) {
    const PackedBatches::Batch batch = batches.batch(i);
    const auto [rows, sums] = compute(padded_batch(call, batches, i, batch, inputs));
    rows_of_out.add(batch.of_q, rows, q);
    unpad_lse(batch.of_q, sums, lse);
  }
  const Tensor out = rows_of_out.value(q);
  set_nan(out, batches.invalid_q());
  set_lse_nan(lse, batches.invalid_q());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const AlibiAttention& call,
    const AttentionBackwardArguments& arguments,
    bool slopes_wanted,
    Backward compute) {
  const auto& [grad_out, given_grad_lse, q, k, v, slopes, out, lse] = arguments;
  const bool slopes_grad = slopes_wanted && slopes.has_value();
  const Tensor grad_lse = given_grad_lse.value_or(Tensor());
  if (!call.packed()) {
    const Padded padded = padded_call(call, arguments.inputs());
    return compute(
        padded, zeros_behind(grad_out, padded.seqlens_q, 1), zeros_behind(grad_lse, padded.seqlens_q, 2), out, lse,
        slopes_grad);
  }
  const PackedBatches batches(call, q.size(0), k.size(0));
  PackedResult of_grad_q;
  PackedResult of_grad_k;
  PackedResult of_grad_v;
  Tensor grad_slopes = slopes_grad ? zeros_of_slopes(*slopes, q) : Tensor();
  for (size_t i = 0; i < batches.size(); ++i) {
    const auto [of_q, of_k] = batches.batch(i);
    const auto [dq, dk, dv, dslopes] = compute(
        padded_batch(call, batches, i, {of_q, of_k}, arguments.inputs()), of_q.pad(grad_out), pad_lse(of_q, grad_lse),
        of_q.pad(out), pad_lse(of_q, lse), slopes_grad);
    of_grad_q.add(of_q, dq, q);
    of_grad_k.add(of_k, dk, k);
    of_grad_v.add(of_k, dv, v);
    if (slopes_grad) {
      add_slopes_of_batch(batches, i, dslopes, grad_slopes);
    }
  }
  const Tensor grad_q = of_grad_q.value(q);
  const Tensor grad_k = of_grad_k.value(k);
  const Tensor grad_v = of_grad_v.value(v);
  set_nan(grad_q, batches.invalid_q());
  set_nan(grad_k, batches.invalid_k());
  set_nan(grad_v, batches.invalid_k());
  if (slopes_grad) {
    set_slopes_nan(grad_slopes, batches);
  }
  return {grad_q, grad_k, grad_v, grad_slopes};
}

Tensor slope_sums(const AlibiAttention& call, const AttentionSlopeSumsArguments& arguments, SlopeSums compute) {
  const Padded padded = padded_call(call, arguments.inputs());
  return compute(padded, zeros_behind(arguments.grad_out, padded.seqlens_q, 1), arguments.lse);
}

SecondOrderResult double_backward(
    const AlibiAttention& call,
    const AttentionTensors& inputs,
    const Tensor& grad_out,
    const Tensor& grad_lse,
    const SecondOrderGrads& grads) {
  if (!call.packed()) {
    const Padded padded = padded_call(call, inputs);
    const SecondOrderGrads visible{
        zeros_behind(grads.q, padded.seqlens_q, 1), zeros_behind(grads.k, padded.seqlens_k, 1),
        zeros_behind(grads.v, padded.seqlens_k, 1), grads.slopes};
    return blockwise_double_backward(
        padded, zeros_behind(grad_out, padded.seqlens_q, 1), zeros_behind(grad_lse, padded.seqlens_q, 2), visible);
  }
  const auto& [q, k, v, slopes] = inputs;
  const PackedBatches batches(call, q.size(0), k.size(0));
  SecondOrderResult result{at::zeros_like(q), filled_lse(call, q, 0), at::zeros_like(q),
                           at::zeros_like(k), at::zeros_like(v),      Tensor()};
  if (slopes.has_value()) {
    result.slopes = zeros_of_slopes(*slopes, q);
  }
  const auto pad = [](const Packing& packing, const Tensor& x) { return x.defined() ? packing.pad(x) : x; };
  for (size_t i = 0; i < batches.size(); ++i) {
    const auto [of_q, of_k] = batches.batch(i);
    const SecondOrderResult of_batch = blockwise_double_backward(
        padded_batch(call, batches, i, {of_q, of_k}, inputs), of_q.pad(grad_out), pad_lse(of_q, grad_lse),
        {pad(of_q, grads.q), pad(of_k, grads.k), pad(of_k, grads.v),
         grads.slopes.defined() ? slopes_of_batch(batches, i, grads.slopes) : Tensor()});
    of_q.unpad(of_batch.grad_out, result.grad_out);
    unpad_lse(of_q, of_batch.grad_lse, result.grad_lse);
    of_q.unpad(of_batch.q, result.q);
    of_k.unpad(of_batch.k, result.k);
    of_k.unpad(of_batch.v, result.v);
    if (slopes.has_value()) {
      add_slopes_of_batch(batches, i, of_batch.slopes, result.slopes);
    }
  }
  for (const Tensor& x : {result.grad_out, result.q}) {
    set_nan(x, batches.invalid_q());
  }
  for (const Tensor& x : {result.k, result.v}) {
    set_nan(x, batches.invalid_k());
  }
  set_lse_nan(result.grad_lse, batches.invalid_q());
  if (slopes.has_value()) {
    set_slopes_nan(result.slopes, batches);
  }
  return result;
}

}  // namespace posenc::blockwise
