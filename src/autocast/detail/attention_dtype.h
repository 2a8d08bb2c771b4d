#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

// What autocast means to attention: q, k and v in the dtype of the region, as LibTorch has it for
// scaled_dot_product_attention. Slopes stay float32: in half they are wrong by 30 at distance 8192.
namespace posenc::autocast {

/// For its lifetime, nothing below is cast again.
template <c10::DeviceType Device>
class AttentionDtype {
 public:
  at::Tensor operator()(const at::Tensor& x) const {
    return x.defined() ? at::autocast::cached_cast(dtype_, x, Device) : x;
  }

 private:
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{at::autocast::get_autocast_dispatch_key_from_device_type(Device)};
  at::ScalarType dtype_ = at::autocast::get_autocast_dtype(Device);
};

}  // namespace posenc::autocast
