// Edges of the masks (paste.cu) -> compressed COCO run lengths, areas and boxes:
// pipeline.paste.encode_box_mask.
//
//   measure_runs -> place_bytes -> write_runs
//
// As with the edges, a mask's part of the bytes' buffer is taken from a cursor.
#include "common.cuh"

namespace {

const int SLICES = 64;  // threads that share the runs of one mask

// The runs of a mask: one before each edge and one after the last, unless that is empty.
struct Runs {
  const u32* edges;
  u32 edge_count, total;

  __device__ __forceinline__ u32 count() const {
    return edge_count + (edges[edge_count - 1] < total ? 1u : 0u);
  }
  __device__ __forceinline__ u32 start(u32 run) const { return run > 0 ? edges[run - 1] : 0u; }
  __device__ __forceinline__ u32 stop(u32 run) const {
    return run < edge_count ? edges[run] : total;
  }
  // What COCO's compression writes: the difference to the run before the last.
  __device__ __forceinline__ long long coded(u32 run) const {
    long long value = static_cast<long long>(stop(run)) - start(run);
    if (run > 2) value -= static_cast<long long>(stop(run - 2)) - start(run - 2);
    return value;
  }
};

// Five bits a byte, least first, until the rest is only the sign.
__device__ __forceinline__ bool next_byte(long long& value, u8& byte) {
  const int low = static_cast<int>(value & 31);
  value >>= 5;
  const bool more = (low & 16) ? value != -1 : value != 0;
  byte = static_cast<u8>(48 + low + (more ? 32 : 0));
  return more;
}

struct Slice {
  u32 start, stop;
};

__device__ __forceinline__ Slice slice_of(u32 runs, int index) {
  const u32 each = (runs + SLICES - 1) / SLICES;
  const u32 start = each * static_cast<u32>(index);
  const u32 stop = start + each;
  return {start < runs ? start : runs, stop < runs ? stop : runs};
}

}  // namespace

// Compressed bytes of each slice of runs [N, SLICES]; areas and boxes.
// threads: (SLICES, N, 1)
extern "C" __global__ void measure_runs(const u32* edges, Head* heads, u32* slices, int image_height,
                                        int image_width, u32 capacity) {
  const int index = thread_x();
  if (index >= SLICES) return;
  const int mask = static_cast<int>(blockIdx.y);
  Head* head = heads + mask;
  u32* own = slices + mask * SLICES + index;
  *own = 0;
  if (head->edges == 0) return;
  if (head->edges > capacity || head->edge_base > capacity - head->edges) return;
  const u32 height = static_cast<u32>(image_height);
  const Runs runs = {edges + head->edge_base, head->edges, height * static_cast<u32>(image_width)};
  const Slice slice = slice_of(runs.count(), index);
  u32 bytes = 0, area = 0;
  int top = 0x7fffffff, bottom = -1, left = 0x7fffffff, right = -1;
  for (u32 run = slice.start; run < slice.stop; ++run) {
    long long value = runs.coded(run);
    u8 byte;
    do {
      ++bytes;
    } while (next_byte(value, byte));
    if (run % 2 == 0) continue;  // background
    const u32 start = runs.start(run), last = runs.stop(run) - 1;
    const int first_column = static_cast<int>(start / height);
    const int last_column = static_cast<int>(last / height);
    const bool one = first_column == last_column;  // else it covers a border of columns
    area += last + 1 - start;
    top = smaller(top, one ? static_cast<int>(start % height) : 0);
    bottom = larger(bottom, one ? static_cast<int>(last % height) : image_height - 1);
    left = smaller(left, first_column);
    right = larger(right, last_column);
  }
  *own = bytes;
  if (area == 0) return;
  atomicAdd(&head->area, area);
  atomicMin(&head->top, top);
  atomicMax(&head->bottom, bottom);
  atomicMin(&head->left, left);
  atomicMax(&head->right, right);
}

// Takes each mask's part of the bytes; the slices' sums become places.
// threads: (N, 1, 1)
extern "C" __global__ void place_bytes(u32* slices, Head* heads, u32* cursors, int masks) {
  const int mask = thread_x();
  if (mask >= masks) return;
  u32* own = slices + mask * SLICES;
  u32 total = 0;
  for (int slice = 0; slice < SLICES; ++slice) total += own[slice];
  u32 place = atomicAdd(cursors + 1, total);
  heads[mask].byte_base = place;
  heads[mask].bytes = total;
  for (int slice = 0; slice < SLICES; ++slice) {
    const u32 sum = own[slice];
    own[slice] = place;
    place += sum;
  }
}

// threads: (SLICES, N, 1)
extern "C" __global__ void write_runs(const u32* edges, const Head* heads, const u32* slices,
                                      u8* text, int image_height, int image_width, u32 capacity) {
  const int index = thread_x();
  if (index >= SLICES) return;
  const int mask = static_cast<int>(blockIdx.y);
  const Head& head = heads[mask];
  if (head.bytes == 0 || head.bytes > capacity || head.byte_base > capacity - head.bytes) return;
  const u32 total = static_cast<u32>(image_height) * static_cast<u32>(image_width);
  const Runs runs = {edges + head.edge_base, head.edges, total};
  const Slice slice = slice_of(runs.count(), index);
  u8* target = text + slices[mask * SLICES + index];
  for (u32 run = slice.start; run < slice.stop; ++run) {
    long long value = runs.coded(run);
    while (next_byte(value, *target++)) {
    }
  }
}
