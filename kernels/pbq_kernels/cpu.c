/* CPU kernels for the packed layout: docs/kernels.md, section "CPU".
 *
 * Rows sit in SIMD lanes. A tile holds 32 rows (AVX-512: 64, if there are so many); its weights are
 * one sequential stream of 32-bit words, stream[tile][group][plane][word][row], and bit c of a word
 * is column c of the 32 columns of that word. Every row is summed in one fixed order, whatever the
 * tile, the number of threads or the tokens beside it, so results do not depend on any of them.
 *
 * exact: a lookup of 4 bits replaces 4 additions. For each run of 4 columns the 16 sums
 *   +-x0+-x1+-x2+-x3 are tabulated once per token in fp32, and one in-register permute fetches them
 *   for 16 rows.
 * int8: x is rounded to int8 with one scale per (token, tier, group); bits times int8 by VNNI or
 *   maddubs, summed as integers.
 *
 * AVX2 and NEON have tables of integers for both modes: see there.
 *
 * A group of 8 tied planes lies in the stream as a byte for each weight and is multiplied as such,
 * in either mode by x as it is: eight lookups would take longer than reading it from memory does.
 *
 * Of a tier with a trellis (trellis.py) the stream has the stored planes, and the planes of its
 * levels are made as they are read, a chunk of words at a time.
 *
 * Sizes are checked by the caller (cpu.py); nothing here allocates from unchecked input.
 */
#include "weight.h"

#ifndef PBQ_SOURCE_HASH
#define PBQ_SOURCE_HASH ""
#endif
/* Keeps the compiler from moving an addition behind other lookups, which would spill registers:
 * a quarter of the speed with four tokens (NEON: half as many instructions again). */
#ifdef __aarch64__
#define IN_ORDER(accumulator) __asm__ volatile("" : "+w"(accumulator))
#else
#define IN_ORDER(accumulator) __asm__("" : "+v"(accumulator))
#endif
#define TOKENS 4 /* multiplied at once, while so many are left */
#define BYTES_AHEAD 2 /* words of a group of bytes before they are read memory is asked for them */

/* SHORT is EXACT for x of 16 bits, where tables are of integers. */
enum { EXACT, INT8, SHORT };

/* One token, or TOKENS of them, in the form the tile kernels read. */
typedef struct {
  int tokens;
  float *x;       /* [tokens][words * WORD], zero at padding */
  float *sum;     /* [tokens][groups]: sum of x, for offsets and bytes */
  float *table;   /* exact: [words][lookups][tokens][entries]; of integers: [tokens] */
  int8_t *q;      /* int8: [tokens][words * WORD], column c of a word at 4 * (c % 8) + c / 8 */
  float *q_scale; /* of the integers that x was rounded to: [tokens][groups] */
  int32_t *q_sum; /* int8: [tokens][groups] */
} Activations;

typedef struct {
  const char *name;
  void (*tabulate)(const float *x, int words, float *table, int tokens);
  void (*exact_tile)(const Weight *, const Activations *, int64_t tile, float *y);
  void (*quantize)(const float *x, int words, int8_t *q, float *scale, int32_t *sum);
  void (*int8_tile)(const Weight *, const Activations *, int64_t tile, float *y);
  void (*short_tile)(const Weight *, const Activations *, int64_t tile, float *y); /* or NULL */
  void (*store_rows)(const float *from, int64_t count, int dtype, void *to, int64_t at);
  void (*decode_row)(const Weight *, int64_t row, int dtype, void *out);
  /* In place of tabulate and quantize, if there is one: tables of integers for words [begin, end)
   * of the `words` of a group. Returns their scale. */
  float (*tabulate_group)(const float *x, int words, int mode, int begin, int end, void *table);
} Variant;

/* Lookups that the last word of a group still needs: the rest of it is padding. */
INLINE int last_lookups(const Group *g) { return (g->columns - (g->words - 1) * WORD + 3) / 4; }

/* bits[p] is bit p of a level's place among 2**planes uneven ones, and becomes the sign of plane p:
 * `sums` of trellis.py as Boolean functions. A level's negative has the opposite signs. */
#define DEFINE_SIGNS(NAME, TYPE, TARGET)                               \
  INLINE TARGET void NAME(const int planes, TYPE *bits) {              \
    if (planes < 3) return; /* they are the signs */                   \
    const TYPE flip = ~bits[planes - 1];                               \
    const TYPE a = bits[0] ^ flip, b = bits[1] ^ flip, bb = ~b;        \
    if (planes == 3) {                                                 \
      bits[0] = (a | bb) ^ flip;                                       \
      bits[1] = (b | ~a) ^ flip;                                       \
      bits[2] = (a | b) ^ flip;                                        \
      return;                                                          \
    }                                                                  \
    const TYPE c = bits[2] ^ flip, ac = a ^ c;                         \
    bits[0] = ((a & b) | (c & bb)) ^ flip;                             \
    bits[1] = ((a ^ bb) | ac) ^ flip;                                  \
    bits[2] = (b | ~ac) ^ flip;                                        \
    bits[3] = (c | (a ^ b)) ^ flip;                                    \
  }

DEFINE_SIGNS(signs_of_place, uint32_t, )

/* A path and what is made of it, of some rows, for a loop over words. */
typedef struct {
  const uint32_t *path;   /* readable up to 12 rows above */
  const uint32_t *others; /* stored plane 1 of these rows ... */
  int64_t plane;          /* ... and how far it is to the next */
  uint32_t *made;         /* of plane 0; the others are CHUNK * MAX_TILE behind */
  int words, stride, path_stride, made_stride;
  int delay;           /* plane 0 is the path so many rows above ... */
  int taps, tap[EDGE]; /* ... and plane 1 the path XOR the path so many rows above */
} Filter;

/* The lowest two planes are made, and of 3 or 4 uneven ones all. */
INLINE int planes_made(const Group *g) { return g->uneven ? g->planes : 2; }

INLINE Filter filter_of(const Weight *w, int64_t tile, const Group *g, int first, int rows,
                        int begin, int end, Planes *to) {
  Filter f;
  f.words = end - begin;
  f.stride = f.path_stride = w->tile;
  f.made_stride = rows;
  f.taps = 0;
  f.plane = (int64_t)g->words * w->tile;
  f.path = plane_words(w, tile, g, 0) + (int64_t)begin * w->tile + first;
  f.others = f.path + f.plane;
  f.made = to->made[0];
  f.delay = g->delay;
  for (int left = g->path & ~1; left; left &= left - 1)
    f.tap[f.taps++] = __builtin_ctz((unsigned)left);
  const int made = planes_made(g);
  for (int p = 0; p < g->planes; p++) {
    to->data[p] = p < made ? to->made[p] : f.others + (p - 2) * f.plane;
    to->stride[p] = p < made ? rows : w->tile;
  }
  return f;
}

INLINE void filter(const int lanes, const int taps, const int planes, const Filter *f) {
  const uint32_t *restrict u = f->path, *restrict others = f->others;
  uint32_t *restrict made = f->made;
  const int64_t delay = f->delay, plane = f->plane;
  int64_t tap[EDGE]; /* in registers */
#pragma GCC unroll 8
  for (int i = 0; i < taps; i++) tap[i] = f->tap[i];
  for (int word = 0; word < f->words; word++) {
    __builtin_prefetch(others - plane + AHEAD * f->stride); /* the path, whatever u is */
    if (planes > 2) __builtin_prefetch(others + AHEAD * f->stride);
    if (planes > 3) __builtin_prefetch(others + plane + AHEAD * f->stride);
#pragma GCC ivdep
#pragma GCC unroll 1 /* what is unrolled early becomes no vector instructions */
    for (int r = 0; r < lanes; r++) {
      uint32_t bits[4] = {u[r - delay], u[r]};
#pragma GCC unroll 8
      for (int i = 0; i < taps; i++) bits[1] ^= u[r - tap[i]];
#pragma GCC unroll 2
      for (int p = 2; p < planes; p++) bits[p] = others[(p - 2) * plane + r];
      signs_of_place(planes, bits);
#pragma GCC unroll 4
      for (int p = 0; p < planes; p++) made[p * CHUNK * MAX_TILE + r] = bits[p];
    }
    u += f->path_stride, others += f->stride, made += f->made_stride;
  }
}

INLINE void filter_planes(const int lanes, const int planes, const Filter *f) {
  switch (f->taps) { /* as many as the polynomials of trellis.py have */
    case 1: filter(lanes, 1, planes, f); break;
    case 2: filter(lanes, 2, planes, f); break;
    case 4: filter(lanes, 4, planes, f); break;
    case 5: filter(lanes, 5, planes, f); break;
    case 6: filter(lanes, 6, planes, f); break;
    default: filter(lanes, f->taps, planes, f);
  }
}

/* The last rows of the tile above and the first of this one side by side, word after word. */
INLINE void copy_edge(const Weight *w, int64_t tile, const Filter *f, int first, uint32_t *edge) {
  const uint32_t *here = f->path - first;
  for (int word = 0; word < f->words; word++, edge += 2 * EDGE, here += w->tile) {
    if (tile)
      memcpy(edge, here - (int64_t)w->stream * w->tile + w->tile - EDGE, EDGE * 4);
    else
      memset(edge, 0, EDGE * 4);
    memcpy(edge + EDGE, here, EDGE * 4);
  }
}

/* In registers of so many rows, up to EDGE. */
INLINE void expand(const int lanes, const Weight *w, int64_t tile, const Group *g, int first,
                   int rows, int begin, int end, Planes *to) {
  const Filter whole = filter_of(w, tile, g, first, rows, begin, end, to);
  const int planes = planes_made(g);
  if (first < EDGE) copy_edge(w, tile, &whole, first, to->edge);
  for (int r = 0; r < rows; r += lanes) {
    Filter f = whole;
    f.path += r, f.others += r, f.made += r;
    if (first + r < EDGE) f.path = to->edge + EDGE + first + r, f.path_stride = 2 * EDGE;
    if (planes == 2)
      filter_planes(lanes, 2, &f);
    else if (planes == 3)
      filter_planes(lanes, 3, &f);
    else
      filter_planes(lanes, 4, &f);
  }
}

#define DEFINE_EXPAND(SUFFIX, TARGET, LANES)                                                       \
  __attribute__((noinline)) TARGET void pbq_expand_##SUFFIX(                                       \
      const Weight *w, int64_t tile, const Group *g, int first, int rows, int begin, int end,      \
      Planes *to) {                                                                                \
    expand(LANES, w, tile, g, first, rows, begin, end, to);                                        \
  }

/* Where the path of a row and group lies so many rows above, or NULL where there is no such row. */
INLINE const uint32_t *path_above(const Weight *w, const Group *g, int64_t tile, int64_t lane,
                                  int rows) {
  if (rows <= lane) return plane_words(w, tile, g, 0) + lane - rows;
  return tile ? plane_words(w, tile - 1, g, 0) + w->tile + lane - rows : NULL;
}

/* One row of a group, to be read word after word. */
typedef struct {
  const uint32_t *stored; /* plane 0 */
  const uint32_t *low;    /* of a trellis: the path that is plane 0, or NULL for zero ... */
  const uint32_t *high[EDGE]; /* ... and those whose XOR is plane 1 */
  int highs;
} Row;

INLINE void find_row(const Weight *w, const Group *g, int64_t tile, int64_t lane, Row *to) {
  to->stored = plane_words(w, tile, g, 0) + lane;
  to->low = NULL;
  to->highs = 0;
  if (!g->path) return;
  to->low = path_above(w, g, tile, lane, g->delay);
  for (int i = 0; i < EDGE; i++) {
    const uint32_t *above = g->path >> i & 1 ? path_above(w, g, tile, lane, i) : NULL;
    if (above) to->high[to->highs++] = above;
  }
}

/* bits[p]: plane p of a word of the row. */
INLINE void row_planes(const Weight *w, const Group *g, const Row *row, int word, uint32_t *bits) {
  const int64_t at = (int64_t)word * w->tile, plane = (int64_t)g->words * w->tile;
  if (!g->path) {
    for (int p = 0; p < g->planes; p++) bits[p] = row->stored[p * plane + at];
    return;
  }
  bits[0] = row->low ? row->low[at] : 0;
  bits[1] = row->high[0][at];
  for (int i = 1; i < row->highs; i++) bits[1] ^= row->high[i][at];
  for (int p = 2; p < g->planes; p++) bits[p] = row->stored[(p - 1) * plane + at];
  if (g->uneven) signs_of_place(g->planes, bits);
}

/* --- portable ------------------------------------------------------------------------------- */

#define LOOKUPS 8  /* of a word, 4 columns each */
#define ENTRIES 16 /* of a table */

/* Each `tabulate` writes the entries of one of `tokens` interleaved tables. */
static void tabulate_portable(const float *x, int words, float *table, int tokens) {
  for (int i = 0; i < words * LOOKUPS; i++, x += 4, table += 16 * tokens)
    for (int code = 0; code < 16; code++) {
      const float a = code & 1 ? x[0] : -x[0], b = code & 2 ? x[1] : -x[1];
      const float c = code & 4 ? x[2] : -x[2], d = code & 8 ? x[3] : -x[3];
      table[code] = (a + b) + (c + d);
    }
}

