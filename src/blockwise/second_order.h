#pragma once

#include <blockwise/padded.h>

#include <ATen/core/Tensor.h>

// The derivative of the backward pass of attention, one block of query rows at a time.
namespace posenc::blockwise {

/// Gradients of the results of the backward pass, in the shapes of q, k, v and the slopes. Undefined means zero.
struct SecondOrderGrads {
  at::Tensor q, k, v, slopes;
};

/// Gradients of the arguments of the backward pass. That of the slopes is undefined without slopes.
struct SecondOrderResult {
  at::Tensor grad_out, grad_lse, q, k, v, slopes;
};

/// With the names of `alibi_attention_backward`, G = dout, and a, b, c and e the gradients of dq, dk, dv and dslopes,
/// the function to differentiate is
///
///     phi = sum over i, j of dS U + P W,   U = scale (a_i k_j + q_i b_j) - e |distance|,   W = G_i c_j.
///
/// U is the derivative of the scores in the direction (a, b, e). With mu = sum_j P U, rho = sum_j P dP and
/// delta = rho - dlse,
///
///     T = P (R - sum_j P R),   R = (dP - delta) U - mu dP + W,
///     dG = P (U - mu) V + P C,               ddlse = mu,
///     dq = scale (dS B + T K),               dk = scale (dS^T A + T^T Q),
///     dv = (P (U - mu))^T G,                 dslopes = -sum over b, i, j of T |distance|,
///
/// where the last sum is over i and j for slopes `[B, Hq]`.
///
/// With a softcap c, the scaled scores s become c tanh(s / c) with the derivatives J = 1 - tanh(s / c)^2 and
/// J' = -2 J tanh(s / c) / c. Then Y = scale (a_i k_j + q_i b_j) in U becomes J Y, dS in dq and dk becomes J dS, and T
/// in dq and dk becomes J T + J' dS Y, elementwise products of matrices over i and j.
///
/// Probabilities and their sums are computed again. Output and log-sum-exp of the forward pass are functions of the
/// other arguments and are not read.
///
/// @param grad_out  `[B, Sq, Hq, D]`.
/// @param grad_lse  `[B, Hq, Sq]`; undefined means zero.
SecondOrderResult blockwise_double_backward(
    const Padded& call,
    const at::Tensor& grad_out,
    const at::Tensor& grad_lse,
    const SecondOrderGrads& grads);

}  // namespace posenc::blockwise
