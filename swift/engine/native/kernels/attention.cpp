// Attention of single queries over keys and values that lie in blocks, read where they lie.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "vector.h"

namespace {

float dot(const float* a, const float* b, int n) {
  V one{}, two{};
  int i = 0;
  for (; i + 2 * W <= n; i += 2 * W) one += load(a + i) * load(b + i), two += load(a + i + W) * load(b + i + W);
  for (; i + W <= n; i += W) one += load(a + i) * load(b + i);
  float whole = sum(one + two);
  for (; i < n; i++) whole += a[i] * b[i];
  return whole;
}

// Scores become probabilities; a sink takes its share.
void softmax(float* scores, int count, int room, const float* sink) {
  float most = sink ? *sink : scores[0];
  for (int i = 0; i < count; i++) most = std::max(most, scores[i]);
  V sums{};
  for (int i = 0; i < room; i += W) {
    const V e = exp_of(load(scores + i) - most);
    store(scores + i, e);
    sums += e;
  }
  const float share = 1 / (sum(sums) + (sink ? std::exp(*sink - most) : 0));
  for (int i = 0; i < room; i += W) store(scores + i, load(scores + i) * share);
}

template <class Do>
void each_place(const int* blocks, int begin, int end, int size, Do act) {
  for (int p = begin; p < end;) {
    const int stop = std::min(end, (p / size + 1) * size);
    for (long place = (long)blocks[p / size] * size + p % size; p < stop; p++, place++) act(p - begin, place);
  }
}

}  // namespace

extern "C" {

// Query b of B sees the places first[b] <= p < context[b] of its sequence; place p lies in block table[b * width + p / size].
// q: head h of query b begins at q + b * q_row + h * q_head. keys (places, G, d), values (places, G, e), out (B, H, e).
// softcap 0 is none; sinks (H) may be null: a score that takes its share of the probability and gives nothing.
void paged_attention(const float* q, long q_row, long q_head, const float* keys, const float* values, const int* table, long width,
                     const int* first, const int* context, long B, int H, int G, int d, int e, int size, float scaling, float softcap,
                     const float* sinks, float* out) {
  const int R = H / G;
  long work = 0;
  for (long b = 0; b < B; b++) work += context[b] - first[b];
  // A key's heads lie beside one another: a sequence is read in one go, if there are enough of them for all threads.
  const int part = B >= omp_get_max_threads() ? G : 1;
#pragma omp parallel if (work * H * d > 100000)
  {
    std::vector<float> scores;
#pragma omp for schedule(dynamic, 1)
    for (long task = 0; task < B * G / part; task++) {
      const long b = task * part / G;
      const int g = task * part % G, begin = first[b], count = context[b] - begin, heads = part * R;
      const int room = (count + W - 1) / W * W;  // of a head's scores, whose last vector is filled up with what gives 0
      const float* query = q + b * q_row + g * R * q_head;
      scores.assign((long)heads * room, -INFINITY);
      each_place(table + b * width, begin, context[b], size, [&](int i, long place) {
        const float* key = keys + (place * G + g) * d;
        for (int h = 0; h < heads; h++) scores[(long)h * room + i] = dot(query + h * q_head, key + h / R * d, d) * scaling;
      });
      for (int h = 0; h < heads; h++) {
        float* mine = scores.data() + (long)h * room;
        if (softcap > 0)
          for (int i = 0; i < count; i++) mine[i] = softcap * std::tanh(mine[i] / softcap);
        softmax(mine, count, room, sinks ? sinks + g * R + h : nullptr);
      }
      float* target = out + (b * H + g * R) * (long)e;
      memset(target, 0, sizeof(float) * heads * e);
      each_place(table + b * width, begin, context[b], size, [&](int i, long place) {
        const float* value = values + (place * G + g) * e;
        for (int h = 0; h < heads; h++) add(target + (long)h * e, scores[(long)h * room + i], value + h / R * e, e);
      });
    }
  }
}

// out (rows, D) = x / sqrt(mean(x^2) + epsilon) * weight
void rms_norm(const float* x, long rows, int D, const float* weight, float epsilon, float* out) {
#pragma omp parallel for schedule(static) if (rows * D > 100000)
  for (long m = 0; m < rows; m++) {
    const float* mine = x + m * D;
    const float scale = 1 / std::sqrt(dot(mine, mine, D) / D + epsilon);
    for (int i = 0; i < D; i++) out[m * D + i] = mine[i] * scale * weight[i];
  }
}
}