DEFINE_EXPAND(portable, , 4)

/* y [tile]: to it is added a group of bytes times a token's x. */
static void add_bytes_portable(const Weight *w, const Activations *a, int64_t tile, int i, int t,
                               float *y) {
  const Group *g = w->group + i;
  const float *x = a->x + ((int64_t)t * w->words + g->first_word) * WORD;
  const float sum = a->sum[t * w->groups + i];
  for (int first = 0; first < w->tile; first += WORD, y += WORD) {
    float acc[WORD] = {0};
    for (int word = 0; word < g->words; word++) {
      const int8_t *codes = byte_codes(w, tile, g, first, word);
      for (int c = 0; c < WORD; c++, codes += WORD)
        for (int r = 0; r < WORD; r++) acc[r] += x[word * WORD + c] * codes[r];
    }
    const uint16_t *scale = scales_of(w, tile, g->scale) + first;
    for (int r = 0; r < WORD; r++) y[r] += half_to_float(scale[r]) * (2 * acc[r] + sum);
    if (g->offset < 0) continue;
    const uint16_t *offset = scales_of(w, tile, g->offset) + first;
    for (int r = 0; r < WORD; r++) y[r] += half_to_float(offset[r]) * sum;
  }
}

static void exact_tile_portable(const Weight *w, const Activations *a, int64_t tile, float *y) {
  Planes planes;
  for (int t = 0; t < a->tokens; t++, y += w->tile) {
    for (int r = 0; r < w->tile; r++) y[r] = 0;
    for (int i = 0; i < w->groups; i++) {
      const Group *g = w->group + i;
      if (g->bytes) {
        add_bytes_portable(w, a, tile, i, t, y);
        continue;
      }
      float acc[MAX_PLANES][MAX_TILE] = {0};
      for (int begin = 0, end; begin < g->words; begin = end) {
        end = take_words(pbq_expand_portable, w, tile, g, 0, w->tile, begin, &planes);
        for (int p = 0; p < g->planes; p++) {
          const uint32_t *data = planes.data[p];
          for (int word = begin; word < end; word++, data += planes.stride[p]) {
            const float *table =
                a->table + ((int64_t)(g->first_word + word) * LOOKUPS * a->tokens + t) * 16;
            const int lookups = word + 1 < g->words ? LOOKUPS : last_lookups(g);
            for (int s = 0; s < lookups; s++, table += 16 * a->tokens)
              for (int r = 0; r < w->tile; r++) acc[p][r] += table[data[r] >> 4 * s & 15];
          }
        }
      }
      for (int p = 0; p < g->planes; p++) {
        const uint16_t *scale = scales_of(w, tile, scale_slot(g, p));
        for (int r = 0; r < w->tile; r++)
          y[r] += half_to_float(scale[r]) * g->factor[p] * acc[p][r];
      }
      if (g->offset >= 0)
        for (int r = 0; r < w->tile; r++)
          y[r] += half_to_float(scales_of(w, tile, g->offset)[r]) * a->sum[t * w->groups + i];
    }
  }
}

/* A scale that is not finite marks an x that is not: the result is then not finite either. */
static void quantize_portable(const float *x, int words, int8_t *q, float *scale, int32_t *sum) {
  float most = 0;
  for (int i = 0; i < words * WORD; i++) {
    const float magnitude = fabsf(x[i]);
    if (!(magnitude <= most)) most = magnitude;
    if (most != most) break;
  }
  const float inverse = most > 0 && isfinite(most) ? 127.0f / most : 0.0f;
  *scale = most / 127.0f;
  *sum = 0;
  for (int i = 0; i < words * WORD; i++) {
    const int c = i % WORD;
    const int8_t value = inverse > 0 ? (int8_t)lrintf(x[i] * inverse) : 0;
    q[i - c + 4 * (c % 8) + c / 8] = value;
    *sum += value;
  }
}

static void int8_tile_portable(const Weight *w, const Activations *a, int64_t tile, float *y) {
  Planes planes;
  for (int t = 0; t < a->tokens; t++, y += w->tile) {
    for (int r = 0; r < w->tile; r++) y[r] = 0;
    for (int i = 0; i < w->groups; i++) {
      const Group *g = w->group + i;
      const int at = t * w->groups + i;
      if (g->bytes) {
        add_bytes_portable(w, a, tile, i, t, y);
        continue;
      }
      int32_t acc[MAX_PLANES][MAX_TILE] = {0};
      for (int begin = 0, end; begin < g->words; begin = end) {
        end = take_words(pbq_expand_portable, w, tile, g, 0, w->tile, begin, &planes);
        for (int p = 0; p < g->planes; p++) {
          const uint32_t *data = planes.data[p];
          const int8_t *q = a->q + ((int64_t)t * w->words + g->first_word + begin) * WORD;
          for (int word = begin; word < end; word++, data += planes.stride[p], q += WORD)
            for (int s = 0; s < LOOKUPS; s++) {
              int32_t sums[16] = {0}; /* of the x whose bits are set */
              for (int i = 0; i < 4; i++)
                for (int code = 0; code < 1 << i; code++)
                  sums[code + (1 << i)] = sums[code] + q[16 * (s % 2) + 4 * i + s / 2];
              for (int r = 0; r < w->tile; r++) acc[p][r] += sums[data[r] >> 4 * s & 15];
            }
        }
      }
      for (int p = 0; p < g->planes; p++) {
        const uint16_t *scale = scales_of(w, tile, scale_slot(g, p));
        for (int r = 0; r < w->tile; r++)
          y[r] += half_to_float(scale[r]) * g->factor[p] * a->q_scale[at] *
                  (float)(2 * acc[p][r] - a->q_sum[at]);
      }
      if (g->offset >= 0)
        for (int r = 0; r < w->tile; r++)
          y[r] += half_to_float(scales_of(w, tile, g->offset)[r]) * a->sum[at];
    }
  }
}

/* The values of `WORD` codes; bits[p] is plane p of the word. */
INLINE void look_up_portable(const float *value, const uint32_t *bits, int planes, float *out) {
  for (int c = 0; c < WORD; c++) {
    int code = 0;
    for (int p = 0; p < planes; p++) code |= (int)(bits[p] >> c & 1) << p;
    out[c] = value[code];
  }
}

INLINE void store_word(const float *from, int count, int dtype, void *to, int64_t at) {
  if (count == WORD) /* a constant count is vectorized */
    for (int c = 0; c < WORD; c++) store(to, at + c, dtype, from[c]);
  else
    for (int c = 0; c < count; c++) store(to, at + c, dtype, from[c]);
}

INLINE void store_many(const float *from, int64_t count, int dtype, void *to, int64_t at) {
  for (int64_t i = 0; i < count; i += WORD)
    store_word(from + i, count - i < WORD ? (int)(count - i) : WORD, dtype, to, at + i);
}

/* value[code] of one row and group: the planes in order, then the offset, in fp32 as
 * reference.dequantize. */
INLINE void code_values(const Weight *w, const Group *g, int64_t tile, int64_t lane, float *value) {
  value[0] = 0.0f;
  for (int p = 0; p < g->planes; p++) {
    const float s = half_to_float(scales_of(w, tile, scale_slot(g, p))[lane]) * g->factor[p];
    for (int code = 0; code < 1 << p; code++) {
      value[code + (1 << p)] = value[code] + s;
      value[code] -= s;
    }
  }
  if (g->offset < 0) return;
  const float offset = half_to_float(scales_of(w, tile, g->offset)[lane]);
  for (int code = 0; code < 1 << g->planes; code++) value[code] += offset;
}

/* Of a group of bytes: a word of a row, as code_values gives it: only the addition rounds. */
INLINE void byte_values(const Weight *w, const Group *g, int64_t tile, int lane, int word,
                        float *out) {
  const int8_t *codes = byte_codes(w, tile, g, lane, word);
  const float scale = half_to_float(scales_of(w, tile, g->scale)[lane]);
  const float offset = g->offset < 0 ? 0 : half_to_float(scales_of(w, tile, g->offset)[lane]);
  for (int c = 0; c < WORD; c++) out[c] = (float)(2 * codes[c * WORD] + 1) * scale + offset;
}

typedef void (*LookUp)(const float *value, const uint32_t *bits, int planes, float *out);

/* One row as it stands for, columns in stored order, rounded once to `dtype`. */
INLINE void decode_row(const Weight *w, int64_t row, int dtype, void *out, LookUp look_up) {
  const int64_t tile = row / w->tile, lane = row % w->tile;
  int64_t at = 0;
  for (int i = 0; i < w->groups; i++) {
    const Group *g = w->group + i;
    Row stored;
    float value[256];
    if (!g->bytes) find_row(w, g, tile, lane, &stored), code_values(w, g, tile, lane, value);
    for (int word = 0; word < g->words; word++) {
      float entries[WORD];
      if (g->bytes) {
        byte_values(w, g, tile, (int)lane, word, entries);
      } else {
        uint32_t bits[MAX_PLANES];
        row_planes(w, g, &stored, word, bits);
        look_up(value, bits, g->planes, entries);
      }
      if (w->column_scale)
        for (int c = 0; c < WORD; c++)
          entries[c] *= w->column_scale[(int64_t)(g->first_word + word) * WORD + c];
      const int left = g->columns - word * WORD, count = left < WORD ? left : WORD;
      store_word(entries, count, dtype, out, at);
      at += count;
    }
  }
}

#define DEFINE_STORE_ROWS(SUFFIX, TARGET)                                                       \
  static TARGET void store_rows_##SUFFIX(const float *from, int64_t count, int dtype, void *to, \
                                         int64_t at) {                                          \
    if (dtype == FLOAT32)                                                                       \
      store_many(from, count, FLOAT32, to, at);                                                 \
    else if (dtype == BFLOAT16)                                                                 \
      store_many(from, count, BFLOAT16, to, at);                                                \
    else                                                                                        \
      store_many(from, count, FLOAT16, to, at);                                                 \
  }

#define DEFINE_DECODE_ROW(SUFFIX, TARGET)                                                      \
  static TARGET void decode_row_##SUFFIX(const Weight *w, int64_t row, int dtype, void *out) { \
    if (dtype == FLOAT32)                                                                      \
      decode_row(w, row, FLOAT32, out, look_up_##SUFFIX);                                      \
    else if (dtype == BFLOAT16)                                                                \
      decode_row(w, row, BFLOAT16, out, look_up_##SUFFIX);                                     \
    else                                                                                       \
      decode_row(w, row, FLOAT16, out, look_up_##SUFFIX);                                      \
  }

DEFINE_STORE_ROWS(portable, )
DEFINE_DECODE_ROW(portable, )

static const Variant PORTABLE = {.name = "portable",
                                 .tabulate = tabulate_portable,
                                 .exact_tile = exact_tile_portable,
                                 .quantize = quantize_portable,
                                 .int8_tile = int8_tile_portable,
                                 .store_rows = store_rows_portable,
                                 .decode_row = decode_row_portable};

/* --- tables of integers: AVX2 and NEON --------------------------------------------------------- *
 *
 * A permute of bytes fetches an entry for 16 rows (AVX2: 32), but only a byte of it. Bytes of fp32
 * entries would have to be put together again before they can be added, which takes as long as all
 * the rest. So x is rounded to integers with one scale per (token, tier, group), the 16 sums of 4
 * columns are cut into digits of so few bits that two entries (exact) or eight (int8) still add up
 * to a byte, and every digit is summed for itself.
 *
 * exact: a power of two as scale, and 25 bits for x in float32, 18 for x of 16 bits. The former keep
 *   all their bits down to half of the largest of its group, bf16 down to 2**-10 of it; a sum of
 *   integers loses nothing more.
 * int8: 127 is the largest x of the group.
 *
 * table: [words][4 bytes of a word][digits][2 lookups of a byte][16 entries]. The unit of an x that
 * is not finite is NaN, and so is the result.
 */

/* Words whose sums stay below 2**16: 64 * 4 * 254. As many as a trellis makes at once, so that its
 * sums are those of the plain form. */
#define BLOCK CHUNK

enum { EXACT_DIGITS = 4, SHORT_DIGITS = 3, EXACT_BITS = 7, INT8_DIGITS = 2, INT8_BITS = 5 };

INLINE int digits_of(int mode) {
  return mode == EXACT ? EXACT_DIGITS : mode == SHORT ? SHORT_DIGITS : INT8_DIGITS;
}

/* Of integers whose sums of four have so many digits. The largest must not be rounded up to a bit
 * more than they have. */
INLINE float exact_unit(float largest, int digits) {
  const int bits = digits * EXACT_BITS - 4;
  const float rounded = digits == SHORT_DIGITS ? largest * (1 + 0x1p-17f) : largest;
  return float_of_bits((bits_of_float(rounded) & 0x7f800000) - ((uint32_t)bits << 23));
}

#ifdef __x86_64__

/* --- AVX2: 32 rows a register, tables of integers ---------------------------------------------- */

INLINE AVX2 float largest_avx2(const float *x, int64_t count) {
  const __m256 absolute = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 most = _mm256_set1_ps(0x1p-101f); /* keeps units and their inverses normal numbers */
  __m256 strange = _mm256_setzero_ps();
  for (int64_t i = 0; i < count; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    most = _mm256_max_ps(most, _mm256_and_ps(v, absolute));
    strange = _mm256_or_ps(strange, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }
  if (_mm256_movemask_ps(strange)) return NAN;
  float lanes[8], found = 0;
  _mm256_storeu_ps(lanes, most);
  for (int i = 0; i < 8; i++) found = lanes[i] > found ? lanes[i] : found;
  return found;
}

/* The sums +-x0+-x1+-x2+-x3, raised by half of their range so that none is negative, in the order
 * that `packed_digits` puts right: 0 to 3 and 8 to 11, then 4 to 7 and 12 to 15. */
INLINE AVX2 void sums_avx2(const float *x, float inverse, int32_t half, __m256i sum[2]) {
  const __m128i v = _mm_cvtps_epi32(_mm_mul_ps(_mm_loadu_ps(x), _mm_set1_ps(inverse)));
  const __m128i pairs = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0x4e));
  const int32_t all = _mm_cvtsi128_si32(_mm_add_epi32(pairs, _mm_shuffle_epi32(pairs, 0xb1)));
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_slli_epi32(v, 1));
  const __m256i bit0 = _mm256_setr_epi32(0, -1, 0, -1, 0, -1, 0, -1);
  const __m256i bit1 = _mm256_setr_epi32(0, 0, -1, -1, 0, 0, -1, -1);
  const __m256i bit3 = _mm256_setr_epi32(0, 0, 0, 0, -1, -1, -1, -1);
  const __m256i x0 = _mm256_and_si256(_mm256_shuffle_epi32(twice, 0x00), bit0);
  const __m256i x1 = _mm256_and_si256(_mm256_shuffle_epi32(twice, 0x55), bit1);
  const __m256i x3 = _mm256_and_si256(_mm256_shuffle_epi32(twice, 0xff), bit3);
  const __m256i low = _mm256_add_epi32(_mm256_set1_epi32(half - all), _mm256_add_epi32(x0, x1));
  sum[0] = _mm256_add_epi32(low, x3);
  sum[1] = _mm256_add_epi32(sum[0], _mm256_shuffle_epi32(twice, 0xaa));
}

