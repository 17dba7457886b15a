// Soft masks at the mask stride -> edges of the masks in the original image, without a full-size
// mask: pipeline.paste.paste_mask. runs.cu makes run lengths of the edges.
//
//   axis_taps -> paste_spans -> count_edges -> sum_columns -> place_edges -> emit_edges
//
// An edge is a place of the original image, in column-major order, whose pixel differs from the one
// before; edges are found twice, counted and then written. How many there are is not known to the
// host in between: a mask's part of the buffer is taken from a cursor, and what does not fit is left
// out; the host sees it in the cursor, grows the buffer and runs all again.
//
// The upsampling by the stride, the crop and the resize are one set of three neighbouring weights
// for each output along each axis, with the roundings of `axis_matrix`; products are accumulated
// by fused multiply-add, least input first, rows before columns.
#include "common.cuh"

// Weights of the inputs base, base + 1, base + 2; first and last input with a weight.
struct alignas(8) Tap {
  int base;
  float weight[3];
  int first;
  int last;
};

// A mask to paste: its index, and its first and last row and column above the threshold.
struct Job {
  int index, top, bottom, left, right;
};

// Outputs that depend on a mask's pixels: rows, columns of the window; the last ones exclusive.
struct Span {
  int top, bottom, left, right;
};

// A window of an image of `image_height` rows, and the mask that covers it.
struct Frame {
  int mask_height, mask_width, window_y, window_x, window_height, window_width, image_height,
      image_width;
};

