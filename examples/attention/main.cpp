// Trains a small language model on the bytes of a text and prints its loss:
//
//   attention [TEXT [STEPS]]
//
// Exits with 0 if the loss falls below kClearly times the first loss. Runs on a GPU if there is one.

#include "model.h"

#include <torch/cuda.h>
#include <torch/nn/functional/loss.h>
#include <torch/optim/adamw.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

namespace {

constexpr int64_t kBatch = 8;
constexpr int64_t kSeqLen = 128;
constexpr int64_t kWarmup = 10;  // steps of linear warm-up of the learning rate
constexpr double kLearningRate = 3e-3;
constexpr double kClearly = 0.75;  // required ratio of the final (smoothed) to the first loss

/// The bytes of a file as int64; empty if it cannot be read.
torch::Tensor read_bytes(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<uint8_t> bytes(std::istreambuf_iterator<char>(file), {});
  return torch::tensor(at::ArrayRef<uint8_t>(bytes), torch::kUInt8).to(torch::kInt64);
}

/// Random pieces of the text, `[kBatch, kSeqLen + 1]`. The model sees all bytes but the last and predicts all but the
/// first.
torch::Tensor sample(const torch::Tensor& text) {
  const auto starts = torch::randint(text.size(0) - kSeqLen, {kBatch, 1}, torch::kInt64);
  return text.index({(starts + torch::arange(kSeqLen + 1)).to(text.device())});
}

}  // namespace

int main(int argc, char** argv) {
  const char* path = argc > 1 ? argv[1] : DEFAULT_TEXT;
  const int64_t steps = argc > 2 ? std::atoll(argv[2]) : 120;
  const torch::Device device(torch::cuda::is_available() ? torch::kCUDA : torch::kCPU);

  torch::manual_seed(0);
  const auto text = read_bytes(path).to(device);
  if (text.size(0) <= kSeqLen) {
    std::fprintf(stderr, "%s: cannot be read, or is shorter than %lld bytes\n", path, static_cast<long long>(kSeqLen));
    return EXIT_FAILURE;
  }
  ByteModel model(/*channels=*/128, /*num_heads=*/4, /*num_blocks=*/2);
  model->to(device);
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(kLearningRate).weight_decay(0.01));

  double first = 0, smooth = 0;
  for (int64_t step = 0; step <= steps; ++step) {
    const double rate = kLearningRate * std::min(1.0, static_cast<double>(step + 1) / kWarmup);
    static_cast<torch::optim::AdamWOptions&>(optimizer.param_groups()[0].options()).lr(rate);

    const auto bytes = sample(text);
    const auto logits = model->forward(bytes.slice(1, 0, kSeqLen));
    const auto loss =
        torch::nn::functional::cross_entropy(logits.flatten(0, 1), bytes.slice(1, 1, kSeqLen + 1).flatten());
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();

    const auto value = loss.item<double>();
    first = step == 0 ? value : first;
    smooth = step == 0 ? value : 0.9 * smooth + 0.1 * value;
    if (step % 20 == 0) {
      std::printf("step %4lld  loss %.3f nats a byte\n", static_cast<long long>(step), value);
    }
  }

  const bool fell = smooth < kClearly * first;
  std::printf(
      "%s: from %.3f to %.3f on %s\n", fell ? "the loss fell" : "the loss did not fall clearly", first, smooth,
      device.str().c_str());
  return fell ? EXIT_SUCCESS : EXIT_FAILURE;
}