/* A digit of 16 sums each of two lookups, 32 bytes. */
INLINE AVX2 __m256i packed_digits(const __m256i sum[4], int right, __m256i mask) {
  __m256i digit[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    digit[i] = _mm256_and_si256(_mm256_srli_epi32(sum[i], right), mask);
  const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(digit[0], digit[1]),
                                            _mm256_packus_epi32(digit[2], digit[3]));
  return _mm256_permute4x64_epi64(bytes, 0xd8);
}

INLINE AVX2 void tabulate_digits_avx2(const int digits, const int bits, const float *x,
                                      int64_t lookups, float inverse, uint8_t *table) {
  const __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
  for (int64_t s = 0; s < lookups; s += 2, x += 8) {
    __m256i sum[4];
    sums_avx2(x, inverse, 1 << (digits * bits - 1), sum);
    sums_avx2(x + 4, inverse, 1 << (digits * bits - 1), sum + 2);
#pragma GCC unroll 4
    for (int d = 0; d < digits; d++, table += 32)
      _mm256_storeu_si256((__m256i *)table, packed_digits(sum, d * bits, mask));
  }
}

static AVX2 float tabulate_avx2(const float *x, int words, int mode, int begin, int end,
                                void *table) {
  const float largest = largest_avx2(x, (int64_t)words * WORD);
  if (!isfinite(largest)) return NAN;
  const int64_t lookups = (int64_t)(end - begin) * LOOKUPS;
  x += (int64_t)begin * WORD;
  if (mode == INT8) {
    tabulate_digits_avx2(INT8_DIGITS, INT8_BITS, x, lookups, 127.0f / largest, table);
    return largest / 127.0f;
  }
  const float unit = exact_unit(largest, digits_of(mode));
  if (mode == SHORT)
    tabulate_digits_avx2(SHORT_DIGITS, EXACT_BITS, x, lookups, 1.0f / unit, table);
  else
    tabulate_digits_avx2(EXACT_DIGITS, EXACT_BITS, x, lookups, 1.0f / unit, table);
  return unit;
}

/* Byte j of the words of 32 rows. Rows are in an order of their own, which `in_order` undoes: each
 * half of a register has 4 of every 8. */
INLINE AVX2 void apart_avx2(const uint32_t *data, __m256i byte[4]) {
  const __m256i apart = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4,
                                         8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m256i v[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    v[i] = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)(data + 8 * i)), apart);
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
  const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  byte[0] = _mm256_unpacklo_epi64(a, c), byte[1] = _mm256_unpackhi_epi64(a, c);
  byte[2] = _mm256_unpacklo_epi64(b, d), byte[3] = _mm256_unpackhi_epi64(b, d);
}

/* Sums of bytes, as 16 bits: `all` of both bytes, the odd one times 256, and `odd` of that alone. */
typedef struct {
  __m256i all, odd;
} Sums;

/* The words of a plane, up to BLOCK of them, for 32 rows. A multiplication shifts, for shifts share
 * their execution ports with the permutes. */
INLINE AVX2 void lookup_avx2(const int digits, const uint32_t *data, int stride, int words,
                             const uint8_t *table, Sums sum[]) {
  const __m256i low = _mm256_set1_epi8(15), down = _mm256_set1_epi16(256);
  for (int word = 0; word < words; word++, data += stride) {
    __builtin_prefetch(data + AHEAD * stride);
    __builtin_prefetch(data + AHEAD * stride + 16);
    __m256i byte[4], part[4];
    apart_avx2(data, byte);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m256i first = _mm256_and_si256(byte[j], low);
      const __m256i second = _mm256_and_si256(_mm256_srli_epi16(byte[j], 4), low);
#pragma GCC unroll 4
      for (int d = 0; d < digits; d++, table += 32) {
        const __m256i at_first = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
        const __m256i at_second =
            _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(table + 16)));
        const __m256i pair = _mm256_add_epi8(_mm256_shuffle_epi8(at_first, first),
                                             _mm256_shuffle_epi8(at_second, second));
        const int begins = digits != INT8_DIGITS || j == 0;
        const int ends = digits != INT8_DIGITS || j == 3;
        part[d] = begins ? pair : _mm256_add_epi8(part[d], pair);
        IN_ORDER(part[d]);
        if (!ends) continue;
        sum[d].all = _mm256_add_epi16(sum[d].all, part[d]);
        sum[d].odd = _mm256_add_epi16(sum[d].odd, _mm256_mulhi_epu16(part[d], down));
        IN_ORDER(sum[d].all);
        IN_ORDER(sum[d].odd);
      }
    }
  }
}

/* 32-bit sums of a digit, of rows [8 i, 8 i + 8). */
INLINE AVX2 void in_order(Sums sum, __m256i rows[4]) {
  const __m256i even = _mm256_sub_epi16(sum.all, _mm256_slli_epi16(sum.odd, 8));
  const __m256i zero = _mm256_setzero_si256();
  const __m256i low = _mm256_unpacklo_epi16(even, sum.odd);
  const __m256i high = _mm256_unpackhi_epi16(even, sum.odd);
  rows[0] = _mm256_unpacklo_epi16(low, zero), rows[1] = _mm256_unpackhi_epi16(low, zero);
  rows[2] = _mm256_unpacklo_epi16(high, zero), rows[3] = _mm256_unpackhi_epi16(high, zero);
}

/* As join_neon. */
INLINE AVX2 __m256 join_avx2(const int digits, const int bits, __m256i rows[][4], int i,
                             int32_t raised) {
  const int top = digits - 2;
  const __m256i high =
      _mm256_add_epi32(rows[top][i], _mm256_slli_epi32(rows[top + 1][i], bits));
  const __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(high, _mm256_set1_epi32(raised)));
  if (!top) return sum;
  const __m256i low =
      top == 1 ? rows[0][i] : _mm256_add_epi32(rows[0][i], _mm256_slli_epi32(rows[1][i], bits));
  return _mm256_fmadd_ps(sum, _mm256_set1_ps((float)(1 << top * bits)), _mm256_cvtepi32_ps(low));
}

/* dot [32 rows]: to it is added a plane of a group times x, in units of the group. */
INLINE AVX2 void dot_avx2(const int digits, const int bits, const uint32_t *data, int stride,
                          int words, const uint8_t *table, __m256 dot[4]) {
  for (int begin = 0; begin < words; begin += BLOCK) {
    const int count = words - begin < BLOCK ? words - begin : BLOCK;
    const Sums none = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    Sums sum[4] = {none, none, none, none};
    lookup_avx2(digits, data + (int64_t)begin * stride, stride, count,
                table + (int64_t)begin * LOOKUPS * digits * 16, sum);
    __m256i rows[4][4];
#pragma GCC unroll 4
    for (int d = 0; d < digits; d++) in_order(sum[d], rows[d]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      dot[i] = _mm256_add_ps(
          dot[i], join_avx2(digits, bits, rows, i, count * LOOKUPS << (2 * bits - 1)));
  }
}

DEFINE_EXPAND(avx2, AVX2, 8)

/* total [T][4]: to it are added 32 rows of a group of bytes times the x of T tokens. */
INLINE AVX2 void add_bytes_avx2(const int T, const Weight *w, const Activations *a, int64_t tile,
                                int first, int i, __m256 total[][4]) {
  const Group *g = w->group + i;
  const float *x = a->x + (int64_t)g->first_word * WORD;
  const int R = T == 1 ? 4 : 2; /* registers of rows at once: their sums stay in registers */
#pragma GCC unroll 2
  for (int from = 0; from < 4; from += R) {
    __m256 acc[TOKENS][4];
    for (int t = 0; t < T; t++)
      for (int r = 0; r < R; r++) acc[t][r] = _mm256_setzero_ps();
    for (int word = 0; word < g->words; word++) {
      const int8_t *codes = byte_codes(w, tile, g, first, word) + 8 * from;
      for (int c = 0; c < WORD; c++, codes += WORD) {
        __builtin_prefetch(codes + BYTES_AHEAD * WORD * w->tile);
        __m256 code[4];
        for (int r = 0; r < R; r++) code[r] = bytes_avx2(codes + 8 * r);
        for (int t = 0; t < T; t++) {
          const __m256 token = _mm256_broadcast_ss(x + ((int64_t)t * w->words + word) * WORD + c);
          for (int r = 0; r < R; r++) acc[t][r] = _mm256_fmadd_ps(token, code[r], acc[t][r]);
        }
      }
    }
    for (int r = 0; r < R; r++) {
      const int row = first + 8 * (from + r);
      const __m256 scale = scales_avx2(scales_of(w, tile, g->scale) + row);
      for (int t = 0; t < T; t++) {
        const __m256 sum = _mm256_set1_ps(a->sum[t * w->groups + i]);
        __m256 *to = total[t] + from + r;
        *to = _mm256_fmadd_ps(scale, _mm256_fmadd_ps(_mm256_set1_ps(2), acc[t][r], sum), *to);
        if (g->offset >= 0)
          *to = _mm256_fmadd_ps(scales_avx2(scales_of(w, tile, g->offset) + row), sum, *to);
      }
    }
  }
}

INLINE AVX2 void tile_avx2(const int digits, const int bits, const Weight *w, const Activations *a,
                           int64_t tile, float *y) {
  Planes planes;
  for (int first = 0; first < w->tile; first += 32) {
    __m256 total[TOKENS][4], dot[TOKENS][MAX_PLANES][4];
    for (int i = 0; i < 4 * a->tokens; i++) total[i / 4][i % 4] = _mm256_setzero_ps();
    for (int i = 0; i < w->groups; i++) {
      const Group *g = w->group + i;
      if (g->bytes) {
        if (a->tokens == 1)
          add_bytes_avx2(1, w, a, tile, first, i, total);
        else
          add_bytes_avx2(TOKENS, w, a, tile, first, i, total);
        continue;
      }
      for (int t = 0; t < a->tokens; t++)
        for (int r = 0; r < 4 * g->planes; r++) dot[t][r / 4][r % 4] = _mm256_setzero_ps();
      for (int begin = 0, end; begin < g->words; begin = end) {
        end = take_words(pbq_expand_avx2, w, tile, g, first, 32, begin, &planes);
        for (int t = 0; t < a->tokens; t++) {
          const int64_t word = (int64_t)t * w->words + g->first_word + begin;
          const uint8_t *table = (const uint8_t *)a->table + word * LOOKUPS * digits * 16;
          for (int p = 0; p < g->planes; p++)
            dot_avx2(digits, bits, planes.data[p], planes.stride[p], end - begin, table, dot[t][p]);
        }
      }
      for (int t = 0; t < a->tokens; t++) {
        const __m256 unit = _mm256_set1_ps(a->q_scale[t * w->groups + i]);
        for (int p = 0; p < g->planes; p++) {
          const uint16_t *scale = scales_of(w, tile, scale_slot(g, p)) + first;
          const __m256 factor = _mm256_set1_ps(g->factor[p]);
          for (int r = 0; r < 4; r++)
            total[t][r] = _mm256_fmadd_ps(_mm256_mul_ps(scales_avx2(scale + 8 * r), factor),
                                          _mm256_mul_ps(dot[t][p][r], unit), total[t][r]);
        }
        if (g->offset >= 0)
          for (int r = 0; r < 4; r++)
            total[t][r] =
                _mm256_fmadd_ps(scales_avx2(scales_of(w, tile, g->offset) + first + 8 * r),
                                _mm256_set1_ps(a->sum[t * w->groups + i]), total[t][r]);
      }
    }
    for (int t = 0; t < a->tokens; t++)
      for (int r = 0; r < 4; r++) _mm256_storeu_ps(y + t * w->tile + first + 8 * r, total[t][r]);
  }
}

static AVX2 void exact_tile_avx2(const Weight *w, const Activations *a, int64_t tile, float *y) {
  tile_avx2(EXACT_DIGITS, EXACT_BITS, w, a, tile, y);
}

static AVX2 void short_tile_avx2(const Weight *w, const Activations *a, int64_t tile, float *y) {
  tile_avx2(SHORT_DIGITS, EXACT_BITS, w, a, tile, y);
}

static AVX2 void int8_tile_avx2(const Weight *w, const Activations *a, int64_t tile, float *y) {
  tile_avx2(INT8_DIGITS, INT8_BITS, w, a, tile, y);
}

/* 8 values at codes of 3 planes: a permute. Each further plane chooses between two halves. */
INLINE AVX2 void values_avx2(const float *value, const int planes, const uint32_t *bits, float *out) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), one = _mm256_set1_epi32(1);
  __m256 table[4];
  for (int i = 0; i < (planes > 3 ? 1 << (planes - 3) : 1); i++)
    table[i] = _mm256_loadu_ps(value + 8 * i);
