// A window of a uint8 image -> resized bilinearly -> padded with zeros:
// pipeline.preprocess._canvas, bit-equal to cv2.resize(..., INTER_LINEAR) on uint8.
#include "common.cuh"

namespace {

struct Neighbours {
  int low, high;
  int low_weight, high_weight;  // of 2048
};

// OpenCV clamps the weights across, but only the indices down.
__device__ __forceinline__ Neighbours neighbours(int output, double scale, int in_size,
                                                 bool clamp_weights) {
  float place = static_cast<float>((output + 0.5) * scale - 0.5);
  int low = static_cast<int>(floorf(place));
  float weight = place - static_cast<float>(low);
  if (clamp_weights && (low < 0 || low >= in_size - 1)) weight = 0.0f;
  Neighbours found;
  found.low_weight = static_cast<int>(rintf((1.0f - weight) * 2048.0f));
  found.high_weight = static_cast<int>(rintf(weight * 2048.0f));
  found.low = smaller(larger(low, 0), in_size - 1);
  found.high = smaller(larger(low + 1, 0), in_size - 1);
  return found;
}

__device__ __forceinline__ int across(const u8* row, const Neighbours& x, int channel) {
  return (row[3 * x.low + channel] * x.low_weight + row[3 * x.high + channel] * x.high_weight) >> 4;
}

}  // namespace

// source: the window's first pixel, rows `row_bytes` apart, RGB. canvas [canvas_height, canvas_width,
// 3]; the image fills its first `height` rows and `width` columns, the rest becomes 0.
// threads: (canvas_width, canvas_height, 1)
extern "C" __global__ void letterbox(const u8* source, u8* canvas, long long row_bytes,
                                     int source_height, int source_width, int height, int width,
                                     int canvas_width, double scale_y, double scale_x) {
  const int x = thread_x();
  if (x >= canvas_width) return;
  const int y = static_cast<int>(blockIdx.y);
  u8* target = canvas + 3 * (static_cast<long long>(y) * canvas_width + x);
  if (y >= height || x >= width) {
    target[0] = target[1] = target[2] = 0;
    return;
  }
  const Neighbours down = neighbours(y, scale_y, source_height, false);
  const Neighbours over = neighbours(x, scale_x, source_width, true);
  const u8* upper = source + down.low * row_bytes;
  const u8* lower = source + down.high * row_bytes;
  for (int channel = 0; channel < 3; ++channel) {
    const int sum = ((down.low_weight * across(upper, over, channel)) >> 16) +
                    ((down.high_weight * across(lower, over, channel)) >> 16);
    target[channel] = static_cast<u8>((sum + 2) >> 2);  // at most 255
  }
}
