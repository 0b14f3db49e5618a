// out = x W' + bias for weights that are kept in few bits and computed with in float32.
//
// W (N, K) lies in panels of NR outputs: for each input k the NR weights that it is multiplied with follow one another, so
// that a product needs no sum across a vector. Formats with groups of inputs have the group's scales before its weights.
// With few rows a panel is read as it is; with many it is turned into float32 once, a part that the cache holds at a time.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "vector.h"

namespace {

constexpr int NR = 2 * W;  // outputs of a panel
constexpr int MR = 6;      // rows computed at once: 12 sums, 2 weights and a factor fit 16 registers
constexpr int KB = 256;    // inputs of a part, 16 KiB of float32 weights on machines with 8 floats a vector

// A format: bytes of a group's head and of an input's weights, inputs of a group (0: all), rows up to which it is read as it
// is, and how the weights of inputs k to k + step are read.
struct Float32 {
  static constexpr int head = 0, unit = NR * 4, group = 0, step = 1, direct = 0;
  explicit Float32(const char*) {}
  void at(const char* p, int k, V* w) const {
    const float* q = (const float*)p + k * NR;
    w[0] = load(q), w[1] = load(q + W);
  }
};

struct Float16 {
  static constexpr int head = 0, unit = NR * 2, group = 0, step = 1, direct = 24;
  explicit Float16(const char*) {}
  void at(const char* p, int k, V* w) const {
    const uint16_t* q = (const uint16_t*)p + k * NR;
    w[0] = from_half(q), w[1] = from_half(q + W);
  }
};

struct BFloat16 {
  static constexpr int head = 0, unit = NR * 2, group = 0, step = 1, direct = 24;
  explicit BFloat16(const char*) {}
  void at(const char* p, int k, V* w) const {
    const uint16_t* q = (const uint16_t*)p + k * NR;
    w[0] = from_bfloat(q), w[1] = from_bfloat(q + W);
  }
};

struct Int8 {  // weight = scale * byte
  static constexpr int head = NR * 4, unit = NR, group = 64, step = 1, direct = 12;
  V scale[2];
  explicit Int8(const char* p) : scale{load((const float*)p), load((const float*)p + W)} {}
  void at(const char* p, int k, V* w) const {
    const int8_t* q = (const int8_t*)p + k * NR;
    w[0] = from_bytes(q) * scale[0], w[1] = from_bytes(q + W) * scale[1];
  }
};

struct Int4 {  // weight = least + scale * nibble; the scales, then the least values; a byte holds two inputs
  static constexpr int head = NR * 4, unit = NR / 2, group = 32, step = 2, direct = 6;
  V scale[2], least[2];
  explicit Int4(const char* p) {
    const uint16_t* q = (const uint16_t*)p;
    for (int i = 0; i < 2; i++) scale[i] = from_bfloat(q + i * W), least[i] = from_bfloat(q + NR + i * W);
  }
  void at(const char* p, int k, V* w) const {
    const uint8_t* q = (const uint8_t*)p + k / 2 * NR;
    for (int i = 0; i < 2; i++) {
      V low, high;
      from_nibbles(q + i * W, low, high);
      w[i] = least[i] + scale[i] * low, w[2 + i] = least[i] + scale[i] * high;
    }
  }
};

template <class F>
constexpr int group_of(int inputs) { return F::group ? F::group : inputs; }

template <class F>
long bytes_of(long inputs) { return inputs * F::unit + (F::group ? inputs / F::group * F::head : 0); }

// out (R, NR) += x (R, K) times a panel (K, NR). One row alone would wait for its sums: it gets several of them.
template <class F, int R>
void tile(const float* x, long x_stride, const char* panel, int K, float* out, long out_stride) {
  constexpr int S = F::step, U = std::max(S, R == 1 ? 4 : R == 2 ? 2 : 1);  // sums in turn
  V acc[U][R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      acc[0][r][i] = load(out + r * out_stride + i * W);
#pragma GCC unroll 8
      for (int u = 1; u < U; u++) acc[u][r][i] = V{};
    }
  const int group = group_of<F>(K);
  for (int begin = 0; begin < K; begin += group) {
    const F format(panel);
    const char* p = panel + F::head;
    int k = 0;
    for (; k + U <= group; k += U)
#pragma GCC unroll 8
      for (int u = 0; u < U; u += S) {
        V w[2 * S];
        format.at(p, k + u, w);
#pragma GCC unroll 8
        for (int s = 0; s < S; s++)
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) {
            const float factor = x[r * x_stride + begin + k + u + s];
            acc[u + s][r][0] += factor * w[2 * s];
            acc[u + s][r][1] += factor * w[2 * s + 1];
          }
      }
    if constexpr (!F::group)
      for (; k < group; k++) {
        V w[2];
        format.at(p, k, w);
        for (int r = 0; r < R; r++) {
          const float factor = x[r * x_stride + begin + k];
          acc[0][r][0] += factor * w[0];
          acc[0][r][1] += factor * w[1];
        }
      }
    panel = p + (long)group * F::unit;
  }
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

// A panel's inputs, KB at a time, as float32 weights (KB, NR).
template <class F>
void expand(const char* panel, int K, float* weights) {
  const int group = group_of<F>(K);
  for (int begin = 0; begin < K; begin += group, panel += bytes_of<F>(group)) {
    const F format(panel);
    for (int k = 0; k < group; k += F::step) {
      V w[2 * F::step];
      format.at(panel + F::head, k, w);
      for (int i = 0; i < 2 * F::step; i++) store(weights + (begin + k) * NR + i * W, w[i]);
    }
  }
}

template <class F>
void panel_product(const float* x, long rows, int K, const char* panel, float* out, long out_stride) {
  if (!std::is_same_v<F, Float32> && rows <= F::direct) return tiles<F>(rows, x, K, panel, K, out, out_stride);
  alignas(64) float weights[KB * NR];
  for (int k = 0; k < K; k += KB) {
    const int part = std::min(KB, K - k);
    const char* begin = panel + bytes_of<F>(k);
    if (!std::is_same_v<F, Float32>) {
      expand<F>(begin, part, weights);
      begin = (const char*)weights;
    }
    tiles<Float32>(rows, x + k, K, begin, part, out, out_stride);
  }
}

template <class F>
void linear(const float* x, long rows, int K, const char* packed, const float* bias, float* out, long N) {
  constexpr int MOST = 96;  // rows of a last panel, which is wider than what it may write, at a time
  const long panels = (N + NR - 1) / NR;
#pragma omp parallel for schedule(static) if (rows * K * N > 50000)
  for (long j = 0; j < panels; j++) {
    const char* panel = packed + j * bytes_of<F>(K);
    float* mine = out + j * NR;
    const long width = std::min<long>(NR, N - j * NR);
    alignas(64) float wide[MOST * NR];
    float initial[NR] = {};
    if (bias) memcpy(initial, bias + j * NR, width * 4);
    const long step = width == NR ? rows : std::min<long>(rows, MOST);
    for (long begin = 0; begin < rows; begin += step) {
      const long count = std::min(step, rows - begin);
      float* target = width == NR ? mine + begin * N : wide;
      const long stride = width == NR ? N : NR;
      for (long m = 0; m < count; m++) memcpy(target + m * stride, initial, sizeof initial);
      panel_product<F>(x + begin * K, count, K, panel, target, stride);
      if (width < NR)
        for (long m = 0; m < count; m++) memcpy(mine + (begin + m) * N, wide + m * NR, width * 4);
    }
  }
}

}  // namespace

extern "C" {

int panel_width() { return NR; }

void linear_float32(const float* x, long rows, int K, const char* w, const float* b, float* out, long N) { linear<Float32>(x, rows, K, w, b, out, N); }
void linear_float16(const float* x, long rows, int K, const char* w, const float* b, float* out, long N) { linear<Float16>(x, rows, K, w, b, out, N); }
void linear_bfloat16(const float* x, long rows, int K, const char* w, const float* b, float* out, long N) { linear<BFloat16>(x, rows, K, w, b, out, N); }
void linear_int8(const float* x, long rows, int K, const char* w, const float* b, float* out, long N) { linear<Int8>(x, rows, K, w, b, out, N); }
void linear_int4(const float* x, long rows, int K, const char* w, const float* b, float* out, long N) { linear<Int4>(x, rows, K, w, b, out, N); }

}