#pragma GCC unroll 4
  for (int c = 0; c < WORD; c += 8) {
    __m256i code = _mm256_setzero_si256(), bit[5];
#pragma GCC unroll 5
    for (int p = 0; p < planes; p++) {
      bit[p] = _mm256_srlv_epi32(_mm256_set1_epi32((int32_t)(bits[p] >> c)), lane);
      if (p < 3)
        code = _mm256_or_si256(code, _mm256_slli_epi32(_mm256_and_si256(bit[p], one), p));
    }
    __m256 found[4];
#pragma GCC unroll 4
    for (int i = 0; i < (planes > 3 ? 1 << (planes - 3) : 1); i++)
      found[i] = _mm256_permutevar8x32_ps(table[i], code);
#pragma GCC unroll 2
    for (int p = 3; p < planes; p++) {
      const __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(bit[p], 31));
      for (int i = 0; i < 1 << (planes - 1 - p); i++)
        found[i] = _mm256_blendv_ps(found[2 * i], found[2 * i + 1], high);
    }
    _mm256_storeu_ps(out + c, found[0]);
  }
}

INLINE AVX2 void look_up_avx2(const float *value, const uint32_t *bits, int planes, float *out) {
  switch (planes) {
    case 0: values_avx2(value, 0, bits, out); break;
    case 1: values_avx2(value, 1, bits, out); break;
    case 2: values_avx2(value, 2, bits, out); break;
    case 3: values_avx2(value, 3, bits, out); break;
    case 4: values_avx2(value, 4, bits, out); break;
    case 5: values_avx2(value, 5, bits, out); break;
    default: look_up_portable(value, bits, planes, out);
  }
}

DEFINE_STORE_ROWS(avx2, AVX2)
DEFINE_DECODE_ROW(avx2, AVX2)

static const Variant VARIANT_AVX2 = {.name = "avx2",
                                     .exact_tile = exact_tile_avx2,
                                     .int8_tile = int8_tile_avx2,
                                     .short_tile = short_tile_avx2,
                                     .store_rows = store_rows_avx2,
                                     .decode_row = decode_row_avx2,
                                     .tabulate_group = tabulate_avx2};

/* --- AVX-512: 16 rows a register, 16-entry tables of 4 columns -------------------------------- */

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define VNNI __attribute__((target("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))

INLINE AVX512 __m512 scales_avx512(const uint16_t *scale) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)scale));
}

/* v in the lanes whose number has bit b set, -v in the others. */
INLINE AVX512 __m512 signed_lanes(float v, int b) {
  static const uint16_t unset[4] = {0x5555, 0x3333, 0x0f0f, 0x00ff};
  const __m512i all = _mm512_set1_epi32((int32_t)bits_of_float(v));
  return _mm512_castsi512_ps(
      _mm512_mask_xor_epi32(all, unset[b], all, _mm512_set1_epi32(INT32_MIN)));
}

static AVX2 void quantize_avx512(const float *x, int words, int8_t *q, float *scale, int32_t *sum) {
  const __m256 absolute = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 most = _mm256_setzero_ps(), strange = _mm256_setzero_ps();
  for (int64_t i = 0; i < (int64_t)words * WORD; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    most = _mm256_max_ps(most, _mm256_and_ps(v, absolute));
    strange = _mm256_or_ps(strange, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }
  float lanes[8], largest = 0;
  _mm256_storeu_ps(lanes, most);
  for (int i = 0; i < 8; i++) largest = lanes[i] > largest ? lanes[i] : largest;
  if (_mm256_movemask_ps(strange)) largest = NAN;
  *scale = largest / 127.0f;
  const __m256 inverse = _mm256_set1_ps(largest > 0 && isfinite(largest) ? 127.0f / largest : 0.0f);
  /* bytes c and 8 + c of each half beside each other, then the two halves */
  const __m256i pairs = _mm256_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15, 0, 8,
                                         1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  __m256i total = _mm256_setzero_si256();
  for (int64_t i = 0; i < (int64_t)words * WORD; i += WORD) {
    __m256i v[4];
    for (int j = 0; j < 4; j++) {
      v[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), inverse));
      total = _mm256_add_epi32(total, v[j]);
    }
    const __m256i bytes =
        _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    const __m256i linear = _mm256_permutevar8x32_epi32(bytes, order);
    const __m256i mixed = _mm256_shuffle_epi8(linear, pairs);
    const __m128i low = _mm256_castsi256_si128(mixed), high = _mm256_extracti128_si256(mixed, 1);
    _mm_storeu_si128((__m128i *)(q + i), _mm_unpacklo_epi16(low, high));
    _mm_storeu_si128((__m128i *)(q + i + 16), _mm_unpackhi_epi16(low, high));
  }
  int32_t sums[8];
  _mm256_storeu_si256((__m256i *)sums, total);
  *sum = 0;
  for (int i = 0; i < 8; i++) *sum += sums[i];
}

static AVX512 void tabulate_avx512(const float *x, int words, float *table, int tokens) {
  for (int64_t i = 0; i < (int64_t)words * LOOKUPS; i++, x += 4, table += 16 * tokens) {
    const __m512 low = _mm512_add_ps(signed_lanes(x[0], 0), signed_lanes(x[1], 1));
    const __m512 high = _mm512_add_ps(signed_lanes(x[2], 2), signed_lanes(x[3], 3));
    _mm512_storeu_ps(table, _mm512_add_ps(low, high));
  }
}

/* The 4 bits of lookup s at the bottom of each row's lane. A 16-bit multiplication shifts, because
 * shifts share their execution ports with the permutes; what stands above the 4 bits is ignored. */
INLINE AVX512 __m512i code_avx512(__m512i word, int s) {
  const __m512i half = s < 4 ? word : _mm512_srli_epi32(word, 16);
  return s % 4 ? _mm512_mulhi_epu16(half, _mm512_set1_epi16((short)(1 << (16 - 4 * (s % 4)))))
               : half;
}

INLINE AVX512 void lookup_avx512(const int T, const int R, const uint32_t *data, const float *table,
                                 int lookups, __m512 acc[4][4]) {
  __m512i word[4];
  for (int r = 0; r < R; r++) word[r] = _mm512_loadu_si512(data + 16 * r);
#pragma GCC unroll 8
  for (int s = 0; s < LOOKUPS; s++) {
    if (s >= lookups) break;
    __m512i code[4];
    for (int r = 0; r < R; r++) code[r] = code_avx512(word[r], s);
    for (int t = 0; t < T; t++) {
      const __m512 entries = _mm512_loadu_ps(table + (s * T + t) * 16);
      for (int r = 0; r < R; r++) {
        acc[t][r] = _mm512_add_ps(acc[t][r], _mm512_permutexvar_ps(code[r], entries));
        IN_ORDER(acc[t][r]);
      }
    }
  }
}

DEFINE_SIGNS(signs_of_place_avx512, __m512i, AVX512)

typedef struct {
  int pair_0, pairs, singles;
  int pair[EDGE], single[EDGE];
} Taps;

/* The taps of a path as pairs of neighbours, if plane 0 is the path a row ago, and the others. */
INLINE Taps taps_of(const Group *g) {
  Taps found;
  found.pair_0 = g->delay == 1 && (g->path & 3) == 3;
  found.pairs = found.singles = 0;
  for (int left = g->path & (found.pair_0 ? ~3 : ~1); left;) {
    const int i = __builtin_ctz((unsigned)left);
    const int pair = g->delay == 1 && left >> (i + 1) & 1;
    if (pair)
      found.pair[found.pairs++] = i;
    else
      found.single[found.singles++] = i;
    left &= ~((pair ? 3 : 1) << i);
  }
  return found;
}

/* `filter` for R registers of rows, the last before them at `above`, or NULL. Neighbouring taps are
 * one of the path XOR the path a row ago, `two`, which costs nothing where that is plane 0. Every
 * second register is shifted by permutes, the others by loads that cross cache lines, because those
 * have ports of their own. */
INLINE AVX512 void filter_avx512(const int R, const int pairs, const int singles, const int pair_0,
                                 const int planes, const Filter *f, const Taps *taps,
                                 const uint32_t *above) {
  const __m512i lane =
      _mm512_setr_epi32(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
  const __m512i late = _mm512_sub_epi32(lane, _mm512_set1_epi32(f->delay));
  __m512i pair[EDGE], single[EDGE];
  for (int i = 0; i < pairs; i++)
    pair[i] = _mm512_sub_epi32(lane, _mm512_set1_epi32(taps->pair[i]));
  for (int i = 0; i < singles; i++)
    single[i] = _mm512_sub_epi32(lane, _mm512_set1_epi32(taps->single[i]));
  const uint32_t *path = f->path, *others = f->others;
  uint32_t *made = f->made;
  for (int word = 0; word < f->words; word++) {
    __m512i before = above ? _mm512_loadu_si512(above) : _mm512_setzero_si512();
    /* its first lane is wrong, and too far above */
    __m512i two_before = _mm512_xor_si512(before, _mm512_permutex2var_epi32(before, late, before));
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const uint32_t *u = path + 16 * r;
      const __m512i here = _mm512_loadu_si512(u);
      __builtin_prefetch(u + CHUNK * f->stride);
      __m512i bits[4], part[EDGE + 1];
      bits[0] = r % 2 ? _mm512_loadu_si512(u - f->delay)
                      : _mm512_permutex2var_epi32(before, late, here);
      const __m512i two = _mm512_xor_si512(here, bits[0]);
      part[0] = pair_0 ? two : here;
#pragma GCC unroll 4
      for (int i = 0; i < pairs; i++)
        part[1 + i] = _mm512_permutex2var_epi32(two_before, pair[i], two);
#pragma GCC unroll 8
      for (int i = 0; i < singles; i++)
        part[1 + pairs + i] = r % 2 ? _mm512_loadu_si512(u - taps->single[i])
                                    : _mm512_permutex2var_epi32(before, single[i], here);
      bits[1] = part[0];
#pragma GCC unroll 8
      for (int i = 1; i < pairs + singles; i += 2)
        bits[1] = _mm512_ternarylogic_epi32(bits[1], part[i], part[i + 1], 0x96); /* XOR */
      if ((pairs + singles) % 2) bits[1] = _mm512_xor_si512(bits[1], part[pairs + singles]);
#pragma GCC unroll 2
      for (int p = 2; p < planes; p++) {
        const uint32_t *stored = others + (p - 2) * f->plane + 16 * r;
        bits[p] = _mm512_loadu_si512(stored);
        __builtin_prefetch(stored + CHUNK * f->stride);
      }
      signs_of_place_avx512(planes, bits);
#pragma GCC unroll 4
      for (int p = 0; p < planes; p++)
        _mm512_storeu_si512(made + p * CHUNK * MAX_TILE + 16 * r, bits[p]);
      before = here, two_before = two;
    }
    path += f->stride, others += f->stride, made += f->made_stride;
    if (above) above += f->stride;
  }
}

