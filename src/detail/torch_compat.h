#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/version.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

// All differences between the supported releases of LibTorch, 2.8 to 2.15.
namespace posenc {

#define POSENC_TORCH_AT_LEAST(major, minor) \
  (TORCH_VERSION_MAJOR > (major) || (TORCH_VERSION_MAJOR == (major) && TORCH_VERSION_MINOR >= (minor)))

// Nodes of the autograd graph: since 2.13 they are intrusively reference counted. Earlier releases hold them by
// std::shared_ptr, with a deleter for deep graphs.
#if POSENC_TORCH_AT_LEAST(2, 13)
using NodePtr = c10::intrusive_ptr<torch::autograd::Node>;

template <typename Node, typename... Args>
NodePtr new_node(Args&&... args) {
  return c10::make_intrusive<Node>(std::forward<Args>(args)...);
}
#else
using NodePtr = std::shared_ptr<torch::autograd::Node>;

template <typename Node, typename... Args>
NodePtr new_node(Args&&... args) {
  return NodePtr(new Node(std::forward<Args>(args)...), torch::autograd::deleteNode);
}
#endif

/// The collective of c10d that sends `sent[r]` elements of `input` to rank r and receives `received[r]` from it. 2.13
/// renamed it to the name in Python and deprecated the old name. `Group` is `c10d::ProcessGroup`, a template parameter
/// because not every build of LibTorch has it.
template <typename Group>
auto all_to_all_single(
    Group& group,
    at::Tensor& output,
    at::Tensor& input,
    std::vector<int64_t>& received,
    std::vector<int64_t>& sent) {
#if POSENC_TORCH_AT_LEAST(2, 13)
  return group.all_to_all_single(output, input, received, sent);
#else
  return group.alltoall_base(output, input, received, sent);
#endif
}

}  // namespace posenc
