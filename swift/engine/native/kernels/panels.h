// What products with packed weights share: panels of outputs, one after the other, each by one thread.
#pragma once
#include <algorithm>
#include <cstring>

#include "vector.h"

constexpr int NR = 2 * W;  // outputs of a panel
constexpr int MR = 6;      // rows computed at once: 12 sums, 2 weights and a factor fit 16 registers

// Calls add(panel, first row, rows, target, stride of the target) for all of out (rows, N), which holds the bias before.
template <class Add>
void each_panel(long rows, long weights, const float* bias, float* out, long N, Add add) {
  constexpr int MOST = 96;  // rows of a last panel, which is wider than what it may write, at a time
  const long panels = (N + NR - 1) / NR;
#pragma omp parallel for schedule(static) if (rows * weights > 50000)
  for (long j = 0; j < panels; j++) {
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
      add(j, begin, count, target, stride);
      if (width < NR)
        for (long m = 0; m < count; m++) memcpy(mine + (begin + m) * N, wide + m * NR, width * 4);
    }
  }
}
