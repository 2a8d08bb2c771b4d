#include <meta/detail/symbolic.h>
#include <ops/dispatch.h>
#include <ops/rotary_tables.h>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

namespace posenc {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> rotary_tables_meta(const FrequenciesArguments<c10::SymInt>& a) {
  meta::check_unless_symbolic(arguments::check_frequencies, a);
  const auto table = [&] {
    return at::empty_symint({a.length, a.inv_freq.sym_size(0)}, a.inv_freq.options().dtype(a.dtype));
  };
  return {table(), table()};
}

Tensor rotary_tables_backward_meta(const FrequenciesBackwardArguments& a) {
  if (!meta::any_symbol(a)) {
    arguments::check_frequencies_backward(a);
  }
  return at::empty_symint({a.cos.sym_size(1)}, a.cos.options().dtype(a.dtype));
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("rotary_tables", kernel<rotary_tables_meta>);
  m.impl("rotary_tables_backward", kernel<rotary_tables_backward_meta>);
}

}  // namespace posenc
