// Table of contents: the schema of every op, and the module gptfast._C. Kernels attach themselves to these schemas in cpu/<op>.cpp
// (TORCH_LIBRARY_IMPL(gptfast, CPU, m)) and cuda/bindings.cpp; fake kernels and autograd are in gptfast/ops/<op>.py.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cpu/engine/binding.h"
#include "cpu/isa.h"
#include "cpu/matmul.h"
#include "cpu/memory.h"
#include "cpu/read_bandwidth.h"

TORCH_LIBRARY(gptfast, m) {
  // Rows [N, C] are contiguous and fp32, bf16 or fp16; statistics, losses and lse are fp32. Each gradient has its input's dtype unless
  // said otherwise. weight and bias of a normalisation share a dtype: x's or fp32; without one dweight and dbias are fp32.
  m.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def("layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd) -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def("add_layer_norm(Tensor residual, Tensor x, Tensor? weight, Tensor? bias, float eps)"
        " -> (Tensor total, Tensor y, Tensor mean, Tensor rstd)");
  // d is the gradient of residual and of x
  m.def("add_layer_norm_backward(Tensor? dtotal, Tensor dy, Tensor total, Tensor? weight, Tensor mean, Tensor rstd)"
        " -> (Tensor d, Tensor dweight, Tensor dbias)");

  // approximate: "tanh" or "none"; bias [C] of x's dtype or fp32. Without a bias dbias has no elements.
  m.def("gelu(Tensor x, Tensor? bias, str approximate) -> Tensor");
  m.def("gelu_backward(Tensor dy, Tensor x, Tensor? bias, str approximate) -> (Tensor dx, Tensor dbias)");
  m.def("dropout(Tensor x, float p, Tensor seed) -> Tensor");
  m.def("dropout_backward(Tensor dy, float p, Tensor seed) -> Tensor");
  // ids and positions [B, T]; gradients of the tables [vocab, C] and [context, C] are fp32
  m.def("embedding(Tensor ids, Tensor positions, Tensor wte, Tensor wpe) -> Tensor");
  m.def("embedding_backward(Tensor dy, Tensor ids, Tensor positions, int vocab, int context) -> (Tensor dwte, Tensor dwpe)");
  // weight [M, K] of any strides, in x's dtype; dweight has weight's strides where these are dense
  // A packed weight is pack_weight's buffer, with its format (fp32, bf16, int8, int4; "" is a plain weight) and M as `outputs`
  m.def("pack_weight(Tensor weight, str format) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, str format=\"\", int outputs=0) -> Tensor");
  m.def("linear_backward(Tensor dy, Tensor x, Tensor weight) -> (Tensor dx, Tensor dweight, Tensor dbias)");

  // q, k, v [B, T, H, D] with a last stride of 1; document_ids [B, T], -1 is padding; seed [1] where dropout_p > 0
  m.def("attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? document_ids, float dropout_p, Tensor? seed)"
        " -> (Tensor o, Tensor lse)");
  m.def("attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale, Tensor? document_ids,"
        " float dropout_p, Tensor? seed, bool deterministic) -> Tensor dqkv");
  // caches [pages, H, 64, D] fp32 or bf16
  m.def("cache_append_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor block_table, Tensor start) -> ()");
  m.def("decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor lengths, float scale) -> Tensor");

  // fused decode steps, 1 to 32 rows; weights as in linear; activation: none, gelu or gelu_tanh; y in x's dtype, or residual's
  m.def("layer_norm_linear(Tensor x, Tensor? ln_weight, Tensor? ln_bias, Tensor weight, Tensor? bias, str activation, float eps,"
        " str format=\"\", int outputs=0) -> Tensor");
  m.def("linear_add(Tensor x, Tensor weight, Tensor? bias, Tensor residual, str format=\"\", int outputs=0) -> Tensor");

  m.def("cross_entropy(Tensor logits, Tensor targets, int ignore_index, int vocab) -> (Tensor loss, Tensor lse)");
  m.def("cross_entropy_backward(Tensor dloss, Tensor logits, Tensor targets, Tensor lse, int ignore_index, int vocab) -> Tensor dlogits");
  m.def("cross_entropy_(Tensor(a!) logits, Tensor targets, int ignore_index, int vocab, Tensor scale) -> Tensor loss");
  // dx and dweight are fp32 or x's dtype; without need_grad they have no elements
  m.def("linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, int ignore_index, int vocab, Tensor scale, int chunks,"
        " bool need_grad) -> (Tensor loss, Tensor lse, Tensor dx, Tensor dweight)");

  m.def("grad_norm(Tensor[] grads) -> (Tensor norm, Tensor finite)");
  m.def("adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[]? copies, Tensor lr,"
        " Tensor(e!) step, Tensor scale, Tensor finite, float[] weight_decay, float beta1, float beta2, float eps) -> ()");

  // residual and x [B, T, C]; weights as in gptfast/ops/transformer_block.py; seeds [3]. Returns total, out and twelve tensors that
  // backward wants back; backward returns the gradient of residual and of x, then those of the weights.
  m.def("transformer_block(Tensor residual, Tensor? x, Tensor[] weights, Tensor? document_ids, Tensor? seeds, int heads, float scale,"
        " float eps, str approximate, float attention_p, float residual_p) -> Tensor[]");
  m.def("transformer_block_backward(Tensor d_total, Tensor d_out, Tensor residual, Tensor total, Tensor[] kept, Tensor[] weights,"
        " Tensor? document_ids, Tensor? seeds, int heads, float scale, str approximate, float attention_p, float residual_p,"
        " bool deterministic) -> Tensor[]");

  // one number a row, or absent for off; mask and prompt are bit words [B, (V + 31) div 32], bias [B, V] fp32, counts [B, V] int32
  m.def("sample(Tensor logits, Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor? typical_p, Tensor? repetition,"
        " Tensor? frequency, Tensor? presence, Tensor? bias, Tensor? mask, Tensor? prompt, Tensor(a!)? counts, Tensor seed,"
        " Tensor position, Tensor choice, int top_n)"
        " -> (Tensor token, Tensor status, Tensor logprob, Tensor top_ids, Tensor top_logprobs)");
  // weights as in linear; of a packed one `vocab` outputs are real. The rest as in sample.
  m.def("lm_head_sample(Tensor x, Tensor? ln_weight, Tensor? ln_bias, Tensor weight, float eps, Tensor temperature, Tensor? top_k,"
        " Tensor? top_p, Tensor? min_p, Tensor? typical_p, Tensor? repetition, Tensor? frequency, Tensor? presence, Tensor? bias,"
        " Tensor? mask, Tensor? prompt, Tensor(a!)? counts, Tensor seed, Tensor position, Tensor choice, int top_n,"
        " str format=\"\", int outputs=0, int vocab=0)"
        " -> (Tensor token, Tensor status, Tensor logprob, Tensor top_ids, Tensor top_logprobs)");
}

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["isas"] = gptfast::cpu::usable_isas();
  info["isa"] = gptfast::cpu::isa_name(gptfast::cpu::isa());
  info["fp32_products"] = gptfast::cpu::fp32_products();
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "gptfast's C++ ops; importing it registers them as torch.ops.gptfast.*";
  m.def("build_info", &build_info, "dict: torch (version built against), compiler, openmp, isas (that this CPU can run), isa (in use),"
                                   " fp32_products (which library computes them)");
  m.def("set_isa", &gptfast::cpu::set_isa, "Use the kernels of one instruction set from now on; ValueError if this CPU lacks it");
  using gptfast::cpu::StepMemory;
  pybind11::class_<StepMemory>(m, "StepMemory", "While entered, large tensors of this thread come from memory that is kept between steps")
      .def(pybind11::init<>())
      .def("__enter__", [](StepMemory& memory) -> StepMemory& { memory.enter(); return memory; })
      .def("__exit__", [](StepMemory& memory, const pybind11::args&) { memory.leave(); })
      .def_property_readonly("bytes_held", &StepMemory::bytes_held);
  using gptfast::cpu::MemoryReader;
  const auto unlocked = pybind11::call_guard<pybind11::gil_scoped_release>();
  pybind11::class_<MemoryReader>(m, "MemoryReader", "A buffer, and several ways to read it: MemoryReader(bytes, threads, huge_pages)")
      .def(pybind11::init<int64_t, int, bool>(), unlocked)
      .def_static("patterns", &MemoryReader::patterns, "Names of the ways, in the order of their numbers")
      .def("read", &MemoryReader::read, unlocked, "Seconds of `times` passes over the buffer: read(pattern, times)")
      .def_property_readonly("bytes", &MemoryReader::bytes);
  gptfast::cpu::engine::bind(m);
}
