// out = x W' + bias for weights that are floating-point numbers of 16 or 32 bits, computed with in float32.
//
// W (N, K) lies in panels of NR outputs: for each input k the NR weights that it is multiplied with follow one another, so
// that a product needs no sum across a vector. With few rows a panel is read as it is; with many it is turned into float32
// once, a part that the cache holds at a time.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "panels.h"

namespace {

constexpr int KB = 256;  // inputs of a part, 16 KiB of float32 weights on machines with 8 floats a vector

// A format: bytes of a weight, rows up to which it is read as it is (measured), and how W of them are read.
struct Float32 {
  static constexpr int bytes = 4, direct = 0;
  static V at(const char* p) { return load((const float*)p); }
};

struct Float16 {
  static constexpr int bytes = 2, direct = W == 8 ? 1 << 30 : 24;  // with 16 floats a vector it costs more to widen than to keep
  static V at(const char* p) { return from_half((const uint16_t*)p); }
};

struct BFloat16 {
  static constexpr int bytes = 2, direct = 6;
  static V at(const char* p) { return from_bfloat((const uint16_t*)p); }
};

// out (R, NR) += x (R, K) times a panel (K, NR). One row alone would wait for its sums: it gets several of them.
template <class F, int R>
void tile(const float* x, long x_stride, const char* panel, int K, float* out, long out_stride) {
  constexpr int U = R == 1 ? 4 : R == 2 ? 2 : 1;  // sums in turn
  V acc[U][R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      acc[0][r][i] = load(out + r * out_stride + i * W);
#pragma GCC unroll 8
      for (int u = 1; u < U; u++) acc[u][r][i] = V{};
    }
  auto add = [&](int k, int u) {
    const char* p = panel + (long)k * NR * F::bytes;
    const V w[2] = {F::at(p), F::at(p + W * F::bytes)};
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const float factor = x[r * x_stride + k];
      acc[u][r][0] += factor * w[0];
      acc[u][r][1] += factor * w[1];
    }
  };
  int k = 0;
  for (; k + U <= K; k += U)
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) add(k + u, u);
  for (; k < K; k++) add(k, 0);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      V whole = acc[0][r][i];
#pragma GCC unroll 8
      for (int u = 1; u < U; u++) whole += acc[u][r][i];
      store(out + r * out_stride + i * W, whole);
    }
}

template <class F>
void tiles(long rows, const float* x, long x_stride, const char* panel, int K, float* out, long out_stride) {
  for (; rows >= MR; rows -= MR, x += MR * x_stride, out += MR * out_stride) tile<F, MR>(x, x_stride, panel, K, out, out_stride);
  if (rows == 1) tile<F, 1>(x, x_stride, panel, K, out, out_stride);
  if (rows == 2) tile<F, 2>(x, x_stride, panel, K, out, out_stride);
  if (rows == 3) tile<F, 3>(x, x_stride, panel, K, out, out_stride);
  if (rows == 4) tile<F, 4>(x, x_stride, panel, K, out, out_stride);
  if (rows == 5) tile<F, 5>(x, x_stride, panel, K, out, out_stride);
}

template <class F>
void panel_product(const float* x, long rows, int K, const char* panel, float* out, long out_stride) {
  if (!std::is_same_v<F, Float32> && rows <= F::direct) return tiles<F>(rows, x, K, panel, K, out, out_stride);
  alignas(64) float weights[KB * NR];
  for (int k = 0; k < K; k += KB) {
    const int part = std::min(KB, K - k);
    const char* begin = panel + (long)k * NR * F::bytes;
    if (!std::is_same_v<F, Float32>) {
      for (int i = 0; i < part * NR; i += W) store(weights + i, F::at(begin + i * F::bytes));
      begin = (const char*)weights;
    }
    tiles<Float32>(rows, x + k, K, begin, part, out, out_stride);
  }
}

template <class F>
void linear(const float* x, long rows, int K, const char* packed, const float* bias, float* out, long N) {
  each_panel(rows, (long)K * N, bias, out, N, [&](long j, long begin, long count, float* target, long stride) {
    panel_product<F>(x + begin * K, count, K, packed + j * K * NR * F::bytes, target, stride);
  });
}

}  // namespace

extern "C" {

int panel_width() { return NR; }

void linear_float32(const float* x, long rows, int K, const char* w, const float* b, float* out, long N) { linear<Float32>(x, rows, K, w, b, out, N); }
void linear_float16(const float* x, long rows, int K, const char* w, const float* b, float* out, long N) { linear<Float16>(x, rows, K, w, b, out, N); }
void linear_bfloat16(const float* x, long rows, int K, const char* w, const float* b, float* out, long N) { linear<BFloat16>(x, rows, K, w, b, out, N); }

}
