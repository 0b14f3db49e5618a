// out = x W' + bias for weights of 8 or 4 bits, in products of whole numbers.
//
// The inputs of a group become whole numbers of 16 bits with one scale, which loses 2^-16 of the largest of them. Their
// products with the weights of the group are added in 32 bits, exactly: 64 * 128 * 32767 and 128 * 15 * 32767 are below 2^31.
// Panels are those of panels.h; within a group two inputs of each output lie side by side, as an instruction that multiplies
// pairs reads them.
#include <algorithm>
#include <cmath>
#include <vector>

#include "panels.h"

namespace {

// A format: inputs of a group, bytes of its head and of its weights, inputs that are read at once, and how.
struct Int8 {  // weight = scale * byte
  static constexpr int group = 64, head = NR * 4, bytes = group * NR, step = 2;
  static constexpr bool has_least = false;
  static void at(const char* p, int k, Pairs (*w)[2]) {
    for (int i = 0; i < 2; i++) w[0][i] = pairs_from_bytes((const int8_t*)p + k * NR + i * 2 * W);
  }
  static V scale(const char* p, int i) { return load((const float*)p + i * W); }
  static V least(const char*, int) { return V{}; }
};

struct Nibbles {  // weight = least + scale * nibble; the scales, then the least values
  static constexpr int step = 4;
  static constexpr bool has_least = true;
  static void at(const char* p, int k, Pairs (*w)[2]) {
    for (int i = 0; i < 2; i++) pairs_from_nibbles((const uint8_t*)p + k / 2 * NR + i * 2 * W, w[0][i], w[1][i]);
  }
};

struct Int4 : Nibbles {  // that weights are rounded to: scales of 16 bits
  static constexpr int group = 32, head = NR * 4, bytes = group * NR / 2;
  static V scale(const char* p, int i) { return from_bfloat((const uint16_t*)p + i * W); }
  static V least(const char* p, int i) { return from_bfloat((const uint16_t*)p + NR + i * W); }
};

template <int inputs>
struct Codes : Nibbles {  // of a checkpoint: scales of 32 bits, which hold its own exactly
  static constexpr int group = inputs, head = NR * 8, bytes = group * NR / 2;
  static V scale(const char* p, int i) { return load((const float*)p + i * W); }
  static V least(const char* p, int i) { return load((const float*)p + NR + i * W); }
};

// Rows of inputs as whole numbers: (rows, K) of them, and for each group its scale and the sum of what it stands for.
struct Rounded {
  std::vector<int16_t> numbers;
  std::vector<float> scales, sums;
};

template <class F>
void round_rows(const float* x, long rows, int K, Rounded& to) {
  const long groups = K / F::group;
  to.numbers.resize(rows * K), to.scales.resize(rows * groups), to.sums.resize(rows * groups);
#pragma omp parallel for schedule(static) if (rows * K > 50000)
  for (long g = 0; g < rows * groups; g++) {
    const float* from = x + g * F::group;
    int16_t* numbers = to.numbers.data() + g * F::group;
    V most{};
    for (int k = 0; k < F::group; k += W) {
      const V v = load(from + k), size = v < 0 ? -v : v;
      most = size > most ? size : most;
    }
    float largest = 0;
    for (int i = 0; i < W; i++) largest = std::max(largest, most[i]);
    const float factor = largest > 0 ? 32767 / largest : 0;
    Ints all{};
    for (int k = 0; k < F::group; k += W) {
      const V scaled = load(from + k) * factor;
      const Ints whole = __builtin_convertvector(scaled + (scaled < 0 ? V{} - 0.5f : V{} + 0.5f), Ints);
      *(Narrow*)(numbers + k) = __builtin_convertvector(whole, Narrow);
      all += whole;
    }
    long sum = 0;
    for (int i = 0; i < W; i++) sum += all[i];
    to.scales[g] = largest / 32767;
    to.sums[g] = to.scales[g] * sum;
  }
}

// out (R, NR) += x (R, groups) times a panel
template <class F, int R>
void tile(const int16_t* x, long K, const float* scales, const float* sums, long groups, const char* panel, float* out, long out_stride) {
  for (long g = 0; g < groups; g++, panel += F::head + F::bytes, x += F::group) {
    Ints products[R][2] = {};
    const char* weights = panel + F::head;
#pragma GCC unroll 2
    for (int k = 0; k < F::group; k += F::step) {
      Pairs w[F::step / 2][2];
      F::at(weights, k, w);
#pragma GCC unroll 2
      for (int s = 0; s < F::step / 2; s++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          int32_t two;
          memcpy(&two, x + r * K + k + 2 * s, 4);
          const Pairs both = (Pairs)(Ints{} + two);
          products[r][0] = add_products(products[r][0], w[s][0], both);
          products[r][1] = add_products(products[r][1], w[s][1], both);
        }
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      const V scale = F::scale(panel, i), least = F::least(panel, i);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        float* target = out + r * out_stride + i * W;
        V whole = load(target) + __builtin_convertvector(products[r][i], V) * (scale * scales[r * groups + g]);
        if (F::has_least) whole += least * sums[r * groups + g];
        store(target, whole);
      }
    }
  }
}

template <class F>
void linear(const float* x, long rows, int K, const char* packed, const float* bias, float* out, long N) {
  static thread_local Rounded rounded;
  round_rows<F>(x, rows, K, rounded);
  const Rounded& own = rounded;
  const long groups = K / F::group;
  each_panel(rows, (long)K * N, bias, out, N, [&](long j, long begin, long count, float* target, long stride) {
    const char* panel = packed + j * groups * (F::head + F::bytes);
    for (long m = 0; m < count;) {
      const long row = begin + m, some = std::min<long>(MR, count - m);
      const int16_t* numbers = own.numbers.data() + row * K;
      const float *scales = own.scales.data() + row * groups, *sums = own.sums.data() + row * groups;
      float* mine = target + m * stride;
      switch (some) {
        case 1: tile<F, 1>(numbers, K, scales, sums, groups, panel, mine, stride); break;
        case 2: tile<F, 2>(numbers, K, scales, sums, groups, panel, mine, stride); break;
        case 3: tile<F, 3>(numbers, K, scales, sums, groups, panel, mine, stride); break;
        case 4: tile<F, 4>(numbers, K, scales, sums, groups, panel, mine, stride); break;
        case 5: tile<F, 5>(numbers, K, scales, sums, groups, panel, mine, stride); break;
        default: tile<F, MR>(numbers, K, scales, sums, groups, panel, mine, stride);
      }
      m += some;
    }
  });
}

}  // namespace

extern "C" {

void linear_int8(const float* x, long rows, int K, const char* w, const float* b, float* out, long N) { linear<Int8>(x, rows, K, w, b, out, N); }
void linear_int4(const float* x, long rows, int K, const char* w, const float* b, float* out, long N) { linear<Int4>(x, rows, K, w, b, out, N); }
void linear_int4_g32(const float* x, long rows, int K, const char* w, const float* b, float* out, long N) { linear<Codes<32>>(x, rows, K, w, b, out, N); }
void linear_int4_g64(const float* x, long rows, int K, const char* w, const float* b, float* out, long N) { linear<Codes<64>>(x, rows, K, w, b, out, N); }
void linear_int4_g128(const float* x, long rows, int K, const char* w, const float* b, float* out, long N) { linear<Codes<128>>(x, rows, K, w, b, out, N); }

}
