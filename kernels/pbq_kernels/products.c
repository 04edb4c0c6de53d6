/* Many tokens at once: packed weights multiplied by the CPU's bfloat16 units, AMX or AVX512-BF16.
 *
 * Weights are rounded to bfloat16 as the reference rounds them. 32 rows are decoded at a time, a
 * column of them in one register: a row's levels lie in as many registers as there are, and each
 * bit plane chooses between two of them for all rows. Columns are then put side by side in pairs,
 * as the units read them, in blocks of 32 columns (a word) of 16 rows. A thread never holds more of
 * the dense weight than 768 KiB, or 32 rows where those are more.
 *
 * A sum goes through its columns in one order, whatever the tokens beside it and the threads.
 */
#include "weight.h"

enum { NO_UNIT, DOTS, TILES }; /* mirrors UNITS in cpu.py */

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define SIDE 16             /* rows, tokens and pairs of columns of a block */
#define BLOCK (SIDE * WORD) /* numbers in it */
#define ROWS 32             /* decoded in one register; two blocks side by side */
#define TOKENS 32           /* multiplied at once: two blocks */
#define MOST_TOKENS 1024    /* whose x is laid out at once */
#define PANEL (384 * 1024)  /* weights, decoded at once: they stay in the second cache */
#define MOST_LEVELS 16      /* of a row, that registers have room for */

#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define VECTOR __attribute__((target(AVX512 ",avx512bf16")))
#define AMX __attribute__((target(AVX512 ",amx-tile,amx-bf16")))

typedef struct {
  int words;        /* of 32 columns */
  int panel;        /* rows decoded at once */
  uint16_t *x;      /* [ceil(tokens / SIDE)][words][SIDE tokens][WORD] */
  uint16_t *column; /* [threads][words * WORD][ROWS]: see `in_lanes` */
  uint16_t *weight; /* [threads][panel / ROWS][words][2][SIDE pairs][SIDE rows][2] */
  float *sum;       /* [threads][TOKENS][ROWS] */
} Buffers;

INLINE __mmask32 first_of(int64_t count) {
  return count < 32 ? (__mmask32)((1u << count) - 1) : UINT32_MAX;
}

/* SIDE tokens; those that are not there, and columns past the last, are zero. */
static VECTOR void lay_out_tokens(const Weight *w, const Buffers *b, const uint16_t *x,
                                  int64_t tokens, uint16_t *to) {
  for (int64_t t = 0; t < SIDE; t++, x += w->k)
    for (int64_t word = 0; word < b->words; word++) {
      const __mmask32 some = t < tokens ? first_of(w->k - word * WORD) : 0;
      const __m512i here = _mm512_maskz_loadu_epi16(some, x + word * WORD);
      _mm512_storeu_si512(to + word * BLOCK + t * WORD, here);
    }
}

/* --- weights ---------------------------------------------------------------------------------- */

/* 32 rows of 16 bits lie in a register so that 4 of the first 16 and 4 of the last 16 alternate:
 * unpacking two columns then gives pairs of the first 16 rows, and pairs of the last. */
INLINE int lane_of(int row) { return row % SIDE / 4 * 8 + row / SIDE * 4 + row % 4; }

INLINE VECTOR __m512i in_lanes(__m512 first, __m512 last) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  return _mm512_permutexvar_epi64(order, (__m512i)_mm512_cvtne2ps_pbh(last, first));
}

/* The rows of a group: what its planes add to, and what each adds or subtracts. */
typedef struct {
  __m512 offset[2], scale[2][MAX_PLANES];
} Scales;

