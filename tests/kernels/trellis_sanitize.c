/* trellis.c over exactly sized buffers: every variant, awkward sizes, wild numbers. The path found
 * must be one, no worse than the path of zeros, and that of the other variants. */
#include <stdio.h>

#include "trellis.c"

static const int H1[] = {0, 0, 5, 0, 19, 0, 103, 0, 397, 0, 1575, 0, 6727};
static const int H0[] = {0, 0, 2, 0, 4, 0, 2, 0, 2, 0, 2, 0, 2};

static float error(const uint8_t *codes, const float *x, const float *scale, int64_t n,
                   const float *levels) {
    float sum = 0;
    for (int64_t t = 0; t < n; t++) {
        const float e = x[t] - scale[t] * levels[codes[t]];
        sum += e * e;
    }
    return sum;
}

static int parity(int x) { return __builtin_popcount((unsigned)x) & 1; }

/* Whether the low planes of codes [n] are a path of the trellis: one is built along. */
static int is_path(const uint8_t *codes, int64_t n, int memory) {
    const int states = 1 << memory;
    uint8_t alive[MOST_STATES] = {1}, next[MOST_STATES]; /* states that a path may be in */
    int left = 1;
    for (int64_t t = 0; t < n && left; t++) {
        memset(next, 0, sizeof next);
        left = 0;
        for (int s = 0; s < states; s++)
            for (int u = 0; u < 2 && alive[s]; u++) {
                const int r = s << 1 | u;
                const int label = 2 * parity(r & H1[memory]) + parity(r & H0[memory]);
                if (label == (codes[t] & 3)) left = next[r & (states - 1)] = 1;
            }
        memcpy(alive, next, sizeof alive);
    }
    return left;
}

int main(void) {
    static const int64_t SIZES[][2] = {{1, 1}, {3, 2}, {16, 5}, {17, 33}, {40, 64}};
    int checked = 0;
    unsigned random = 1;
    for (int size = 0; size < 5; size++)
        for (int memory = 2; memory <= 12; memory += 2)
            for (int kind = 0; kind < 6; kind++) {
                const int planes = 2 + kind / 2 * 3, uneven = kind % 2, steps = (1 << planes) - 1;
                float *levels = malloc((size_t)(steps + 1) * sizeof *levels);
                for (int i = 0; i <= steps; i++) {
                    const float even = (float)(2 * i - steps);
                    levels[i] = even + (uneven ? 0.1f * even * fabsf(even) : 0);
                }
                const int64_t c = SIZES[size][0], n = SIZES[size][1];
                float *x = malloc((size_t)(c * n) * sizeof *x), *scale = malloc((size_t)n * sizeof *x);
                uint8_t *codes = malloc((size_t)(c * n)), *zeros = calloc((size_t)n, 1);
                uint8_t *first = malloc((size_t)(c * n)); /* what the first variant finds */
                for (int64_t i = 0; i < c * n; i++) {
                    random = random * 1664525u + 1013904223u;
                    x[i] = (float)(random >> 8) / 8388608.0f - 1;
                }
                for (int64_t t = 0; t < n; t++) scale[t] = t % 5 ? 0.3f : 0;
                if (size == 3) x[7] = NAN, x[40] = INFINITY;
                for (int v = 0; pbq_trellis_use(v); v++, checked++) {
                    const int threads = 1 + checked % 3;
                    if (pbq_trellis(x, scale, c, n, planes, memory, H1[memory], H0[memory],
                                    uneven ? levels : NULL, codes, threads))
                        return 2;
                    if (!v) memcpy(first, codes, (size_t)(c * n));
                    if (memcmp(first, codes, (size_t)(c * n))) {
                        printf("%s in case %d\n", pbq_trellis_use(v), checked);
                        return 1;
                    }
                }
                for (int64_t i = 0; i < c; i++) {
                    const uint8_t *own = first + i * n;
                    const float found = error(own, x + i * n, scale, n, levels);
                    if (!is_path(own, n, memory) ||
                        found > 1.0001f * error(zeros, x + i * n, scale, n, levels)) {
                        printf("sequence %d of case %d\n", (int)i, checked);
                        return 1;
                    }
                }
                /* in turn: without what is made up for, the same paths, but behind what is no number */
                float *A = calloc((size_t)(c * c), sizeof *A), *own = malloc((size_t)(c * n) * sizeof *x);
                for (int with = 0; with < 2; with++) {
                    for (int64_t i = 0; with && i < c * c; i++) A[i] = 0.01f * (float)(i % 7);
                    for (int v = 0; pbq_trellis_use(v); v++, checked++) {
                        memcpy(own, x, (size_t)(c * n) * sizeof *x);
                        if (pbq_trellis_in_turn(own, A, v ? x : NULL, scale, c, n, planes, memory,
                                                H1[memory], H0[memory], uneven ? levels : NULL, codes))
                            return 2;
                        int wrong = !with && size != 3 && memcmp(first, codes, (size_t)(c * n));
                        for (int64_t i = 0; i < c; i++) wrong |= !is_path(codes + i * n, n, memory);
                        if (wrong) {
                            printf("%s in turn, case %d\n", pbq_trellis_use(v), checked);
                            return 1;
                        }
                    }
                }
                free(A), free(own);
                free(x), free(scale), free(levels), free(codes), free(first), free(zeros);
            }
    printf("%d cases\n", checked);
    return 0;
}
