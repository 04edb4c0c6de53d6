/* The gradients of causal attention by the tiles of a CPU (AMX): of query, key and value, from the
 * output, what its loss says of it, and the logarithm of the sum that each query's softmax has.
 * attention.py holds the slow twin.
 *
 * With S = query keyᵀ, P = exp(scale S - log sum) and D = P * (back valueᵀ - Σ back * output):
 * value's are Pᵀ back, key's scale Dᵀ query, query's scale D key (FlashAttention-2, algorithm 2).
 * All is computed transposed, a square of KEYS x QUERIES at a time: rows of Sᵀ are keys, so that Pᵀ
 * and Dᵀ are what the products take from the left as soon as they are bfloat16, and rows of Dᵀ two
 * by two what they take from the right. A head is one thread's; what heads that share a key say of
 * it is added up in their order, whatever the threads.
 */
#include "tiles.h"

#ifdef HAS_UNITS

#define KEYS 64 /* of a square; both are multiples of 32 */
#define QUERIES 64
#define PAIRS (SIDE * 2)     /* 16-bit numbers in a row of a tile */
#define BLOCK (SIDE * PAIRS) /* and in a tile */
#define ALIGNED(x, to) (((x) + (to) - 1) / (to) * (to))

/* bfloat16 [batch, heads, tokens, width], by steps between them in numbers; the last is 1. */
typedef struct {
  const uint16_t *at;
  int64_t batch, head, token;
} Input;

typedef struct {
  Input query, key, value, out, back;
  const float *sums; /* [batch, heads, tokens]: logarithms */
  int64_t heads, shared, tokens, width; /* shared: heads of a key */
  int64_t d, rows;                      /* width and tokens, rounded up */
  float scale;
} Attention;

/* A thread's, of one head. Rows and columns that are padding are zero. */
typedef struct {
  uint16_t *rows;           /* [rows][d]: what is laid out next */
  uint16_t *key, *value;    /* [rows][d] */
  uint16_t *key_columns;    /* [d][rows] */
  uint16_t *query, *back;   /* pairs of columns: [rows / 16][d / 32] tiles of 16 rows */
  uint16_t *query_rows;     /* pairs of rows: [rows / 32][d / 16] tiles of 16 columns */
  uint16_t *back_rows;      /* the same */
  float *sums, *inner;      /* [rows]; inner: Σ back * out */
  float *by_query;          /* [d][rows] */
  float *scores;            /* [KEYS][QUERIES]: S, transposed */
  float *by_weight;         /* [KEYS][QUERIES]: back valueᵀ, transposed */
  uint16_t *weights;        /* [KEYS][QUERIES]: P, transposed */
  uint16_t *by_score;       /* [KEYS][QUERIES]: D, transposed */
  uint16_t *by_score_pairs; /* D, pairs of keys: [KEYS / 32][QUERIES / 16] tiles */
} Head;

/* --- layouts ------------------------------------------------------------------------------------ */

/* Rows of one head, padded: [rows][d]. */
static VECTOR void copy_rows(const Attention *a, Input x, int64_t batch, int64_t head,
                             uint16_t *to) {
  const uint16_t *from = x.at + batch * x.batch + head * x.head;
  for (int64_t t = 0; t < a->rows; t++)
    for (int64_t c = 0; c < a->d; c += PAIRS, to += PAIRS) {
      const __mmask32 some = t < a->tokens ? first_of(a->width - c) : 0;
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(some, from + t * x.token + c));
    }
}

/* Pair `pair` of columns of 16 rows: of each row one 32-bit number. */
INLINE VECTOR __m512i column_pair(const uint16_t *x, int64_t columns, int64_t row, int64_t pair) {
  const __m512i at = _mm512_mullo_epi32(lanes(), _mm512_set1_epi32((int)(columns / 2)));
  return _mm512_i32gather_epi32(at, (const int *)(x + row * columns) + pair, 4);
}