INLINE VECTOR __m512 halves(const uint16_t *from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

INLINE VECTOR void read_scales(const Weight *w, int64_t tile, const Group *g, int first,
                               Scales *to) {
  for (int half = 0; half < 2; half++) {
    const int row = first + half * SIDE;
    to->offset[half] =
        g->offset < 0 ? _mm512_setzero_ps() : halves(scales_of(w, tile, g->offset) + row);
    for (int p = 0; p < g->planes; p++)
      to->scale[half][p] = _mm512_mul_ps(halves(scales_of(w, tile, scale_slot(g, p)) + row),
                                         _mm512_set1_ps(g->factor[p]));
  }
}

/* The level of a code, in fp32 as reference.dequantize, rounded. */
INLINE VECTOR __m512i level_of(const Scales *s, int planes, int code) {
  __m512 sum[2] = {s->offset[0], s->offset[1]};
  for (int half = 0; half < 2; half++)
    for (int p = 0; p < planes; p++)
      sum[half] = code >> p & 1 ? _mm512_add_ps(sum[half], s->scale[half][p])
                                : _mm512_sub_ps(sum[half], s->scale[half][p]);
  return in_lanes(sum[0], sum[1]);
}

/* How many planes choose a level. Without an offset the highest plane is a sign. */
INLINE int choosing(const Group *g) { return g->planes - (g->offset < 0 && g->planes); }

/* Columns [16 * high, 16 * high + count) of a word of 32 rows, by `planes` that choose and, if
 * there is one more, a sign. */
INLINE VECTOR void choose_columns(const int planes, const int is_signed, const __m512i *level,
                                  const uint32_t *const *data, int high, int count,
                                  const int32_t *column, uint16_t *out) {
  const __m512i low_half = _mm512_set1_epi32(0xffff), sign = _mm512_set1_epi16(INT16_MIN);
  __m512i bits[5], flip = _mm512_setzero_si512();
  for (int p = 0; p < planes + is_signed; p++) {
    __m512i first = _mm512_loadu_si512(data[p]), last = _mm512_loadu_si512(data[p] + SIDE);
    first = high ? _mm512_srli_epi32(first, 16) : _mm512_and_si512(first, low_half);
    last = high ? _mm512_srli_epi32(last, 16) : _mm512_and_si512(last, low_half);
    bits[p] = _mm512_packus_epi32(first, last);
  }
  if (is_signed) {
    flip = _mm512_ternarylogic_epi32(bits[planes], bits[planes], bits[planes], 0x55); /* NOT */
    for (int p = 0; p < planes; p++) bits[p] = _mm512_xor_si512(bits[p], flip);
  }
#pragma GCC unroll 16
  for (int c = 0; c < 16; c++) {
    if (c == count) break;
    const __m512i bit = _mm512_set1_epi16((short)(1 << c));
    __m512i found[MOST_LEVELS];
#pragma GCC unroll 16
    for (int i = 0; i < 1 << planes; i++) found[i] = level[i];
#pragma GCC unroll 4
    for (int p = 0; p < planes; p++) {
      const __mmask32 set = _mm512_test_epi16_mask(bits[p], bit);
#pragma GCC unroll 8
      for (int i = 0; i < 1 << (planes - p - 1); i++)
        found[i] = _mm512_mask_blend_epi16(set, found[2 * i], found[2 * i + 1]);
    }
    if (is_signed) /* found ^ (flip & sign) */
      found[0] = _mm512_ternarylogic_epi32(found[0], _mm512_slli_epi16(flip, 15 - c), sign, 0x78);
    _mm512_storeu_si512(out + (int64_t)column[c] * ROWS, found[0]);
  }
}

INLINE VECTOR void choose_words(const int planes, const int is_signed, const __m512i *level,
                                const uint32_t *const *data, const int *stride, int words,
                                int columns, const int32_t *column, uint16_t *out) {
  for (int word = 0; word < words; word++, column += WORD, columns -= WORD) {
    const uint32_t *here[MAX_PLANES];
    for (int p = 0; p < planes + is_signed; p++) here[p] = data[p] + (int64_t)word * stride[p];
    choose_columns(planes, is_signed, level, here, 0, columns < 16 ? columns : 16, column, out);
    if (columns > 16)
      choose_columns(planes, is_signed, level, here, 1, columns < 32 ? columns - 16 : 16,
                     column + 16, out);
  }
}

/* The same for any number of planes and column scales, by additions. */
static VECTOR void add_words(const Scales *s, int planes, const uint32_t *const *data,
                             const int *stride, int words, int columns, const int32_t *column,
                             const float *column_scale, uint16_t *out) {
  for (int i = 0; i < columns && i < words * WORD; i++) {
    __m512 sum[2];
    for (int half = 0; half < 2; half++) {
      sum[half] = s->offset[half];
      for (int p = 0; p < planes; p++) {
        const uint32_t *from = data[p] + (int64_t)(i / WORD) * stride[p] + half * SIDE;
        const __mmask16 set = _mm512_test_epi32_mask(_mm512_loadu_si512(from),
                                                     _mm512_set1_epi32((int)(1u << i % WORD)));
        const __m512 less = _mm512_sub_ps(sum[half], s->scale[half][p]);
        sum[half] = _mm512_mask_add_ps(less, set, sum[half], s->scale[half][p]);
      }
      if (column_scale) sum[half] = _mm512_mul_ps(sum[half], _mm512_set1_ps(column_scale[i]));
    }
    _mm512_storeu_si512(out + (int64_t)column[i] * ROWS, in_lanes(sum[0], sum[1]));
  }
}

/* Words [begin, end) of 32 rows of a group, whose planes are given, from row `first` of the tile. */
static VECTOR void decode_words(const Weight *w, int64_t tile, const Group *g, int first,
                                const uint32_t *const *data, const int *stride, int begin, int end,
                                uint16_t *out) {
  const int planes = choosing(g), words = end - begin, columns = g->columns - begin * WORD;
  const int64_t position = (int64_t)(g->first_word + begin) * WORD;
  const int32_t *column = w->column + position;
  Scales s;
  read_scales(w, tile, g, first, &s);
  if (w->column_scale || 1 << planes > MOST_LEVELS) {
    add_words(&s, g->planes, data, stride, words, columns, column,
              w->column_scale ? w->column_scale + position : NULL, out);
    return;
  }
  __m512i level[MOST_LEVELS]; /* up to 4 planes choose */
  const int sign = planes < g->planes;
  for (int i = 0; i < 1 << planes; i++) level[i] = level_of(&s, g->planes, i | sign << planes);
#define CASE(PLANES, SIGN)                                                                  \
  case 2 * PLANES + SIGN:                                                                   \
    choose_words(PLANES, SIGN, level, data, stride, words, columns, column, out);           \
    break
  switch (2 * planes + sign) {
    CASE(0, 0);
    CASE(0, 1);
    CASE(1, 0);
    CASE(1, 1);
    CASE(2, 0);
    CASE(2, 1);
    CASE(3, 0);
    CASE(3, 1);
    CASE(4, 0);
    CASE(4, 1);
  }
#undef CASE
}

/* 32 rows, from row `first` of a tile, into [words * WORD columns][ROWS]. */
static VECTOR void decode_rows(const Weight *w, const Buffers *b, int64_t tile, int first,
                               uint16_t *out) {
  Planes planes;
  for (int i = 0; i < w->groups; i++) {
    const Group *g = w->group + i;
    for (int begin = 0, end; begin < g->words; begin = end) {
      end = take_words(pbq_expand_avx512, w, tile, g, first, ROWS, begin, &planes);
      decode_words(w, tile, g, first, planes.data, planes.stride, begin, end, out);
    }
  }
  memset(out + w->k * ROWS, 0, (size_t)(b->words * WORD - w->k) * ROWS * sizeof *out);
}

/* Overlay entries of the same rows take the place of what lies below. */
static void put_overlay(const Weight *w, int64_t first, uint16_t *out) {
  for (int row = 0; row < ROWS && first + row < w->n; row++)
    for (int64_t i = w->overlay_start[first + row]; i < w->overlay_start[first + row + 1]; i++)
      out[(int64_t)w->overlay_column[i] * ROWS + lane_of(row)] = w->overlay_value[i];
}

/* column [words * WORD][ROWS] -> weight [words][2][SIDE pairs][SIDE rows][2] */
static VECTOR void pair_columns(int words, const uint16_t *column, uint16_t *weight) {
  for (int word = 0; word < words; word++, weight += BLOCK)
    for (int j = 0; j < SIDE; j++, column += 2 * ROWS, weight += WORD) {
      const __m512i even = _mm512_loadu_si512(column), odd = _mm512_loadu_si512(column + ROWS);
      _mm512_storeu_si512(weight, _mm512_unpacklo_epi16(even, odd));
      _mm512_storeu_si512(weight + BLOCK, _mm512_unpackhi_epi16(even, odd));
    }
}

/* --- products --------------------------------------------------------------------------------- */

/* sum [T * SIDE tokens][ROWS] = x @ weight. x [T][words][BLOCK], `x_step` from one block of tokens
 * to the next; weight [words][2][BLOCK]. */
typedef void Product(int T, int words, const uint16_t *x, int64_t x_step, const uint16_t *weight,
                     float *sum);

static VECTOR void dots(int T, int words, const uint16_t *x, int64_t x_step,
                        const uint16_t *weight, float *sum) {
  for (int part = 0; part < 2 * T; part++, sum += 8 * ROWS) { /* 8 tokens */
    const uint16_t *tokens = x + part / 2 * x_step + part % 2 * (BLOCK / 2);
    __m512 acc[8][2];
    for (int t = 0; t < 8; t++)
      for (int r = 0; r < 2; r++) acc[t][r] = _mm512_setzero_ps();
    for (int word = 0; word < words; word++)
      for (int j = 0; j < SIDE; j++) {
        const uint16_t *pairs = weight + (int64_t)word * 2 * BLOCK + j * WORD;
        const __m512bh low = (__m512bh)_mm512_loadu_si512(pairs);
        const __m512bh high = (__m512bh)_mm512_loadu_si512(pairs + BLOCK);
        for (int t = 0; t < 8; t++) {
          int32_t pair;
          memcpy(&pair, tokens + (int64_t)word * BLOCK + t * WORD + 2 * j, 4);
          const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
          acc[t][0] = _mm512_dpbf16_ps(acc[t][0], both, low);
          acc[t][1] = _mm512_dpbf16_ps(acc[t][1], both, high);
        }
      }
    for (int t = 0; t < 8; t++)
      for (int r = 0; r < 2; r++) _mm512_storeu_ps(sum + t * ROWS + r * SIDE, acc[t][r]);
  }
}

/* All loads of a word first: the order in which they are issued is a fifth of the time. */
static AMX void tiles(int T, int words, const uint16_t *x, int64_t x_step, const uint16_t *weight,
                      float *sum) {
  const int64_t row = WORD * sizeof *x, sums = ROWS * sizeof *sum;
  __asm__ volatile("" ::: "memory"); /* compilers do not know that a tile reads memory */
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (T == 2)
    for (int word = 0; word < words; word++, x += BLOCK, weight += 2 * BLOCK) {
      _tile_loadd(6, weight, row);
      _tile_loadd(7, weight + BLOCK, row);
      _tile_loadd(4, x, row);
      _tile_loadd(5, x + x_step, row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  else
    for (int word = 0; word < words; word++, x += BLOCK, weight += 2 * BLOCK) {
      _tile_loadd(6, weight, row);
      _tile_loadd(7, weight + BLOCK, row);
      _tile_loadd(4, x, row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
  _tile_stored(0, sum, sums);
  _tile_stored(1, sum + SIDE, sums);
  if (T == 1) return;
  _tile_stored(2, sum + SIDE * ROWS, sums);
  _tile_stored(3, sum + SIDE * ROWS + SIDE, sums);
}

typedef struct {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} TileConfig;

/* Of this thread, which had *before: others that use tiles may rely on what they set. */
static AMX void configure_tiles(TileConfig *before) {
  static const TileConfig all = {.palette = 1,
                                 .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                                 .rows = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE}};
  _tile_storeconfig(before);
  __asm__ volatile("" ::"r"(before) : "memory"); /* a compiler may take it for 8 bytes */
  _tile_loadconfig(&all);
}

static AMX void restore_tiles(const TileConfig *before) {
  __asm__ volatile("" ::"r"(before) : "memory");
  _tile_loadconfig(before);
}

/* Sums of up to 32 tokens into rows [row, row + 32) of y, as many as there are. */
static VECTOR void store_sums(const Weight *w, const float *sum, int64_t tokens, int64_t row,
                              uint16_t *y) {
  const __mmask32 some = first_of(w->n - row);
  for (int64_t t = 0; t < tokens; t++, sum += ROWS, y += w->n) {
    const __m512 low = _mm512_loadu_ps(sum), high = _mm512_loadu_ps(sum + SIDE);
    _mm512_mask_storeu_epi16(y + row, some, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

/* Rows [first, first + panel) for the tokens laid out in b->x. */
static void run_panel(const Weight *w, const Buffers *b, Product *product, int64_t first,
                      int64_t tokens, uint16_t *column, uint16_t *weight, float *sum, uint16_t *y) {
  const int64_t rows = w->n - first < b->panel ? w->n - first : b->panel;
  const int64_t size = (int64_t)b->words * BLOCK; /* of 16 tokens, and of 16 rows */
  for (int64_t row = first; row < first + rows; row += ROWS) {
    decode_rows(w, b, row / w->tile, (int)(row % w->tile), column);
    if (w->overlay_start) put_overlay(w, row, column);
    pair_columns(b->words, column, weight + (row - first) / ROWS * 2 * size);
  }
  for (int64_t token = 0; token < tokens; token += TOKENS) {
    const uint16_t *x = b->x + token / SIDE * size;
    const int64_t left = tokens - token < TOKENS ? tokens - token : TOKENS;
    for (int64_t row = 0; row < rows; row += ROWS) {
      product(left > SIDE ? 2 : 1, b->words, x, size, weight + row / ROWS * 2 * size, sum);
      store_sums(w, sum, left, first + row, y + token * w->n);
    }
  }
}

static void run_panels(const Weight *w, const Buffers *b, int unit, int64_t tokens, uint16_t *y,
                       int threads) {
  const int64_t panels = (w->n + b->panel - 1) / b->panel;
  const int64_t columns = (int64_t)b->words * WORD;
  (void)threads; /* without OpenMP */
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = omp_get_thread_num();
    TileConfig before;
    if (unit == TILES) configure_tiles(&before);
#pragma omp for schedule(dynamic)
    for (int64_t panel = 0; panel < panels; panel++)
      run_panel(w, b, unit == TILES ? tiles : dots, panel * b->panel, tokens,
                b->column + thread * columns * ROWS, b->weight + thread * columns * b->panel,
                b->sum + thread * TOKENS * ROWS, y);
    if (unit == TILES) restore_tiles(&before);
  }
}

static void *carve(uintptr_t *from, int64_t bytes) {
  void *part = (void *)*from;
  *from += (uintptr_t)((bytes + 63) / 64 * 64);
  return part;
}

/* From address `from` on; returns how many bytes they take. */
static int64_t lay_out(Buffers *b, const Weight *w, int64_t m, int threads, uintptr_t from) {
  const uintptr_t begin = from;
  const int64_t tokens = ((m < MOST_TOKENS ? m : MOST_TOKENS) + SIDE - 1) / SIDE * SIDE;
  b->words = (int)((w->k + WORD - 1) / WORD);
  const int64_t columns = (int64_t)b->words * WORD, blocks = (w->n + ROWS - 1) / ROWS;
  const int64_t fair = threads > 1 ? blocks / (4 * threads) : blocks; /* several for a thread */
  int64_t most = PANEL / columns / ROWS;
  most = most < fair ? most : fair;
  b->panel = (int)(most > 1 ? most : 1) * ROWS;
  b->x = carve(&from, tokens * columns * sizeof *b->x);
  b->column = carve(&from, threads * columns * ROWS * sizeof *b->column);
  b->weight = carve(&from, threads * columns * b->panel * sizeof *b->weight);
  b->sum = carve(&from, (int64_t)threads * TOKENS * ROWS * sizeof *b->sum);
  return (int64_t)(from - begin);
}

/* Whether the kernel lets this process use tiles, which it must ask for. */
static int may_use_tiles(void) {
#ifdef __linux__
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
  return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA);
#else
  return 0;
#endif
}

/* The best unit of this machine. */
EXPORT int pbq_unit(void) {
  static int found = -1; /* a hypervisor takes microseconds to answer cpuid */
  unsigned a, b, c, d;
  if (found >= 0) return found;
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512bw") || !__get_cpuid_count(7, 1, &a, &b, &c, &d) ||
      !(a >> 5 & 1))
    return found = NO_UNIT;
  const int amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 24 & 1 && d >> 22 & 1;
  return found = amx && may_use_tiles() ? TILES : DOTS;
}

/* Bytes of `scratch` that pbq_product takes. */
EXPORT int64_t pbq_product_scratch(const Weight *w, int64_t m, int threads) {
  Buffers b;
  return lay_out(&b, w, m, threads, 0);
}

/* y [m, n] = x [m, k] @ W_hat.T, bfloat16, for weights with words of 32 columns. `unit` is that of
 * the machine, or one below it; scratch is aligned to 64 bytes, and for as many threads. */
EXPORT void pbq_product(const Weight *w, int unit, const uint16_t *x, int64_t m, uint16_t *y,
                        void *scratch, int threads) {
  Buffers b;
  lay_out(&b, w, m, threads, (uintptr_t)scratch);
  for (int64_t token = 0; token < m; token += MOST_TOKENS) {
    const int64_t tokens = m - token < MOST_TOKENS ? m - token : MOST_TOKENS;
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens > TOKENS)
    for (int64_t t = 0; t < tokens; t += SIDE)
      lay_out_tokens(w, &b, x + (token + t) * w->k, tokens - t, b.x + t * b.words * WORD);
    run_panels(w, &b, unit, tokens, y + token * w->n, threads);
  }
}

#else

EXPORT int pbq_unit(void) { return NO_UNIT; }

EXPORT int64_t pbq_product_scratch(const Weight *w, int64_t m, int threads) {
  (void)w, (void)m, (void)threads;
  return 0;
}

EXPORT void pbq_product(const Weight *w, int unit, const uint16_t *x, int64_t m, uint16_t *y,
                        void *scratch, int threads) {
  (void)w, (void)unit, (void)x, (void)m, (void)y, (void)scratch, (void)threads;
}

#endif
