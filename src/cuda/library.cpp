#include <arguments/alibi.h>
#include <arguments/qk_norm_rotary_embedding.h>
#include <arguments/rotary_embedding.h>
#include <arguments/rotary_embedding_qkv.h>
#include <cuda/kernels.h>

#include <torch/library.h>

namespace posenc {

TORCH_LIBRARY_IMPL(posenc, CUDA, m) {
  m.impl("rotary_embedding", rotary_kernel<arguments::rotary_embedding<cuda::rotate>>);
  m.impl("rotary_embedding_", rotary_kernel<arguments::rotary_embedding_in_place<cuda::rotate>>);
  m.impl("rotary_embedding_qk", rotary_kernel<arguments::rotary_embedding_qk<cuda::rotate>>);
  m.impl("rotary_embedding_qk_", rotary_kernel<arguments::rotary_embedding_qk_in_place<cuda::rotate>>);
  m.impl("rotary_embedding_qkv", rotary_kernel<arguments::rotary_embedding_qkv<cuda::rotate>>);
  m.impl("rotary_embedding_pack", rotary_pack_kernel<arguments::rotary_embedding_pack<cuda::rotate>>);
  m.impl("rotary_embedding_backward", rotary_kernel<cuda::rotary_embedding_backward>);
  m.impl("rotary_embedding_tables_backward", rotary_kernel<cuda::rotary_embedding_tables_backward>);
  m.impl("rotary_tables", cuda::rotary_tables);
  m.impl("rotary_tables_backward", cuda::rotary_tables_backward);
  m.impl("qk_norm_rotary_embedding", qk_norm_rotary_kernel<arguments::qk_norm_rotary_embedding<cuda::qk_norm_rotate>>);
  m.impl(
      "qk_norm_rotary_embedding_backward",
      qk_norm_rotary_backward_kernel<arguments::qk_norm_rotary_embedding_backward<cuda::qk_norm_rotate_backward>>);
  m.impl("alibi_bias", arguments::alibi_bias<cuda::alibi_bias>);
  m.impl("alibi_add", arguments::alibi_add<cuda::alibi_add>);
  m.impl("alibi_add_", arguments::alibi_add_<cuda::alibi_add>);
  m.impl("alibi_mask", arguments::alibi_mask<cuda::alibi_mask>);
  m.impl("alibi_softmax", arguments::alibi_softmax<cuda::alibi_softmax>);
  m.impl("alibi_softmax_backward", arguments::alibi_softmax_backward<cuda::alibi_softmax_backward>);
  m.impl("alibi_slopes_backward", cuda::alibi_slopes_backward);
}

}  // namespace posenc