static VECTOR void pairs_of_columns(const uint16_t *x, int64_t rows, int64_t columns,
                                    uint16_t *to) {
  for (int64_t row = 0; row < rows; row += SIDE)
    for (int64_t pair = 0; pair < columns / 2; pair++, to += PAIRS)
      _mm512_storeu_si512(to, column_pair(x, columns, row, pair));
}

/* [columns][rows] */
static VECTOR void transpose(const uint16_t *x, int64_t rows, int64_t columns, uint16_t *to) {
  for (int64_t row = 0; row < rows; row += SIDE)
    for (int64_t pair = 0; pair < columns / 2; pair++) {
      const __m512i both = column_pair(x, columns, row, pair);
      uint16_t *const low = to + 2 * pair * rows + row;
      _mm256_storeu_si256((__m256i *)low, _mm512_cvtepi32_epi16(both));
      _mm256_storeu_si256((__m256i *)(low + rows),
                          _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
    }
}

static VECTOR void pairs_of_rows(const uint16_t *x, int64_t rows, int64_t columns, uint16_t *to) {
  for (int64_t row = 0; row < rows; row += PAIRS)
    for (int64_t c = 0; c < columns; c += SIDE)
      for (int64_t r = row; r < row + PAIRS; r += 2, to += PAIRS) {
        const __m256i one = _mm256_loadu_si256((const __m256i *)(x + r * columns + c));
        const __m256i next = _mm256_loadu_si256((const __m256i *)(x + (r + 1) * columns + c));
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(one), next, 1);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(side_by_side(), both));
      }
}

INLINE VECTOR __m512 floats(const uint16_t *from, __mmask16 some) {
  const __m256i x = _mm256_maskz_loadu_epi16(some, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

/* Σ back * out of each token of one head; 0 of those that are not there. */
static VECTOR void inner_products(const Attention *a, int64_t batch, int64_t head, float *to) {
  const uint16_t *back = a->back.at + batch * a->back.batch + head * a->back.head;
  const uint16_t *out = a->out.at + batch * a->out.batch + head * a->out.head;
  memset(to, 0, (size_t)a->rows * sizeof *to);
  for (int64_t t = 0; t < a->tokens; t++) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < a->width; c += SIDE) {
      const __mmask16 some = (__mmask16)first_of(a->width - c);
      sum = _mm512_fmadd_ps(floats(back + t * a->back.token + c, some),
                            floats(out + t * a->out.token + c, some), sum);
    }
    to[t] = _mm512_reduce_add_ps(sum);
  }
}

static void lay_out_head(const Attention *a, int64_t batch, int64_t head, const Head *h) {
  const int64_t tokens = a->tokens, rows = a->rows, d = a->d;
  copy_rows(a, a->key, batch, head / a->shared, h->key);
  transpose(h->key, rows, d, h->key_columns);
  copy_rows(a, a->value, batch, head / a->shared, h->value);
  copy_rows(a, a->query, batch, head, h->rows);
  pairs_of_columns(h->rows, rows, d, h->query);
  pairs_of_rows(h->rows, rows, d, h->query_rows);
  copy_rows(a, a->back, batch, head, h->rows);
  pairs_of_columns(h->rows, rows, d, h->back);
  pairs_of_rows(h->rows, rows, d, h->back_rows);
  memcpy(h->sums, a->sums + (batch * a->heads + head) * tokens, (size_t)tokens * sizeof *h->sums);
  /* queries that are not there have weights of zero */
  for (int64_t t = tokens; t < rows; t++) h->sums[t] = INFINITY;
  inner_products(a, batch, head, h->inner);
  memset(h->by_query, 0, (size_t)(d * rows) * sizeof *h->by_query);
}

/* --- products ----------------------------------------------------------------------------------- */

/* c [rows][columns], with c_row numbers to the next row, is a b, or has it added. a [rows][32 steps]:
 * a_row to the next row. b: tiles of pairs of rows, b_step to the next 32 rows, b_column to the
 * next 16 columns. rows and columns are multiples of 32. */
