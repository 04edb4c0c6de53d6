/* Many tokens at once on CPUs with AVX2, which have no unit for bfloat16: packed weights decoded to
 * float32, and multiplied in registers.
 *
 * Rows lie in lanes. 16 rows of up to 256 columns are decoded, in the order in which columns are
 * stored, into 16 KiB that stay in the first cache, and multiplied by all tokens, TOKENS at a time:
 * so many sums of 16 rows fill the registers. x is put in the columns' order, and multiplied by
 * their scales, once. Every row is summed in one order, whatever the threads and the tokens beside.
 */
#include "weight.h"

#ifdef __x86_64__

#define ROWS 16
#define BLOCK 32 /* rows for which x is read once */
#define TOKENS 6
#define WORDS 8         /* decoded at once */
#define MOST_TOKENS 240 /* laid out at once */
/* All in one function, gcc takes up to half as long again: it moves addresses out of registers. */
#define NOINLINE __attribute__((noinline))

typedef struct {
  int64_t tokens; /* laid out at once, at most */
  float *x;      /* [tokens / TOKENS, rounded up][words * WORD][TOKENS] */
  float *weight; /* [threads][WORDS * WORD][ROWS] */
  float *sum;    /* [threads][BLOCK / ROWS][tokens][ROWS] */
} Buffers;

/* --- x ---------------------------------------------------------------------------------------- */

INLINE void lay_out_as(const Weight *w, const void *x, int dtype, int64_t tokens, float *to) {
  for (int64_t i = 0; i < (int64_t)w->words * WORD; i++, to += TOKENS) {
    const int64_t column = w->column[i];
    const float scale = w->column_scale ? w->column_scale[i] : 1.0f;
    for (int64_t t = 0; t < TOKENS; t++)
      to[t] = column < 0 || t >= tokens ? 0.0f : load(x, t * w->k + column, dtype) * scale;
  }
}

/* Up to TOKENS tokens. */
static AVX2 void lay_out_tokens(const Weight *w, const char *x, int dtype, int64_t tokens,
                                float *to) {
  if (dtype == FLOAT32)
    lay_out_as(w, x, FLOAT32, tokens, to);
  else if (dtype == BFLOAT16)
    lay_out_as(w, x, BFLOAT16, tokens, to);
  else
    lay_out_as(w, x, FLOAT16, tokens, to);
}

/* --- weights ---------------------------------------------------------------------------------- */

/* 8 rows of a group: what each plane adds or subtracts, and what is added then. */
typedef struct {
  __m256 offset, scale[MAX_PLANES];
} Scales;

INLINE AVX2 Scales read_scales(const Weight *w, int64_t tile, const Group *g, int row) {
  Scales s;
  s.offset = g->offset < 0 ? _mm256_setzero_ps() : scales_avx2(scales_of(w, tile, g->offset) + row);
  for (int p = 0; p < g->planes; p++)
    s.scale[p] = _mm256_mul_ps(scales_avx2(scales_of(w, tile, scale_slot(g, p)) + row),
                               _mm256_set1_ps(g->factor[p]));
  return s;
}

/* A word of 8 rows; the first `chosen` planes choose between their levels, and each further one
 * adds its scale with its sign: as reference.dequantize does. */
INLINE AVX2 void decode_word(const int chosen, const int planes, const Scales *s,
                             const __m256 *level, const uint32_t *const *data, const int *stride,
                             int64_t word, float *out) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256i bits[MAX_PLANES];
  for (int p = 0; p < planes; p++)
    bits[p] = _mm256_loadu_si256((const __m256i *)(data[p] + word * stride[p]));
  for (int c = WORD - 1; c >= 0; c--) { /* the highest bit is that of the column */
    __m256 found[8];
#pragma GCC unroll 8
    for (int i = 0; i < 1 << chosen; i++) found[i] = level[i];
#pragma GCC unroll 3
    for (int p = 0; p < chosen; p++)
#pragma GCC unroll 4
      for (int i = 0; i < 1 << (chosen - p - 1); i++)
        found[i] = _mm256_blendv_ps(found[2 * i], found[2 * i + 1], _mm256_castsi256_ps(bits[p]));
    for (int p = chosen; p < planes; p++)
      found[0] = _mm256_add_ps(
          found[0],
          _mm256_xor_ps(s->scale[p], _mm256_andnot_ps(_mm256_castsi256_ps(bits[p]), sign)));
    if (planes > chosen) found[0] = _mm256_add_ps(found[0], s->offset);
    _mm256_storeu_ps(out + c * ROWS, found[0]);
    for (int p = 0; p < planes; p++) bits[p] = _mm256_add_epi32(bits[p], bits[p]);
  }
}

INLINE AVX2 void decode_some(const int chosen, const int planes, const Scales *s,
                             const uint32_t *const *data, const int *stride, int words,
                             float *out) {
  __m256 level[8];
  for (int i = 0; i < 1 << chosen; i++) {
    level[i] = _mm256_setzero_ps();
    for (int p = 0; p < chosen; p++)
      level[i] = i >> p & 1 ? _mm256_add_ps(level[i], s->scale[p])
                            : _mm256_sub_ps(level[i], s->scale[p]);
    if (planes == chosen) level[i] = _mm256_add_ps(level[i], s->offset);
  }
  for (int word = 0; word < words; word++)
    decode_word(chosen, planes, s, level, data, stride, word, out + (int64_t)word * WORD * ROWS);
}

