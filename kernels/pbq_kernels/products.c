/* Many tokens at once: packed weights multiplied by the CPU's bfloat16 units, AMX or AVX512-BF16.
 *
 * Weights are decoded, rounded to bfloat16 as the reference rounds them, straight into the blocks
 * that these units read: of 32 columns (a word) of 16 rows, the pairs of columns c and c + 16. A
 * word of 16 rows is a register that has both in the halves of a lane. A row's levels, twice in its
 * lane, lie in as many registers as there are, and each bit plane chooses between two of them for
 * 16 pairs at once. A thread never holds more of the dense weight than 768 KiB, or 32 rows where
 * those are more.
 *
 * Columns are stored tier by tier. Either x is put in that order, which takes some time for each
 * token, or the decoded weights in x's, which takes some for each row: whatever is less. A sum goes
 * through its columns in this order, whatever the threads and the tokens beside it.
 */
#include "tiles.h"

/* The best unit of this machine. */
EXPORT int pbq_unit(void) { return best_unit(); }

#ifdef HAS_UNITS

#define BLOCK (SIDE * WORD) /* numbers in it */
#define ROWS 32             /* multiplied at once: two blocks */
#define TOKENS 32           /* the same */
#define MOST_TOKENS 1024    /* whose x is laid out at once */
#define PANEL (384 * 1024)  /* weights, decoded at once: they stay in the second cache */
#define MOST_LEVELS 16      /* of a row, that registers have room for */
#define ROWS_A_TOKEN 3      /* as many are reordered in the time of a token */

typedef struct {
  int own;               /* weights are put in x's order, not x in theirs */
  int stored;            /* words of the groups that are not all zero: no others are decoded */
  int words;             /* that are multiplied: these, or all of x */
  int panel;             /* rows decoded at once */
  int wanted[MOST_RUNS]; /* whether a run of columns has any of the stored words */
  int *first;            /* [groups]: of a group's words among the stored, or -1 */
  int *place;            /* [k]: of a column in the stored words, for overlays */
  uint16_t *line;        /* [threads][SIDE tokens][k]: x in stored order */
  uint16_t *decoded;     /* [threads][stored][2][BLOCK]: 32 rows that are still to be reordered */
  uint16_t *x;           /* [ceil(tokens / SIDE)][words][SIDE tokens][WORD] */
  uint16_t *weight;      /* [threads][panel / ROWS][words][2][SIDE pairs][SIDE rows][2] */
  float *sum;            /* [threads][TOKENS][ROWS] */
} Buffers;

/* A group of zeros adds nothing, unless an overlay replaces some of them. */
INLINE int is_multiplied(const Weight *w, const Group *g) {
  return g->planes || g->offset >= 0 || w->overlay_start;
}

/* --- x ---------------------------------------------------------------------------------------- */

/* The columns of up to SIDE tokens as they are stored, [tokens][k]: of 32, a run's at once. */
INLINE VECTOR void in_stored_order(const Weight *w, const Buffers *b, int tokens, const uint16_t *x,
                                   uint16_t *line) {
  int64_t next[MOST_RUNS];
  const uint32_t *mask = w->run_mask;
  for (int r = 0; r < w->runs; r++) next[r] = w->run_begin[r];
  for (int64_t c = 0; c < w->k; c += 32, mask += MOST_RUNS)
    for (int r = 0; r < w->runs; r++) {
      const int count = __builtin_popcount(mask[r]);
      const __mmask32 there = first_of(w->k - c), some = first_of(count);
      for (int t = 0; b->wanted[r] && t < tokens; t++) {
        const __m512i here = _mm512_maskz_loadu_epi16(there, x + t * w->k + c);
        _mm512_mask_storeu_epi16(line + t * w->k + next[r], some,
                                 _mm512_maskz_compress_epi16(mask[r], here));
      }
      next[r] += count;
    }
}

/* SIDE tokens into their blocks, in stored order; rows of those that are not there, and positions
 * that are padding, are zero. */
