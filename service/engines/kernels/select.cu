// Candidates of a whole batch -> NMS -> survivors, best first: pipeline.postprocess.select.
//
//   pack_bits -> measure_masks -> compare_masks -> matrix_compensate, matrix_decay
//                                               or mark_overlaps, greedy_nms      -> rank_survivors
//
// Arithmetic is fp32 throughout and in the order of pipeline.nms. The words of the packed
// masks lie [B, words, K]: neighbouring threads compare one mask with neighbouring ones, so a
// warp's loads are one line.
#include "common.cuh"

namespace {

const int WORDS_PER_THREAD = 32;

// Thresholds eight pixels into a byte. The words are little-endian, as GPUs and x86 are.
template <typename T>
__device__ __forceinline__ void pack(const T* probs, const float* scores, u8* bits, u32* areas,
                                     int* lows, int* highs, int candidates, int pixels, int words,
                                     float threshold) {
  const int byte = thread_x();
  const int candidate = static_cast<int>(blockIdx.y);
  const int image = static_cast<int>(blockIdx.z);
  const long long mask = static_cast<long long>(image) * candidates + candidate;
  if (byte >= 4 * words) return;
  if (byte == 0) {
    areas[mask] = 0;
    lows[2 * mask] = lows[2 * mask + 1] = 0x7fffffff;
    highs[2 * mask] = highs[2 * mask + 1] = -1;
  }
  if (!(scores[mask] > 0.0f)) return;  // an empty slot: its area stays 0, its bits are never read
  const T* source = probs + mask * pixels;
  u32 packed = 0;
  for (int bit = 0; bit < 8; ++bit) {
    const int pixel = 8 * byte + bit;
    if (pixel < pixels && widen(source[pixel]) > threshold) packed |= 1u << bit;
  }
  const long long word = (static_cast<long long>(image) * words + byte / 4) * candidates + candidate;
  bits[4 * word + byte % 4] = static_cast<u8>(packed);
}

__device__ __forceinline__ const u32* words_of(const u32* bits, int image, int words,
                                               int candidates) {
  return bits + static_cast<long long>(image) * words * candidates;
}

}  // namespace

// threads: (4 * words, K, B)
#define PACK_BITS(NAME, TYPE)                                                                       \
  extern "C" __global__ void NAME(const TYPE* probs, const float* scores, u8* bits, u32* areas,     \
                                  int* lows, int* highs, int candidates, int pixels, int words,     \
                                  float threshold) {                                                \
    pack(probs, scores, bits, areas, lows, highs, candidates, pixels, words, threshold);            \
  }
PACK_BITS(pack_bits_float32, float)
PACK_BITS(pack_bits_float16, Float16)
PACK_BITS(pack_bits_bfloat16, BFloat16)

// Areas, and the first and last row and column with a set pixel: lows, highs [B, K, 2] (y, x).
// threads: (K, ceil(words / WORDS_PER_THREAD), B)
extern "C" __global__ void measure_masks(const u32* bits, const float* scores, u32* areas, int* lows,
                                         int* highs, int candidates, int width, int words) {
  const int candidate = thread_x();
  if (candidate >= candidates) return;
  const int image = static_cast<int>(blockIdx.z);
  const long long mask = static_cast<long long>(image) * candidates + candidate;
  if (!(scores[mask] > 0.0f)) return;
  const u32* own = words_of(bits, image, words, candidates) + candidate;
  const int start = static_cast<int>(blockIdx.y) * WORDS_PER_THREAD;
  const int stop = smaller(start + WORDS_PER_THREAD, words);
  int area = 0, top = 0x7fffffff, left = 0x7fffffff, bottom = -1, right = -1;
  for (int word = start; word < stop; ++word) {
    u32 rest = own[static_cast<long long>(word) * candidates];
    area += __popc(rest);
    while (rest) {  // one turn for each row of the mask that the word touches
      const int first = 32 * word + __ffs(static_cast<int>(rest)) - 1;
      const int row = first / width;
      const int bits_of_row = smaller((row + 1) * width - 32 * word, 32);
      const u32 present = bits_of_row < 32 ? rest & ((1u << bits_of_row) - 1u) : rest;
      const int last = 32 * word + 31 - __clz(static_cast<int>(present));
      top = smaller(top, row);
      bottom = larger(bottom, row);
      left = smaller(left, first - row * width);
      right = larger(right, last - row * width);
      rest &= ~present;
    }
  }
  if (area == 0) return;
  atomicAdd(areas + mask, static_cast<u32>(area));
  atomicMin(lows + 2 * mask, top);
  atomicMin(lows + 2 * mask + 1, left);
  atomicMax(highs + 2 * mask, bottom);
  atomicMax(highs + 2 * mask + 1, right);
}

// IoU [B, K, K] of each mask with the lesser ones; 0 for another class, an empty slot or mask.
// threads: (K, K, B): the lesser mask, the better mask
extern "C" __global__ void compare_masks(const u32* bits, const long long* labels, const u32* areas,
                                         const int* lows, const int* highs, float* iou,
                                         int candidates, int width, int words) {
  const int lesser = thread_x();
  const int better = static_cast<int>(blockIdx.y);
  if (lesser >= candidates || lesser <= better) return;
  const int image = static_cast<int>(blockIdx.z);
  const long long base = static_cast<long long>(image) * candidates;
  const long long i = base + better, j = base + lesser;
  u32 shared = 0;
  if (labels[i] == labels[j] && areas[i] > 0 && areas[j] > 0) {
    const int top = larger(lows[2 * i], lows[2 * j]);
    const int bottom = smaller(highs[2 * i], highs[2 * j]);
    const bool meet = top <= bottom && larger(lows[2 * i + 1], lows[2 * j + 1]) <=
                                           smaller(highs[2 * i + 1], highs[2 * j + 1]);
    if (meet) {
      const u32* words_all = words_of(bits, image, words, candidates);
      const int last = ((bottom + 1) * width - 1) / 32;
      for (int word = top * width / 32; word <= last; ++word) {
        const u32* row = words_all + static_cast<long long>(word) * candidates;
        shared += static_cast<u32>(__popc(row[better] & row[lesser]));
      }
    }
  }
  const float both = static_cast<float>(areas[i]) + static_cast<float>(areas[j]);
  const float joined = both - static_cast<float>(shared);
  iou[i * candidates + lesser] = shared > 0 ? static_cast<float>(shared) / joined : 0.0f;
}

