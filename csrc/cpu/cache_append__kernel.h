// Keys and values of new tokens into their places in a paged cache: one copy of D elements a token and head, which is all that
// limits it.
#pragma once

#include "cpu/isa.h"
#include "cpu/paged.h"
#include "cpu/vec_types.h"

namespace gptfast::cpu {

struct CacheAppend {
  Type key_type, value_type, cache_type;
  int64_t tokens;                   // Q, new tokens a row
  const void *keys, *values;        // [B, Q, H, D], heads contiguous
  int64_t key_stride, value_stride;  // elements from token to token, all B Q of them in order
  PagedCache cache;                 // written
  Integers start;                   // [B], the position of a row's first new token
};

}  // namespace gptfast::cpu

// The tokens first..end of all B Q
GPTFAST_PER_ISA(void cache_append(const CacheAppend& args, int64_t first_token, int64_t end_token))

#ifdef GPTFAST_ISA

#include "cpu/vec.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

// from [H, D] -> to, whose heads are 64 D apart
template <typename From, typename To>
void append_token(const void* from, void* to, int64_t heads, int64_t size) {
  for (int64_t head = 0; head < heads; ++head) {
    const From* source = static_cast<const From*>(from) + head * size;
    To* target = static_cast<To*>(to) + head * kPage * size;
    for_columns(size, [&](int64_t i, int lanes) { store_lanes(target + i, load_lanes(source + i, lanes), lanes); });
  }
}

template <typename From>
void append_from(const void* from, Type to_type, void* to, int64_t place, const PagedCache& cache) {
  if (to_type == Type::bf16) return append_token<From, bf16>(from, static_cast<bf16*>(to) + place, cache.heads, cache.size);
  append_token<From, float>(from, static_cast<float*>(to) + place, cache.heads, cache.size);
}

void append(Type type, const void* tokens, int64_t offset, Type to_type, void* to, int64_t place, const PagedCache& cache) {
  switch (type) {
    case Type::fp32: return append_from<float>(static_cast<const float*>(tokens) + offset, to_type, to, place, cache);
    case Type::bf16: return append_from<bf16>(static_cast<const bf16*>(tokens) + offset, to_type, to, place, cache);
    case Type::fp16: return append_from<fp16>(static_cast<const fp16*>(tokens) + offset, to_type, to, place, cache);
  }
}

}  // namespace

void cache_append(const CacheAppend& args, int64_t first_token, int64_t end_token) {
  for (int64_t token = first_token; token < end_token; ++token) {
    const int64_t row = token / args.tokens, position = args.start[row] + token % args.tokens;
    const int64_t page = args.cache.page(row, position), slot = position % kPage * args.cache.size;
    append(args.key_type, args.keys, token * args.key_stride, args.cache_type, args.cache.keys,
           page * args.cache.key_stride + slot, args.cache);
    append(args.value_type, args.values, token * args.value_stride, args.cache_type, args.cache.values,
           page * args.cache.value_stride + slot, args.cache);
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