static VECTOR void reorder_tokens(const Weight *w, const Buffers *b, const uint16_t *x,
                                  int64_t tokens, uint16_t *line, uint16_t *to) {
  const __m512i order = side_by_side();
  if (tokens < SIDE) memset(to, 0, (size_t)b->words * BLOCK * sizeof *to);
  if (!w->runs)
    for (int64_t t = 0; t < tokens && t < SIDE; t++)
      for (int64_t i = 0, at = 0; i < (int64_t)w->words * WORD; i++)
        if (w->column[i] >= 0) line[t * w->k + at++] = x[t * w->k + w->column[i]];
  if (tokens < SIDE)
    in_stored_order(w, b, (int)tokens, x, line);
  else
    in_stored_order(w, b, SIDE, x, line);
  for (int64_t t = 0; t < tokens && t < SIDE; t++, line += w->k, to += WORD) {
    const uint16_t *from = line;
    for (int i = 0; i < w->groups; from += w->group[i++].columns)
      for (int word = 0; b->first[i] >= 0 && word < w->group[i].words; word++) {
        const __mmask32 some = first_of(w->group[i].columns - word * WORD);
        const __m512i here = _mm512_maskz_loadu_epi16(some, from + word * WORD);
        _mm512_storeu_si512(to + (int64_t)(b->first[i] + word) * BLOCK,
                            _mm512_permutexvar_epi16(order, here));
      }
  }
}

/* The same in their own order. */
static VECTOR void copy_tokens(const Weight *w, const Buffers *b, const uint16_t *x,
                               int64_t tokens, uint16_t *to) {
  for (int64_t t = 0; t < SIDE; t++, x += w->k, to += WORD)
    for (int64_t word = 0; word < b->words; word++) {
      const __mmask32 some = t < tokens ? first_of(w->k - word * WORD) : 0;
      _mm512_storeu_si512(to + word * BLOCK, _mm512_maskz_loadu_epi16(some, x + word * WORD));
    }
}

/* --- weights ---------------------------------------------------------------------------------- */

/* 16 rows of a group: what each plane adds or subtracts, and what is added then. */
typedef struct {
  __m512 offset, scale[MAX_PLANES];
} Scales;