INLINE AVX512 void filter_planes_avx512(const int R, const int planes, const Group *g,
                                        const Filter *f, const uint32_t *above) {
  const Taps taps = taps_of(g);
  switch (taps.pair_0 << 8 | taps.pairs << 4 | taps.singles) { /* those of trellis.py */
    case 0x001: filter_avx512(R, 0, 1, 0, planes, f, &taps, above); break;
    case 0x002: filter_avx512(R, 0, 2, 0, planes, f, &taps, above); break;
    case 0x020: filter_avx512(R, 2, 0, 0, planes, f, &taps, above); break;
    case 0x111: filter_avx512(R, 1, 1, 1, planes, f, &taps, above); break;
    case 0x112: filter_avx512(R, 1, 2, 1, planes, f, &taps, above); break;
    case 0x113: filter_avx512(R, 1, 3, 1, planes, f, &taps, above); break;
    default: filter_avx512(R, taps.pairs, taps.singles, taps.pair_0, planes, f, &taps, above);
  }
}

__attribute__((noinline)) AVX512 void pbq_expand_avx512(const Weight *w, int64_t tile,
                                                        const Group *g, int first, int rows,
                                                        int begin, int end, Planes *to) {
  const Filter f = filter_of(w, tile, g, first, rows, begin, end, to);
  const uint32_t *above = f.path - EDGE;
  if (!first) above = tile ? f.path - (int64_t)w->stream * w->tile + w->tile - EDGE : NULL;
  const int planes = planes_made(g);
  if (rows == 64 && planes == 2)
    filter_planes_avx512(4, 2, g, &f, above);
  else if (rows == 64 && planes == 3)
    filter_planes_avx512(4, 3, g, &f, above);
  else if (rows == 64)
    filter_planes_avx512(4, 4, g, &f, above);
  else if (planes == 2)
    filter_planes_avx512(2, 2, g, &f, above);
  else if (planes == 3)
    filter_planes_avx512(2, 3, g, &f, above);
  else
    filter_planes_avx512(2, 4, g, &f, above);
}

/* total[t * step + r], of 16 rows each: to it are added 16 R rows of a group of bytes times the x of
 * T tokens. */
INLINE AVX512 void add_bytes_avx512(const int T, const int R, const Weight *w,
                                    const Activations *a, int64_t tile, int first, int i,
                                    __m512 *total, const int step) {
  const Group *g = w->group + i;
  const float *x = a->x + (int64_t)g->first_word * WORD;
  __m512 acc[4][4];
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) acc[t][r] = _mm512_setzero_ps();
  for (int word = 0; word < g->words; word++) {
    const int8_t *codes = byte_codes(w, tile, g, first, word);
    for (int c = 0; c < WORD; c++, codes += WORD) {
      __m512 code[4];
      for (int r = 0; r < R; r++) {
        const int8_t *from = codes + r / 2 * WORD * WORD + r % 2 * 16;
        if (r % 2 == 0) __builtin_prefetch(from + BYTES_AHEAD * WORD * w->tile);
        code[r] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
      }
      for (int t = 0; t < T; t++) {
        const __m512 token = _mm512_set1_ps(x[((int64_t)t * w->words + word) * WORD + c]);
        for (int r = 0; r < R; r++) acc[t][r] = _mm512_fmadd_ps(token, code[r], acc[t][r]);
      }
    }
  }
  for (int r = 0; r < R; r++) {
    const __m512 scale = scales_avx512(scales_of(w, tile, g->scale) + first + 16 * r);
    for (int t = 0; t < T; t++) {
      const __m512 sum = _mm512_set1_ps(a->sum[t * w->groups + i]);
      __m512 *to = total + t * step + r;
      *to = _mm512_fmadd_ps(scale, _mm512_fmadd_ps(_mm512_set1_ps(2), acc[t][r], sum), *to);
      if (g->offset >= 0)
        *to = _mm512_fmadd_ps(scales_avx512(scales_of(w, tile, g->offset) + first + 16 * r), sum,
                              *to);
    }
  }
}

INLINE AVX512 void exact_rows_avx512(const int trellises, const int T, const int R,
                                     const Weight *w, const Activations *a, int64_t tile,
                                     int first, float *y) {
  Planes planes;
  __m512 total[4][4], kept[MAX_PLANES][4][4]; /* of the words before */
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) total[t][r] = _mm512_setzero_ps();
  for (int i = 0; i < w->groups; i++) {
    const Group *g = w->group + i;
    if (g->bytes) {
      add_bytes_avx512(T, R, w, a, tile, first, i, &total[0][0], 4);
      continue;
    }
    for (int begin = 0, end; begin < g->words; begin = end) {
      end = g->words;
      if (trellises) end = take_words(pbq_expand_avx512, w, tile, g, first, 16 * R, begin, &planes);
      for (int p = 0; p < g->planes; p++) {
        const uint32_t *data = trellises ? planes.data[p] : plane_words(w, tile, g, p) + first;
        const int stride = trellises ? planes.stride[p] : w->tile, last = end == g->words;
        const float *table = a->table + (int64_t)(g->first_word + begin) * LOOKUPS * T * 16;
        __m512 acc[4][4];
        for (int t = 0; t < T; t++)
          for (int r = 0; r < R; r++) acc[t][r] = begin ? kept[p][t][r] : _mm512_setzero_ps();
        for (int word = begin; word < end - last; word++, data += stride, table += LOOKUPS * T * 16)
          lookup_avx512(T, R, data, table, LOOKUPS, acc);
        if (!last) {
          for (int t = 0; t < T; t++)
            for (int r = 0; r < R; r++) kept[p][t][r] = acc[t][r];
          continue;
        }
        lookup_avx512(T, R, data, table, last_lookups(g), acc);
        const __m512 factor = _mm512_set1_ps(g->factor[p]);
        for (int r = 0; r < R; r++) {
          const __m512 s = _mm512_mul_ps(
              scales_avx512(scales_of(w, tile, scale_slot(g, p)) + first + 16 * r), factor);
          for (int t = 0; t < T; t++) total[t][r] = _mm512_fmadd_ps(s, acc[t][r], total[t][r]);
        }
      }
    }
    if (g->offset >= 0)
      for (int r = 0; r < R; r++) {
        const __m512 offset = scales_avx512(scales_of(w, tile, g->offset) + first + 16 * r);
        for (int t = 0; t < T; t++)
          total[t][r] =
              _mm512_fmadd_ps(offset, _mm512_set1_ps(a->sum[t * w->groups + i]), total[t][r]);
      }
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) _mm512_storeu_ps(y + t * w->tile + first + 16 * r, total[t][r]);
}

INLINE AVX512 void exact_rows_of_tile_avx512(const int trellises, const Weight *w,
                                             const Activations *a, int64_t tile, float *y) {
  if (a->tokens == TOKENS)
    for (int first = 0; first < w->tile; first += 32)
      exact_rows_avx512(trellises, TOKENS, 2, w, a, tile, first, y);
  else if (w->tile == 64)
    exact_rows_avx512(trellises, 1, 4, w, a, tile, 0, y);
  else
    exact_rows_avx512(trellises, 1, 2, w, a, tile, 0, y);
}

static AVX512 void exact_tile_avx512(const Weight *w, const Activations *a, int64_t tile,
                                     float *y) {
  if (w->trellises)
    exact_rows_of_tile_avx512(1, w, a, tile, y);
  else
    exact_rows_of_tile_avx512(0, w, a, tile, y);
}

INLINE VNNI __m512i dot_vnni(__m512i acc, __m512i bits, __m512i q) {
  return _mm512_dpbusd_epi32(acc, bits, q);
}

INLINE AVX512 __m512i dot_maddubs(__m512i acc, __m512i bits, __m512i q) {
  const __m512i pairs = _mm512_maddubs_epi16(bits, q);
  return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}

INLINE AVX512 __m512i four_columns(const int8_t *q) {
  int32_t four;
  memcpy(&four, q, 4);
  return _mm512_set1_epi32(four);
}

/* One token: bits stay where they are and weigh 2**j, one sum for each j, divided at the end.
 * Several: each bit is moved to the bottom once and serves all T tokens. The sums are the same
 * integers. */
#define DEFINE_INT8_AVX512(SUFFIX, TARGET, DOT)                                                    \
  INLINE TARGET void int8_one_##SUFFIX(const int R, const uint32_t *data, int stride, int words,   \
                                       const int8_t *q, __m512i *sum) {                            \
    const __m512i bit = _mm512_set1_epi8(1);                                                       \
    __m512i acc[4][4];                                                                             \
    for (int r = 0; r < R; r++)                                                                    \
      for (int j = 0; j < 4; j++) acc[r][j] = _mm512_setzero_si512();                              \
    for (int word = 0; word < words; word++, data += stride, q += WORD) {                          \
      __m512i bits[4];                                                                             \
      for (int r = 0; r < R; r++) bits[r] = _mm512_loadu_si512(data + 16 * r);                     \
      _Pragma("GCC unroll 2") for (int half = 0; half < 2; half++) {                               \
        _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {                                      \
          const __m512i mask = _mm512_slli_epi32(bit, j);                                          \
          const __m512i x = four_columns(q + 16 * half + 4 * j);                                   \
          for (int r = 0; r < R; r++) {                                                            \
            acc[r][j] = DOT(acc[r][j], _mm512_and_si512(bits[r], mask), x);                        \
            IN_ORDER(acc[r][j]);                                                                   \
          }                                                                                        \
        }                                                                                          \
        if (!half)                                                                                 \
          for (int r = 0; r < R; r++) bits[r] = _mm512_srli_epi32(bits[r], 4);                     \
      }                                                                                            \
    }                                                                                              \
    for (int r = 0; r < R; r++)                                                                    \
      sum[r] = _mm512_add_epi32(                                                                   \
          _mm512_add_epi32(acc[r][0], _mm512_srai_epi32(acc[r][1], 1)),                            \
          _mm512_add_epi32(_mm512_srai_epi32(acc[r][2], 2), _mm512_srai_epi32(acc[r][3], 3)));     \
  }                                                                                                \
                                                                                                   \
  INLINE TARGET void int8_many_##SUFFIX(const int T, const int R, const uint32_t *data,            \
                                        int stride, int words, const int8_t *q, int64_t token_q,   \
                                        __m512i *sum) {                                            \
    const __m512i bit = _mm512_set1_epi8(1);                                                       \
    for (int i = 0; i < T * R; i++) sum[i] = _mm512_setzero_si512();                               \
    for (int word = 0; word < words; word++, data += stride, q += WORD) {                          \
      __m512i bits[4];                                                                             \
      for (int r = 0; r < R; r++) bits[r] = _mm512_loadu_si512(data + 16 * r);                     \
      _Pragma("GCC unroll 8") for (int j = 0; j < 8; j++) {                                        \
        __m512i x[4];                                                                              \
        for (int t = 0; t < T; t++) x[t] = four_columns(q + t * token_q + 4 * j);                  \
        for (int r = 0; r < R; r++) {                                                              \
          const __m512i lowest = _mm512_and_si512(_mm512_srli_epi32(bits[r], j), bit);             \
          for (int t = 0; t < T; t++) sum[t * R + r] = DOT(sum[t * R + r], lowest, x[t]);          \
        }                                                                                          \
      }                                                                                            \
    }                                                                                              \
  }                                                                                                \
                                                                                                   \
  INLINE TARGET void int8_rows_##SUFFIX(const int trellises, const int T, const int R,             \
                                        const Weight *w, const Activations *a, int64_t tile,       \
                                        int first, float *y) {                                     \
    const int64_t token_q = (int64_t)w->words * WORD;                                              \
    Planes planes;                                                                                 \
    __m512 total[16];                                                                              \
    for (int i = 0; i < T * R; i++) total[i] = _mm512_setzero_ps();                                \
    for (int i = 0; i < w->groups; i++) {                                                          \
      const Group *g = w->group + i;                                                               \
      if (g->bytes) {                                                                              \
        add_bytes_avx512(T, R, w, a, tile, first, i, total, R);                                    \
        continue;                                                                                  \
      }                                                                                            \
      __m512i kept[MAX_PLANES][16]; /* of the words before */                                      \
      for (int begin = 0, end; begin < g->words; begin = end) {                                    \
        const int8_t *q = a->q + (int64_t)(g->first_word + begin) * WORD;                          \
        end = g->words;                                                                            \
        if (trellises)                                                                             \
          end = take_words(pbq_expand_avx512, w, tile, g, first, 16 * R, begin, &planes);          \
        for (int p = 0; p < g->planes; p++) {                                                      \
          const uint32_t *data = trellises ? planes.data[p] : plane_words(w, tile, g, p) + first;  \
          const int stride = trellises ? planes.stride[p] : w->tile;                               \
          __m512i sum[16];                                                                         \
          if (T == 1)                                                                              \
            int8_one_##SUFFIX(R, data, stride, end - begin, q, sum);                               \
          else                                                                                     \
            int8_many_##SUFFIX(T, R, data, stride, end - begin, q, token_q, sum);                  \
          if (begin)                                                                               \
            for (int j = 0; j < T * R; j++) sum[j] = _mm512_add_epi32(sum[j], kept[p][j]);         \
          if (end < g->words) {                                                                    \
            for (int j = 0; j < T * R; j++) kept[p][j] = sum[j];                                   \
            continue;                                                                              \
          }                                                                                        \
          const __m512 factor = _mm512_set1_ps(g->factor[p]);                                      \
          for (int t = 0; t < T; t++) {                                                            \
            const int at = t * w->groups + i;                                                      \
            const __m512 q_scale = _mm512_set1_ps(a->q_scale[at]);                                 \
            const __m512i q_sum = _mm512_set1_epi32(a->q_sum[at]);                                 \
            for (int r = 0; r < R; r++) {                                                          \
              const __m512 s = _mm512_mul_ps(                                                      \
                  scales_avx512(scales_of(w, tile, scale_slot(g, p)) + first + 16 * r), factor);   \
              const __m512i signs =                                                                \
                  _mm512_sub_epi32(_mm512_slli_epi32(sum[t * R + r], 1), q_sum);                   \
              total[t * R + r] = _mm512_fmadd_ps(_mm512_mul_ps(s, q_scale),                        \
                                                 _mm512_cvtepi32_ps(signs), total[t * R + r]);     \
            }                                                                                      \
          }                                                                                        \
        }                                                                                          \
      }                                                                                            \
      if (g->offset >= 0)                                                                          \
        for (int t = 0; t < T; t++) {                                                              \
          const __m512 x = _mm512_set1_ps(a->sum[t * w->groups + i]);                              \
          for (int r = 0; r < R; r++)                                                              \
            total[t * R + r] =                                                                     \
                _mm512_fmadd_ps(scales_avx512(scales_of(w, tile, g->offset) + first + 16 * r), x,  \
                                total[t * R + r]);                                                 \
        }                                                                                          \
    }                                                                                              \
    for (int t = 0; t < T; t++)                                                                    \
      for (int r = 0; r < R; r++)                                                                  \
        _mm512_storeu_ps(y + t * w->tile + first + 16 * r, total[t * R + r]);                      \
  }                                                                                                \
                                                                                                   \
  INLINE TARGET void int8_rows_of_tile_##SUFFIX(const int trellises, const Weight *w,              \
                                                const Activations *a, int64_t tile, float *y) {    \
    if (a->tokens == TOKENS)                                                                       \
      for (int first = 0; first < w->tile; first += 32)                                            \
        int8_rows_##SUFFIX(trellises, TOKENS, 2, w, a, tile, first, y);                            \
    else if (w->tile == 64)                                                                        \
      int8_rows_##SUFFIX(trellises, 1, 4, w, a, tile, 0, y);                                       \
    else                                                                                           \
      int8_rows_##SUFFIX(trellises, 1, 2, w, a, tile, 0, y);                                       \
  }                                                                                                \
                                                                                                   \
  static TARGET void int8_tile_##SUFFIX(const Weight *w, const Activations *a, int64_t tile,       \
                                        float *y) {                                                \
    if (w->trellises)                                                                              \
      int8_rows_of_tile_##SUFFIX(1, w, a, tile, y);                                                \
    else                                                                                           \
      int8_rows_of_tile_##SUFFIX(0, w, a, tile, y);                                                \
  }

