/* The nearest path of levels through a trellis: Viterbi's algorithm, the states side by side.
 *
 * trellis.py says what the code is, paths.py holds the slow twin. Every variant adds and compares
 * the same float32 numbers, so the path does not depend on the machine.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define MOST_STATES 4096
#define SUMS 64 /* rows whose sums stay in registers, or near */

/* A path's last bits, the newest lowest, are a state; the bit that enters moves them up. States s
 * and s + half, which differ in their oldest bit, thus both lead to 2 s (a 0 enters) and 2 s + 1.
 * That bit and the one that enters each turn over the label's high bit and leave the low one, so
 * these four steps have two labels: that of s and a 0, and the other with the same low bit. */
typedef struct {
    int top; /* codes of a label: label + 4 * (0 to top) */
    float steps;
    const float *levels;        /* rising; where there are none they are 2 * code - steps */
    int half;                   /* of the states */
    int row;                    /* bytes of decisions that a step takes */
    uint8_t label[MOST_STATES]; /* of a state and a 0. Linear: label[s ^ t] = label[s] ^ label[t] */
} Code;

/* n steps. cost, next [2 * half], aligned: of the states before them, and scratch; returns the one
 * that ends with the costs after them. d [n][4]: what each label costs. Bit s of the decisions
 * oldest [n][entered][half] becomes whether the better way to 2 s + entered is from s + half. */
typedef float *Forward(const Code *c, int64_t n, const float *d, float *cost, float *next,
                       uint8_t *oldest);

/* A step from a block of states at a and the states that differ in the oldest bit, at b. same: what
 * the labels of the block cost; zeros, ones: the decisions. */
INLINE void pairs(const int lanes, const float *restrict a, const float *restrict b,
                  const float *restrict same, const float *restrict other, float *restrict next,
                  uint8_t *zeros, uint8_t *ones) {
    static const int BIT[8] = {1, 2, 4, 8, 16, 32, 64, 128}; /* few CPUs shift by lane */
    int zero = 0, one = 0;
#pragma GCC unroll 1 /* what is unrolled early becomes no vector instructions */
    for (int i = 0; i < lanes; i++) {
        const float a0 = a[i] + same[i], b0 = b[i] + other[i];
        const float a1 = a[i] + other[i], b1 = b[i] + same[i];
        next[2 * i] = b0 < a0 ? b0 : a0;
        next[2 * i + 1] = b1 < a1 ? b1 : a1;
        zero |= -(b0 < a0) & BIT[i];
        one |= -(b1 < a1) & BIT[i];
    }
    *zeros = (uint8_t)zero, *ones = (uint8_t)one;
}

/* In blocks of 8, or of all where there are fewer. By linearity, the label of a block's first state
 * says all of its labels. */
INLINE float *advance(const int lanes, const Code *c, int64_t n, const float *d, float *cost,
                      float *next, uint8_t *oldest) {
    const int half = lanes < 8 ? lanes : c->half;
    for (; n > 0; n--, d += 4, oldest += c->row) {
        float distance[4][2][8]; /* if the first label is k: of a block's labels, of the others */
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < lanes; i++)
                distance[k][0][i] = distance[k ^ 2][1][i] = d[k ^ c->label[i]];
        for (int s = 0; s < half; s += lanes) {
            const float(*block)[8] = distance[c->label[s]];
            uint8_t *decided = oldest + s / 8;
            pairs(lanes, cost + s, cost + half + s, block[0], block[1], next + 2 * s, decided,
                  decided + c->row / 2);
        }
        float *before = cost;
        cost = next, next = before;
    }
    return cost;
}

static float *forward_plain(const Code *c, int64_t n, const float *d, float *cost, float *next,
                            uint8_t *oldest) {
    if (c->half == 2) return advance(2, c, n, d, cost, next, oldest);
    return advance(8, c, n, d, cost, next, oldest);
}

#ifdef __x86_64__

#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

