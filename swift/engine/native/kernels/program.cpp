// A model's pass as a list of instructions over strided tensors, run in one call; instructions.py writes it.
//
// An instruction is WORDS numbers: what to do, for a linear layer its number, then what it takes. An operand is a base (0: an address, else one of the
// pass: see Pass) and an offset in bytes; strides are in elements. Floats stand in the low half of a word.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "vector.h"

extern "C" void rms_norm(const float* x, long rows, int D, const float* weight, float epsilon, float* out);
extern "C" void paged_attention(const float* q, long q_row, long q_head, const float* keys, const float* values, const int* table,
                                long width, const int* first, const int* context, long B, int H, int G, int d, int e, int size,
                                float scaling, float softcap, const float* sinks, float* out);

namespace {

constexpr int WORDS = 32;
constexpr long MANY = 1 << 14;  // elements that are worth a second thread
typedef int64_t Word;

// In the order of OPS in instructions.py.
enum Op : Word {
  COPY, NEG, SILU, GELU, GELU_TANH, RELU, TANH, SIGMOID, POW, RSQRT, COS, SIN, ADD, SUB, MUL, DIV, MULS, ADDS, GATE,
  FROM_INT, ADD_INT, MEAN, LAYER_NORM, GATHER, LINEAR, RMS_NORM, ATTEND
};

// What an adapter adds to a linear layer (N, K): A' (K, rank) and B' (rank, N); nothing where A' is null.
struct Update {
  const float *a, *b;
  Word rank;
};

// The rows that get an adapter, and its update of each layer.
struct Part {
  Word count;
  const Word* rows;
  const Update* layers;
};

struct Pass {
  char* bases[4];         // nothing, the workspace, token ids, positions
  const Word* places;     // (T,) of the cache, where the keys and values of the row go
  const int* table;       // (T, width) blocks of each query's sequence
  Word width;
  const int* context;     // (T,)
  Word block_size;
  float* const* caches;   // keys and values of each layer
  const int* const* firsts;  // for each window, (T,) first tokens that are seen
  Word num_parts;
  const Part* parts;
};

float number(Word w) {
  float f;
  memcpy(&f, &w, 4);
  return f;
}

template <class T>
T* at(const Word* w, const Pass& pass) { return (T*)(pass.bases[w[0]] + w[1]); }

inline V lanes(const float* p, long stride, int count) {
  if (stride == 0) return V{} + *p;
  if (stride == 1 && count == W) return load(p);
  V v{};
  for (int i = 0; i < count; i++) v[i] = p[i * stride];
  return v;
}

template <class F>
void line(float* out, long so, const float* a, long sa, const float* b, long sb, long count, F f) {
  if (so == 1 && sa == 1 && (sb == 1 || sb == 0)) {
    const V same = sb ? V{} : V{} + *b;
    long i = 0;
    for (; i + W <= count; i += W) store(out + i, f(load(a + i), sb ? load(b + i) : same));
    if (i == count) return;
    out += i, a += i, b += sb * i, count -= i;
  }
  for (long i = 0; i < count; i += W) {
    const int some = std::min<long>(W, count - i);
    const V v = f(lanes(a + i * sa, sa, some), lanes(b + i * sb, sb, some));
    for (int j = 0; j < some; j++) out[(i + j) * so] = v[j];
  }
}

// out = f(a, b) over up to four dimensions: sizes at w[2], then out, a and b, each with its base, offset and strides.
template <class F>
void each(const Word* w, const Pass& pass, F f) {
  const Word *n = w + 2, *so = w + 8, *sa = w + 14, *sb = w + 20;
  float* out = at<float>(w + 6, pass);
  const float *a = at<float>(w + 12, pass), *b = at<float>(w + 18, pass);
  const long lines = n[0] * n[1] * n[2], count = n[3];
  if (lines == 1 && count > MANY) {
    constexpr long part = 4096;
#pragma omp parallel for schedule(static)
    for (long i = 0; i < count; i += part)
      line(out + i * so[3], so[3], a + i * sa[3], sa[3], b + i * sb[3], sb[3], std::min(part, count - i), f);
    return;
  }
#pragma omp parallel for schedule(static) if (lines * count > MANY)
  for (long i = 0; i < lines; i++) {
    const long z = i % n[2], y = i / n[2] % n[1], x = i / n[2] / n[1];
    line(out + x * so[0] + y * so[1] + z * so[2], so[3], a + x * sa[0] + y * sa[1] + z * sa[2], sa[3],
         b + x * sb[0] + y * sb[1] + z * sb[2], sb[3], count, f);
  }
}

inline V absolute(V x) { return x < 0 ? -x : x; }

inline V sigmoid(V x) {
  const V e = exp_of(-absolute(x)), whole = 1 / (1 + e);
  return x < 0 ? e * whole : whole;
}

inline V tanh_of(V x) {
  const V e = exp_of(-2 * absolute(x)), t = (1 - e) / (1 + e);
  return x < 0 ? -t : t;
}

template <class F>
V one_by_one(V x, F f) {
  for (int i = 0; i < W; i++) x[i] = f(x[i]);
  return x;
}

inline V gelu_tanh(V x) { return 0.5f * x * (1 + tanh_of(0.7978845608f * (x + 0.044715f * x * x * x))); }
inline V gelu(V x) { return 0.5f * x * (1 + one_by_one(x, [](float v) { return std::erf(v * 0.7071067812f); })); }

// Words 2 to 4: sizes and what is reduced; like `each` otherwise.
void mean(const Word* w, const Pass& pass) {
  const Word *n = w + 2, *so = w + 8, *sa = w + 14;
  for (long x = 0; x < n[0]; x++)
    for (long y = 0; y < n[1]; y++)
      for (long z = 0; z < n[2]; z++) {
        const float* a = at<float>(w + 12, pass) + x * sa[0] + y * sa[1] + z * sa[2];
        double whole = 0;
        for (long i = 0; i < n[3]; i++) whole += a[i * sa[3]];
        at<float>(w + 6, pass)[x * so[0] + y * so[1] + z * so[2]] = whole / n[3];
      }
}

void layer_norm(const float* x, long rows, long D, const float* weight, const float* bias, float epsilon, float* out) {
#pragma omp parallel for schedule(static) if (rows * D > MANY)
  for (long m = 0; m < rows; m++) {
    const float* mine = x + m * D;
    double whole = 0, squares = 0;
    for (long i = 0; i < D; i++) whole += mine[i];
    const float middle = whole / D;
    for (long i = 0; i < D; i++) squares += (mine[i] - middle) * (mine[i] - middle);
    const float scale = 1 / std::sqrt((float)(squares / D) + epsilon);
    for (long i = 0; i < D; i++) out[m * D + i] = (mine[i] - middle) * scale * (weight ? weight[i] : 1) + (bias ? bias[i] : 0);
  }
}

void write(const float* rows, long row, long head, long T, int G, int d, const Word* places, float* cache) {
  for (long t = 0; t < T; t++)
    for (int g = 0; g < G; g++) memcpy(cache + (places[t] * G + g) * d, rows + t * row + g * head, sizeof(float) * d);
}

void attend(const Word* w, const Pass& pass) {
  const long T = w[2];
  const int H = w[3], G = w[4], d = w[5], e = w[6];
  float *keys = pass.caches[2 * w[7]], *values = pass.caches[2 * w[7] + 1];
  write(at<float>(w + 16, pass), w[18], w[19], T, G, d, pass.places, keys);
  write(at<float>(w + 20, pass), w[22], w[23], T, G, e, pass.places, values);
  paged_attention(at<float>(w + 12, pass), w[14], w[15], keys, values, pass.table, pass.width, pass.firsts[w[8]], pass.context, T, H, G,
                  d, e, pass.block_size, number(w[9]), number(w[10]), (const float*)w[11], at<float>(w + 24, pass));
}

// Some rows at a time, which share what is read of the update.
void update(const float* x, long K, float* out, long N, const Part& part, const Update& by) {
  constexpr long SOME = 4;
#pragma omp parallel for schedule(static) if (part.count * (K + N) * by.rank > MANY)
  for (long begin = 0; begin < part.count; begin += SOME) {
    const Word* rows = part.rows + begin;
    const long count = std::min(SOME, part.count - begin);
    std::vector<float> low(count * by.rank);
    for (long k = 0; k < K; k++)
      for (long m = 0; m < count; m++) add(low.data() + m * by.rank, x[rows[m] * K + k], by.a + k * by.rank, by.rank);
    for (long r = 0; r < by.rank; r++)
      for (long m = 0; m < count; m++) add(out + rows[m] * N, low[m * by.rank + r], by.b + r * N, N);
  }
}

typedef void (*Linear)(const float* x, long rows, int K, const char* w, const float* b, float* out, long N);

void run(const Word* w, const Pass& pass) {
  switch (w[0]) {
    case COPY: return each(w, pass, [](V a, V) { return a; });
    case NEG: return each(w, pass, [](V a, V) { return -a; });
    case SILU: return each(w, pass, [](V a, V) { return a * sigmoid(a); });
    case GELU: return each(w, pass, [](V a, V) { return gelu(a); });
    case GELU_TANH: return each(w, pass, [](V a, V) { return gelu_tanh(a); });
    case RELU: return each(w, pass, [](V a, V) { return a > 0 ? a : V{}; });
    case TANH: return each(w, pass, [](V a, V) { return tanh_of(a); });
    case SIGMOID: return each(w, pass, [](V a, V) { return sigmoid(a); });
    case POW: {
      const float power = number(w[24]);
      if (power == 2) return each(w, pass, [](V a, V) { return a * a; });
      if (power == 3) return each(w, pass, [](V a, V) { return a * a * a; });
      return each(w, pass, [power](V a, V) { return one_by_one(a, [power](float v) { return std::pow(v, power); }); });
    }
    case RSQRT: return each(w, pass, [](V a, V) { return one_by_one(a, [](float v) { return 1 / std::sqrt(v); }); });
    case COS: return each(w, pass, [](V a, V) { return one_by_one(a, [](float v) { return std::cos(v); }); });
    case SIN: return each(w, pass, [](V a, V) { return one_by_one(a, [](float v) { return std::sin(v); }); });
    case ADD: {
      const float alpha = number(w[24]);
      if (alpha == 1) return each(w, pass, [](V a, V b) { return a + b; });
      return each(w, pass, [alpha](V a, V b) { return a + alpha * b; });
    }
    case SUB: return each(w, pass, [](V a, V b) { return a - b; });
    case MUL: return each(w, pass, [](V a, V b) { return a * b; });
    case DIV: return each(w, pass, [](V a, V b) { return a / b; });
    case MULS: {
      const float factor = number(w[24]);
      return each(w, pass, [factor](V a, V) { return a * factor; });
    }
    case ADDS: {
      const float term = number(w[24]);
      return each(w, pass, [term](V a, V) { return a + term; });
    }
    case GATE:
      switch (w[24]) {
        case SILU: return each(w, pass, [](V a, V b) { return a * sigmoid(a) * b; });
        case GELU: return each(w, pass, [](V a, V b) { return gelu(a) * b; });
        default: return each(w, pass, [](V a, V b) { return gelu_tanh(a) * b; });
      }
    case FROM_INT: {
      float* out = at<float>(w + 3, pass);
      const Word* from = at<Word>(w + 5, pass);
      for (long i = 0; i < w[2]; i++) out[i] = from[i];
      return;
    }
    case ADD_INT: {
      Word* out = at<Word>(w + 3, pass);
      const Word* from = at<Word>(w + 5, pass);
      for (long i = 0; i < w[2]; i++) out[i] = from[i] + w[7];
      return;
    }
    case MEAN: return mean(w, pass);
    case LAYER_NORM:
      return layer_norm(at<float>(w + 4, pass), w[2], w[3], (const float*)w[8], (const float*)w[9], number(w[10]), at<float>(w + 6, pass));
    case GATHER: {
      const Word* ids = at<Word>(w + 5, pass);
      for (long i = 0; i < w[2]; i++) memcpy(at<char>(w + 7, pass) + i * w[3], (const char*)w[4] + ids[i] * w[3], w[3]);
      return;
    }
    case LINEAR: {
      const float* x = at<float>(w + 6, pass);
      float* out = at<float>(w + 10, pass);
      ((Linear)w[2])(x, w[3], w[4], (const char*)w[8], (const float*)w[9], out, w[5]);
      for (const Part* part = pass.parts; part < pass.parts + pass.num_parts; part++)
        if (const Update& by = part->layers[w[1]]; by.a) update(x, w[4], out, w[5], *part, by);
      return;
    }
    case RMS_NORM:
      return rms_norm(at<float>(w + 4, pass), w[2], w[3], (const float*)w[8], number(w[9]), at<float>(w + 6, pass));
    case ATTEND: return attend(w, pass);
  }
}

}  // namespace

extern "C" void run_program(const Word* program, long begin, long end, const Pass* pass) {
  for (long i = begin; i < end; i++) run(program + i * WORDS, *pass);
}
