/* The nearest path of levels through a trellis: Viterbi's algorithm, 16 sequences side by side.
 *
 * trellis.py says what the code is and holds the slow twin. Plain C loops over LANES sequences,
 * which compilers turn into vector instructions; compiled once for each kind of machine.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define MOST_STATES 64

typedef struct {
    int planes, memory, states;
    float steps;
    uint8_t label[2 * MOST_STATES]; /* of each register: state before, then the bit that enters */
} Code;

/* Squared distance of x to the nearest level of each of the four labels, in units of the weights. */
INLINE void distances(const Code *c, const float *x, float square, float d[4][LANES]) {
    const float top = (float)((1 << (c->planes - 2)) - 1);
    for (int q = 0; q < 4; q++)
        for (int l = 0; l < LANES; l++) {
            float rest = rintf(((x[l] + c->steps) * 0.5f - (float)q) * 0.25f);
            rest = rest < 0 ? 0 : rest > top ? top : rest;
            const float e = x[l] - (2 * ((float)q + 4 * rest) - c->steps);
            d[q][l] = e * e * square;
        }
}

/* x [n][LANES] in units of a row's scale, square [n]: that scale squared; decision [n][states / 8
 * rounded up][LANES]. Leaves the codes in code [n][LANES]. */
INLINE void block(const Code *c, int states, int64_t n, const float *x, const float *square,
                  uint8_t *decision, uint8_t *code) {
    const int half = states / 2, bytes = (states + 7) / 8;
    float cost[MOST_STATES][LANES], next[MOST_STATES][LANES], d[4][LANES];
    for (int s = 0; s < states; s++)
        for (int l = 0; l < LANES; l++) cost[s][l] = s ? 1e30f : 0;
    for (int64_t t = 0; t < n; t++) {
        distances(c, x + t * LANES, square[t], d);
        for (int byte = 0; byte < bytes; byte++) {
            int32_t chosen[LANES] = {0};
            for (int bit = 0; bit < 8 && 8 * byte + bit < states; bit++) {
                /* the new state is the old one moved up by the bit that enters: two lead here */
                const int s = 8 * byte + bit, low = s >> 1, high = low | half;
                const float *a = d[c->label[2 * low | (s & 1)]];
                const float *b = d[c->label[2 * high | (s & 1)]];
                for (int l = 0; l < LANES; l++) {
                    const float from_low = cost[low][l] + a[l], from_high = cost[high][l] + b[l];
                    const int better = from_high < from_low;
                    next[s][l] = better ? from_high : from_low;
                    chosen[l] |= better << bit;
                }
            }
            uint8_t *out = decision + (t * bytes + byte) * LANES;
            for (int l = 0; l < LANES; l++) out[l] = (uint8_t)chosen[l];
        }
        memcpy(cost, next, (size_t)states * sizeof *cost);
    }
    int state[LANES] = {0};
    for (int s = 1; s < states; s++)
        for (int l = 0; l < LANES; l++)
            if (cost[s][l] < cost[state[l]][l]) state[l] = s;
    const int top = (1 << (c->planes - 2)) - 1;
    for (int64_t t = n - 1; t >= 0; t--)
        for (int l = 0; l < LANES; l++) {
            const int s = state[l];
            const int high = decision[(t * bytes + (s >> 3)) * LANES + l] >> (s & 7) & 1;
            const int before = s >> 1 | (high ? half : 0);
            const int q = c->label[2 * before | (s & 1)];
            int rest = (int)rintf(((x[t * LANES + l] + c->steps) * 0.5f - (float)q) * 0.25f);
            rest = rest < 0 ? 0 : rest > top ? top : rest;
            code[t * LANES + l] = (uint8_t)(q + 4 * rest);
            state[l] = before;
        }
}

/* A constant number of states lets the loops over them unroll. */
INLINE void any_block(const Code *c, int64_t n, const float *x, const float *square,
                      uint8_t *decision, uint8_t *code) {
    switch (c->states) {
    case 4: block(c, 4, n, x, square, decision, code); break;
    case 8: block(c, 8, n, x, square, decision, code); break;
    case 16: block(c, 16, n, x, square, decision, code); break;
    case 32: block(c, 32, n, x, square, decision, code); break;
    default: block(c, 64, n, x, square, decision, code); break;
    }
}

typedef void (*Block)(const Code *, int64_t, const float *, const float *, uint8_t *, uint8_t *);

#define DEFINE_BLOCK(NAME, TARGET)                                                              \
    static TARGET void NAME(const Code *c, int64_t n, const float *x, const float *square,     \
                            uint8_t *decision, uint8_t *code) {                                \
        any_block(c, n, x, square, decision, code);                                            \
    }

DEFINE_BLOCK(block_plain, )
#ifdef __x86_64__
DEFINE_BLOCK(block_avx2, __attribute__((target("avx2"))))
DEFINE_BLOCK(block_avx512,
             __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))))
#endif

static Block fastest(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return block_avx512;
    if (__builtin_cpu_supports("avx2")) return block_avx2;
#endif
    return block_plain;
}

static int parity(int x) { return __builtin_popcount((unsigned)x) & 1; }

/* x [sequences, n], scale [n] -> codes [sequences, n]: of all sequences of levels scale * (2 code -
 * steps) that the trellis holds, the one nearest to each x. h1, h0: what of the register makes the
 * two low bits of a code. Returns 0, or -1 without memory. */
EXPORT int pbq_trellis(const float *x, const float *scale, int64_t sequences, int64_t n, int planes,
                       int memory, int h1, int h0, uint8_t *codes, int threads) {
    Code c = {planes, memory, 1 << memory, (float)((1 << planes) - 1), {0}};
    for (int r = 0; r < 2 * c.states; r++) c.label[r] = (uint8_t)(2 * parity(r & h1) + parity(r & h0));
    const Block run = fastest();
    const size_t bytes = (size_t)n * LANES * sizeof(float);
    const size_t each = bytes + (size_t)n * LANES * (size_t)((c.states + 7) / 8 + 1);
    float *square = malloc(2 * (size_t)n * sizeof(float));
    if (!square) return -1;
    float *inverse = square + n;
    for (int64_t t = 0; t < n; t++) {
        square[t] = scale[t] * scale[t];
        inverse[t] = scale[t] != 0 ? 1 / scale[t] : 0;
    }
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *scratch = malloc(each);
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
        float *lanes = (float *)scratch;
        uint8_t *code = (uint8_t *)scratch + bytes, *decision = code + n * LANES;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < sequences; i += LANES) {
            if (!scratch) continue;
            const int count = (int)(sequences - i < LANES ? sequences - i : LANES);
            for (int l = 0; l < LANES; l++)
                for (int64_t t = 0; t < n; t++) {
                    const float v = l < count ? x[(i + l) * n + t] * inverse[t] : 0;
                    lanes[t * LANES + l] = fabsf(v) < 1e15f ? v : 0;
                }
            run(&c, n, lanes, square, decision, code);
            for (int l = 0; l < count; l++)
                for (int64_t t = 0; t < n; t++) codes[(i + l) * n + t] = code[t * LANES + l];
        }
        free(scratch);
    }
    free(square);
    return failed ? -1 : 0;
}