DEFINE_INT8_AVX512(vnni, VNNI, dot_vnni)
DEFINE_INT8_AVX512(avx512, AVX512, dot_maddubs)

INLINE AVX512 void look_up_generic_avx512(const float *value, const uint32_t *bits, int planes,
                                          float *out) {
  for (int c = 0; c < WORD; c += 16) {
    __m512i code = _mm512_setzero_si512();
    for (int p = 0; p < planes; p++) {
      const __mmask16 set = (__mmask16)(bits[p] >> c);
      code = _mm512_mask_or_epi32(code, set, code, _mm512_set1_epi32(1 << p));
    }
    const __m512 found = planes <= 4 ? _mm512_permutexvar_ps(code, _mm512_loadu_ps(value))
                                     : _mm512_i32gather_ps(code, value, 4);
    _mm512_storeu_ps(out + c, found);
  }
}

DEFINE_STORE_ROWS(avx512, AVX512)
DEFINE_DECODE_ROW(generic_avx512, AVX512)

/* code_values for up to 4 planes, rounded to 16 bits. */
INLINE AVX512 __m256i code_values_16_bits(const Weight *w, const Group *g, int64_t tile,
                                          int64_t lane, int dtype) {
  __m512 value = _mm512_setzero_ps();
  for (int p = 0; p < g->planes; p++) {
    const float s = half_to_float(scales_of(w, tile, scale_slot(g, p))[lane]) * g->factor[p];
    value = _mm512_add_ps(value, signed_lanes(s, p));
  }
  if (g->offset >= 0)
    value = _mm512_add_ps(
        value, _mm512_set1_ps(half_to_float(scales_of(w, tile, g->offset)[lane])));
  if (dtype == FLOAT16) return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(bits, up), 16));
}

/* 16-bit results without column scale: the values are rounded once and permuted as they are. */
static AVX512 void decode_row_16_bits(const Weight *w, int64_t row, int dtype, uint16_t *out) {
  const int64_t tile = row / w->tile, lane = row % w->tile;
  for (int i = 0; i < w->groups; i++) {
    const Group *g = w->group + i;
    Row stored;
    find_row(w, g, tile, lane, &stored);
    const __m512i values = _mm512_castsi256_si512(code_values_16_bits(w, g, tile, lane, dtype));
    for (int word = 0, left = g->columns; left > 0; word++, left -= WORD) {
      uint32_t bits[MAX_PLANES];
      row_planes(w, g, &stored, word, bits);
      __m512i code = _mm512_setzero_si512();
      for (int p = 0; p < g->planes; p++)
        code = _mm512_mask_add_epi16(code, bits[p], code, _mm512_set1_epi16((short)(1 << p)));
      const int count = left < WORD ? left : WORD;
      const __mmask32 kept = count < WORD ? (1u << count) - 1 : UINT32_MAX;
      _mm512_mask_storeu_epi16(out, kept, _mm512_permutexvar_epi16(code, values));
      out += count;
    }
  }
}

static AVX512 void decode_row_avx512(const Weight *w, int64_t row, int dtype, void *out) {
  int most = 0;
  for (int i = 0; i < w->groups; i++) most = w->group[i].planes > most ? w->group[i].planes : most;
  if (dtype != FLOAT32 && !w->column_scale && most <= 4)
    decode_row_16_bits(w, row, dtype, out);
  else
    decode_row_generic_avx512(w, row, dtype, out);
}

/* A row in stored order [k] put where its columns belong, 32 at a time. */
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2"))) static void merge_row(
    const Weight *w, const uint16_t *row, uint16_t *out) {
  const uint16_t *next[MOST_RUNS];
  const uint32_t *mask = w->run_mask;
  for (int r = 0; r < w->runs; r++) next[r] = row + w->run_begin[r];
  for (int64_t c = 0; c < w->k; c += 32, mask += MOST_RUNS) {
    __m512i values = _mm512_setzero_si512();
    for (int r = 0; r < w->runs; r++) {
      const int count = __builtin_popcount(mask[r]);
      const __m512i run = _mm512_maskz_loadu_epi16(first_of(count), next[r]);
      values = _mm512_mask_expand_epi16(values, mask[r], run);
      next[r] += count;
    }
    _mm512_mask_storeu_epi16(out + c, first_of(w->k - c), values);
  }
}

/* They differ in how bytes are multiplied. */
#define VARIANT_OF_AVX512(NAME, TILE) \
  {.name = NAME,                      \
   .tabulate = tabulate_avx512,       \
   .exact_tile = exact_tile_avx512,   \
   .quantize = quantize_avx512,       \
   .int8_tile = TILE,                 \
   .store_rows = store_rows_avx512,   \
   .decode_row = decode_row_avx512}
static const Variant VARIANT_AVX512 = VARIANT_OF_AVX512("avx512", int8_tile_avx512);
static const Variant VARIANT_VNNI = VARIANT_OF_AVX512("avx512vnni", int8_tile_vnni);

#endif

#ifdef __aarch64__

/* --- NEON: 16 rows a register ------------------------------------------------------------------ *
 *
 * One token at a time: more would share little but the codes, 2 of 22 instructions (int8: of 10).
 */

INLINE float largest_neon(const float *x, int64_t count) {
  float32x4_t most = vdupq_n_f32(0x1p-101f); /* keeps units and their inverses normal numbers */
  for (int64_t i = 0; i < count; i += 4) most = vmaxq_f32(most, vabsq_f32(vld1q_f32(x + i)));
  return vmaxvq_f32(most); /* NaN if one is */
}

/* The sums +-x0+-x1+-x2+-x3, raised by half of their range so that none is negative. */
INLINE void sums_neon(int32x4_t x, int32_t half, uint32x4_t sum[4]) {
  static const int32_t bit0[4] = {0, -1, 0, -1}, bit1[4] = {0, 0, -1, -1};
  const int32x4_t twice = vshlq_n_s32(x, 1);
  const int32x4_t x0 = vandq_s32(vdupq_laneq_s32(twice, 0), vld1q_s32(bit0));
  const int32x4_t x1 = vandq_s32(vdupq_laneq_s32(twice, 1), vld1q_s32(bit1));
  const int32x4_t x2 = vdupq_laneq_s32(twice, 2), x3 = vdupq_laneq_s32(twice, 3);
  const int32x4_t low = vaddq_s32(vdupq_n_s32(half - vaddvq_s32(x)), vaddq_s32(x0, x1));
  sum[0] = vreinterpretq_u32_s32(low);
  sum[1] = vreinterpretq_u32_s32(vaddq_s32(low, x2));
  sum[2] = vreinterpretq_u32_s32(vaddq_s32(low, x3));
  sum[3] = vreinterpretq_u32_s32(vaddq_s32(vaddq_s32(low, x2), x3));
}

INLINE void tabulate_digits(const int digits, const int bits, const float *x, int64_t lookups,
                            float inverse, uint8_t *table) {
  for (int64_t s = 0; s < lookups; s++, x += 4) {
    uint32x4_t sum[4];
    sums_neon(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x), inverse)), 1 << (digits * bits - 1), sum);
    uint8_t *to = table + (s / 2 * digits * 2 + s % 2) * 16;
    for (int d = 0; d < digits; d++, to += 32) {
      uint16x8_t half[2];
      for (int i = 0; i < 2; i++) {
        const int32x4_t right = vdupq_n_s32(-bits * d);
        half[i] = vuzp1q_u16(vreinterpretq_u16_u32(vshlq_u32(sum[2 * i], right)),
                             vreinterpretq_u16_u32(vshlq_u32(sum[2 * i + 1], right)));
      }
      const uint8x16_t bytes =
          vuzp1q_u8(vreinterpretq_u8_u16(half[0]), vreinterpretq_u8_u16(half[1]));
      vst1q_u8(to, vandq_u8(bytes, vdupq_n_u8((uint8_t)((1 << bits) - 1))));
    }
  }
}

static float tabulate_neon(const float *x, int words, int mode, int begin, int end, void *table) {
  const float largest = largest_neon(x, (int64_t)words * WORD);
  if (!isfinite(largest)) return NAN;
  const int64_t lookups = (int64_t)(end - begin) * LOOKUPS;
  x += (int64_t)begin * WORD;
  if (mode == INT8) {
    tabulate_digits(INT8_DIGITS, INT8_BITS, x, lookups, 127.0f / largest, table);
    return largest / 127.0f;
  }
  const float unit = exact_unit(largest, digits_of(mode));
  if (mode == SHORT)
    tabulate_digits(SHORT_DIGITS, EXACT_BITS, x, lookups, 1.0f / unit, table);
  else
    tabulate_digits(EXACT_DIGITS, EXACT_BITS, x, lookups, 1.0f / unit, table);
  return unit;
}

/* The digits of 4 rows put together. `raised`, in units of the highest two digits, is by how much
 * the sums were. The halves of an exact sum are below 2**23, so only their addition rounds. */
INLINE float32x4_t join_neon(const int digits, const int bits, const uint16x4_t *digit,
                             int32_t raised) {
  const int top = digits - 2;
  const uint32x4_t high = vmlal_n_u16(vmovl_u16(digit[top]), digit[top + 1], 1 << bits);
  const float32x4_t sum =
      vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(high), vdupq_n_s32(raised)));
  if (!top) return sum;
  const uint32x4_t lowest = vmovl_u16(digit[0]);
  const uint32x4_t low = top == 1 ? lowest : vmlal_n_u16(lowest, digit[1], 1 << bits);
  return vfmaq_n_f32(vcvtq_f32_u32(low), sum, (float)(1 << top * bits));
}

