#include "cpu/engine/binding.h"

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <string>

#include "check.h"
#include "cpu/engine/engine.h"

namespace py = pybind11;

namespace gptfast::cpu::engine {
namespace {

using Tensors = std::map<std::string, at::Tensor>;

// Looks weights up by their Hugging Face name and checks that they fit the shape
class Weights {
 public:
  explicit Weights(const Tensors& tensors) : tensors_(tensors) {}

  const float* vector(const std::string& name, int64_t count) const {
    const at::Tensor& tensor = named(name);
    check_type(tensor, at::kFloat, name.c_str());
    TORCH_CHECK(tensor.numel() == count && tensor.is_contiguous(), name, " has shape ", tensor.sizes(), ", needs ", count, " numbers");
    return tensor.const_data_ptr<float>();
  }

  PackedWeight matrix(const std::string& name, Format format, int64_t outputs, int64_t inputs) const {
    const at::Tensor& tensor = named(name);
    check_type(tensor, at::kByte, name.c_str());
    const int64_t bytes = packed_bytes(format, outputs, inputs);
    TORCH_CHECK(tensor.numel() == bytes && tensor.is_contiguous(), name, " has ", tensor.numel(), " bytes, needs ", bytes, " for [",
                outputs, ", ", inputs, "]");
    const uint8_t* data = tensor.const_data_ptr<uint8_t>();
    TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 64 == 0, name, " does not begin at a multiple of 64 bytes");
    return {format, outputs, inputs, data};
  }

 private:
  const at::Tensor& named(const std::string& name) const {
    const auto found = tensors_.find(name);
    TORCH_CHECK(found != tensors_.end(), "the weights lack ", name);
    return found->second;
  }

  const Tensors& tensors_;
};

Format format_of(const std::string& name) {
  static const std::map<std::string, Format> known{
      {"fp32", Format::fp32}, {"bf16", Format::bf16}, {"int8", Format::int8}, {"int4", Format::int4}};
  const auto found = known.find(name);
  if (found == known.end()) throw std::invalid_argument("format is " + name + "; allowed: fp32, bf16, int8, int4");
  return found->second;
}

Nonlinearity activation_of(const std::string& name) {
  static const std::map<std::string, Nonlinearity> known{
      {"gelu", Nonlinearity::gelu}, {"gelu_new", Nonlinearity::gelu_tanh}, {"gelu_pytorch_tanh", Nonlinearity::gelu_tanh},
      {"relu", Nonlinearity::relu}, {"silu", Nonlinearity::silu}, {"tanh", Nonlinearity::tanh}};
  const auto found = known.find(name);
  if (found == known.end()) throw std::invalid_argument("activation_function is " + name + ", which the engine does not have");
  return found->second;
}

Block block_of(const Weights& weights, const Model& model, int64_t index) {
  const std::string prefix = "transformer.h." + std::to_string(index) + ".";
  const int64_t width = model.width, inner = model.inner;
  const auto vector = [&](const char* name, int64_t count) { return weights.vector(prefix + name, count); };
  const auto matrix = [&](const char* name, int64_t outputs, int64_t inputs) {
    return weights.matrix(prefix + name, model.format, outputs, inputs);
  };
  Block block{};
  block.ln_1_weight = vector("ln_1.weight", width);
  block.ln_1_bias = vector("ln_1.bias", width);
  block.c_attn = matrix("attn.c_attn.weight", 3 * width, width);
  block.c_attn_bias = vector("attn.c_attn.bias", 3 * width);
  block.attn_c_proj = matrix("attn.c_proj.weight", width, width);
  block.attn_c_proj_bias = vector("attn.c_proj.bias", width);
  block.ln_2_weight = vector("ln_2.weight", width);
  block.ln_2_bias = vector("ln_2.bias", width);
  block.c_fc = matrix("mlp.c_fc.weight", inner, width);
  block.c_fc_bias = vector("mlp.c_fc.bias", inner);
  block.mlp_c_proj = matrix("mlp.c_proj.weight", width, inner);
  block.mlp_c_proj_bias = vector("mlp.c_proj.bias", width);
  return block;
}

Model model_of(const py::dict& config, const Weights& weights, const std::string& format) {
  const auto number = [&](const char* name) { return config[name].cast<int64_t>(); };
  Model model{};
  model.format = format_of(format);
  model.head_format = model.format == Format::int4 ? Format::int8 : model.format;
  model.context = number("n_positions");
  model.width = number("n_embd");
  model.heads = number("n_head");
  model.inner = config["n_inner"].is_none() ? 4 * model.width : number("n_inner");
  const int64_t rows = number("vocab_size");
  model.vocab = config["real_vocab_size"].is_none() ? rows : number("real_vocab_size");
  model.epsilon = config["layer_norm_epsilon"].cast<float>();
  model.activation = activation_of(config["activation_function"].cast<std::string>());
  const float scale = config["scale_attn_weights"].cast<bool>() ? 1 / std::sqrt(static_cast<float>(model.size())) : 1.0f;
  const bool by_layer = config["scale_attn_by_inverse_layer_idx"].cast<bool>();
  for (int64_t index = 0; index < number("n_layer"); ++index) {
    model.blocks.push_back(block_of(weights, model, index));
    model.blocks.back().scale = by_layer ? scale / static_cast<float>(index + 1) : scale;
  }
  model.wte = weights.matrix("transformer.wte.weight", model.head_format, rows, model.width);
  const bool tied = config["tie_word_embeddings"].cast<bool>();
  model.head = tied ? model.wte : weights.matrix("lm_head.weight", model.head_format, rows, model.width);
  model.wpe = weights.vector("transformer.wpe.weight", model.context * model.width);
  model.ln_f_weight = weights.vector("transformer.ln_f.weight", model.width);
  model.ln_f_bias = weights.vector("transformer.ln_f.bias", model.width);
  return model;
}

// A tensor of one type and shape, or absent
template <typename T>
T* data(OptionalTensor tensor, at::ScalarType type, at::IntArrayRef shape, const char* name) {
  if (!has(tensor)) return nullptr;
  check_type(*tensor, type, name);
  TORCH_CHECK(tensor->sizes() == shape && tensor->is_contiguous() && tensor->is_cpu(), name, " has shape ", tensor->sizes(), ", needs ",
              shape, ", contiguous, on the CPU");
  return static_cast<T*>(tensor->mutable_data_ptr());
}

using Optionals = std::map<std::string, std::optional<at::Tensor>>;

class Named {
 public:
  explicit Named(const Optionals& tensors) : tensors_(tensors) {}