static AVX2 float *forward_avx2(const Code *c, int64_t n, const float *d, float *cost, float *next,
                                uint8_t *oldest) {
    const int64_t half = c->half;
    if (half < 8) return forward_plain(c, n, d, cost, next, oldest);
    const __m256i lane = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)c->label));
    for (; n > 0; n--, d += 4, oldest += c->row) {
        const __m256 labels = _mm256_broadcast_ps((const __m128 *)d);
        __m256 distance[4][2]; /* as above; a block fills a register */
        for (int k = 0; k < 4; k++)
            distance[k][0] = distance[k ^ 2][1] =
                _mm256_permutevar_ps(labels, _mm256_xor_si256(lane, _mm256_set1_epi32(k)));
        for (int64_t i = 0; i < half / 8; i++) {
            const __m256 *block = distance[c->label[8 * i]];
            const __m256 a = _mm256_load_ps(cost + 8 * i), b = _mm256_load_ps(cost + half + 8 * i);
            const __m256 a0 = _mm256_add_ps(a, block[0]), b0 = _mm256_add_ps(b, block[1]);
            const __m256 a1 = _mm256_add_ps(a, block[1]), b1 = _mm256_add_ps(b, block[0]);
            const __m256 zero = _mm256_min_ps(b0, a0), one = _mm256_min_ps(b1, a1);
            const __m256 low = _mm256_unpacklo_ps(zero, one), high = _mm256_unpackhi_ps(zero, one);
            _mm256_store_ps(next + 16 * i, _mm256_permute2f128_ps(low, high, 0x20));
            _mm256_store_ps(next + 16 * i + 8, _mm256_permute2f128_ps(low, high, 0x31));
            oldest[i] = (uint8_t)_mm256_movemask_ps(_mm256_cmp_ps(b0, a0, _CMP_LT_OQ));
            oldest[half / 8 + i] = (uint8_t)_mm256_movemask_ps(_mm256_cmp_ps(b1, a1, _CMP_LT_OQ));
        }
        float *before = cost;
        cost = next, next = before;
    }
    return cost;
}

static AVX512 float *forward_avx512(const Code *c, int64_t n, const float *d, float *cost,
                                    float *next, uint8_t *oldest) {
    const int64_t half = c->half;
    if (half < 16) return forward_avx2(c, n, d, cost, next, oldest);
    const __m512i lane = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)c->label));
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (; n > 0; n--, d += 4, oldest += c->row) {
        const __m512 labels = _mm512_broadcast_f32x4(_mm_loadu_ps(d));
        __m512 distance[4][2];
        for (int k = 0; k < 4; k++)
            distance[k][0] = distance[k ^ 2][1] =
                _mm512_permutevar_ps(labels, _mm512_xor_si512(lane, _mm512_set1_epi32(k)));
#pragma GCC unroll 2
        for (int64_t i = 0; i < half / 16; i++) {
            const __m512 *block = distance[c->label[16 * i]];
            const __m512 a = _mm512_load_ps(cost + 16 * i);
            const __m512 b = _mm512_load_ps(cost + half + 16 * i);
            const __m512 a0 = _mm512_add_ps(a, block[0]), b0 = _mm512_add_ps(b, block[1]);
            const __m512 a1 = _mm512_add_ps(a, block[1]), b1 = _mm512_add_ps(b, block[0]);
            const __m512 zero = _mm512_min_ps(b0, a0), one = _mm512_min_ps(b1, a1);
            _mm512_store_ps(next + 32 * i, _mm512_permutex2var_ps(zero, low, one));
            _mm512_store_ps(next + 32 * i + 16, _mm512_permutex2var_ps(zero, high, one));
            const __mmask16 zeros = _mm512_cmp_ps_mask(b0, a0, _CMP_LT_OQ);
            const __mmask16 ones = _mm512_cmp_ps_mask(b1, a1, _CMP_LT_OQ);
            memcpy(oldest + 2 * i, &zeros, 2);
            memcpy(oldest + half / 8 + 2 * i, &ones, 2);
        }
        float *before = cost;
        cost = next, next = before;
    }
    return cost;
}

#endif

/* The code of a label that is nearest to x. */
INLINE float nearest(const Code *c, float x, int label) {
    if (c->levels) {
        int found = label;
        for (int code = label + 4; code <= 4 * c->top + label; code += 4)
            if (fabsf(x - c->levels[code]) < fabsf(x - c->levels[found])) found = code;
        return (float)found;
    }
    const float top = (float)c->top;
    const float rest = rintf(((x + c->steps) * 0.5f - (float)label) * 0.25f);
    const float raised = rest > 0 ? rest : 0;
    return (float)label + 4 * (raised < top ? raised : top);
}

/* Of each label: the squared distance from x to its nearest level. */
INLINE void squares(const Code *c, float x, float d[4]) {
    if (!c->levels) {
        for (int label = 0; label < 4; label++) {
            const float e = x - (2 * nearest(c, x, label) - c->steps);
            d[label] = e * e;
        }
        return;
    }
    for (int label = 0; label < 4; label++) d[label] = 3e38f;
    for (int i = 0; i <= c->top; i++) /* the labels side by side in a register */
        for (int label = 0; label < 4; label++) {
            const float e = x - c->levels[4 * i + label];
            d[label] = e * e < d[label] ? e * e : d[label];
        }
}

