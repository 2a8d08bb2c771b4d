#include "alibi_support.h"
#include "gradcheck.h"

#include <posenc/reference.h>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>

#include <string>

namespace posenc::test {
namespace {

/// Derivatives of every operator against its reference version, and modifications of inputs between the passes.
class AlibiDerivatives : public DeviceTest {
 protected:
  AlibiInputs inputs(at::ScalarType dtype, bool all_flags) const {
    AlibiCase c;
    c.causal = c.masked = all_flags;
    if (all_flags) {
      c.scale = 0.5;
      c.query_offset = 4;  // k_len - q_len + 2: causal rows see keys that the default offset hides
    }
    AlibiInputs in = make_alibi_inputs(c, {GetParam(), dtype});
    if (dtype == at::kDouble) {
      in.slopes = in.slopes.to(at::kDouble);
    }
    return in;
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, AlibiDerivatives, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, AlibiDerivatives, ::testing::Values(at::kCUDA), device_name);

enum class Operator { bias, add, add_in_place, softmax };
constexpr Operator kOperators[] = {Operator::bias, Operator::add, Operator::add_in_place, Operator::softmax};

const char* name_of(Operator op) {
  constexpr const char* kNames[] = {"alibi_bias", "alibi_add", "alibi_add_", "alibi_softmax"};
  return kNames[static_cast<int>(op)];
}

at::Tensor call(Operator op, const AlibiInputs& in) {
  switch (op) {
    case Operator::bias:
      return bias_of(in, in.scores.scalar_type());
    case Operator::add:
      return add_of(in);
    case Operator::add_in_place: {
      at::Tensor scores = in.scores.clone();
      return posenc::alibi_add_(scores, in.slopes, in.causal, in.query_offset);
    }
    case Operator::softmax:
      return softmax_of(in);
  }
  return {};
}

at::Tensor call_reference(Operator op, const AlibiInputs& in) {
  switch (op) {
    case Operator::bias:
      return reference::alibi_bias(
          in.slopes, in.scores.size(-2), in.scores.size(-1), in.causal, in.scores.scalar_type(), in.query_offset);
    case Operator::add:
    case Operator::add_in_place:
      return reference::alibi_add(in.scores, in.slopes, in.causal, in.query_offset);
    case Operator::softmax:
      return reference::alibi_softmax(in.scores, in.slopes, in.scale, in.causal, in.key_padding_mask, in.query_offset);
  }
  return {};
}

using Call = at::Tensor (*)(Operator, const AlibiInputs&);

/// A nonlinear function of the result, so that every operator has second derivatives. Ignores hidden keys.
at::Tensor loss(const at::Tensor& result) {
  const at::Tensor finite = result.masked_fill(result.isinf(), 0);
  const at::Tensor weights = at::linspace(-1, 2, result.numel(), result.options()).view(result.sizes());
  return (finite.pow(3) * weights).sum();
}

/// First derivatives without and with create_graph, and the derivatives of a gradient penalty.
struct Derivatives {
  TensorList first, first_with_graph, second;
};

Derivatives derivatives(const at::Tensor& value, const TensorList& leaves) {
  Derivatives result;
  result.first = gradients({value}, leaves, {at::Tensor()});
  result.first_with_graph = gradients({value}, leaves, {at::Tensor()}, /*create_graph=*/true);
  at::Tensor penalty;
  for (const at::Tensor& gradient : result.first_with_graph) {
    if (gradient.defined() && gradient.requires_grad()) {
      const at::Tensor term = gradient.pow(2).sum();
      penalty = penalty.defined() ? penalty + term : term;
    }
  }
  if (penalty.defined()) {
    result.second = gradients({penalty}, leaves, {at::Tensor()});
  }
  return result;
}

void expect_close(const TensorList& actual, const TensorList& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    SCOPED_TRACE(::testing::Message() << "input " << i);
    ASSERT_EQ(actual[i].defined(), expected[i].defined());
    if (actual[i].defined()) {
      const at::Tensor wide = expected[i].detach().cpu();
      expect_within(actual[i].detach().cpu(), wide, at::full_like(wide, 1e-11 * (1 + wide.abs().max().item<double>())));
    }
  }
}

void expect_equal_derivatives(const Derivatives& actual, const Derivatives& expected) {
  const ::testing::ScopedTrace trace(__FILE__, __LINE__, "without a graph, with a graph, of a penalty");
  expect_close(actual.first, expected.first);
  expect_close(actual.first_with_graph, expected.first);
  expect_close(actual.second, expected.second);
}

TEST_P(AlibiDerivatives, AreThoseOfTensorOperationsForEverySubsetOfInputs) {
  for (const Operator op : kOperators) {
    for (const bool all_flags : {false, true}) {
      for (const auto& [scores, slopes] : {std::pair(true, true), {true, false}, {false, true}}) {
        if (op == Operator::bias && !slopes) {
          continue;
        }
        SCOPED_TRACE(
            ::testing::Message() << name_of(op) << " flags " << all_flags << ", gradient of scores " << scores
                                 << ", of slopes " << slopes);
        const AlibiInputs in = with_alibi_grad(inputs(at::kDouble, all_flags), scores && op != Operator::bias, slopes);
        const TensorList leaves{in.scores, in.slopes};
        expect_equal_derivatives(
            derivatives(loss(call(op, in)), leaves), derivatives(loss(call_reference(op, in)), leaves));
      }
    }
  }
}

// The scores depend on the slopes, which are also an argument. Each path must contribute to the gradient once.
TEST_P(AlibiDerivatives, OfInputsThatDependOnEachOther) {
  for (const Operator op : {Operator::add, Operator::add_in_place, Operator::softmax}) {
    for (const bool all_flags : {false, true}) {
      SCOPED_TRACE(::testing::Message() << name_of(op) << " flags " << all_flags);
      AlibiInputs in = inputs(at::kDouble, all_flags);
      const at::Tensor base = in.scores;
      const at::Tensor x = in.slopes.clone().requires_grad_();
      const auto value = [&](Call function) {
        in.slopes = x;
        in.scores = base * x.view({-1, 1, 1}).sin() + x.view({-1, 1, 1});
        return loss(function(op, in));
      };
      expect_equal_derivatives(derivatives(value(call), {x}), derivatives(value(call_reference), {x}));
    }
  }
}

/// Autocast to bfloat16 on one device for the lifetime of the object.
class Autocast {
 public:
  explicit Autocast(at::DeviceType device) : device_(device) {
    at::autocast::set_autocast_enabled(device_, true);
    at::autocast::set_autocast_dtype(device_, at::kBFloat16);
  }
  ~Autocast() {
    at::autocast::set_autocast_enabled(device_, false);
    at::autocast::clear_cache();
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
  at::DeviceType device_;
};

TEST_P(AlibiDerivatives, InAnAutocastRegionAreTheSame) {
  for (const Operator op : kOperators) {
    SCOPED_TRACE(name_of(op));
    const AlibiInputs in = with_alibi_grad(inputs(at::kFloat, true), op != Operator::bias, true);
    const TensorList leaves{in.scores, in.slopes};
    const at::Tensor value = loss(call(op, in));
    const Derivatives expected = derivatives(value, leaves);
    const Autocast autocast(GetParam());
    const Derivatives found = derivatives(value, leaves);
    for (size_t i = 0; i < leaves.size(); ++i) {
      if (leaves[i].requires_grad()) {
        expect_same_bits(found.first[i], expected.first[i]);
        expect_same_bits(found.first_with_graph[i].detach(), expected.first[i]);
        expect_same_bits(found.second[i], expected.second[i]);
      }
    }
  }
}

/// Expects an in-place modification between the passes not to change the gradients, or autograd to report a modified
/// saved variable.
void expect_gradient_or_error(const std::function<TensorList()>& backward, const TensorList& expected) {
  TensorList found;
  try {
    found = backward();
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what()).find("modified by an inplace operation"), std::string::npos) << error.what();
    return;
  }
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i) {
    if (expected[i].defined()) {
      expect_same_bits(found[i].detach(), expected[i].detach());
    }
  }
}

