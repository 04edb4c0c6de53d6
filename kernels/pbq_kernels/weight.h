/* What the C files share: numbers of 16 bits, and a weight in the layout that cpu.py makes. */
#ifndef PBQ_WEIGHT_H
#define PBQ_WEIGHT_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif
#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#endif
#ifdef __aarch64__
#include <arm_neon.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define WORD 32 /* columns of one word of weights */
#define MAX_TILE 64
#define MAX_PLANES 8
#define MOST_RUNS 8 /* of columns in rising order: five tiers, or a few with groups of columns */
#define EDGE 16 /* rows above a tile that its planes may be made of: 12, and whole registers */
/* Words of a trellis whose planes are made at once: they stay in the first cache. And how many words
 * before they are read memory is asked for them. */
#ifdef __aarch64__
#define CHUNK 64 /* the BLOCK of NEON */
#define AHEAD 64
#else
#define CHUNK 16
#define AHEAD 32
#endif

enum { FLOAT32, BFLOAT16, FLOAT16 };

/* The columns of one tier that share their scales. Mirrors Group in cpu.py. */
typedef struct {
  int64_t bit;        /* of its first column in plane 0, from the start of a stored row */
  int64_t plane_bits; /* from a plane to the next in a stored row */
  int32_t columns;
  int32_t words;      /* of one plane of one row */
  int32_t first_word; /* its place in the words of x */
  int32_t stream;     /* its first word in the stream of one row */
  int32_t stored;     /* planes in the stream */
  int32_t planes;     /* of the levels: one more with a trellis */
  int32_t tied;       /* one scale is stored for all planes */
  int32_t bytes;      /* of 8 tied planes: where they would be lie codes, see byte_codes */
  int32_t scale;      /* slot of the first scale */
  int32_t offset;     /* slot of the offset, or -1 */
  int32_t path;       /* of a trellis, else 0: bit i is set where plane 1 has the path i rows ago */
  int32_t delay;      /* of a trellis: plane 0 is the path so many rows ago */
  int32_t uneven;     /* of a trellis: the planes of 2 to 4 made so are the place of the level */
  float factor[MAX_PLANES]; /* of each plane of the levels, times its stored scale */
} Group;

/* Mirrors Weight in cpu.py. */
typedef struct {
  int64_t n, k, row_bytes;
  int32_t tile, groups, words, stream, slots, variant;
  int32_t trellises; /* whether there are any */
  const Group *group;
  const uint32_t *data;      /* [tiles, stream, tile] */
  const uint16_t *scale;     /* float16 [tiles, slots, tile] */
  const int32_t *column;     /* [words * WORD]: column of x at each position, -1 is padding */
  const float *column_scale; /* [words * WORD] or NULL */
  /* Overlay, or NULL: entries of row r are [overlay_start[r], overlay_start[r + 1]). */
  const int64_t *overlay_start;
  const int32_t *overlay_column; /* of x */
  const float *overlay_delta;    /* what the entry adds to the weight below it */
  const uint16_t *overlay_value; /* bfloat16: what it stands for */
  /* x's columns in stored order are `runs` runs in rising order, or runs is 0: which of 32 columns
   * are the next of a run, [ceil(k / 32), MOST_RUNS], and where in stored order it begins. */
  const uint32_t *run_mask;
  int64_t run_begin[MOST_RUNS];
  int32_t runs;
} Weight;

/* The next part of a buffer, from an address that is a multiple of 64; so is what is left. */
INLINE void *carve(uintptr_t *from, int64_t bytes) {
  void *part = (void *)*from;
  *from += (uintptr_t)((bytes + 63) / 64 * 64);
  return part;
}

/* A mask of the first `count` of 32. */
INLINE uint32_t first_of(int64_t count) {
  return count < 32 ? (1u << count) - 1 : UINT32_MAX;
}

/* --- numbers -------------------------------------------------------------------------------- */

INLINE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

INLINE float half_to_float(uint16_t h) {
  const uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13;
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
  if (magnitude >= 0x0f800000) return float_of_bits(sign | 0x70000000 | magnitude); /* inf, nan */
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude) * 0x1p112f));
}