static AMX void multiply(const uint16_t *a, int64_t a_row, const uint16_t *b, int64_t b_step,
                         int64_t b_column, int64_t steps, float *c, int64_t c_row, int64_t rows,
                         int64_t columns, int added) {
  const int64_t a_bytes = a_row * 2, b_bytes = PAIRS * 2, c_bytes = c_row * 4;
  __asm__ volatile("" ::: "memory"); /* compilers do not know that a tile reads memory */
  for (int64_t row = 0; row < rows; row += 2 * SIDE)
    for (int64_t column = 0; column < columns; column += 2 * SIDE) {
      const uint16_t *left = a + row * a_row, *right = b + column / SIDE * b_column;
      float *const upper = c + row * c_row + column, *const lower = upper + SIDE * c_row;
      if (added) {
        _tile_loadd(0, upper, c_bytes);
        _tile_loadd(1, upper + SIDE, c_bytes);
        _tile_loadd(2, lower, c_bytes);
        _tile_loadd(3, lower + SIDE, c_bytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t s = 0; s < steps; s++, left += PAIRS, right += b_step) {
        _tile_loadd(6, right, b_bytes);
        _tile_loadd(7, right + b_column, b_bytes);
        _tile_loadd(4, left, a_bytes);
        _tile_loadd(5, left + SIDE * a_row, a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, upper, c_bytes);
      _tile_stored(1, upper + SIDE, c_bytes);
      _tile_stored(2, lower, c_bytes);
      _tile_stored(3, lower + SIDE, c_bytes);
    }
}

/* e**x, within some units of the last place; e**-100 below, no number where x is none. */
INLINE VECTOR __m512 exponential(__m512 x) {
  const __m512 y = _mm512_max_ps(_mm512_set1_ps(-100), x); /* x where it is no number */
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(y, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), y); /* ln 2 in two parts */
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
  __m512 e = _mm512_set1_ps(8.3334519073e-3f); /* Cephes, expf, without its last term */
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(4.1665795894e-2f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.6666665459e-1f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(5.0000001201e-1f));
  e = _mm512_fmadd_ps(e, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1)));
  return _mm512_scalef_ps(e, n);
}

/* Of a square: P and D. The first query is `ahead` tokens behind the first key. */
static VECTOR void weigh(const Head *h, float scale, int64_t first_query, int64_t ahead) {
  for (int64_t key = 0; key < KEYS; key += 2)
    for (int64_t q = 0; q < QUERIES; q += SIDE) {
      const __m512 sums = _mm512_loadu_ps(h->sums + first_query + q);
      const __m512 inner = _mm512_loadu_ps(h->inner + first_query + q);
      __m512 p[2], d[2];
      for (int i = 0; i < 2; i++) {
        const int64_t at = (key + i) * QUERIES + q, seen = key + i - ahead - q;
        /* by queries no earlier than the key */
        const __mmask16 some = _mm512_cmpge_epi32_mask(lanes(), _mm512_set1_epi32((int)seen));
        const __m512 score = _mm512_loadu_ps(h->scores + at), by = _mm512_loadu_ps(h->by_weight + at);
        p[i] = _mm512_maskz_mov_ps(
            some, exponential(_mm512_fmsub_ps(score, _mm512_set1_ps(scale), sums)));
        d[i] = _mm512_maskz_mul_ps(some, p[i], _mm512_sub_ps(by, inner));
      }
      const __m512i weights = (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]);
      const __m512i by_score = (__m512i)_mm512_cvtne2ps_pbh(d[1], d[0]);
      const int64_t one = key * QUERIES + q, next = one + QUERIES;
      _mm256_storeu_si256((__m256i *)(h->weights + one), _mm512_castsi512_si256(weights));
      _mm256_storeu_si256((__m256i *)(h->weights + next), _mm512_extracti64x4_epi64(weights, 1));
      _mm256_storeu_si256((__m256i *)(h->by_score + one), _mm512_castsi512_si256(by_score));
      _mm256_storeu_si256((__m256i *)(h->by_score + next), _mm512_extracti64x4_epi64(by_score, 1));
      uint16_t *tile = h->by_score_pairs + (key / PAIRS * (QUERIES / SIDE) + q / SIDE) * BLOCK;
      _mm512_storeu_si512(tile + key % PAIRS / 2 * PAIRS,
                          _mm512_permutexvar_epi16(side_by_side(), by_score));
    }
}

