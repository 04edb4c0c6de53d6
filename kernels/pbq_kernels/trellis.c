/* The nearest path of levels through a trellis: Viterbi's algorithm, the states side by side.
 *
 * trellis.py says what the code is, paths.py holds the slow twin. Plain C loops over states, which
 * compilers turn into vector instructions; compiled once for each kind of machine.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define MOST_STATES 4096

/* A path's last bits, the newest lowest, are a state; the bit that enters moves them up. */
typedef struct {
    int top; /* codes of a label: label + 4 * (0 to top) */
    float steps;
    int32_t low[MOST_STATES], high[MOST_STATES]; /* the label's bits, when a 0 enters after a state;
                                                    a 1 turns the high one over */
} Code;

INLINE float nearest(const Code *c, float x, int label) {
    const float rest = rintf(((x + c->steps) * 0.5f - (float)label) * 0.25f);
    const float top = (float)c->top;
    return (float)label + 4 * (rest < 0 ? 0 : rest > top ? top : rest);
}

/* One row: costs of the states before it -> costs after it, and which of the two states that lead to
 * each was better: the one without the oldest bit (0) or with it (1). Returns the least cost. */
INLINE void advance(const Code *c, int states, const float d[4], const float *cost, float *next,
                    uint8_t *oldest) {
    const int half = states / 2;
    const float d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
    float zero[MOST_STATES], one[MOST_STATES]; /* cost of a 0 and of a 1 after each state */
    for (int s = 0; s < states; s++) {
        const float even = c->low[s] ? d1 : d0, odd = c->low[s] ? d3 : d2;
        zero[s] = cost[s] + (c->high[s] ? odd : even);
        one[s] = cost[s] + (c->high[s] ? even : odd);
    }
    for (int s = 0; s < half; s++) {
        const int with = zero[s + half] < zero[s];
        next[2 * s] = with ? zero[s + half] : zero[s];
        oldest[s] = (uint8_t)with;
    }
    for (int s = 0; s < half; s++) {
        const int with = one[s + half] < one[s];
        next[2 * s + 1] = with ? one[s + half] : one[s];
        oldest[half + s] = (uint8_t)with;
    }
}

/* x [n] in units of a row's scale, square [n]: that scale squared; oldest [n][states]: scratch. */
INLINE void search(const Code *c, int states, int64_t n, const float *x, const float *square,
                   uint8_t *oldest, uint8_t *codes) {
    float costs[2][MOST_STATES], *cost = costs[0], *next = costs[1];
    for (int s = 0; s < states; s++) cost[s] = s ? 1e30f : 0;
    for (int64_t t = 0; t < n; t++) {
        float d[4];
        for (int label = 0; label < 4; label++) {
            const float e = x[t] - (2 * nearest(c, x[t], label) - c->steps);
            d[label] = e * e * square[t];
        }
        advance(c, states, d, cost, next, oldest + t * states);
        float *before = cost;
        cost = next, next = before;
    }
    int state = 0;
    for (int s = 1; s < states; s++)
        if (cost[s] < cost[state]) state = s;
    for (int64_t t = n - 1; t >= 0; t--) {
        const int entered = state & 1, rest = state >> 1;
        const int before = rest | (oldest[t * states + entered * (states / 2) + rest] ? states / 2 : 0);
        const int label = 2 * (c->high[before] ^ entered) + c->low[before];
        codes[t] = (uint8_t)nearest(c, x[t], label);
        state = before;
    }
}

typedef void (*Search)(const Code *, int, int64_t, const float *, const float *, uint8_t *, uint8_t *);

/* A constant number of states lets the loops over them unroll. */
#define DEFINE_SEARCH(NAME, TARGET)                                                               \
    static TARGET void NAME(const Code *c, int states, int64_t n, const float *x,                \
                            const float *square, uint8_t *oldest, uint8_t *codes) {              \
        switch (states) {                                                                        \
        case 4: search(c, 4, n, x, square, oldest, codes); break;                                \
        case 16: search(c, 16, n, x, square, oldest, codes); break;                              \
        case 64: search(c, 64, n, x, square, oldest, codes); break;                              \
        case 256: search(c, 256, n, x, square, oldest, codes); break;                            \
        case 1024: search(c, 1024, n, x, square, oldest, codes); break;                          \
        default: search(c, 4096, n, x, square, oldest, codes); break;                            \
        }                                                                                        \
    }

DEFINE_SEARCH(search_plain, )
#ifdef __x86_64__
DEFINE_SEARCH(search_avx2, __attribute__((target("avx2"))))
DEFINE_SEARCH(search_avx512,
              __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))))
#endif

static Search fastest(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return search_avx512;
    if (__builtin_cpu_supports("avx2")) return search_avx2;
#endif
    return search_plain;
}

static int parity(int x) { return __builtin_popcount((unsigned)x) & 1; }

/* x [sequences, n], scale [n] -> codes [sequences, n]: of all sequences of levels scale * (2 code -
 * steps) that the trellis holds, the one nearest to each x. h1, h0: what of the last bits makes the
 * two low bits of a code; bit 0 is in h1 only. memory 2, 4, … 12. Returns 0, or -1 without memory. */
EXPORT int pbq_trellis(const float *x, const float *scale, int64_t sequences, int64_t n, int planes,
                       int memory, int h1, int h0, uint8_t *codes, int threads) {
    const int states = 1 << memory;
    Code c = {(1 << (planes - 2)) - 1, (float)((1 << planes) - 1), {0}, {0}};
    for (int s = 0; s < states; s++) {
        c.high[s] = parity((s << 1) & h1);
        c.low[s] = parity((s << 1) & h0);
    }
    const Search run = fastest();
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
        float *units = malloc((size_t)n * (sizeof(float) + (size_t)states));
        uint8_t *oldest = (uint8_t *)(units + n);
        if (!units) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < sequences; i++) {
            if (!units) continue;
            for (int64_t t = 0; t < n; t++) {
                const float v = x[i * n + t] * inverse[t];
                units[t] = fabsf(v) < 1e15f ? v : 0;
            }
            run(&c, states, n, units, square, oldest, codes + i * n);
        }
        free(units);
    }
    free(square);
    return failed ? -1 : 0;
}