/* What a search needs for columns of n entries. */
typedef struct {
    int64_t n;
    const float *scale;
    float *square, *inverse; /* of the scales [n]; 0 the inverse of 0 */
    float *units, *d;        /* scratch: [n], [n][4] */
    uint8_t *oldest;
} Column;

/* The path nearest to x [n]. */
INLINE void search(Forward *forward, const Code *c, const Column *column, const float *x_scaled,
                   uint8_t *restrict codes) {
    const int64_t n = column->n;
    float *restrict const x = column->units;
    float *const d = column->d;
    uint8_t *const oldest = column->oldest;
    for (int64_t t = 0; t < n; t++) {
        const float v = x_scaled[t] * column->inverse[t];
        x[t] = fabsf(v) < 1e15f ? v : 0;
    }
    for (int64_t t = 0; t < n; t++) {
        squares(c, x[t], d + 4 * t);
        for (int label = 0; label < 4; label++) d[4 * t + label] *= column->square[t];
    }
    const unsigned half = (unsigned)c->half, states = 2 * half, side = (unsigned)c->row / 2;
    float costs[2][MOST_STATES] __attribute__((aligned(64)));
    for (unsigned s = 0; s < states; s++) costs[0][s] = s ? 1e30f : 0;
    const float *cost = forward(c, n, d, costs[0], costs[1], oldest);
    float least = cost[0];
    for (unsigned s = 1; s < states; s++) least = cost[s] < least ? cost[s] : least;
    unsigned state = 0;
    while (state < states && cost[state] > least) state++;
    state &= states - 1; /* if no cost is a number, the first, to which a path leads */
    const uint8_t *row = oldest + n * c->row;
    for (int64_t t = n - 1; t >= 0; t--) {
        const unsigned entered = state & 1, rest = state >> 1;
        row -= c->row;
        const unsigned with = row[(entered ? side : 0) + (rest >> 3)] >> (rest & 7) & 1;
        state = rest | (-with & half);
        codes[t] = (uint8_t)(c->label[state] ^ 2 * entered);
    }
    for (int64_t t = 0; t < n; t++) codes[t] = (uint8_t)nearest(c, x[t], codes[t]);
}

/* x -= the sum over i of A[i] * error[i], error [before, n]. */
INLINE void made_up_for(int64_t n, int64_t before, const float *A, const float *error, float *x) {
    for (int64_t r = 0; r < n; r += SUMS) {
        const int64_t left = n - r < SUMS ? n - r : SUMS;
        float sum[SUMS] = {0};
        for (int64_t i = 0; i < before; i++) {
            const float *restrict own = error + i * n + r;
            if (left == SUMS)
#pragma GCC unroll 1
                for (int l = 0; l < SUMS; l++) sum[l] += A[i] * own[l];
            else
                for (int64_t l = 0; l < left; l++) sum[l] += A[i] * own[l];
        }
        for (int64_t l = 0; l < left; l++) x[r + l] -= sum[l];
    }
}

/* Of columns [n], the errors of so many before which count A [before] for this one, made up for;
 * its path, and what it leaves in turn: what it became less `start`, or less itself. */
INLINE void in_turn(Forward *forward, const Code *c, const Column *column, int64_t before,
                    const float *A, float *errors, float *x, const float *start,
                    uint8_t *codes) {
    const int64_t n = column->n;
    made_up_for(n, before, A, errors, x);
    search(forward, c, column, x, codes);
    float *const error = errors + before * n;
    const float *const from = start ? start : x;
    for (int64_t t = 0; t < n; t++) {
        const float level = c->levels ? c->levels[codes[t]] : 2 * (float)codes[t] - c->steps;
        error[t] = column->scale[t] * level - from[t];
    }
}

typedef void Search(const Code *, const Column *, const float *, uint8_t *);
typedef void InTurn(const Code *, const Column *, int64_t, const float *, float *, float *,
                    const float *, uint8_t *);