/* Gradients of one head: by_query of `h`, and by_key and by_value [rows][d]. */
static void run_head(const Attention *a, const Head *h, float *by_key, float *by_value) {
  const int64_t rows = a->rows, d = a->d, columns = d / PAIRS, sides = d / SIDE;
  for (int64_t key = 0; key < rows; key += KEYS) {
    const int64_t first = key / QUERIES * QUERIES;
    for (int64_t q = first; q < rows; q += QUERIES) {
      multiply(h->key + key * d, d, h->query + q * d, BLOCK, columns * BLOCK, columns, h->scores,
               QUERIES, KEYS, QUERIES, 0);
      multiply(h->value + key * d, d, h->back + q * d, BLOCK, columns * BLOCK, columns,
               h->by_weight, QUERIES, KEYS, QUERIES, 0);
      weigh(h, a->scale, q, q - key);
      multiply(h->weights, QUERIES, h->back_rows + q * d, sides * BLOCK, BLOCK, QUERIES / PAIRS,
               by_value + key * d, d, KEYS, d, q > first);
      multiply(h->by_score, QUERIES, h->query_rows + q * d, sides * BLOCK, BLOCK, QUERIES / PAIRS,
               by_key + key * d, d, KEYS, d, q > first);
      multiply(h->key_columns + key, rows, h->by_score_pairs, QUERIES / SIDE * BLOCK, BLOCK,
               KEYS / PAIRS, h->by_query + q, rows, d, QUERIES, 1);
    }
  }
}

/* --- results ------------------------------------------------------------------------------------ */

/* [tokens][width] of a transposed by_query [d][rows]. */
static VECTOR void store_query(const Attention *a, const float *from, uint16_t *to) {
  const __m512i at = _mm512_mullo_epi32(lanes(), _mm512_set1_epi32((int)a->rows));
  for (int64_t t = 0; t < a->tokens; t++)
    for (int64_t c = 0; c < a->width; c += SIDE) {
      const __m512 x = _mm512_i32gather_ps(at, from + c * a->rows + t, 4);
      const __m256i found = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(x, _mm512_set1_ps(a->scale)));
      _mm256_mask_storeu_epi16(to + t * a->width + c, (__mmask16)first_of(a->width - c), found);
    }
}

/* [tokens][width] of the sum of `shared` heads' [rows][d], times scale. */
static VECTOR void store_sum(const Attention *a, const float *from, float scale, uint16_t *to) {
  for (int64_t t = 0; t < a->tokens; t++)
    for (int64_t c = 0; c < a->width; c += SIDE) {
      const float *at = from + t * a->d + c;
      __m512 x = _mm512_loadu_ps(at);
      for (int64_t head = 1; head < a->shared; head++)
        x = _mm512_add_ps(x, _mm512_loadu_ps(at + head * a->rows * a->d));
      const __m256i found = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(x, _mm512_set1_ps(scale)));
      _mm256_mask_storeu_epi16(to + t * a->width + c, (__mmask16)first_of(a->width - c), found);
    }
}

