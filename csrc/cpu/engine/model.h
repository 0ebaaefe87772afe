// What the engine runs: a GPT-2's shape and where its weights are, the pages of keys and values, and buffers.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/engine/product.h"
#include "cpu/engine/step_kernel.h"
#include "cpu/paged.h"
#include "cpu/vec_types.h"

namespace gptfast::cpu::engine {

struct Block {
  const float *ln_1_weight, *ln_1_bias, *ln_2_weight, *ln_2_bias;
  PackedWeight c_attn, attn_c_proj, c_fc, mlp_c_proj;
  const float *c_attn_bias, *attn_c_proj_bias, *c_fc_bias, *mlp_c_proj_bias;
  float scale;  // of attention scores
};

struct Model {
  Format format;       // of the blocks' matrices
  Format head_format;  // of the token embedding and the head
  int64_t vocab;       // ids that can be drawn
  int64_t context, width, heads, inner;
  float epsilon;
  Nonlinearity activation;
  std::vector<Block> blocks;
  PackedWeight wte, head;  // the same where they are tied
  const float *wpe, *ln_f_weight, *ln_f_bias;

  int64_t size() const { return width / heads; }  // D
};

// Memory aligned to 64 bytes; what is never written takes none
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : memory_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) / 64 + 1) * 64)), &std::free) {
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  T* get() const { return memory_.get(); }

 private:
  std::unique_ptr<T, decltype(&std::free)> memory_{nullptr, &std::free};
};

// Keys and values of all blocks, [pages, blocks, 2, H, 64, D]: a page's are together, so that memory can come in huge pages
// without much of it unused. Pages that were never written take no memory, and hold zeros.
class Cache {
 public:
  Cache(const Model& model, int64_t pages)
      : type(model.format == Format::fp32 ? Type::fp32 : Type::bf16),
        pages(pages),
        blocks(static_cast<int64_t>(model.blocks.size())),
        heads(model.heads),
        size(model.size()),
        bytes_(pages * page_bytes()) {
    void* memory = mmap(nullptr, bytes_ + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    madvise(memory, bytes_ + 1, MADV_HUGEPAGE);  // which Linux may refuse
    memory_ = static_cast<uint8_t*>(memory);
  }
  ~Cache() { munmap(memory_, bytes_ + 1); }
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  int64_t item() const { return type == Type::fp32 ? 4 : 2; }
  int64_t stride() const { return 2 * blocks * heads * kPage * size; }  // elements from page to page
  int64_t page_bytes() const { return stride() * item(); }
  uint8_t* page(int64_t number) const { return memory_ + number * page_bytes(); }
  uint8_t* keys(int64_t block) const { return memory_ + 2 * block * heads * kPage * size * item(); }
  uint8_t* values(int64_t block) const { return memory_ + (2 * block + 1) * heads * kPage * size * item(); }

  const Type type;
  const int64_t pages, blocks, heads, size;

 private:
  const int64_t bytes_;
  uint8_t* memory_;
};

}  // namespace gptfast::cpu::engine