/* The words of a plane, up to BLOCK of them, for 32 rows: sum[digit][16 rows][8 rows]. */
INLINE void lookup_neon(const int digits, const uint32_t *data, int stride, int words,
                        const uint8_t *table, uint16x8_t sum[][2][2]) {
  const uint8x16_t low = vdupq_n_u8(15);
  for (int word = 0; word < words; word++, data += stride) {
    const uint8x16x4_t bytes[2] = {vld4q_u8((const uint8_t *)data),
                                   vld4q_u8((const uint8_t *)(data + 16))};
    uint8x16_t part[4][2];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
      for (int d = 0; d < digits; d++, table += 32) {
        const uint8x16_t first = vld1q_u8(table), second = vld1q_u8(table + 16);
        for (int r = 0; r < 2; r++) {
          const uint8x16_t pair = vaddq_u8(vqtbl1q_u8(first, vandq_u8(bytes[r].val[j], low)),
                                           vqtbl1q_u8(second, vshrq_n_u8(bytes[r].val[j], 4)));
          const int begins = digits != INT8_DIGITS || j == 0;
          const int ends = digits != INT8_DIGITS || j == 3;
          part[d][r] = begins ? pair : vaddq_u8(part[d][r], pair);
          IN_ORDER(part[d][r]);
          if (!ends) continue;
          sum[d][r][0] = vaddw_u8(sum[d][r][0], vget_low_u8(part[d][r]));
          IN_ORDER(sum[d][r][0]);
          sum[d][r][1] = vaddw_high_u8(sum[d][r][1], part[d][r]);
          IN_ORDER(sum[d][r][1]);
        }
      }
  }
}

/* dot [32 rows]: to it is added a plane of a group times x, in units of the group. */
INLINE void dot_neon(const int digits, const int bits, const uint32_t *data, int stride, int words,
                     const uint8_t *table, float32x4_t dot[8]) {
  for (int begin = 0; begin < words; begin += BLOCK) {
    const int count = words - begin < BLOCK ? words - begin : BLOCK;
    uint16x8_t sum[4][2][2];
    for (int i = 0; i < 4 * digits; i++) sum[i / 4][i / 2 % 2][i % 2] = vdupq_n_u16(0);
    lookup_neon(digits, data + (int64_t)begin * stride, stride, count,
                table + (int64_t)begin * LOOKUPS * digits * 16, sum);
    for (int i = 0; i < 8; i++) {
      uint16x4_t digit[4];
      for (int d = 0; d < digits; d++) {
        const uint16x8_t rows = sum[d][i / 4][i / 2 % 2];
        digit[d] = i % 2 ? vget_high_u16(rows) : vget_low_u16(rows);
      }
      dot[i] = vaddq_f32(dot[i], join_neon(digits, bits, digit, count * LOOKUPS << (2 * bits - 1)));
    }
  }
}

INLINE float32x4_t scales_neon(const uint16_t *scale) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(scale)));
}

/* total [32 rows]: to it is added a group of bytes times a token's x. */
INLINE void add_bytes_neon(const Weight *w, const Activations *a, int64_t tile, int first, int i,
                           int t, float32x4_t total[8]) {
  const Group *g = w->group + i;
  const float *x = a->x + ((int64_t)t * w->words + g->first_word) * WORD;
  const float32x4_t sum = vdupq_n_f32(a->sum[t * w->groups + i]);
  float32x4_t acc[8];
  for (int r = 0; r < 8; r++) acc[r] = vdupq_n_f32(0);
  for (int word = 0; word < g->words; word++) {
    const int8_t *codes = byte_codes(w, tile, g, first, word);
    for (int c = 0; c < WORD; c++, codes += WORD)
      for (int r = 0; r < 8; r += 2) {
        const int16x8_t code = vmovl_s8(vld1_s8(codes + 4 * r));
        const float token = x[word * WORD + c];
        acc[r] = vfmaq_n_f32(acc[r], vcvtq_f32_s32(vmovl_s16(vget_low_s16(code))), token);
        acc[r + 1] = vfmaq_n_f32(acc[r + 1], vcvtq_f32_s32(vmovl_high_s16(code)), token);
      }
  }
  for (int r = 0; r < 8; r++) {
    const float32x4_t scale = scales_neon(scales_of(w, tile, g->scale) + first + 4 * r);
    total[r] = vfmaq_f32(total[r], scale, vfmaq_n_f32(sum, acc[r], 2));
    if (g->offset >= 0)
      total[r] =
          vfmaq_f32(total[r], scales_neon(scales_of(w, tile, g->offset) + first + 4 * r), sum);
  }
}

INLINE void tile_neon(const int digits, const int bits, const Weight *w, const Activations *a,
                      int64_t tile, float *y) {
  Planes planes;
  for (int t = 0; t < a->tokens; t++)
    for (int first = 0; first < w->tile; first += 32, y += 32) {
      float32x4_t total[8], dot[MAX_PLANES][8];
      for (int i = 0; i < 8; i++) total[i] = vdupq_n_f32(0);
      for (int i = 0; i < w->groups; i++) {
        const Group *g = w->group + i;
        if (g->bytes) {
          add_bytes_neon(w, a, tile, first, i, t, total);
          continue;
        }
        for (int r = 0; r < 8 * g->planes; r++) dot[r / 8][r % 8] = vdupq_n_f32(0);
        for (int begin = 0, end; begin < g->words; begin = end) {
          const int64_t word = (int64_t)t * w->words + g->first_word + begin;
          const uint8_t *table = (const uint8_t *)a->table + word * LOOKUPS * digits * 16;
          end = take_words(pbq_expand_portable, w, tile, g, first, 32, begin, &planes);
          for (int p = 0; p < g->planes; p++)
            dot_neon(digits, bits, planes.data[p], planes.stride[p], end - begin, table, dot[p]);
        }
        for (int p = 0; p < g->planes; p++) {
          const uint16_t *scale = scales_of(w, tile, scale_slot(g, p)) + first;
          for (int r = 0; r < 8; r++)
            total[r] =
                vfmaq_f32(total[r], vmulq_n_f32(scales_neon(scale + 4 * r), g->factor[p]),
                          vmulq_n_f32(dot[p][r], a->q_scale[t * w->groups + i]));
        }
        if (g->offset >= 0)
          for (int r = 0; r < 8; r++)
            total[r] =
                vfmaq_n_f32(total[r], scales_neon(scales_of(w, tile, g->offset) + first + 4 * r),
                            a->sum[t * w->groups + i]);
      }
      for (int r = 0; r < 8; r++) vst1q_f32(y + 4 * r, total[r]);
    }
}

static void exact_tile_neon(const Weight *w, const Activations *a, int64_t tile, float *y) {
  tile_neon(EXACT_DIGITS, EXACT_BITS, w, a, tile, y);
}

static void short_tile_neon(const Weight *w, const Activations *a, int64_t tile, float *y) {
  tile_neon(SHORT_DIGITS, EXACT_BITS, w, a, tile, y);
}

static void int8_tile_neon(const Weight *w, const Activations *a, int64_t tile, float *y) {
  tile_neon(INT8_DIGITS, INT8_BITS, w, a, tile, y);
}

/* The four bytes of 16 values, fetched apart, for up to 4 planes. */
INLINE void look_up_neon(const float *value, const uint32_t *bits, int planes, float *out) {
  static const uint8_t BIT[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t bit = vld1q_u8(BIT);
  for (int c = 0; c < WORD; c += 16) {
    uint8x16_t code = vdupq_n_u8(0);
    for (int p = 0; p < planes; p++) {
      const uint32_t word = bits[p] >> c;
      const uint8x16_t spread =
          vcombine_u8(vdup_n_u8((uint8_t)word), vdup_n_u8((uint8_t)(word >> 8)));
      code = vorrq_u8(code, vandq_u8(vtstq_u8(spread, bit), vdupq_n_u8((uint8_t)(1 << p))));
    }
    if (planes <= 4) {
      uint8x16x4_t bytes = vld4q_u8((const uint8_t *)value);
      for (int i = 0; i < 4; i++) bytes.val[i] = vqtbl1q_u8(bytes.val[i], code);
      vst4q_u8((uint8_t *)(out + c), bytes);
    } else {
      uint8_t codes[16];
      vst1q_u8(codes, code);
      for (int i = 0; i < 16; i++) out[c + i] = value[codes[i]];
    }
  }
}

DEFINE_DECODE_ROW(neon, )

static const Variant VARIANT_NEON = {.name = "neon",
                                     .exact_tile = exact_tile_neon,
                                     .int8_tile = int8_tile_neon,
                                     .short_tile = short_tile_neon,
                                     .store_rows = store_rows_portable,
                                     .decode_row = decode_row_neon,
                                     .tabulate_group = tabulate_neon};

#endif

/* --- entry points ----------------------------------------------------------------------------- */

/* The named variants this machine can run, fastest first; NULL past the last. */
static const Variant *variant(int index) {
  const Variant *found[4];
  int count = 0;
#ifdef __x86_64__
  __builtin_cpu_init();
  /* F16C is older than AVX2; compilers before gcc 11 cannot ask for it. */
  const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const int avx512 = avx2 && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) found[count++] = &VARIANT_VNNI;
  if (avx512) found[count++] = &VARIANT_AVX512;
  if (avx2) found[count++] = &VARIANT_AVX2;
#endif
#ifdef __aarch64__
  found[count++] = &VARIANT_NEON;
#endif
  found[count++] = &PORTABLE;
  return index < count ? found[index] : NULL;
}

EXPORT const char *pbq_source_hash(void) { return PBQ_SOURCE_HASH; }

EXPORT const char *pbq_variant_name(int index) {
  const Variant *v = variant(index);
  return v ? v->name : NULL;
}

static uint32_t stored_bits(const uint8_t *row, int64_t row_bytes, int64_t first, int count) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < 5 && first / 8 + i < row_bytes; i++)
    bits |= (uint64_t)row[first / 8 + i] << 8 * i;
  return (uint32_t)(bits >> first % 8 & ((1ull << count) - 1));
}

/* Bit 8 i + j becomes bit 8 j + i: planes of 8 columns become their codes, and back. */
INLINE uint64_t transposed(uint64_t bits) {
  uint64_t t = (bits ^ bits >> 7) & 0x00aa00aa00aa00aa;
  bits ^= t ^ t << 7;
  t = (bits ^ bits >> 14) & 0x0000cccc0000cccc;
  bits ^= t ^ t << 14;
  t = (bits ^ bits >> 28) & 0x00000000f0f0f0f0;
  return bits ^ t ^ t << 28;
}

#define SIGNED 0x8080808080808080 /* codes less 128, as bytes with a sign, and back */

/* The planes of a word of a row, to be at codes [WORD][32 rows]. */
static void store_codes(const uint32_t *plane, int8_t *codes) {
  for (int c = 0; c < WORD; c += 8) {
    uint64_t bits = 0;
    for (int p = 0; p < MAX_PLANES; p++) bits |= (uint64_t)(plane[p] >> c & 255) << 8 * p;
    bits = transposed(bits) ^ SIGNED;
    for (int i = 0; i < 8; i++, codes += WORD) *codes = (int8_t)(bits >> 8 * i);
  }
}

/* The inverse of store_codes. */
static void load_codes(const int8_t *codes, uint32_t *plane) {
  memset(plane, 0, MAX_PLANES * sizeof *plane);
  for (int c = 0; c < WORD; c += 8) {
    uint64_t bits = 0;
    for (int i = 0; i < 8; i++, codes += WORD) bits |= (uint64_t)(uint8_t)*codes << 8 * i;
    bits = transposed(bits ^ SIGNED);
    for (int p = 0; p < MAX_PLANES; p++) plane[p] |= (uint32_t)(bits >> 8 * p & 255) << c;
  }
}

/* stored uint8 [n, row_bytes] -> out, laid out as Weight.data; rows past n are zero. */
EXPORT void pbq_repack(const Weight *w, const uint8_t *stored, uint32_t *out, int threads) {
  const int64_t rows = (w->n + w->tile - 1) / w->tile * w->tile;
  Weight made = *w;
  made.data = out;
  (void)threads; /* without OpenMP */
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; row++) {
    const int64_t tile = row / w->tile, lane = row % w->tile;
    for (int i = 0; i < w->groups; i++) {
      const Group *g = w->group + i;
      for (int word = 0; word < g->words; word++) {
        const int begin = word * WORD;
        const int count = g->columns - begin < WORD ? g->columns - begin : WORD;
        uint32_t plane[MAX_PLANES];
        for (int p = 0; p < g->stored; p++)
          plane[p] = row < w->n ? stored_bits(stored + row * w->row_bytes, w->row_bytes,
                                              g->bit + p * g->plane_bits + begin, count)
                                : 0;
        if (g->bytes)
          store_codes(plane, (int8_t *)byte_codes(&made, tile, g, (int)lane, word));
        else
          for (int p = 0; p < g->stored; p++)
            out[plane_words(&made, tile, g, p) - out + (int64_t)word * w->tile + lane] = plane[p];
      }
    }
  }
}

/* The inverse of stored_bits, into a row that is zero there. */
static void store_bits(uint8_t *row, int64_t row_bytes, int64_t first, uint32_t word) {
  const uint64_t bits = (uint64_t)word << first % 8;
  for (int64_t i = 0; i < 5 && first / 8 + i < row_bytes; i++)
    row[first / 8 + i] |= (uint8_t)(bits >> 8 * i);
}

/* The inverse of pbq_repack for `count` rows: out uint8 [count, row_bytes]. 0, or 1 when one of the
 * rows does not exist. */