  template <typename T>
  T* get(const char* name, at::ScalarType type, at::IntArrayRef shape) const {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : data<T>(found->second, type, shape, name);
  }

  template <typename T>
  T* need(const char* name, at::ScalarType type, at::IntArrayRef shape) const {
    T* result = get<T>(name, type, shape);
    TORCH_CHECK(result != nullptr, name, " is missing");
    return result;
  }

 private:
  const Optionals& tensors_;
};

// Parameters and results as tensors by name: those of ops.sample a row, or `targets`; results [steps, R]
Draws draws_of(const Optionals& tensors, const Model& model, int64_t steps, int64_t rows, int64_t top_n) {
  const Named named(tensors);
  const int64_t vocab = model.vocab, words = (vocab + 31) / 32;
  Draws draws;
  draws.logits = named.get<float>("logits", at::kFloat, {rows, vocab});
  draws.targets = named.get<int64_t>("targets", at::kLong, {rows});
  for (int64_t row = 0; draws.targets != nullptr && row < rows; ++row) {
    TORCH_CHECK(draws.targets[row] >= 0 && draws.targets[row] < vocab, "targets hold ", draws.targets[row]);
  }
  draws.sampling = draws.targets != nullptr || named.get<float>("temperature", at::kFloat, {rows}) != nullptr;
  if (!draws.sampling) return draws;
  Sample& sample = draws.sample;
  sample.vocab = vocab;
  if (draws.targets == nullptr) {
    sample.temperature = named.need<float>("temperature", at::kFloat, {rows});
    for (const auto& [name, place] : {std::pair{"seed", &sample.seed}, {"position", &sample.position}, {"choice", &sample.choice}}) {
      *place = named.need<int64_t>(name, at::kLong, {rows});
    }
    sample.top_k = named.get<int64_t>("top_k", at::kLong, {rows});
    for (const auto& [name, place] :
         {std::pair{"top_p", &sample.top_p}, {"min_p", &sample.min_p}, {"typical_p", &sample.typical_p},
          {"repetition", &sample.repetition}, {"frequency", &sample.frequency}, {"presence", &sample.presence}}) {
      *place = named.get<float>(name, at::kFloat, {rows});
    }
    sample.bias = named.get<float>("bias", at::kFloat, {rows, vocab});
    sample.mask = named.get<int32_t>("mask", at::kInt, {rows, words});
    sample.prompt = named.get<int32_t>("prompt", at::kInt, {rows, words});
    sample.counts = named.get<int32_t>("counts", at::kInt, {rows, vocab});
    sample.bias_stride = sample.counts_stride = vocab;
  }
  sample.top_n = top_n;
  sample.token = named.need<int64_t>("token", at::kLong, {steps, rows});
  sample.status = named.need<int8_t>("status", at::kChar, {steps, rows});
  sample.logprob = named.need<float>("logprob", at::kFloat, {steps, rows});
  if (top_n > 0) {
    sample.top_ids = named.need<int64_t>("top_ids", at::kLong, {steps, rows, top_n});
    sample.top_logprobs = named.need<float>("top_logprobs", at::kFloat, {steps, rows, top_n});
  }
  return draws;
}

class Bound {
 public:
  Bound(const py::dict& config, Tensors weights, const std::string& format, int threads, int64_t pages)
      : weights_(std::move(weights)), engine_(model_of(config, Weights(weights_), format), checked(threads), pages) {}

