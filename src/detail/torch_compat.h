#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/version.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

// The differences between the releases of LibTorch that posenc is built with, 2.8 to 2.15: all of them are here.
namespace posenc {

#define POSENC_TORCH_AT_LEAST(major, minor) \
  (TORCH_VERSION_MAJOR > (major) || (TORCH_VERSION_MAJOR == (major) && TORCH_VERSION_MINOR >= (minor)))

// Nodes of the graph: 2.13 counts their references in themselves, earlier releases hold them by std::shared_ptr, and
// delete those that may be deeply linked with a function of their own.
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
/// gave it the name that Python has, and deprecates the old one. `Group` is `c10d::ProcessGroup`, which not every
/// build of LibTorch has.
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
