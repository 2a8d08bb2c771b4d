#pragma once

#include "device.h"
#include "suite.h"

// Functions that register cases, one per source file. `device` must outlive `suite`.
namespace posenc::bench {

/// RoPE: rotary_embedding.cpp.
void add_rotary_embedding(Suite& suite, Device& device, Protocol protocol);

/// RoPE of packed QKV projections, in place, and with multi-axis positions: rotary_embedding_forms.cpp.
void add_rotary_embedding_forms(Suite& suite, Device& device);

/// RMSNorm of queries and keys, then RoPE: qk_norm_rotary_embedding.cpp.
void add_qk_norm_rotary_embedding(Suite& suite, Device& device, Protocol protocol);

/// RoPE with learnable frequencies: learnable_frequencies.cpp.
void add_learnable_frequencies(Suite& suite, Device& device, Protocol protocol);

/// ALiBi: alibi.cpp.
void add_alibi(Suite& suite, Device& device, Protocol protocol);

/// Attention with the ALiBi bias: alibi_attention.cpp.
void add_alibi_attention(Suite& suite, Device& device, Protocol protocol);

/// Attention on packed sequences, with a window and in decoding: attention_shapes.cpp.
void add_attention_shapes(Suite& suite, Device& device);

/// Host time per call, on tensors so small that the device keeps up with the host: host_cost.cpp.
void add_host_cost(Suite& suite, Device& device);

}  // namespace posenc::bench