TEST_P(AlibiDerivatives, ChangesBetweenThePassesAreNeverWrongGradients) {
  enum Changed { scores, slopes, mask, result, grad, kChanged };
  for (const Operator op : kOperators) {
    for (int changed = 0; changed < kChanged; ++changed) {
      for (const bool twice : {false, true}) {
        SCOPED_TRACE(::testing::Message() << name_of(op) << ", changed argument " << changed << ", twice " << twice);
        AlibiInputs in = with_alibi_grad(inputs(at::kFloat, true), op != Operator::bias, true);
        in.key_padding_mask = in.key_padding_mask->clone();
        const TensorList leaves{in.scores, in.slopes};
        at::Tensor y = call(op, in);
        at::Tensor cotangent = at::randn_like(y).requires_grad_(twice);
        const auto first = [&](bool create_graph) { return gradients({y}, leaves, {cotangent}, create_graph); };
        const auto change = [&] {
          const at::NoGradGuard no_grad;
          switch (changed) {
            case scores:
              in.scores.fill_(3);
              break;
            case slopes:
              in.slopes.fill_(3);
              break;
            case mask:
              in.key_padding_mask->logical_not_();
              break;
            case result:
              y.mul_(2);
              break;
            default:
              cotangent.mul_(2);
          }
        };
        if (!twice) {
          if (changed == grad) {
            continue;  // an argument of the backward pass
          }
          const TensorList expected = first(false);
          change();
          expect_gradient_or_error([&] { return first(false); }, expected);
          continue;
        }
        const TensorList once = first(true);
        const TensorList seeds{
            once[0].defined() ? at::ones_like(once[0]) : at::Tensor(), at::linspace(1, 2, 3, once[1].options())};
        TensorList outputs{once[1]};
        TensorList weights{seeds[1]};
        if (once[0].defined()) {
          outputs.push_back(once[0]);
          weights.push_back(seeds[0]);
        }
        const auto second = [&] { return gradients(outputs, {cotangent}, weights); };
        const TensorList expected = second();
        change();
        expect_gradient_or_error(second, expected);
      }
    }
  }
}

// The result of softmax is the only tensor that a backward pass reads. The test above must be able to meet this error.
TEST_P(AlibiDerivatives, AChangedResultOfSoftmaxIsTheErrorOfASavedTensor) {
  const AlibiInputs in = with_alibi_grad(inputs(at::kFloat, true), true, true);
  at::Tensor y = softmax_of(in);
  {
    const at::NoGradGuard no_grad;
    y.mul_(2);
  }
  expect_error([&] { gradients({y}, {in.scores}, {at::ones_like(y)}); }, {"modified by an inplace operation"});
}

}  // namespace
}  // namespace posenc::test
