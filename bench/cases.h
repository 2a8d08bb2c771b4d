#pragma once

#include "device.h"
#include "suite.h"

// What main registers: one function a source file. `device` outlives the suite.
namespace posenc::bench {

/// RoPE: rotary_embedding.cpp.
void add_rotary_embedding(Suite& suite, Device& device, Protocol protocol);

/// RoPE of packed projections, in place and with positions of several axes: rotary_embedding_forms.cpp.
void add_rotary_embedding_forms(Suite& suite, Device& device);

/// RMSNorm of queries and keys and RoPE: qk_norm_rotary_embedding.cpp.
void add_qk_norm_rotary_embedding(Suite& suite, Device& device, Protocol protocol);

/// RoPE with learnable frequencies: learnable_frequencies.cpp.
void add_learnable_frequencies(Suite& suite, Device& device, Protocol protocol);

/// ALiBi: alibi.cpp.
void add_alibi(Suite& suite, Device& device, Protocol protocol);

/// Attention with ALiBi inside: alibi_attention.cpp.
void add_alibi_attention(Suite& suite, Device& device, Protocol protocol);

/// Host time of single calls on tensors so small that nothing else counts: host_cost.cpp.
void add_host_cost(Suite& suite, Device& device);

}  // namespace posenc::bench