INLINE VECTOR __m512 halves(const uint16_t *from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

INLINE VECTOR Scales read_scales(const Weight *w, int64_t tile, const Group *g, int row) {
  Scales s;
  s.offset = g->offset < 0 ? _mm512_setzero_ps() : halves(scales_of(w, tile, g->offset) + row);
  for (int p = 0; p < g->planes; p++)
    s.scale[p] = _mm512_mul_ps(halves(scales_of(w, tile, scale_slot(g, p)) + row),
                               _mm512_set1_ps(g->factor[p]));
  return s;
}

/* Two columns of 16 rows in pairs. */
INLINE VECTOR __m512i paired(__m512 low, __m512 high) {
  return _mm512_permutexvar_epi16(side_by_side(), (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* The level of a code, in fp32 as reference.dequantize, rounded: twice for each row. */
INLINE VECTOR __m512i level_of(const Scales *s, int planes, int code) {
  __m512 sum = _mm512_setzero_ps();
  for (int p = 0; p < planes; p++)
    sum = code >> p & 1 ? _mm512_add_ps(sum, s->scale[p]) : _mm512_sub_ps(sum, s->scale[p]);
  sum = _mm512_add_ps(sum, s->offset);
  return paired(sum, sum);
}

/* How many planes choose a level. Without an offset the highest plane is a sign. */
INLINE int choosing(const Group *g) { return g->planes - (g->offset < 0 && g->planes); }

/* Words of 16 rows, whose planes are at data[p], by `planes` that choose and, if there is one more,
 * a sign; into blocks that are two blocks apart. */
INLINE VECTOR void choose_words(const int planes, const int is_signed, const __m512i *level,
                                const uint32_t *const *data, const int *stride, int words,
                                uint16_t *out) {
  const __m512i sign = _mm512_set1_epi16(INT16_MIN);
  for (int word = 0; word < words; word++, out += 2 * BLOCK) {
    __m512i bits[5], flip = _mm512_setzero_si512();
    for (int p = 0; p < planes + is_signed; p++)
      bits[p] = _mm512_loadu_si512(data[p] + (int64_t)word * stride[p]);
    if (is_signed) {
      flip = _mm512_ternarylogic_epi32(bits[planes], bits[planes], bits[planes], 0x55); /* NOT */
      for (int p = 0; p < planes; p++) bits[p] = _mm512_xor_si512(bits[p], flip);
    }
#pragma GCC unroll 16
    for (int c = 0; c < SIDE; c++) {
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
      _mm512_storeu_si512(out + c * WORD, found[0]);
    }
  }
}

INLINE VECTOR __m512 sum_of(const Scales *s, int planes, const __m512i *bits, int c) {
  __m512 sum = _mm512_setzero_ps();
  for (int p = 0; p < planes; p++) {
    const __mmask16 set = _mm512_test_epi32_mask(bits[p], _mm512_set1_epi32((int)(1u << c)));
    sum = _mm512_mask_add_ps(_mm512_sub_ps(sum, s->scale[p]), set, sum, s->scale[p]);
  }
  return _mm512_add_ps(sum, s->offset);
}

/* The same for any number of planes and column scales, by additions. */
static VECTOR void add_words(const Scales *s, int planes, const uint32_t *const *data,
                             const int *stride, int words, const float *column_scale,
                             uint16_t *out) {
  for (int word = 0; word < words; word++, out += 2 * BLOCK) {
    __m512i bits[MAX_PLANES];
    for (int p = 0; p < planes; p++)
      bits[p] = _mm512_loadu_si512(data[p] + (int64_t)word * stride[p]);
    for (int c = 0; c < SIDE; c++) {
      __m512 low = sum_of(s, planes, bits, c), high = sum_of(s, planes, bits, c + SIDE);
      if (column_scale) {
        low = _mm512_mul_ps(low, _mm512_set1_ps(column_scale[word * WORD + c]));
        high = _mm512_mul_ps(high, _mm512_set1_ps(column_scale[word * WORD + c + SIDE]));
      }
      _mm512_storeu_si512(out + c * WORD, paired(low, high));
    }
  }
}

/* 16 rows of a group from row `row` of a tile on: words [begin, end), whose planes are given. */
static VECTOR void decode_words(const Weight *w, int64_t tile, const Group *g, int row,
                                const uint32_t *const *data, const int *stride, int begin, int end,
                                uint16_t *out) {
  const int planes = choosing(g), words = end - begin;
  const Scales s = read_scales(w, tile, g, row);
  if (w->column_scale || 1 << planes > MOST_LEVELS) {
    const int64_t position = (int64_t)(g->first_word + begin) * WORD;
    add_words(&s, g->planes, data, stride, words,
              w->column_scale ? w->column_scale + position : NULL, out);
    return;
  }
  __m512i level[MOST_LEVELS]; /* up to 4 planes choose */
  const int sign = planes < g->planes;
  for (int i = 0; i < 1 << planes; i++) level[i] = level_of(&s, g->planes, i | sign << planes);
#define CASE(PLANES, SIGN)                                       \
  case 2 * PLANES + SIGN:                                        \
    choose_words(PLANES, SIGN, level, data, stride, words, out); \
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

/* 16 rows of a group of bytes, from row `row` of a tile on. */
static VECTOR void decode_bytes(const Weight *w, int64_t tile, const Group *g, int row,
                                uint16_t *out) {
  const Scales s = read_scales(w, tile, g, row);
  const __m512i one = _mm512_set1_epi32(1);
  for (int word = 0; word < g->words; word++, out += 2 * BLOCK) {
    const int8_t *codes = byte_codes(w, tile, g, row, word);
    for (int c = 0; c < SIDE; c++) {
      __m512 value[2]; /* of columns c and c + 16 */
      for (int i = 0; i < 2; i++) {
        const int column = c + i * SIDE;
        const __m512i code =
            _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + column * WORD)));
        const __m512i twice = _mm512_add_epi32(code, code);
        const __m512 level = _mm512_cvtepi32_ps(_mm512_add_epi32(twice, one));
        value[i] = _mm512_fmadd_ps(level, s.scale[0], s.offset);
        if (w->column_scale)
          value[i] = _mm512_mul_ps(
              value[i], _mm512_set1_ps(w->column_scale[(g->first_word + word) * WORD + column]));
      }
      _mm512_storeu_si512(out + c * WORD, paired(value[0], value[1]));
    }
  }
}

/* 32 rows, from row `first` of a tile, into [words][2][BLOCK]. */
static VECTOR void decode_rows(const Weight *w, const Buffers *b, int64_t tile, int first,
                               uint16_t *out) {
  Planes planes;
  for (int i = 0; i < w->groups; i++) {
    const Group *g = w->group + i;
    for (int begin = 0, end; b->first[i] >= 0 && begin < g->words; begin = end) {
      end = take_words(pbq_expand_avx512, w, tile, g, first, ROWS, begin, &planes);
      for (int half = 0; half < 2; half++) {
        uint16_t *to = out + (int64_t)(b->first[i] + begin) * 2 * BLOCK + half * BLOCK;
        if (g->bytes) {
          decode_bytes(w, tile, g, first + half * SIDE, to);
          continue;
        }
        const uint32_t *data[MAX_PLANES];
        for (int p = 0; p < g->planes; p++) data[p] = planes.data[p] + half * SIDE;
        decode_words(w, tile, g, first + half * SIDE, data, planes.stride, begin, end, to);
      }
    }
  }
}

/* Overlay entries of the same rows take the place of what lies below. */
static void put_overlay(const Weight *w, const Buffers *b, int64_t first, uint16_t *out) {
  for (int row = 0; row < ROWS && first + row < w->n; row++)
    for (int64_t i = w->overlay_start[first + row]; i < w->overlay_start[first + row + 1]; i++) {
      const int place = b->place[w->overlay_column[i]], c = place % WORD;
      uint16_t *block = out + (int64_t)(place / WORD) * 2 * BLOCK + row / SIDE * BLOCK;
      block[c % SIDE * WORD + row % SIDE * 2 + c / SIDE] = w->overlay_value[i];
    }
}

/* Where the 16 rows of a column lie in blocks of x's order: in every second number. */
INLINE VECTOR void put_column(int32_t column, __m512i even, __m512i odd, uint16_t *blocks) {
  uint16_t *to = blocks + (int64_t)(column / WORD) * 2 * BLOCK + column % WORD / 2 * WORD;
  if (column % 2)
    _mm512_mask_storeu_epi16(to, 0xaaaaaaaa, odd);
  else
    _mm512_mask_storeu_epi16(to, 0x55555555, even);
}

/* [stored][2][BLOCK] -> [words][2][BLOCK] */
static VECTOR void reorder_rows(const Weight *w, const Buffers *b, const uint16_t *from,
                                uint16_t *to) {
  const __m512i zero = _mm512_setzero_si512();
  for (int i = 0; i < w->groups; i++) {
    const Group *g = w->group + i;
    const int32_t *column = w->column + (int64_t)g->first_word * WORD;
    for (int c = 0; b->first[i] < 0 && c < g->columns; c++)
      for (int half = 0; half < 2; half++) put_column(column[c], zero, zero, to + half * BLOCK);
    for (int word = 0; b->first[i] >= 0 && word < g->words; word++, column += WORD)
      for (int half = 0; half < 2; half++, from += BLOCK)
        for (int c = 0; c < SIDE && column[c] >= 0; c++) {
          const __m512i both = _mm512_loadu_si512(from + c * WORD);
          const __m512i swapped = _mm512_rol_epi32(both, 16);
          put_column(column[c], both, swapped, to + half * BLOCK);
          if (column[c + SIDE] >= 0) put_column(column[c + SIDE], swapped, both, to + half * BLOCK);
        }
  }
  for (int column = (int)w->k; column < b->words * WORD; column++)
    for (int half = 0; half < 2; half++) put_column(column, zero, zero, to + half * BLOCK);
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
                      int64_t tokens, uint16_t *decoded, uint16_t *weight, float *sum,
                      uint16_t *y) {
  const int64_t rows = w->n - first < b->panel ? w->n - first : b->panel;
  const int64_t size = (int64_t)b->words * BLOCK; /* of 16 tokens, and of 16 rows */
  for (int64_t row = first; row < first + rows; row += ROWS) {
    uint16_t *blocks = weight + (row - first) / ROWS * 2 * size, *to = b->own ? decoded : blocks;
    decode_rows(w, b, row / w->tile, (int)(row % w->tile), to);
    if (w->overlay_start) put_overlay(w, b, row, to);
    if (b->own) reorder_rows(w, b, decoded, blocks);
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
  const int64_t columns = (int64_t)b->words * WORD, decoded = (int64_t)b->stored * 2 * BLOCK;
  (void)threads; /* without OpenMP */
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = omp_get_thread_num();
    TileConfig before;
    if (unit == TILES) configure_tiles(&before);
#pragma omp for schedule(dynamic)
    for (int64_t panel = 0; panel < panels; panel++)
      run_panel(w, b, unit == TILES ? tiles : dots, panel * b->panel, tokens,
                b->decoded + thread * decoded, b->weight + thread * columns * b->panel,
                b->sum + thread * TOKENS * ROWS, y);
    if (unit == TILES) restore_tiles(&before);
  }
}

/* From address `from` on; returns how many bytes they take. */
static int64_t lay_out(Buffers *b, const Weight *w, int64_t m, int threads, uintptr_t from) {
  const uintptr_t begin = from;
  const int64_t tokens = ((m < MOST_TOKENS ? m : MOST_TOKENS) + SIDE - 1) / SIDE * SIDE;
  b->own = m > w->n / ROWS_A_TOKEN;
  b->stored = 0;
  for (int i = 0; i < w->groups; i++)
    if (is_multiplied(w, w->group + i)) b->stored += w->group[i].words;
  b->words = b->own ? (int)((w->k + WORD - 1) / WORD) : b->stored;
  const int64_t columns = (int64_t)b->words * WORD, blocks = (w->n + ROWS - 1) / ROWS;
  const int64_t fair = threads > 1 ? blocks / (4 * threads) : blocks; /* several for a thread */
  int64_t most = columns ? PANEL / columns / ROWS : 1;
  most = most < fair ? most : fair;
  b->panel = (int)(most > 1 ? most : 1) * ROWS;
  b->first = carve(&from, w->groups * sizeof *b->first);
  b->place = carve(&from, w->overlay_start ? w->k * sizeof *b->place : 0);
  b->line = carve(&from, b->own ? 0 : threads * SIDE * w->k * sizeof *b->line);
  b->decoded = carve(&from, b->own ? threads * b->stored * 2 * BLOCK * sizeof *b->decoded : 0);
  b->x = carve(&from, tokens * columns * sizeof *b->x);
  b->weight = carve(&from, threads * columns * b->panel * sizeof *b->weight);
  b->sum = carve(&from, (int64_t)threads * TOKENS * ROWS * sizeof *b->sum);
  return (int64_t)(from - begin);
}

/* Where the words are that are multiplied, and the columns in them. */
static void find_places(const Weight *w, Buffers *b) {
  int64_t column = 0;
  for (int r = 0; r < MOST_RUNS; r++) b->wanted[r] = 0;
  for (int i = 0, next = 0; i < w->groups; i++) {
    const Group *g = w->group + i;
    b->first[i] = is_multiplied(w, g) ? next : -1;
    for (int c = 0; w->overlay_start && c < g->columns; c++)
      b->place[w->column[(int64_t)g->first_word * WORD + c]] = next * WORD + c;
    for (int r = 0; b->first[i] >= 0 && r < w->runs; r++) {
      const int64_t end = r + 1 < w->runs ? w->run_begin[r + 1] : w->k;
      if (column < end && w->run_begin[r] < column + g->columns) b->wanted[r] = 1;
    }
    if (b->first[i] >= 0) next += g->words;
    column += g->columns;
  }
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
  find_places(w, &b);
  for (int64_t token = 0; token < m; token += MOST_TOKENS) {
    const int64_t tokens = m - token < MOST_TOKENS ? m - token : MOST_TOKENS;
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens > TOKENS)
    for (int64_t t = 0; t < tokens; t += SIDE) {
      const uint16_t *from = x + (token + t) * w->k;
      uint16_t *to = b.x + t * b.words * WORD;
      if (b.own)
        copy_tokens(w, &b, from, tokens - t, to);
      else
        reorder_tokens(w, &b, from, tokens - t, b.line + omp_get_thread_num() * SIDE * w->k, to);
    }
    run_panels(w, &b, unit, tokens, y + token * w->n, threads);
  }
}

#else

EXPORT int64_t pbq_product_scratch(const Weight *w, int64_t m, int threads) {
  (void)w, (void)m, (void)threads;
  return 0;
}

EXPORT void pbq_product(const Weight *w, int unit, const uint16_t *x, int64_t m, uint16_t *y,
                        void *scratch, int threads) {
  (void)w, (void)unit, (void)x, (void)m, (void)y, (void)scratch, (void)threads;
}

#endif