// Matrix NMS, first half: each mask's largest IoU with a better one.
// threads: (K, 1, B)
extern "C" __global__ void matrix_compensate(const float* iou, float* largest, int candidates) {
  const int lesser = thread_x();
  if (lesser >= candidates) return;
  const long long base = static_cast<long long>(blockIdx.z) * candidates;
  float found = 0.0f;
  for (int better = 0; better < lesser; ++better) {
    const float value = iou[(base + better) * candidates + lesser];
    if (value > found) found = value;
  }
  largest[base + lesser] = found;
}

// Matrix NMS, second half: decayed [B, K]; -1 for an empty slot or mask. A pair of different
// classes has IoU 0 and decays by 1 / f(largest) >= 1, so it never is the least.
// threads: (K, 1, B)
extern "C" __global__ void matrix_decay(const float* scores, const u32* areas, const float* iou,
                                        const float* largest, float* decayed, int candidates,
                                        int gaussian, float sigma) {
  const int lesser = thread_x();
  if (lesser >= candidates) return;
  const long long base = static_cast<long long>(blockIdx.z) * candidates;
  const long long j = base + lesser;
  if (areas[j] == 0) {
    decayed[j] = -1.0f;
    return;
  }
  float least = 1.0f;
  for (int better = 0; better < lesser; ++better) {
    const float overlap = iou[(base + better) * candidates + lesser];
    if (!(overlap > 0.0f)) continue;
    const float other = largest[base + better];
    float decay;
    if (gaussian) {
      decay = expf(-sigma * (overlap * overlap)) / expf(-sigma * (other * other));
    } else {
      const float rest = 1.0f - other;
      const float tiny = 1.17549435e-38f;
      decay = (1.0f - overlap) / (rest > tiny ? rest : tiny);
    }
    if (decay < least) least = decay;
  }
  decayed[j] = scores[j] * least;
}

// Greedy NMS, first half: for each mask the lesser ones it would drop, one bit each
// [B, K, ceil(K / 32)].
// threads: (ceil(K / 32), K, B)
extern "C" __global__ void mark_overlaps(const float* iou, u32* overlaps, int candidates,
                                         float threshold) {
  const int word = thread_x();
  const int words = (candidates + 31) / 32;
  if (word >= words) return;
  const int better = static_cast<int>(blockIdx.y);
  const long long i = static_cast<long long>(blockIdx.z) * candidates + better;
  u32 marked = 0;
  for (int bit = 0; bit < 32; ++bit) {
    const int lesser = 32 * word + bit;
    if (lesser > better && lesser < candidates && iou[i * candidates + lesser] > threshold) {
      marked |= 1u << bit;
    }
  }
  overlaps[i * words + word] = marked;
}

// Greedy NMS, second half: decayed [B, K] is the score of a kept mask and -1 for any other.
// `dropped` [B, ceil(K / 32)] is scratch.
// threads: (B, 1, 1)
extern "C" __global__ void greedy_nms(const float* scores, const u32* areas, const u32* overlaps,
                                      u32* dropped, float* decayed, int candidates, int batch) {
  const int image = thread_x();
  if (image >= batch) return;
  const int words = (candidates + 31) / 32;
  const long long base = static_cast<long long>(image) * candidates;
  u32* gone = dropped + static_cast<long long>(image) * words;
  for (int word = 0; word < words; ++word) gone[word] = 0;
  for (int mask = 0; mask < candidates; ++mask) {
    const bool alive = areas[base + mask] > 0 && !(gone[mask / 32] >> (mask % 32) & 1u);
    decayed[base + mask] = alive ? scores[base + mask] : -1.0f;
    if (!alive) continue;
    const u32* marked = overlaps + (base + mask) * words;
    for (int word = mask / 32; word < words; ++word) gone[word] |= marked[word];
  }
}

// Survivors, best first (ties: the earlier candidate): order, kept [B, K] hold counts[b] entries.
// threads: (K, 1, B)
extern "C" __global__ void rank_survivors(const float* decayed, int* order, float* kept, int* counts,
                                          int candidates, float threshold) {
  const int mask = thread_x();
  if (mask >= candidates) return;
  const int image = static_cast<int>(blockIdx.z);
  const float* own = decayed + static_cast<long long>(image) * candidates;
  int before = 0, survivors = 0;
  const float score = own[mask];
  for (int other = 0; other < candidates; ++other) {
    const float value = own[other];
    if (!(value >= 0.0f && value >= threshold)) continue;
    ++survivors;
    if (value > score || (value == score && other < mask)) ++before;
  }
  if (mask == 0) counts[image] = survivors;
  if (!(score >= 0.0f && score >= threshold)) return;
  const long long place = static_cast<long long>(image) * candidates + before;
  order[place] = mask;
  kept[place] = score;
}