/* Compiled for each kind of machine: their loops over rows become vector instructions, too. */
#define DEFINE_SEARCH(NAME, TARGET)                                                              \
    static TARGET void search_##NAME(const Code *c, const Column *column, const float *x,        \
                                     uint8_t *codes) {                                           \
        search(forward_##NAME, c, column, x, codes);                                             \
    }                                                                                            \
    static TARGET void in_turn_##NAME(const Code *c, const Column *column, int64_t before,       \
                                      const float *A, float *errors, float *x,                   \
                                      const float *start, uint8_t *codes) {                      \
        in_turn(forward_##NAME, c, column, before, A, errors, x, start, codes);                  \
    }

DEFINE_SEARCH(plain, )
#ifdef __x86_64__
DEFINE_SEARCH(avx2, AVX2)
DEFINE_SEARCH(avx512, AVX512)
#endif

typedef struct {
    const char *name;
    Search *search;
    InTurn *in_turn;
} Variant;

/* The variants this machine can run, fastest first; without a name past the last. */
static Variant variant(int index) {
    Variant found[4] = {{0}};
    int count = 0;
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found[count++] = (Variant){"avx512", search_avx512, in_turn_avx512};
    if (__builtin_cpu_supports("avx2")) found[count++] = (Variant){"avx2", search_avx2, in_turn_avx2};
#endif
    found[count++] = (Variant){"plain", search_plain, in_turn_plain};
    return found[index < count ? index : count];
}

static int chosen;

/* For tests: this variant searches from now on. Its name, or NULL if there are not so many. */
EXPORT const char *pbq_trellis_use(int index) {
    const Variant v = variant(index);
    if (v.name) chosen = index;
    return v.name;
}

static Code code_of(int planes, int memory, int h1, int h0, const float *levels) {
    const int half = 1 << (memory - 1);
    Code c = {.top = (1 << (planes - 2)) - 1, .steps = (float)((1 << planes) - 1), .levels = levels};
    c.half = half, c.row = half < 8 ? 2 : half / 4;
    for (int i = 0; i < memory; i++) {
        const int bit = 2 * (h1 >> (i + 1) & 1) + (h0 >> (i + 1) & 1);
        for (int s = 0; s < 1 << i; s++) c.label[s | 1 << i] = (uint8_t)(c.label[s] ^ bit);
    }
    return c;
}

/* For entries of these scales [n]; `square`, which all of it is part of, is NULL without memory. */
static Column column_of(const Code *c, int64_t n, const float *scale) {
    Column found = {.n = n, .scale = scale};
    found.square = malloc((size_t)n * (7 * sizeof(float) + (size_t)c->row));
    if (!found.square) return found;
    found.inverse = found.square + n, found.units = found.inverse + n, found.d = found.units + n;
    found.oldest = (uint8_t *)(found.d + 4 * n);
    for (int64_t t = 0; t < n; t++) {
        found.square[t] = scale[t] * scale[t];
        found.inverse[t] = scale[t] != 0 ? 1 / scale[t] : 0;
    }
    return found;
}

/* x [sequences, n], scale [n] -> codes [sequences, n]: of all sequences of levels scale * (2 code -
 * steps) that the trellis holds, or of scale * levels[code], levels rising, the one nearest to each
 * x. h1, h0: what of the last bits makes the two low bits of a code; bits 0 and memory are in h1
 * only. memory 2, 4, … 12; planes to 8. Returns 0, or -1 without memory. */
EXPORT int pbq_trellis(const float *x, const float *scale, int64_t sequences, int64_t n, int planes,
                       int memory, int h1, int h0, const float *levels, uint8_t *codes,
                       int threads) {
    (void)threads; /* where there is no OpenMP */
    const Code c = code_of(planes, memory, h1, h0, levels);
    Search *const run = variant(chosen).search;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Column column = column_of(&c, n, scale);
        if (!column.square) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < sequences; i++)
            if (column.square) run(&c, &column, x + i * n, codes + i * n);
        free(column.square);
    }
    return failed ? -1 : 0;
}

/* The same for columns x [columns, n] of a weight in turn, once x[j] -= the sum over i < j of
 * A[j][i] * (what i became - start[i]); start [columns, n], or NULL: x[i] as it is by then. */
EXPORT int pbq_trellis_in_turn(float *x, const float *A, const float *start, const float *scale,
                               int64_t columns, int64_t n, int planes, int memory, int h1, int h0,
                               const float *levels, uint8_t *codes) {
    const Code c = code_of(planes, memory, h1, h0, levels);
    InTurn *const run = variant(chosen).in_turn;
    const Column column = column_of(&c, n, scale);
    float *const errors = malloc((size_t)(columns * n) * sizeof(float));
    if (column.square && errors)
        for (int64_t j = 0; j < columns; j++)
            run(&c, &column, j, A + j * columns, errors, x + j * n, start ? start + j * n : NULL,
                codes + j * n);
    const int failed = !column.square || !errors;
    free(column.square), free(errors);
    return failed ? -1 : 0;
}
