/* levels.c over exactly sized buffers: awkward sizes, weights and gradients against plain sums. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "levels.c"

int main(void) {
    static const int64_t SIZES[][2] = {{1, 1}, {3, 15}, {2, 16}, {5, 17}, {33, 63}};
    int checked = 0;
    unsigned random = 1;
    for (int size = 0; size < 5; size++)
        for (int tiers = 1; tiers <= MOST_TIERS; tiers += 5) {
            const int64_t n = SIZES[size][0], k = SIZES[size][1];
            int8_t *position = malloc((size_t)(n * k));
            int32_t *tier_of = malloc((size_t)k * sizeof *tier_of);
            float *scale = malloc((size_t)(n * tiers) * sizeof *scale);
            float *found = malloc((size_t)(n * tiers) * sizeof *found);
            uint16_t *out = malloc((size_t)(n * k) * sizeof *out);
            for (int64_t i = 0; i < n * k; i++) position[i] = (int8_t)(random = random * 69069 + 1, random >> 24);
            for (int64_t i = 0; i < k; i++) tier_of[i] = (int32_t)(i % tiers);
            for (int64_t i = 0; i < n * tiers; i++) scale[i] = (float)(i % 7) * 0.01f + 0.001f;
            pbq_levels(position, tier_of, scale, n, k, tiers, out, 3);
            pbq_levels_gradient(position, tier_of, out, n, k, tiers, found, 3);
            for (int64_t r = 0; r < n; r++)
                for (int t = 0; t < tiers; t++) {
                    double sum = 0, size_of = 1e-6;
                    for (int64_t c = t; c < k; c += tiers) {
                        const double exact = (double)scale[r * tiers + t] * position[r * k + c];
                        const double made = bfloat_to_float(out[r * k + c]);
                        if (fabs(made - exact) > fabs(exact) / 256) return 1;
                        sum += made * position[r * k + c], size_of += fabs(made * position[r * k + c]);
                    }
                    if (fabs(sum - found[r * tiers + t]) > 1e-6 * size_of) return 2;
                }
            free(position), free(tier_of), free(scale), free(found), free(out);
            checked++;
        }
    /* what is no number stays none, and what is too large becomes infinite */
    if (!isnan(bfloat_to_float(float_to_bfloat(NAN))) || !isinf(bfloat_to_float(float_to_bfloat(3.4e38f)))) return 3;
    printf("%d cases\n", checked);
    return 0;
}