/* ROWS rows of a group from row `row` of a tile on, of words whose planes are given. */
NOINLINE static AVX2 void decode(const Weight *w, int64_t tile, const Group *g, int row,
                                 const uint32_t *const *data, const int *stride, int words,
                                 float *out) {
  for (int half = 0; half < ROWS; half += 8) {
    const Scales s = read_scales(w, tile, g, row + half);
    const uint32_t *here[MAX_PLANES];
    for (int p = 0; p < g->planes; p++) here[p] = data[p] + half;
    switch (g->planes) {
      case 0: decode_some(0, 0, &s, here, stride, words, out + half); break;
      case 1: decode_some(1, 1, &s, here, stride, words, out + half); break;
      case 2: decode_some(2, 2, &s, here, stride, words, out + half); break;
      case 3: decode_some(3, 3, &s, here, stride, words, out + half); break;
      case 4: decode_some(3, 4, &s, here, stride, words, out + half); break;
      case 5: decode_some(3, 5, &s, here, stride, words, out + half); break;
      default: decode_some(3, g->planes, &s, here, stride, words, out + half);
    }
  }
}

/* The same of a group of bytes, words [begin, begin + words). */
NOINLINE static AVX2 void decode_bytes(const Weight *w, int64_t tile, const Group *g, int row,
                                       int begin, int words, float *out) {
  for (int half = 0; half < ROWS; half += 8) {
    const Scales s = read_scales(w, tile, g, row + half);
    for (int word = 0; word < words; word++) {
      const int8_t *codes = byte_codes(w, tile, g, row + half, begin + word);
      float *to = out + (int64_t)word * WORD * ROWS + half;
      for (int c = 0; c < WORD; c++, codes += WORD, to += ROWS) {
        const __m256 level =
            _mm256_fmadd_ps(bytes_avx2(codes), _mm256_set1_ps(2), _mm256_set1_ps(1));
        _mm256_storeu_ps(to, _mm256_fmadd_ps(level, s.scale[0], s.offset));
      }
    }
  }
}

/* --- products --------------------------------------------------------------------------------- */

/* sum [T][ROWS] += x [columns][TOKENS] @ weight [columns][ROWS], summed for itself first: what is
 * lost by rounding grows with the columns that are added one after the other. */
