/* Dense weights from whole numbers and scales, and what an error in those weights says of the
 * scales: all that a step of training does with every weight. levels.py holds the slow twins.
 *
 * A weight [n, k] is scale[r][tier_of[c]] * position[r][c]. What tier a column is of is found by
 * comparing with each: there are few, and any machine compares many columns at once. Variants for
 * AVX2 and AVX-512 take .7 of the time, 1 % of a step: they are not worth having.
 */
#include "weight.h"

#define LANES 16
#define MOST_TIERS 16

INLINE void some_weights(const int lanes, const int8_t *restrict position,
                         const int32_t *restrict tier_of, const float *restrict scale, int tiers,
                         uint16_t *restrict out) {
    float own[LANES] = {0};
    for (int t = 0; t < tiers; t++) {
        const float here = scale[t];
#pragma GCC unroll 1 /* what is unrolled early becomes no vector instructions */
        for (int l = 0; l < lanes; l++) own[l] = tier_of[l] == t ? here : own[l];
    }
#pragma GCC unroll 1
    for (int l = 0; l < lanes; l++) out[l] = float_to_bfloat(own[l] * (float)position[l]);
}

static void row_of_weights(const int8_t *position, const int32_t *tier_of, const float *scale,
                           int64_t k, int tiers, uint16_t *out) {
    int64_t c = 0;
    for (; c + LANES <= k; c += LANES)
        some_weights(LANES, position + c, tier_of + c, scale, tiers, out + c);
    some_weights((int)(k - c), position + c, tier_of + c, scale, tiers, out + c);
}

INLINE void some_gradients(const int lanes, const int8_t *restrict position,
                           const int32_t *restrict tier_of, const uint16_t *restrict gradient,
                           int tiers, float (*restrict sum)[LANES]) {
    float product[LANES];
#pragma GCC unroll 1
    for (int l = 0; l < lanes; l++) product[l] = bfloat_to_float(gradient[l]) * (float)position[l];
    for (int t = 0; t < tiers; t++)
#pragma GCC unroll 1
        for (int l = 0; l < lanes; l++) sum[t][l] += tier_of[l] == t ? product[l] : 0;
}

static void row_of_gradients(const int8_t *position, const int32_t *tier_of,
                             const uint16_t *gradient, int64_t k, int tiers, float *out) {
    float sum[MOST_TIERS][LANES] = {{0}};
    int64_t c = 0;
    for (; c + LANES <= k; c += LANES)
        some_gradients(LANES, position + c, tier_of + c, gradient + c, tiers, sum);
    some_gradients((int)(k - c), position + c, tier_of + c, gradient + c, tiers, sum);
    for (int t = 0; t < tiers; t++) {
        out[t] = 0;
        for (int l = 0; l < LANES; l++) out[t] += sum[t][l];
    }
}

/* position [n, k], tier_of [k] below tiers (MOST_TIERS at most), scale [n, tiers] -> out [n, k],
 * bfloat16. */
EXPORT void pbq_levels(const int8_t *position, const int32_t *tier_of, const float *scale,
                       int64_t n, int64_t k, int tiers, uint16_t *out, int threads) {
    (void)threads; /* where there is no OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t r = 0; r < n; r++)
        row_of_weights(position + r * k, tier_of, scale + r * tiers, k, tiers, out + r * k);
}

/* gradient [n, k], bfloat16, of the weights -> out [n, tiers] of the scales. */
EXPORT void pbq_levels_gradient(const int8_t *position, const int32_t *tier_of,
                                const uint16_t *gradient, int64_t n, int64_t k, int tiers,
                                float *out, int threads) {
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t r = 0; r < n; r++)
        row_of_gradients(position + r * k, tier_of, gradient + r * k, k, tiers, out + r * tiers);
}