/* A thread's buffers from address `from` on; returns how many bytes they take. */
static int64_t lay_out(const Attention *a, Head *h, uintptr_t from) {
  const uintptr_t begin = from;
  const int64_t head = a->rows * a->d, square = KEYS * QUERIES;
  h->rows = carve(&from, head * 2);
  h->key = carve(&from, head * 2);
  h->value = carve(&from, head * 2);
  h->key_columns = carve(&from, head * 2);
  h->query = carve(&from, head * 2);
  h->back = carve(&from, head * 2);
  h->query_rows = carve(&from, head * 2);
  h->back_rows = carve(&from, head * 2);
  h->sums = carve(&from, a->rows * 4);
  h->inner = carve(&from, a->rows * 4);
  h->by_query = carve(&from, head * 4);
  h->scores = carve(&from, square * 4);
  h->by_weight = carve(&from, square * 4);
  h->weights = carve(&from, square * 2);
  h->by_score = carve(&from, square * 2);
  h->by_score_pairs = carve(&from, square * 2);
  return (int64_t)(from - begin);
}

/* Gradients of softmax(scale query keyᵀ) value, each token attending to itself and those before it.
 * given: query, key, value, out, back; steps [5][3]: from batch to batch, head to head and token to
 * token. sums [batch, heads, tokens]. sizes: batch, heads, heads of keys, tokens, width.
 * by_query [batch, heads, tokens, width], and by_key and by_value with as many heads as keys have,
 * bfloat16. For machines with TILES. Returns 0, or -1 without memory. */
EXPORT int pbq_attention_back(const uint16_t *const *given, const int64_t *steps, const float *sums,
                              const int64_t *sizes, float scale, uint16_t *by_query,
                              uint16_t *by_key, uint16_t *by_value, int threads) {
  Input x[5];
  for (int i = 0; i < 5; i++)
    x[i] = (Input){given[i], steps[3 * i], steps[3 * i + 1], steps[3 * i + 2]};
  const int64_t heads = sizes[0] * sizes[1], keys = sizes[0] * sizes[2];
  const int64_t tokens = sizes[3], width = sizes[4];
  const Attention a = {.query = x[0], .key = x[1], .value = x[2], .out = x[3], .back = x[4],
                       .sums = sums, .heads = sizes[1], .shared = sizes[1] / sizes[2],
                       .tokens = tokens, .width = width, .d = ALIGNED(width, PAIRS),
                       .rows = ALIGNED(ALIGNED(tokens, KEYS), QUERIES), .scale = scale};
  Head none;
  const int64_t own = lay_out(&a, &none, 0), head = a.rows * a.d, together = a.shared * head;
  float *const found_key = malloc((size_t)(heads * head) * sizeof *found_key);
  float *const found_value = malloc((size_t)(heads * head) * sizeof *found_value);
  int failed = !found_key || !found_value;
  (void)threads; /* without OpenMP */
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Head h;
    TileConfig before;
    void *const memory = failed ? NULL : aligned_alloc(64, (size_t)own);
    lay_out(&a, &h, (uintptr_t)memory);
    configure_tiles(&before);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < heads; i++) {
      if (!memory) {
#pragma omp atomic write
        failed = 1;
        continue;
      }
      lay_out_head(&a, i / a.heads, i % a.heads, &h);
      run_head(&a, &h, found_key + i * head, found_value + i * head);
      store_query(&a, h.by_query, by_query + i * tokens * width);
    }
    restore_tiles(&before);
    free(memory);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < keys; i++) {
      if (failed) continue;
      store_sum(&a, found_key + i * together, scale, by_key + i * tokens * width);
      store_sum(&a, found_value + i * together, 1, by_value + i * tokens * width);
    }
  }
  free(found_key);
  free(found_value);
  return failed ? -1 : 0;
}

#else

EXPORT int pbq_attention_back(const uint16_t *const *given, const int64_t *steps, const float *sums,
                              const int64_t *sizes, float scale, uint16_t *by_query,
                              uint16_t *by_key, uint16_t *by_value, int threads) {
  (void)given, (void)steps, (void)sums, (void)sizes, (void)scale, (void)by_query, (void)by_key;
  (void)by_value, (void)threads;
  return -1;
}

#endif
