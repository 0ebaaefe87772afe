// embedding: rows of two tables gathered and added; backward sums dy by id without a race and in the order of the rows.
// For that the places of dy are sorted by id once (counting sort, stable), and every row of the table is then one thread's work.
// Forward is limited by memory. Backward too: it writes the whole table, past the caches where the table is larger than they are.
#pragma once

#include "cpu/isa.h"
#include "cpu/vec_types.h"

namespace gptfast::cpu {

struct Ids {
  bool wide;         // int64, else int32
  const void* data;  // [N]
  int64_t size;      // rows of the table; an id outside names none
};

struct Embedding {
  Type type;            // of the tables and y, or of dy
  int64_t columns;      // C
  Ids ids, positions;
  const void* wte;      // [V, C]
  const void* wpe;      // [P, C]
  void* y;              // [N, C]
};

// The gradient of one table
struct EmbeddingSums {
  Type type;              // of dy
  int64_t columns;        // C
  const void* dy;         // [N, C]
  const int64_t* ends;    // [V]: where the places of an id end in `places`; they begin where those of the id before it end
  const int64_t* places;  // rows of dy, sorted by id
  float* sums;            // [V, C]
  bool stream;            // sums is written past the caches; needs rows and a start that are whole cache lines
};

}  // namespace gptfast::cpu

GPTFAST_PER_ISA(void embedding_forward(const Embedding& args, int64_t first_row, int64_t end_row))
// Fills ends [ids.size] and places [count]; ids outside the table have no place
GPTFAST_PER_ISA(void embedding_sort(const Ids& ids, int64_t count, int64_t* ends, int64_t* places))
// Writes the rows first_id .. end_id of the sums
GPTFAST_PER_ISA(void embedding_sums(const EmbeddingSums& args, int64_t first_id, int64_t end_id))

#ifdef GPTFAST_ISA

#include "cpu/vec.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

// The row that place i names, or -1
GPTFAST_INLINE int64_t id_at(const Ids& ids, int64_t i) {
  const int64_t id = ids.wide ? static_cast<const int64_t*>(ids.data)[i] : static_cast<const int32_t*>(ids.data)[i];
  return id >= 0 && id < ids.size ? id : -1;
}

template <typename T>
void embedding_rows(const Embedding& args, int64_t first_row, int64_t end_row) {
  const int64_t columns = args.columns;
  for (int64_t row = first_row; row < end_row; ++row) {
    const int64_t id = id_at(args.ids, row), position = id_at(args.positions, row);
    T* y = static_cast<T*>(args.y) + row * columns;
    if (id < 0 || position < 0) {
      for_columns(columns, [&](int64_t i, int lanes) { store_lanes(y + i, set(__builtin_nanf("")), lanes); });
      continue;
    }
    const T* token = static_cast<const T*>(args.wte) + id * columns;
    const T* place = static_cast<const T*>(args.wpe) + position * columns;
    for_columns(columns, [&](int64_t i, int lanes) {
      store_lanes(y + i, load_lanes(token + i, lanes) + load_lanes(place + i, lanes), lanes);
    });
  }
}

template <typename T>
void embedding_sums_of(const EmbeddingSums& args, int64_t first_id, int64_t end_id) {
  const int64_t columns = args.columns;
  for (int64_t id = first_id; id < end_id; ++id) {
    const int64_t first_place = id == 0 ? 0 : args.ends[id - 1], end_place = args.ends[id];
    float* sums = args.sums + id * columns;
    for_columns(columns, [&](int64_t i, int lanes) {
      Vec total = set(0);
      for (int64_t place = first_place; place < end_place; ++place) {
        total += load_lanes(static_cast<const T*>(args.dy) + args.places[place] * columns + i, lanes);
      }
      store_or_stream(sums + i, total, lanes, args.stream);
    });
  }
  if (args.stream) finish_streams();
}

}  // namespace

void embedding_forward(const Embedding& args, int64_t first_row, int64_t end_row) {
  switch (args.type) {
    case Type::fp32: return embedding_rows<float>(args, first_row, end_row);
    case Type::bf16: return embedding_rows<bf16>(args, first_row, end_row);
    case Type::fp16: return embedding_rows<fp16>(args, first_row, end_row);
  }
}

void embedding_sort(const Ids& ids, int64_t count, int64_t* ends, int64_t* places) {
  for (int64_t id = 0; id < ids.size; ++id) ends[id] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = id_at(ids, i);
    if (id >= 0) ++ends[id];
  }
  int64_t before = 0;
  for (int64_t id = 0; id < ids.size; ++id) {
    const int64_t here = ends[id];
    ends[id] = before;  // so far where the id's places begin; each one found below moves it on
    before += here;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = id_at(ids, i);
    if (id >= 0) places[ends[id]++] = i;
  }
}

void embedding_sums(const EmbeddingSums& args, int64_t first_id, int64_t end_id) {
  switch (args.type) {
    case Type::fp32: return embedding_sums_of<float>(args, first_id, end_id);
    case Type::bf16: return embedding_sums_of<bf16>(args, first_id, end_id);
    case Type::fp16: return embedding_sums_of<fp16>(args, first_id, end_id);
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