INLINE uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000,
                 magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (magnitude < 0x38800000) /* subnormal: adding 1/2 makes the FPU round at 2**-24 */
    return (uint16_t)(sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000));
  return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

INLINE float bfloat_to_float(uint16_t b) { return float_of_bits((uint32_t)b << 16); }

INLINE uint16_t float_to_bfloat(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE int64_t size_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE float load(const void *x, int64_t i, int dtype) {
  if (dtype == FLOAT32) return ((const float *)x)[i];
  const uint16_t bits = ((const uint16_t *)x)[i];
  return dtype == BFLOAT16 ? bfloat_to_float(bits) : half_to_float(bits);
}

INLINE void store(void *y, int64_t i, int dtype, float value) {
  if (dtype == FLOAT32)
    ((float *)y)[i] = value;
  else
    ((uint16_t *)y)[i] = dtype == BFLOAT16 ? float_to_bfloat(value) : float_to_half(value);
}

INLINE int scale_slot(const Group *g, int plane) { return g->tied ? g->scale : g->scale + plane; }

/* Of a stored plane, unless the group is one of bytes. */
INLINE const uint32_t *plane_words(const Weight *w, int64_t tile, const Group *g, int plane) {
  return w->data + (tile * w->stream + g->stream + (int64_t)plane * g->words) * w->tile;
}

/* Of a group of bytes, from a row of a tile on, of 32 rows that stand together: the codes of a word's
 * columns, [WORD][32 rows]. Bytes have a sign, they are 128 less than the code; its level is 2 * byte
 * + 1 times the scale. */
INLINE const int8_t *byte_codes(const Weight *w, int64_t tile, const Group *g, int row, int word) {
  const uint32_t *words = plane_words(w, tile, g, 0) + (int64_t)word * MAX_PLANES * w->tile;
  return (const int8_t *)(words + row / WORD * WORD * MAX_PLANES) + row % WORD;
}

INLINE const uint16_t *scales_of(const Weight *w, int64_t tile, int slot) {
  return w->scale + (tile * w->slots + slot) * w->tile;
}

#ifdef __x86_64__
#define AVX2 __attribute__((target("avx2,fma,f16c")))

/* Of 8 rows. */
INLINE AVX2 __m256 scales_avx2(const uint16_t *scale) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)scale));
}

/* Bytes of 8 rows. */
INLINE AVX2 __m256 bytes_avx2(const int8_t *from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
}
#endif

/* --- trellis -------------------------------------------------------------------------------- */

/* Planes of the levels, some words and rows of them, each with its step from word to word: in the
 * stream as they are, or made here. */
typedef struct {
  const uint32_t *data[MAX_PLANES];
  int stride[MAX_PLANES];
  uint32_t made[4][CHUNK * MAX_TILE];
  uint32_t edge[CHUNK * 2 * EDGE]; /* the rows above a tile and its first ones, side by side */
} Planes;

/* Words [begin, end) and rows [first, first + rows) of a group with a trellis. */
typedef void Expand(const Weight *w, int64_t tile, const Group *g, int first, int rows, int begin,
                    int end, Planes *to);

Expand pbq_expand_portable;
#ifdef __x86_64__
Expand pbq_expand_avx2;   /* a multiple of 8 rows */
Expand pbq_expand_avx512; /* 32 or 64 rows; reads whole registers */
#endif

/* The planes of rows [first, first + rows) of a tile, from word `begin` of a group to the one that
 * is returned: all words, or CHUNK of them where planes are to be made. A group of bytes has none. */
INLINE int take_words(Expand *expand, const Weight *w, int64_t tile, const Group *g, int first,
                      int rows, int begin, Planes *to) {
  if (g->bytes) return g->words;
  if (!g->path) {
    for (int p = 0; p < g->planes; p++) {
      to->data[p] = plane_words(w, tile, g, p) + first;
      to->stride[p] = w->tile;
    }
    return g->words;
  }
  const int end = g->words - begin < CHUNK ? g->words : begin + CHUNK;
  expand(w, tile, g, first, rows, begin, end, to);
  return end;
}

#endif
