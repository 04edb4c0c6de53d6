/* KL divergences of next-token distributions, and their gradients: every logit is read three times
 * and nothing of their size is written but the gradient. divergence.py holds the slow twin.
 */
#include "weight.h"

#define LANES 16
#define PART 64 /* blocks of LANES whose sums are kept in float32 */
#define LEAST 0xff7f /* the least bfloat16, whose exponential is nothing */

/* e**x for x up to 0, within some units of the last place; 0 from -87 on and where x is no number. */
INLINE float exponential(float x) {
  const float above = x > -87 ? x : -87;
  const float rounder = 0x1.8p23f; /* the last bits of a sum with it are the nearest whole number */
  const float shifted = above * 1.44269504f + rounder, n = shifted - rounder;
  const float r = above - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f; /* ln 2 in two parts */
  float e = 1.9875691500e-4f; /* Cephes, expf: on half of ln 2 to either side of 0 */
  e = e * r + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * (r * r) + r + 1;
  const uint32_t power = (bits_of_float(shifted) << 23) + 0x3f800000;
  return e * float_of_bits(x > -87 ? power : 0);
}

/* The first of LANES numbers in a row of v at c; where they are fewer, a copy in `all`, filled up
 * with what has no share. */
INLINE const uint16_t *block(const uint16_t *row, int64_t c, int64_t v, uint16_t all[LANES]) {
  if (v - c >= LANES) return row + c;
  for (int l = 0; l < LANES; l++) all[l] = l < v - c ? row[c + l] : LEAST;
  return all;
}

INLINE float largest(const uint16_t *row, int64_t v) {
  float most[LANES], found = -INFINITY;
  uint16_t all[LANES];
  for (int l = 0; l < LANES; l++) most[l] = found;
  for (int64_t c = 0; c < v; c += LANES) {
    const uint16_t *x = block(row, c, v, all);
#pragma GCC unroll 1 /* what is unrolled early becomes no vector instructions */
    for (int l = 0; l < LANES; l++) {
      const float here = bfloat_to_float(x[l]);
      most[l] = here > most[l] ? here : most[l];
    }
  }
  for (int l = 0; l < LANES; l++) found = most[l] > found ? most[l] : found;
  return found;
}

/* A token's: KL(p || q) and the entropy of p in nats; and, if there is room for it, the gradient of
 * entropy**gamma * KL. */
INLINE void token(const uint16_t *student, const uint16_t *target, int64_t v, float gamma,
                  float *kl, float *entropy, uint16_t *gradient) {
  const float most_q = largest(student, v), most_p = largest(target, v);
  uint16_t all[3][LANES];
  /* with q, p less the largest: sums of e**q, e**p, e**p p, e**p (p - q) */
  double total_q = 0, total_p = 0, inner = 0, apart = 0;
  for (int64_t start = 0; start < v; start += PART * LANES) {
    const int64_t stop = start + PART * LANES < v ? start + PART * LANES : v;
    float sum[4][LANES] = {{0}};
    for (int64_t c = start; c < stop; c += LANES) {
      const uint16_t *x = block(student, c, v, all[0]), *y = block(target, c, v, all[1]);
#pragma GCC unroll 1
      for (int l = 0; l < LANES; l++) {
        const float q = bfloat_to_float(x[l]) - most_q, p = bfloat_to_float(y[l]) - most_p;
        const float e = exponential(p);
        sum[0][l] += exponential(q);
        sum[1][l] += e;
        sum[2][l] += e * p;
        sum[3][l] += e * (p - q);
      }
    }
    for (int l = 0; l < LANES; l++) {
      total_q += sum[0][l], total_p += sum[1][l];
      inner += sum[2][l], apart += sum[3][l];
    }
  }
  *kl = (float)(apart / total_p - log(total_p) + log(total_q));
  *entropy = (float)(log(total_p) - inner / total_p);
  if (!gradient) return;
  const float weight = gamma != 0 ? powf(*entropy > 0 ? *entropy : 0, gamma) : 1;
  const float share_q = weight / (float)total_q, share_p = weight / (float)total_p;
  for (int64_t c = 0; c < v; c += LANES) {
    const uint16_t *x = block(student, c, v, all[0]), *y = block(target, c, v, all[1]);
    uint16_t *const out = all[2];
#pragma GCC unroll 1
    for (int l = 0; l < LANES; l++) {
      const float q = exponential(bfloat_to_float(x[l]) - most_q) * share_q;
      const float p = exponential(bfloat_to_float(y[l]) - most_p) * share_p;
      out[l] = float_to_bfloat(q - p);
    }
    memcpy(gradient + c, out, (size_t)(v - c < LANES ? v - c : LANES) * sizeof *out);
  }
}

typedef void Token(const uint16_t *, const uint16_t *, int64_t, float, float *, float *,
                   uint16_t *);

/* Compiled for each kind of machine; AVX-512 would take .8 of AVX2's time. */
#define DEFINE_TOKEN(NAME, TARGET)                                                               \
  static TARGET void token_##NAME(const uint16_t *q, const uint16_t *p, int64_t v, float gamma,  \
                                  float *kl, float *entropy, uint16_t *gradient) {               \
    token(q, p, v, gamma, kl, entropy, gradient);                                                \
  }

DEFINE_TOKEN(plain, )
#ifdef __x86_64__
DEFINE_TOKEN(avx2, __attribute__((target("avx2,fma"))))
#endif

/* What this machine can run, fastest first; NULL past the last. */
static Token *variant(int index) {
  Token *found[3] = {0};
  int count = 0;
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[count++] = token_avx2;
#endif
  found[count++] = token_plain;
  return found[index < count ? index : count];
}

static int chosen;

/* For tests: this variant is taken from now on, if there are so many. */
EXPORT int pbq_divergence_use(int index) {
  if (!variant(index)) return 0;
  chosen = index;
  return 1;
}

/* Logits [tokens, v] of a student and its target, bfloat16 -> kl, entropy [tokens]; and, unless it
 * is NULL, gradient [tokens, v], bfloat16: see `token`. */
EXPORT void pbq_divergence(const uint16_t *student, const uint16_t *target, int64_t tokens,
                           int64_t v, float gamma, float *kl, float *entropy, uint16_t *gradient,
                           int threads) {
  (void)threads; /* where there is no OpenMP */
  Token *const run = variant(chosen);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t t = 0; t < tokens; t++)
    run(student + t * v, target + t * v, v, gamma, kl + t, entropy + t,
        gradient ? gradient + t * v : NULL);
}