  bool step(const at::Tensor& tokens, const at::Tensor& lengths, const at::Tensor& starts, const at::Tensor& table,
            const at::Tensor& draws, const Optionals& tensors, int64_t top_n, bool signals) {
    const Request request = request_of(tokens, lengths, starts, table, draws);
    int64_t rows = 0;
    for (int64_t s = 0; s < request.sequences; ++s) rows += request.draws[s];
    const Draws wanted = draws_of(tensors, engine_.model(), 1, rows, top_n);
    py::gil_scoped_release released;
    if (!signals) return engine_.step(request, wanted);
    const Interruptible interruptible(engine_);
    return engine_.step(request, wanted);
  }

  int64_t decode(const at::Tensor& tokens, const at::Tensor& lengths, const at::Tensor& starts, const at::Tensor& table,
                 const at::Tensor& draws, const Optionals& tensors, int64_t top_n, int64_t steps,
                 std::vector<std::vector<int64_t>> stops, bool signals) {
    const Request request = request_of(tokens, lengths, starts, table, draws);
    const Draws wanted = draws_of(tensors, engine_.model(), steps, request.sequences, top_n);
    TORCH_CHECK(wanted.targets == nullptr && wanted.logits == nullptr, "decode draws, or computes what nobody sees");
    TORCH_CHECK(static_cast<int64_t>(stops.size()) == request.sequences, "there are ", stops.size(), " lists of stop ids");
    for (auto& ids : stops) std::sort(ids.begin(), ids.end());
    py::gil_scoped_release released;
    if (!signals) return engine_.decode(request, wanted, steps, stops);
    const Interruptible interruptible(engine_);
    return engine_.decode(request, wanted, steps, stops);
  }

  void copy_pages(const std::vector<std::pair<int64_t, int64_t>>& pairs) {
    py::gil_scoped_release released;
    for (const auto& [from, to] : pairs) engine_.copy_page(from, to);
  }

  void embed(int64_t token, int64_t position, const at::Tensor& y) const {
    engine_.embed(token, position, data<float>(y, at::kFloat, {engine_.model().width}, "y"));
  }

  void interrupt() { engine_.interrupt(); }
  int64_t vocab() const { return engine_.model().vocab; }
  int64_t pages() const { return engine_.pages(); }

 private:
  static int checked(int threads) {
    if (threads < 1 || threads > 1024) throw std::invalid_argument("threads is " + std::to_string(threads) + "; allowed: 1 to 1024");
    return threads;
  }

  Request request_of(const at::Tensor& tokens, const at::Tensor& lengths, const at::Tensor& starts, const at::Tensor& table,
                     const at::Tensor& draws) const {
    Request request{};
    request.sequences = lengths.numel();
    request.total = tokens.numel();
    TORCH_CHECK(table.dim() == 2, "block_table has ", table.dim(), " dimensions, needs 2: [S, pages a sequence]");
    request.width = table.size(1);
    const auto numbers = [](const at::Tensor& tensor, at::IntArrayRef shape, const char* name) {
      return static_cast<const int32_t*>(data<int32_t>(tensor, at::kInt, shape, name));
    };
    request.tokens = numbers(tokens, {request.total}, "tokens");
    request.lengths = numbers(lengths, {request.sequences}, "query_lengths");
    request.starts = numbers(starts, {request.sequences}, "starts");
    request.draws = numbers(draws, {request.sequences}, "draws");
    request.table = numbers(table, {request.sequences, request.width}, "block_table");
    for (int64_t s = 0; s < request.sequences; ++s) TORCH_CHECK(request.draws[s] >= 0, "draws hold ", request.draws[s]);
    return request;
  }

  const Tensors weights_;
  Engine engine_;
};

}  // namespace

void bind(py::module_& module) {
  py::class_<Bound>(module, "Engine", "A GPT-2 on the CPU that makes tokens with packed weights; gptfast/generation/cpp.py is its front")
      .def(py::init<const py::dict&, Tensors, const std::string&, int, int64_t>(), py::arg("config"), py::arg("weights"),
           py::arg("format"), py::arg("threads"), py::arg("pages"))
      .def("step", &Bound::step, py::arg("tokens"), py::arg("query_lengths"), py::arg("starts"), py::arg("block_table"), py::arg("draws"),
           py::arg("tensors"), py::arg("top_n"), py::arg("signals"))
      .def("decode", &Bound::decode, py::arg("tokens"), py::arg("query_lengths"), py::arg("starts"), py::arg("block_table"),
           py::arg("draws"), py::arg("tensors"), py::arg("top_n"), py::arg("steps"), py::arg("stops"), py::arg("signals"))
      .def("copy_pages", &Bound::copy_pages)
      .def("embed", &Bound::embed)
      .def("interrupt", &Bound::interrupt)
      .def_property_readonly("vocab", &Bound::vocab)
      .def_property_readonly("pages", &Bound::pages);
}

}  // namespace gptfast::cpu::engine
