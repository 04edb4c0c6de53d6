/* divergence.c over exactly sized buffers: every variant, awkward sizes, against plain sums. */
#include <stdio.h>

#include "divergence.c"

int main(void) {
  static const int64_t SIZES[][2] = {{1, 1}, {2, 15}, {1, 16}, {3, 17}, {2, 2065}};
  int checked = 0;
  unsigned random = 1;
  for (int size = 0; size < 5; size++)
    for (int kind = 0; kind < 4; kind++) {
      const int64_t tokens = SIZES[size][0], v = SIZES[size][1];
      const float gamma = kind % 2 ? 0.5f : 0;
      uint16_t *both[2], *gradient = malloc((size_t)(tokens * v) * sizeof *gradient);
      for (int i = 0; i < 2; i++) {
        both[i] = malloc((size_t)(tokens * v) * sizeof *gradient);
        for (int64_t j = 0; j < tokens * v; j++) {
          random = random * 1664525u + 1013904223u;
          both[i][j] = float_to_bfloat(((float)(random >> 8) / 8388608.0f - 1) * (kind < 2 ? 3 : 60));
        }
      }
      float *kl = malloc((size_t)tokens * sizeof *kl), *entropy = malloc((size_t)tokens * sizeof *kl);
      for (int index = 0; pbq_divergence_use(index); index++, checked++) {
        pbq_divergence(both[0], both[1], tokens, v, gamma, kl, entropy, gradient, 1 + checked % 3);
        for (int64_t t = 0; t < tokens; t++) {
          double sum[2] = {0}, exact = 0, uncertain = 0;
          for (int i = 0; i < 2; i++)
            for (int64_t c = 0; c < v; c++) sum[i] += exp(bfloat_to_float(both[i][t * v + c]));
          for (int64_t c = 0; c < v; c++) {
            const double log_q = bfloat_to_float(both[0][t * v + c]) - log(sum[0]);
            const double log_p = bfloat_to_float(both[1][t * v + c]) - log(sum[1]);
            exact += exp(log_p) * (log_p - log_q), uncertain -= exp(log_p) * log_p;
          }
          if (fabs(kl[t] - exact) > 1e-5 * (1 + exact)) return printf("KL, case %d\n", checked), 1;
          if (fabs(entropy[t] - uncertain) > 1e-5) return printf("entropy, case %d\n", checked), 1;
          const double weight = gamma != 0 ? sqrt(fmax(entropy[t], 0)) : 1; /* of 0, errors are all */
          for (int64_t c = 0; c < v; c++) {
            const double q = exp(bfloat_to_float(both[0][t * v + c])) / sum[0];
            const double p = exp(bfloat_to_float(both[1][t * v + c])) / sum[1];
            const double found = bfloat_to_float(gradient[t * v + c]);
            if (fabs(found - weight * (q - p)) > 0.004 * weight * fabs(q - p) + 1e-4 * (p + q) + 1e-30)
              return printf("gradient, case %d: %g, not %g\n", checked, found, weight * (q - p)), 1;
          }
        }
      }
      free(both[0]), free(both[1]), free(gradient), free(kl), free(entropy);
    }
  printf("%d cases\n", checked);
  return 0;
}
