/* attention.c over exactly sized buffers: awkward sizes, any number of threads, against plain sums.
 * Prints no cases where the machine has no tiles. */
#include <stdio.h>

#include "attention.c"

/* batch, heads, heads of keys, tokens, width */
static const int64_t SIZES[][5] = {
    {1, 1, 1, 1, 8}, {2, 4, 2, 17, 8}, {1, 2, 1, 65, 24}, {1, 3, 3, 130, 40}, {1, 2, 1, 64, 64}};

static unsigned seed = 1;

/* [batch, tokens, heads, width], as models make them. */
static uint16_t *made(const int64_t *size, int64_t heads, int64_t *steps) {
  const int64_t count = size[0] * heads * size[3] * size[4];
  uint16_t *x = malloc((size_t)count * sizeof *x);
  for (int64_t i = 0; i < count; i++) {
    seed = seed * 1664525u + 1013904223u;
    x[i] = float_to_bfloat(((float)(seed >> 8) / 8388608.0f - 1) * 2);
  }
  steps[0] = size[3] * heads * size[4], steps[1] = size[4], steps[2] = heads * size[4];
  return x;
}

/* Of the slow way: weights [tokens][tokens] of one head of query, q, and one of key, k. */
static void softmax(const uint16_t *q, int64_t q_step, const uint16_t *k, int64_t k_step,
                    int64_t tokens, int64_t width, double scale, double *weights, float *sums) {
  for (int64_t t = 0; t < tokens; t++) {
    double sum = 0;
    for (int64_t s = 0; s < tokens; s++) {
      double score = 0;
      for (int64_t c = 0; c < width; c++)
        score += (double)bfloat_to_float(q[t * q_step + c]) * bfloat_to_float(k[s * k_step + c]);
      weights[t * tokens + s] = s <= t ? exp(scale * score) : 0;
      sum += weights[t * tokens + s];
    }
    for (int64_t s = 0; s < tokens; s++) weights[t * tokens + s] /= sum;
    sums[t] = (float)log(sum);
  }
}

/* Whether found, [heads][tokens][width], is within 2 % of exact, on the whole. */
static int far_from(const uint16_t *found, const double *exact, int64_t count) {
  double error = 0, size = 0;
  for (int64_t i = 0; i < count; i++) {
    const double difference = bfloat_to_float(found[i]) - exact[i];
    error += difference * difference, size += exact[i] * exact[i];
  }
  return !(error <= 4e-4 * size + 1e-12); /* nor is what is no number */
}

static int check(const int64_t *size, int threads) {
  const int64_t b = size[0], h = size[1], g = size[2], tokens = size[3], d = size[4];
  const int64_t all = b * h * tokens * d, shared = b * g * tokens * d;
  const float scale = 0.3f;
  int64_t steps[15];
  uint16_t *given[5];
  for (int i = 0; i < 5; i++) given[i] = made(size, i == 1 || i == 2 ? g : h, steps + 3 * i);
  float *sums = malloc((size_t)(b * h * tokens) * sizeof *sums);
  double *exact[3] = {calloc((size_t)all, 8), calloc((size_t)shared, 8), calloc((size_t)shared, 8)};
  double *weights = malloc((size_t)(tokens * tokens) * sizeof *weights);
  for (int64_t i = 0; i < b * h; i++) {
    const int64_t head = i % h / (h / g), of_key = (i / h * g + head) * tokens * d;
    const uint16_t *x[5];
    for (int j = 0; j < 5; j++)
      x[j] = given[j] + i / h * steps[3 * j] + (j == 1 || j == 2 ? head : i % h) * steps[3 * j + 1];
    softmax(x[0], steps[2], x[1], steps[5], tokens, d, scale, weights, sums + i * tokens);
    for (int64_t t = 0; t < tokens; t++) {
      double inner = 0;
      for (int64_t c = 0; c < d; c++)
        inner += (double)bfloat_to_float(x[4][t * steps[14] + c]) *
                 bfloat_to_float(x[3][t * steps[11] + c]);
      for (int64_t s = 0; s <= t; s++) {
        const double weight = weights[t * tokens + s];
        double by_weight = 0;
        for (int64_t c = 0; c < d; c++)
          by_weight += (double)bfloat_to_float(x[4][t * steps[14] + c]) *
                       bfloat_to_float(x[2][s * steps[8] + c]);
        const double by_score = scale * weight * (by_weight - inner);
        for (int64_t c = 0; c < d; c++) {
          exact[0][(i * tokens + t) * d + c] += by_score * bfloat_to_float(x[1][s * steps[5] + c]);
          exact[1][of_key + s * d + c] += by_score * bfloat_to_float(x[0][t * steps[2] + c]);
          exact[2][of_key + s * d + c] += weight * bfloat_to_float(x[4][t * steps[14] + c]);
        }
      }
    }
  }
  uint16_t *found[3] = {malloc((size_t)all * 2), malloc((size_t)shared * 2),
                        malloc((size_t)shared * 2)};
  const int failed =
      pbq_attention_back((const uint16_t *const *)given, steps, sums, size, scale, found[0],
                         found[1], found[2], threads) ||
      far_from(found[0], exact[0], all) || far_from(found[1], exact[1], shared) ||
      far_from(found[2], exact[2], shared);
  for (int i = 0; i < 5; i++) free(given[i]);
  for (int i = 0; i < 3; i++) free(exact[i]), free(found[i]);
  free(sums), free(weights);
  return failed;
}

int main(void) {
  int checked = 0;
  for (int i = 0; best_unit() == TILES && i < 5; i++)
    for (int threads = 1; threads <= 3; threads++, checked++)
      if (check(SIZES[i], threads)) return printf("size %d, %d threads\n", i, threads), 1;
  printf("%d cases\n", checked);
  return 0;
}
