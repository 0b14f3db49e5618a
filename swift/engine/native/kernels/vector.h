// Vectors of the machine's width, and how numbers of other formats become float32. GCC and Clang.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512BW__)
constexpr int W = 16;  // floats of a vector
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float V __attribute__((vector_size(W * 4)));
typedef float Anywhere __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(W * 4)));
typedef uint16_t Shorts __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef int16_t Pairs __attribute__((vector_size(W * 4)));
typedef int16_t Narrow __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef int8_t Bytes __attribute__((vector_size(W * 2), aligned(1), may_alias));
typedef uint8_t UnsignedBytes __attribute__((vector_size(W * 2), aligned(1), may_alias));

static inline V load(const float* p) { return *(const Anywhere*)p; }
static inline void store(float* p, V v) { *(Anywhere*)p = v; }

static inline V from_half(const uint16_t* p) {
#if defined(__AVX512BW__)
  return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return (V)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
  V v;
  for (int i = 0; i < W; i++) {  // sign, exponent and fraction are moved; the exponent's bias follows as a factor
    uint32_t bits = (uint32_t)(p[i] & 0x8000) << 16 | (uint32_t)(p[i] & 0x7fff) << 13;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    v[i] = f * 0x1p112f;
  }
  return v;
#endif
}

static inline V from_bfloat(const uint16_t* p) { return (V)(__builtin_convertvector(*(const Shorts*)p, Ints) << 16); }

// W pairs of 16 bits, of 2W bytes with a sign; of the low and of the high four bits of 2W bytes.
static inline Pairs pairs_from_bytes(const int8_t* p) {
#if defined(__AVX512BW__)
  return (Pairs)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (Pairs)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
  return __builtin_convertvector(*(const Bytes*)p, Pairs);
#endif
}

static inline void pairs_from_nibbles(const uint8_t* p, Pairs& low, Pairs& high) {
#if defined(__AVX512BW__)
  const Pairs both = (Pairs)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  const Pairs both = (Pairs)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
  const Pairs both = __builtin_convertvector(*(const UnsignedBytes*)p, Pairs);
#endif
  low = both & 15;
  high = both >> 4;
}

// sums + a0 b0 + a1 b1 of each pair
static inline Ints add_products(Ints sums, Pairs a, Pairs b) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sums + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
  return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
  return sums + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  for (int i = 0; i < W; i++) sums[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sums;
#endif
}

static inline float sum(V v) {
#if defined(__AVX512BW__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX__)
  __m128 two = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  two = _mm_add_ps(two, _mm_movehl_ps(two, two));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (v[0] + v[1]) + (v[2] + v[3]);
#endif
}

// out += factor * v
static inline void add(float* out, float factor, const float* v, long n) {
  long i = 0;
  for (; i + W <= n; i += W) store(out + i, load(out + i) + factor * load(v + i));
  for (; i < n; i++) out[i] += factor * v[i];
}

// e^x for x <= 0, 0 below -87: 2^n e^r with |r| <= ln(2)/2, and e^r by its Taylor series, whose rest is below 2e-7.
static inline V exp_of(V x) {
  const V floor = V{} - 87.0f;
  x = x < floor ? floor : x;
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  const V whole = __builtin_convertvector(n, V);
  const V r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  V e = 1.0f / 720 + r * (1.0f / 5040);
  e = 1.0f / 120 + r * e;
  e = 1.0f / 24 + r * e;
  e = 1.0f / 6 + r * e;
  e = 0.5f + r * e;
  e = 1.0f + r * (1.0f + r * e);
  e *= (V)((n + 127) << 23);
  return x <= floor ? V{} : e;
}