EXPORT int pbq_unpack(const Weight *w, const int64_t *row, int64_t count, uint8_t *out,
                      int threads) {
  for (int64_t i = 0; i < count; i++)
    if (row[i] < 0 || row[i] >= w->n) return 1;
  (void)threads; /* without OpenMP */
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; i++) {
    const int64_t tile = row[i] / w->tile, lane = row[i] % w->tile;
    uint8_t *to = out + i * w->row_bytes;
    memset(to, 0, (size_t)w->row_bytes);
    for (int j = 0; j < w->groups; j++) {
      const Group *g = w->group + j;
      for (int word = 0; word < g->words; word++) {
        uint32_t plane[MAX_PLANES];
        if (g->bytes)
          load_codes(byte_codes(w, tile, g, (int)lane, word), plane);
        else
          for (int p = 0; p < g->stored; p++)
            plane[p] = plane_words(w, tile, g, p)[(int64_t)word * w->tile + lane];
        for (int p = 0; p < g->stored; p++)
          store_bits(to, w->row_bytes, g->bit + p * g->plane_bits + word * WORD, plane[p]);
      }
    }
  }
  return 0;
}

/* out[to[c]] = from[c] for numbers of so many bytes. */
INLINE void scatter(const char *restrict from, const int64_t *restrict to, int64_t columns,
                    int64_t size, char *restrict out) {
  for (int64_t c = 0; c < columns; c++)
    if (size == 4)
      ((uint32_t *)out)[to[c]] = ((const uint32_t *)from)[c];
    else
      ((uint16_t *)out)[to[c]] = ((const uint16_t *)from)[c];
}

/* Weight.run_mask, zero where it is given, and run_begin of columns in stored order. Returns
 * Weight.runs. */
EXPORT int pbq_runs(const int64_t *column, int64_t columns, uint32_t *mask, int64_t *begin) {
  int runs = 0;
  for (int64_t c = 0; c < columns; c++) {
    if (c == 0 || column[c] < column[c - 1]) {
      if (runs == MOST_RUNS) return 0;
      begin[runs++] = c;
    }
    mask[column[c] / 32 * MOST_RUNS + runs - 1] |= 1u << column[c] % 32;
  }
  return runs;
}

/* Whether merge_row runs here, and goes with the variant that was asked for. */
static int merges(const Variant *v) {
#ifdef __x86_64__
  return (v == &VARIANT_AVX512 || v == &VARIANT_VNNI) && __builtin_cpu_supports("avx512vbmi2");
#else
  (void)v;
  return 0;
#endif
}

/* Rows [row, row + rows) into out [rows, columns]: the columns of w's groups in stored order, or
 * where `to` puts them. `line` has room for a row of each thread, if there is a `to`. */
EXPORT void pbq_decode(const Weight *w, int64_t row, int64_t rows, int64_t columns, int dtype,
                       const int64_t *to, void *line, void *out, int threads) {
  const Variant *v = variant(w->variant);
  const int64_t size = size_of(dtype), row_size = columns * size;
  const int merged = size == 2 && w->runs && merges(v);
  (void)threads; /* without OpenMP */
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    char *mine = to ? (char *)line + omp_get_thread_num() * row_size : NULL;
#pragma omp for
    for (int64_t i = 0; i < rows; i++) {
      char *there = (char *)out + i * row_size;
      v->decode_row(w, row + i, dtype, to ? mine : there);
      if (!to) continue;
#ifdef __x86_64__
      if (merged) {
        merge_row(w, (const uint16_t *)mine, (uint16_t *)there);
        continue;
      }
#endif
      if (size == 4)
        scatter(mine, to, columns, 4, there);
      else
        scatter(mine, to, columns, 2, there);
    }
  }
}

INLINE void gather_as(const int32_t *restrict column, const void *restrict x, int dtype,
                      int64_t count, float *restrict to) {
  for (int64_t i = 0; i < count; i++) to[i] = column[i] < 0 ? 0.0f : load(x, column[i], dtype);
}

/* Positions [begin, end) of the tokens' x: stored order, fp32, padded, times the column scale. */
static void gather(const Weight *w, const void *x, int dtype, int64_t begin, int64_t end,
                   float *to) {
  if (dtype == FLOAT32)
    gather_as(w->column + begin, x, FLOAT32, end - begin, to + begin);
  else if (dtype == BFLOAT16)
    gather_as(w->column + begin, x, BFLOAT16, end - begin, to + begin);
  else
    gather_as(w->column + begin, x, FLOAT16, end - begin, to + begin);
  if (w->column_scale)
    for (int64_t i = begin; i < end; i++) to[i] *= w->column_scale[i];
}

/* fp64: an offset times a sum that has lost digits would show in every row. */
static float group_sum(const Group *g, const float *x) {
  double part[4] = {0};
  for (int64_t i = 0; i < (int64_t)g->words * WORD; i++) part[i % 4] += x[i];
  return (float)((part[0] + part[1]) + (part[2] + part[3]));
}

static void prepare_group(const Weight *w, const Variant *v, int mode, const Activations *a,
                          int token, int i) {
  const Group *g = w->group + i;
  const int at = token * w->groups + i;
  const int64_t begin = ((int64_t)token * w->words + g->first_word) * WORD;
  if (g->offset >= 0 || g->bytes) a->sum[at] = group_sum(g, a->x + begin);
  if (mode == INT8 && v->quantize)
    v->quantize(a->x + begin, g->words, a->q + begin, a->q_scale + at, a->q_sum + at);
}

static void tabulate_part(const Weight *w, const Variant *v, const Activations *a, int token,
                          int rank, int size) {
  const int begin = (int)((int64_t)w->words * rank / size);
  const int end = (int)((int64_t)w->words * (rank + 1) / size);
  const int64_t first = (int64_t)token * w->words + begin;
  float *table = a->table + ((int64_t)begin * LOOKUPS * a->tokens + token) * ENTRIES;
  v->tabulate(a->x + first * WORD, end - begin, table, a->tokens);
}

/* Of the tables of a word. Entries of integers have a byte for each digit. */
static int64_t table_bytes(const Variant *v, int mode) {
  const int entry = v->tabulate_group ? digits_of(mode) : mode == EXACT ? 4 : 0;
  return LOOKUPS * ENTRIES * entry;
}

/* This share of every group's words; the share of a group's first word keeps its scale. */
static void tabulate_groups(const Weight *w, const Variant *v, int mode, const Activations *a,
                            int share, int shares) {
  for (int at = 0; at < a->tokens * w->groups; at++) {
    const Group *g = w->group + at % w->groups;
    const int64_t first = (int64_t)(at / w->groups) * w->words + g->first_word;
    const int begin = (int)((int64_t)g->words * share / shares);
    const int end = (int)((int64_t)g->words * (share + 1) / shares);
    if (begin == end || !g->planes || g->bytes) continue;
    char *table = (char *)a->table + (first + begin) * table_bytes(v, mode);
    const float scale = v->tabulate_group(a->x + first * WORD, g->words, mode, begin, end, table);
    if (begin == 0) a->q_scale[at] = scale;
  }
}

INLINE float overlay_as(const Weight *w, int64_t row, const void *x, int dtype) {
  float part[4] = {0};
  for (int64_t i = w->overlay_start[row]; i < w->overlay_start[row + 1]; i++)
    part[i % 4] += w->overlay_delta[i] * load(x, w->overlay_column[i], dtype);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

static float overlay_dot(const Weight *w, int64_t row, const void *x, int dtype) {
  if (dtype == FLOAT32) return overlay_as(w, row, x, FLOAT32);
  return dtype == BFLOAT16 ? overlay_as(w, row, x, BFLOAT16) : overlay_as(w, row, x, FLOAT16);
}

/* This thread's share of the tiles, for the a->tokens tokens at x, into their rows of y. */
static void run_tiles(const Weight *w, const Variant *v, int mode, const Activations *a, int rank,
                      int size, const char *x, int dtype, char *y, int y_dtype) {
  const int64_t tiles = (w->n + w->tile - 1) / w->tile;
  float rows[TOKENS * MAX_TILE];
  for (int64_t tile = tiles * rank / size; tile < tiles * (rank + 1) / size; tile++) {
    (mode == EXACT ? v->exact_tile : mode == INT8 ? v->int8_tile : v->short_tile)(w, a, tile, rows);
    const int64_t first = tile * w->tile;
    const int64_t count = w->n - first < w->tile ? w->n - first : w->tile;
    for (int t = 0; t < a->tokens; t++) {
      float *from = rows + t * w->tile;
      if (w->overlay_start)
        for (int64_t r = 0; r < count; r++)
          from[r] += overlay_dot(w, first + r, x + t * w->k * size_of(dtype), dtype);
      v->store_rows(from, count, y_dtype, y, t * w->n + first);
    }
  }
}

/* One of `size` threads that share the rows, and one of `shares` that share the preparation of x:
 * all of them, or each for itself. Barriers: x is gathered, x is prepared, x may be overwritten. */
static void run_rows(const Weight *w, const Variant *v, int mode, Activations a, int rank, int size,
                     int shares, const char *x, int dtype, int64_t m, char *y, int y_dtype) {
  const int share = shares == 1 ? 0 : rank;
  const int64_t positions = (int64_t)w->words * WORD;
  const int64_t begin = (int64_t)w->words * share / shares * WORD;
  const int64_t end = (int64_t)w->words * (share + 1) / shares * WORD;
  for (int64_t token = 0; token < m; token += a.tokens) {
    a.tokens = m - token < TOKENS ? 1 : TOKENS;
    const char *from = x + token * w->k * size_of(dtype);
    for (int t = 0; t < a.tokens; t++) {
      gather(w, from + t * w->k * size_of(dtype), dtype, begin, end, a.x + t * positions);
      if (mode == EXACT && v->tabulate) tabulate_part(w, v, &a, t, share, shares);
    }
    if (shares > 1) {
#pragma omp barrier
    }
    for (int i = share; i < a.tokens * w->groups; i += shares)
      prepare_group(w, v, mode, &a, i / w->groups, i % w->groups);
    if (v->tabulate_group) tabulate_groups(w, v, mode, &a, share, shares);
    if (shares > 1) {
#pragma omp barrier
    }
    run_tiles(w, v, mode, &a, rank, size, from, dtype, y + token * w->n * size_of(y_dtype),
              y_dtype);
    if (shares > 1) {
#pragma omp barrier
    }
  }
}

/* Lays out the buffers of one chunk from address `from` on; returns how many bytes they take. */
static int64_t lay_out(Activations *a, const Weight *w, const Variant *v, int mode, int64_t m,
                       uintptr_t from) {
  const uintptr_t first = from;
  const int64_t tokens = m < TOKENS ? 1 : TOKENS;
  const int64_t words = tokens * w->words, groups = tokens * w->groups;
  a->table = carve(&from, words * table_bytes(v, mode));
  a->x = carve(&from, words * WORD * 4);
  a->q = carve(&from, mode == INT8 ? words * WORD : 0);
  a->sum = carve(&from, groups * 4);
  a->q_scale = carve(&from, groups * 4);
  a->q_sum = carve(&from, groups * 4);
  return (int64_t)(from - first);
}

/* A barrier waits for a thread that is not running, which on a busy machine takes milliseconds. So
 * many tokens are shared out instead of rows, and a few threads rather prepare x each for itself.
 */
#define FEW_THREADS 4

static void run_thread(const Weight *w, const Variant *v, int mode, char *scratch,
                       int64_t scratch_size, int rank, int size, const char *x, int dtype,
                       int64_t m, char *y, int y_dtype) {
  const int64_t chunks = m / TOKENS;
  const int share_tokens = chunks >= 4 * size, share_x = !share_tokens && size > FEW_THREADS;
  Activations a = {0};
  lay_out(&a, w, v, mode, m, (uintptr_t)(share_x ? scratch : scratch + rank * scratch_size));
  if (!share_tokens) {
    run_rows(w, v, mode, a, rank, size, share_x ? size : 1, x, dtype, m, y, y_dtype);
    return;
  }
  const int64_t begin = chunks * rank / size * TOKENS;
  const int64_t end = rank + 1 == size ? m : chunks * (rank + 1) / size * TOKENS;
  run_rows(w, v, mode, a, 0, 1, 1, x + begin * w->k * size_of(dtype), dtype, end - begin,
           y + begin * w->n * size_of(y_dtype), y_dtype);
}

/* y [m, n] = x [m, k] @ W_hat.T, both contiguous. 0, or 1 when memory is short. */
EXPORT int pbq_matmul(const Weight *w, int mode, const void *x, int dtype, int64_t m, void *y,
                      int y_dtype, int threads) {
  const Variant *v = variant(w->variant);
  if (mode == EXACT && dtype != FLOAT32 && v->short_tile) mode = SHORT;
  Activations a;
  const int64_t scratch_size = lay_out(&a, w, v, mode, m, 0);
#ifndef _OPENMP
  threads = 1;
#endif
  char *scratch = aligned_alloc(64, (size_t)(scratch_size * threads));
  if (!scratch) return 1;
  if (threads == 1) run_thread(w, v, mode, scratch, scratch_size, 0, 1, x, dtype, m, y, y_dtype);
#ifdef _OPENMP
  else
#pragma omp parallel num_threads(threads)
    run_thread(w, v, mode, scratch, scratch_size, omp_get_thread_num(), omp_get_num_threads(), x,
               dtype, m, y, y_dtype);
#endif
  free(scratch);
  return 0;
}