INLINE AVX2 void multiply(const int T, int64_t columns, const float *x, const float *weight,
                          float *sum) {
  __m256 acc[TOKENS][2];
#pragma GCC unroll 6
  for (int t = 0; t < T; t++)
    for (int r = 0; r < 2; r++) acc[t][r] = _mm256_setzero_ps();
  for (int64_t c = 0; c < columns; c++, x += TOKENS, weight += ROWS) {
    const __m256 low = _mm256_loadu_ps(weight), high = _mm256_loadu_ps(weight + 8);
#pragma GCC unroll 6
    for (int t = 0; t < T; t++) {
      const __m256 token = _mm256_broadcast_ss(x + t);
      acc[t][0] = _mm256_fmadd_ps(token, low, acc[t][0]);
      acc[t][1] = _mm256_fmadd_ps(token, high, acc[t][1]);
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < T; t++)
    for (int r = 0; r < 2; r++) {
      float *const at = sum + t * ROWS + 8 * r;
      _mm256_storeu_ps(at, _mm256_add_ps(_mm256_loadu_ps(at), acc[t][r]));
    }
}

/* The same of all tokens; x_step from TOKENS of them to the next. */
NOINLINE static AVX2 void multiply_all(const float *x, int64_t x_step, int64_t tokens,
                                       int64_t columns, const float *weight, float *sum) {
  for (; tokens > 0; tokens -= TOKENS, x += x_step, sum += TOKENS * ROWS)
    switch (tokens < TOKENS ? tokens : TOKENS) {
      case 1: multiply(1, columns, x, weight, sum); break;
      case 2: multiply(2, columns, x, weight, sum); break;
      case 3: multiply(3, columns, x, weight, sum); break;
      case 4: multiply(4, columns, x, weight, sum); break;
      case 5: multiply(5, columns, x, weight, sum); break;
      default: multiply(TOKENS, columns, x, weight, sum);
    }
}

INLINE void store_as(const float *sum, int64_t tokens, int rows, int dtype, void *y, int64_t at,
                     int64_t step) {
  for (int64_t t = 0; t < tokens; t++, sum += ROWS, at += step)
    if (rows == ROWS) /* a constant count is vectorized */
      for (int r = 0; r < ROWS; r++) store(y, at + r, dtype, sum[r]);
    else
      for (int r = 0; r < rows; r++) store(y, at + r, dtype, sum[r]);
}

/* Sums of up to ROWS rows into y, from `at` on; `step` from a token to the next. */
static AVX2 void store_sums(const float *sum, int64_t tokens, int rows, int dtype, void *y,
                            int64_t at, int64_t step) {
  if (dtype == FLOAT32)
    store_as(sum, tokens, rows, FLOAT32, y, at, step);
  else if (dtype == BFLOAT16)
    store_as(sum, tokens, rows, BFLOAT16, y, at, step);
  else
    store_as(sum, tokens, rows, FLOAT16, y, at, step);
}

/* Rows [row, row + BLOCK) of the weight. */
static AVX2 void run_block(const Weight *w, const float *x, int64_t tokens, int64_t row,
                           float *weight, float *sum, void *y, int dtype) {
  const int64_t tile = row / w->tile, step = (int64_t)w->words * WORD * TOKENS;
  const int first = (int)(row % w->tile);
  Planes planes;
  memset(sum, 0, (size_t)tokens * BLOCK * sizeof *sum);
  for (int i = 0; i < w->groups; i++) {
    const Group *g = w->group + i;
    if (!g->planes && g->offset < 0) continue; /* zeros */
    for (int begin = 0, end; begin < g->words; begin = end) {
      end = take_words(pbq_expand_avx2, w, tile, g, first, BLOCK, begin, &planes);
      for (int at = begin; at < end; at += WORDS) {
        const int words = end - at < WORDS ? end - at : WORDS;
        for (int r = 0; r < BLOCK; r += ROWS) {
          const uint32_t *data[MAX_PLANES];
          if (g->bytes) {
            decode_bytes(w, tile, g, first + r, at, words, weight);
          } else {
            for (int p = 0; p < g->planes; p++)
              data[p] = planes.data[p] + (int64_t)(at - begin) * planes.stride[p] + r;
            decode(w, tile, g, first + r, data, planes.stride, words, weight);
          }
          multiply_all(x + (int64_t)(g->first_word + at) * WORD * TOKENS, step, tokens,
                       (int64_t)words * WORD, weight, sum + tokens * r);
        }
      }
    }
  }
  for (int r = 0; r < BLOCK && row + r < w->n; r += ROWS) {
    const int64_t left = w->n - row - r;
    store_sums(sum + tokens * r, tokens, (int)(left < ROWS ? left : ROWS), dtype, y, row + r, w->n);
  }
}

/* From address `from` on; returns how many bytes they take. */
static int64_t lay_out(Buffers *b, const Weight *w, int64_t m, int threads, uintptr_t from) {
  const uintptr_t begin = from;
  b->tokens = m < MOST_TOKENS ? m : MOST_TOKENS;
  const int64_t parts = (b->tokens + TOKENS - 1) / TOKENS;
  b->x = carve(&from, parts * TOKENS * w->words * WORD * (int64_t)sizeof *b->x);
  b->weight = carve(&from, (int64_t)threads * WORDS * WORD * ROWS * (int64_t)sizeof *b->weight);
  b->sum = carve(&from, threads * b->tokens * BLOCK * (int64_t)sizeof *b->sum);
  return (int64_t)(from - begin);
}

/* Bytes of `scratch` that pbq_floats takes. */
EXPORT int64_t pbq_floats_scratch(const Weight *w, int64_t m, int threads) {
  Buffers b;
  return lay_out(&b, w, m, threads, 0);
}

/* y [m, n] = x [m, k] @ W_hat.T without its overlay; scratch is aligned to 64 bytes, and for as many
 * threads. */
EXPORT void pbq_floats(const Weight *w, const void *x, int dtype, int64_t m, void *y, int y_dtype,
                       void *scratch, int threads) {
  Buffers b;
  lay_out(&b, w, m, threads, (uintptr_t)scratch);
  for (int64_t token = 0; token < m; token += MOST_TOKENS) {
    const int64_t tokens = m - token < MOST_TOKENS ? m - token : MOST_TOKENS;
    const char *from = (const char *)x + token * w->k * size_of(dtype);
    char *to = (char *)y + token * w->n * size_of(y_dtype);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for
      for (int64_t t = 0; t < tokens; t += TOKENS)
        lay_out_tokens(w, from + t * w->k * size_of(dtype), dtype, tokens - t,
                       b.x + t * w->words * WORD);
      float *weight = b.weight + (int64_t)omp_get_thread_num() * WORDS * WORD * ROWS;
      float *sum = b.sum + omp_get_thread_num() * b.tokens * BLOCK;
#pragma omp for schedule(dynamic)
      for (int64_t row = 0; row < w->n; row += BLOCK)
        run_block(w, b.x, tokens, row, weight, sum, to, y_dtype);
    }
  }
}

#else

EXPORT int64_t pbq_floats_scratch(const Weight *w, int64_t m, int threads) {
  (void)w, (void)m, (void)threads;
  return 0;
}

EXPORT void pbq_floats(const Weight *w, const void *x, int dtype, int64_t m, void *y, int y_dtype,
                       void *scratch, int threads) {
  (void)w, (void)x, (void)dtype, (void)m, (void)y, (void)y_dtype, (void)scratch, (void)threads;
}

#endif