namespace {

const int COLUMNS_PER_CHUNK = 32;

struct Linear {
  int low;
  float weight;  // of low + 1
};

// pipeline.paste.linear_weights, one entry.
__device__ __forceinline__ Linear linear(int output, int in_size, int out_size) {
  const float scale = static_cast<float>(in_size) / static_cast<float>(out_size);
  float centre = (static_cast<float>(output) + 0.5f) * scale - 0.5f;
  const float most = static_cast<float>(in_size - 1);
  centre = centre < 0.0f ? 0.0f : centre > most ? most : centre;
  Linear found;
  found.low = smaller(static_cast<int>(centre), larger(in_size - 2, 0));
  found.weight = centre - static_cast<float>(found.low);
  return found;
}

// pipeline.paste.axis_matrix, one row.
__device__ __forceinline__ Tap build_tap(int output, int mask_size, int stride, int valid,
                                         int original) {
  Linear resize = {output, 0.0f};
  if (valid != original) resize = linear(output, valid, original);
  const Linear lower = linear(resize.low, mask_size, mask_size * stride);
  const Linear upper = linear(smaller(resize.low + 1, valid - 1), mask_size, mask_size * stride);
  Tap tap = {lower.low, {1.0f - lower.weight, lower.weight, 0.0f}, 0, 0};
  if (valid != original) {
    float above[3] = {0.0f, 0.0f, 0.0f};
    const int shift = upper.low - lower.low;  // 0 or 1
    above[shift] = 1.0f - upper.weight;
    above[shift + 1] = upper.weight;
    for (int i = 0; i < 3; ++i) {
      tap.weight[i] = tap.weight[i] * (1.0f - resize.weight) + above[i] * resize.weight;
    }
  }
  int first = 0, last = 2;
  while (first < 2 && !(tap.weight[first] > 0.0f)) ++first;
  while (last > 0 && !(tap.weight[last] > 0.0f)) --last;
  tap.first = tap.base + first;
  tap.last = tap.base + last;
  return tap;
}

// How many of the taps lie wholly before an input, or begin no later than it; both ascend.
__device__ __forceinline__ int count_before(const Tap* taps, int count, int input) {
  int low = 0;
  while (low < count) {
    const int middle = (low + count) / 2;
    if (taps[middle].last < input) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

__device__ __forceinline__ int count_reached(const Tap* taps, int count, int input) {
  int low = 0;
  while (low < count) {
    const int middle = (low + count) / 2;
    if (taps[middle].first <= input) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

__device__ __forceinline__ float blend(const float* weight, float a, float b, float c) {
  return fmaf(weight[2], c, fmaf(weight[1], b, weight[0] * a));
}

// One column of the window; the inputs are loaded again only when a row needs others.
template <typename T>
struct Column {
  const T* mask;
  const Tap* rows;
  const Tap across;
  int mask_height, mask_width;
  int loaded;
  float values[3][3];  // [column][row]
  float threshold;

  __device__ __forceinline__ Column(const T* mask, const Tap* rows, const Tap& across,
                                    const Frame& frame, float threshold)
      : mask(mask), rows(rows), across(across), mask_height(frame.mask_height),
        mask_width(frame.mask_width), loaded(-1), threshold(threshold) {}

  __device__ __forceinline__ void load(int base) {
    for (int column = 0; column < 3; ++column) {
      const int x = smaller(across.base + column, mask_width - 1);
      for (int row = 0; row < 3; ++row) {
        const int y = smaller(base + row, mask_height - 1);
        values[column][row] = widen(mask[static_cast<long long>(y) * mask_width + x]);
      }
    }
    loaded = base;
  }

  __device__ __forceinline__ bool is_set(int y) {
    const Tap& down = rows[y];
    if (down.base != loaded) load(down.base);
    float part[3];
    for (int column = 0; column < 3; ++column) {
      const float* own = values[column];
      part[column] = blend(down.weight, own[0], own[1], own[2]);
    }
    return blend(across.weight, part[0], part[1], part[2]) > threshold;
  }
};

// Edges of one column; `write` gets each. Where a mask's rows span the whole image, the pixel before
// a column's first is the last of the column to its left, else it is background.
template <typename T, typename Write>
__device__ __forceinline__ void walk(const T* mask, const Tap* taps, const Span& span, int column,
                                     const Frame& frame, float threshold, Write& write) {
  const Tap* across = taps + frame.window_height;
  const bool joined = frame.window_y + span.top == 0 &&
                      frame.window_y + span.bottom == frame.image_height;
  bool before = false;
  if (joined && column > span.left) {
    Column<T> left(mask, taps, across[column - 1], frame, threshold);
    before = left.is_set(span.bottom - 1);
  }
  Column<T> own(mask, taps, across[column], frame, threshold);
  const u32 start =
      static_cast<u32>(frame.window_x + column) * static_cast<u32>(frame.image_height) +
      static_cast<u32>(frame.window_y);
  for (int row = span.top; row < span.bottom; ++row) {
    const bool set = own.is_set(row);
    if (set != before) write(start + static_cast<u32>(row));
    before = set;
  }
  if (before && !(joined && column + 1 < span.right)) write(start + static_cast<u32>(span.bottom));
}

struct CountEdges {
  u32 found;
  __device__ __forceinline__ void operator()(u32) { ++found; }
};

struct StoreEdges {
  u32* target;
  __device__ __forceinline__ void operator()(u32 edge) { *target++ = edge; }
};

template <typename T>
__device__ __forceinline__ void count_edges(const T* probs, const Job* jobs, const Tap* taps,
                                            const Span* spans, u32* columns, const Frame& frame,
                                            float threshold) {
  const int mask = static_cast<int>(blockIdx.y);
  const Span span = spans[mask];
  const int column = span.left + thread_x();
  if (column >= span.right) return;
  const long long pixels = static_cast<long long>(frame.mask_height) * frame.mask_width;
  CountEdges counted = {0};
  walk(probs + jobs[mask].index * pixels, taps, span, column, frame, threshold, counted);
  columns[static_cast<long long>(mask) * frame.window_width + column - span.left] = counted.found;
}

template <typename T>
__device__ __forceinline__ void emit_edges(const T* probs, const Job* jobs, const Tap* taps,
                                           const Span* spans, const u32* columns, const u32* chunks,
                                           const Head* heads, u32* edges, const Frame& frame,
                                           float threshold, u32 capacity) {
  const int mask = static_cast<int>(blockIdx.y);
  const Span span = spans[mask];
  const int index = thread_x();
  if (span.left + index >= span.right) return;
  const Head& head = heads[mask];
  if (head.edges > capacity || head.edge_base > capacity - head.edges) return;
  const u32* own = columns + static_cast<long long>(mask) * frame.window_width;
  if (own[index] == 0) return;
  const int chunk = index / COLUMNS_PER_CHUNK;
  const int chunk_count = (frame.window_width + COLUMNS_PER_CHUNK - 1) / COLUMNS_PER_CHUNK;
  u32 place = chunks[static_cast<long long>(mask) * chunk_count + chunk];
  for (int other = chunk * COLUMNS_PER_CHUNK; other < index; ++other) place += own[other];
  const long long pixels = static_cast<long long>(frame.mask_height) * frame.mask_width;
  StoreEdges store = {edges + place};
  walk(probs + jobs[mask].index * pixels, taps, span, span.left + index, frame, threshold, store);
}

}  // namespace

// Taps of the window's rows, then of its columns [H + W].
// threads: (H + W, 1, 1)
extern "C" __global__ void axis_taps(Tap* taps, int mask_height, int mask_width, int stride,
                                     int valid_height, int valid_width, int height, int width) {
  const int output = thread_x();
  if (output < height) {
    taps[output] = build_tap(output, mask_height, stride, valid_height, height);
  } else if (output < height + width) {
    taps[output] = build_tap(output - height, mask_width, stride, valid_width, width);
  }
}

// Where each mask can have pixels; clears the heads and the cursors (edges, bytes).
// threads: (N, 1, 1)
extern "C" __global__ void paste_spans(const Tap* taps, const Job* jobs, Span* spans, Head* heads,
                                       u32* cursors, int masks, int height, int width) {
  const int mask = thread_x();
  if (mask == 0) cursors[0] = cursors[1] = 0;
  if (mask >= masks) return;
  const Job job = jobs[mask];
  Span span = {count_before(taps, height, job.top), count_reached(taps, height, job.bottom),
               count_before(taps + height, width, job.left),
               count_reached(taps + height, width, job.right)};
  if (span.top >= span.bottom || span.left >= span.right) span = {0, 0, 0, 0};  // in the padding
  spans[mask] = span;
  heads[mask] = {0, 0, 0, 0, 0, 0x7fffffff, -1, 0x7fffffff, -1};
}

// threads: (W, N, 1)
#define COUNT_EDGES(NAME, TYPE)                                                                     \
  extern "C" __global__ void NAME(const TYPE* probs, const Job* jobs, const Tap* taps,              \
                                  const Span* spans, u32* columns, const Frame* frame,              \
                                  float threshold) {                                                \
    count_edges(probs, jobs, taps, spans, columns, *frame, threshold);                              \
  }
COUNT_EDGES(count_edges_float32, float)
COUNT_EDGES(count_edges_float16, Float16)
COUNT_EDGES(count_edges_bfloat16, BFloat16)

// Edges of each chunk of columns [N, ceil(W / COLUMNS_PER_CHUNK)].
// threads: (ceil(W / COLUMNS_PER_CHUNK), N, 1)
extern "C" __global__ void sum_columns(const u32* columns, const Span* spans, u32* chunks,
                                       int width) {
  const int chunk = thread_x();
  const int chunk_count = (width + COLUMNS_PER_CHUNK - 1) / COLUMNS_PER_CHUNK;
  if (chunk >= chunk_count) return;
  const int mask = static_cast<int>(blockIdx.y);
  const u32* own = columns + static_cast<long long>(mask) * width;
  const int start = chunk * COLUMNS_PER_CHUNK;
  const int stop = smaller(start + COLUMNS_PER_CHUNK, spans[mask].right - spans[mask].left);
  u32 sum = 0;
  for (int column = start; column < stop; ++column) sum += own[column];
  chunks[static_cast<long long>(mask) * chunk_count + chunk] = sum;
}

// Takes each mask's part of the edges; the chunks' sums become places.
// threads: (N, 1, 1)
extern "C" __global__ void place_edges(u32* chunks, Head* heads, u32* cursors, int masks,
                                       int width) {
  const int mask = thread_x();
  if (mask >= masks) return;
  const int chunk_count = (width + COLUMNS_PER_CHUNK - 1) / COLUMNS_PER_CHUNK;
  u32* own = chunks + static_cast<long long>(mask) * chunk_count;
  u32 total = 0;
  for (int chunk = 0; chunk < chunk_count; ++chunk) total += own[chunk];
  u32 place = atomicAdd(cursors, total);
  heads[mask].edge_base = place;
  heads[mask].edges = total;
  for (int chunk = 0; chunk < chunk_count; ++chunk) {
    const u32 sum = own[chunk];
    own[chunk] = place;
    place += sum;
  }
}

// threads: (W, N, 1)
#define EMIT_EDGES(NAME, TYPE)                                                                      \
  extern "C" __global__ void NAME(const TYPE* probs, const Job* jobs, const Tap* taps,              \
                                  const Span* spans, const u32* columns, const u32* chunks,         \
                                  const Head* heads, u32* edges, const Frame* frame,                \
                                  float threshold, u32 capacity) {                                  \
    emit_edges(probs, jobs, taps, spans, columns, chunks, heads, edges, *frame, threshold,          \
               capacity);                                                                           \
  }
EMIT_EDGES(emit_edges_float32, float)
EMIT_EDGES(emit_edges_float16, Float16)
EMIT_EDGES(emit_edges_bfloat16, BFloat16)
