/* Runs every variant of cpu.c over awkward sizes, each buffer exactly as large as it must be, and
 * compares with the portable one. test_cpu.py builds it with -fsanitize=address,undefined, and for
 * ARM. */
#include <stdio.h>

#include "cpu.c"

int pbq_unit(void);
int64_t pbq_product_scratch(const Weight *w, int64_t m, int threads);
void pbq_product(const Weight *w, int unit, const uint16_t *x, int64_t m, uint16_t *y, void *scratch,
                 int threads);
int64_t pbq_floats_scratch(const Weight *w, int64_t m, int threads);
void pbq_floats(const Weight *w, const void *x, int dtype, int64_t m, void *y, int y_dtype,
                void *scratch, int threads);

#define GROUPS 8

typedef struct {
  int planes, columns, group_size, tied, offset;
  int path, delay, uneven; /* of a trellis, which makes one plane more */
} Tier;

typedef struct {
  int64_t n, m;
  const Tier *tiers;
  int count, dtype, mode;
} Case;

static uint32_t state = 1;

static uint32_t noise(void) { return state = state * 1664525u + 1013904223u; }

static float uniform(void) { return (float)(noise() >> 8) / 8388608.0f - 1.0f; }

/* A copy in a block of its own: one element more is out of bounds for the sanitizer. */
static void *exactly(const void *from, size_t bytes) {
  void *copy = malloc(bytes ? bytes : 1);
  if (bytes) memcpy(copy, from, bytes);
  return copy;
}

static int add_groups(Weight *w, Group *groups, const Tier *tiers, int count) {
  int64_t byte = 0;
  int n = 0;
  for (int t = 0; t < count; t++)
    for (int begin = 0; begin < tiers[t].columns; begin += tiers[t].group_size) {
      Group *g = groups + n++;
      const int left = tiers[t].columns - begin;
      g->bit = 8 * byte + begin;
      g->plane_bits = tiers[t].columns;
      g->columns = left < tiers[t].group_size ? left : tiers[t].group_size;
      g->words = (g->columns + WORD - 1) / WORD;
      g->first_word = w->words;
      g->stream = w->stream;
      g->stored = tiers[t].planes;
      g->planes = tiers[t].planes + (tiers[t].path != 0);
      g->tied = tiers[t].tied;
      g->bytes = g->tied && g->stored == MAX_PLANES;
      g->path = tiers[t].path;
      g->delay = tiers[t].delay;
      g->uneven = tiers[t].uneven;
      for (int p = 0; p < g->planes; p++)
        g->factor[p] = g->uneven ? 13 + 6 * p : g->tied ? 1 << p : 1;
      g->scale = w->slots;
      w->slots += g->stored == 0 ? 0 : g->tied ? 1 : g->stored;
      g->offset = tiers[t].offset ? w->slots++ : -1;
      w->words += g->words;
      w->stream += g->stored * g->words;
      if (left <= tiers[t].group_size)
        byte += ((int64_t)tiers[t].planes * tiers[t].columns + 7) / 8;
    }
  w->row_bytes = byte;
  return n;
}

/* The columns in stored order: backwards, or three runs in rising order. */
static int64_t *order_of(int64_t k, int thirds) {
  int64_t *order = malloc(k * sizeof *order);
  for (int64_t i = 0; i < k && !thirds; i++) order[i] = k - 1 - i;
  for (int64_t i = 0, r = 0; r < 3 && thirds; r++)
    for (int64_t c = r; c < k; c += 3) order[i++] = c;
  return order;
}

static int32_t *columns_of(const Weight *w, const Group *groups, const int64_t *order) {
  int32_t *column = malloc(sizeof(int32_t) * w->words * WORD);
  for (int i = 0; i < w->words * WORD; i++) column[i] = -1;
  for (int i = 0; i < w->groups; i++)
    for (int c = 0; c < groups[i].columns; c++)
      column[groups[i].first_word * WORD + c] = (int32_t)*order++;
  return column;
}

/* By products.c, whose weights are rounded, against lookups: without the overlay, of which only the
 * bounds are looked at. */
static void check_products(const Weight *w, const char *x, int64_t m, int threads) {
  const int64_t count = m * w->n;
  uint16_t *y = malloc(count * sizeof *y), *sums = malloc(count * sizeof *sums);
  Weight plain = *w;
  plain.overlay_start = NULL;
  if (pbq_matmul(&plain, EXACT, x, BFLOAT16, m, sums, BFLOAT16, 1)) exit(2);
  for (int unit = 1; unit <= pbq_unit(); unit++) {
    void *scratch = aligned_alloc(64, pbq_product_scratch(w, m, threads));
    pbq_product(w, unit, (const uint16_t *)x, m, y, scratch, threads);
    pbq_product(&plain, unit, (const uint16_t *)x, m, y, scratch, threads);
    float error = 0, most = 1e-30f;
    for (int64_t i = 0; i < count; i++) {
      const float sum = load(sums, i, BFLOAT16), off = fabsf(load(y, i, BFLOAT16) - sum);
      if (!(off <= error)) error = off;
      if (fabsf(sum) > most) most = fabsf(sum);
    }
    if (!(error <= 0x1p-6f * most)) exit(6);
    free(scratch);
  }
  free(y), free(sums);
}

/* By floats.c, whose sums are of 256 columns each, against lookups of the same x in fp32. */
static void check_floats(const Weight *w, const char *x, int dtype, int64_t m, int threads) {
  const int64_t count = m * w->n;
  float *y = malloc(count * sizeof *y), *sums = malloc(count * sizeof *sums);
  float error = 0, most = 1e-30f;
  Weight plain = *w;
  plain.overlay_start = NULL;
  void *scratch = aligned_alloc(64, pbq_floats_scratch(w, m, threads));
  float *wide = malloc(m * w->k * sizeof *wide);
  for (int64_t i = 0; i < m * w->k; i++) wide[i] = load(x, i, dtype);
  if (pbq_matmul(&plain, EXACT, wide, FLOAT32, m, sums, FLOAT32, 1)) exit(2);
  pbq_floats(w, x, dtype, m, y, FLOAT32, scratch, threads);
  for (int64_t i = 0; i < count; i++) {
    if (!(fabsf(y[i] - sums[i]) <= error)) error = fabsf(y[i] - sums[i]);
    if (fabsf(sums[i]) > most) most = fabsf(sums[i]);
  }
  if (!(error <= 256 * 0x1p-25f * most)) exit(8); /* of 256 equal numbers added one by one */
  free(scratch), free(y), free(sums), free(wide);
}

/* y [m, n] and dense [n, k] (or NULL), both in fp32; x[m - 1, 0] is `last` where that is not 0. */
static void run(const Case *c, int index, int threads, float last, float *y, float *dense) {
  const int64_t n = c->n, m = c->m;
  const int dtype = c->dtype;
  Group groups[GROUPS] = {0};
  Weight w = {.n = n, .variant = index, .tile = n > 64 ? 64 : 32};
  for (int t = 0; t < c->count; t++) {
    w.k += c->tiers[t].columns;
    w.trellises |= c->tiers[t].path != 0;
  }
  w.groups = add_groups(&w, groups, c->tiers, c->count);
  w.group = exactly(groups, sizeof(Group) * w.groups);
  const int64_t tiles = (n + w.tile - 1) / w.tile, element = size_of(dtype);

  state = 1; /* the same bits for every variant */
  uint8_t *stored = malloc(n * w.row_bytes + (w.row_bytes == 0));
  for (int64_t i = 0; i < n * w.row_bytes; i++) stored[i] = i < w.row_bytes ? 255 : noise() >> 24;
  uint16_t *scale = calloc(tiles * w.slots * w.tile + 1, 2);
  for (int64_t row = 0; row < n; row++)
    for (int slot = 0; slot < w.slots; slot++)
      scale[(row / w.tile * w.slots + slot) * w.tile + row % w.tile] = float_to_half(uniform());
  int64_t *overlay_start = malloc(sizeof(int64_t) * (n + 1));
  int32_t *overlay_column = malloc(sizeof(int32_t) * n);
  float *overlay_delta = malloc(sizeof(float) * n);
  uint16_t *overlay_value = malloc(sizeof(uint16_t) * n);
  for (int64_t row = 0; row < n; row++) {
    overlay_start[row] = row;
    overlay_column[row] = (int32_t)(noise() % (uint32_t)w.k);
    overlay_delta[row] = uniform();
    overlay_value[row] = 0;
  }
  overlay_start[n] = n;
  char *x = malloc(m * w.k * element), *out = malloc(m * n * element);
  for (int64_t i = 0; i < m * w.k; i++) store(x, i, dtype, (noise() >> 28 ? 1 : 50) * uniform());
  /* The last of several tokens and the first row have the largest sums there are. */
  for (int64_t i = (m - 1) * w.k; m > 1 && i < m * w.k; i++) store(x, i, dtype, 1.9999999f);
  if (last != 0) store(x, (m - 1) * w.k, dtype, last);

  uint32_t *data = malloc(tiles * w.stream * w.tile * 4 + 1);
  const int thirds = n % 2;
  int64_t *order = order_of(w.k, thirds), *third = order_of(w.k, 1);
  uint32_t *run_mask = calloc((w.k + 31) / 32 * MOST_RUNS, sizeof *run_mask);
  w.column = columns_of(&w, groups, order);
  w.run_mask = run_mask;
  w.runs = pbq_runs(order, w.k, run_mask, w.run_begin);
  if (w.k > MOST_RUNS && w.runs != (thirds ? 3 : 0)) exit(7);
  w.scale = exactly(scale, tiles * w.slots * w.tile * 2);
  w.overlay_start = overlay_start;
  w.overlay_column = overlay_column;
  w.overlay_delta = overlay_delta;
  w.overlay_value = overlay_value;
  pbq_repack(&w, stored, data, threads);
  w.data = exactly(data, tiles * w.stream * w.tile * 4);
  if (pbq_matmul(&w, c->mode, x, dtype, m, out, dtype, threads)) exit(2);
  for (int64_t i = 0; i < m * n; i++) y[i] = load(out, i, dtype);
  if (dtype == BFLOAT16 && c->mode == EXACT && last == 0) check_products(&w, x, m, threads);
  if (c->mode == EXACT && last == 0 && !strcmp(pbq_variant_name(index), "avx2"))
    check_floats(&w, x, dtype, m, threads);
  char *decoded = malloc(n * w.k * element), *line = malloc(threads * w.k * element);
  int64_t *to = malloc(w.k * sizeof(int64_t));
  for (int64_t i = 0; i < w.k; i++) to[i] = w.k - 1 - i;
  if (dense) {
    /* three runs of columns in rising order, if the weight has them, then one for each column */
    char *merged = malloc(n * w.k * element);
    if (!thirds) w.runs = 0;
    pbq_decode(&w, 0, n, w.k, dtype, NULL, NULL, decoded, threads);
    pbq_decode(&w, 0, n, w.k, dtype, third, line, merged, threads);
    for (int64_t row = 0; row < n; row++)
      for (int64_t i = 0; i < w.k; i++)
        if (memcmp(merged + (row * w.k + third[i]) * element, decoded + (row * w.k + i) * element,
                   element))
          exit(5);
    free(merged);
    w.runs = 0;
    pbq_decode(&w, 0, n, w.k, dtype, to, line, decoded, threads);
    for (int64_t i = 0; i < n * w.k; i++) dense[i] = load(decoded, i, dtype);
  }
  int64_t *rows = malloc(n * sizeof(int64_t));
  for (int64_t row = 0; row < n; row++) rows[row] = row;
  memset(stored, 255, n * w.row_bytes);
  if (pbq_unpack(&w, rows, n, stored, threads)) exit(3);
  pbq_repack(&w, stored, data, threads);
  if (memcmp(data, w.data, tiles * w.stream * w.tile * 4)) exit(4);

  void *all[] = {(void *)w.group, stored,         scale,         x,    out,
                 overlay_start,   overlay_column, overlay_delta, data, (void *)w.column,
                 (void *)w.scale, (void *)w.data, decoded,       line, to,   rows,
                 overlay_value,   order,          third,         run_mask};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

#define MOST_SUMS (33 * 37)
#define MOST_WEIGHTS (130 * 2198)

static float y[MOST_SUMS], expected[MOST_SUMS], other[MOST_SUMS];
static float dense[MOST_WEIGHTS], expected_dense[MOST_WEIGHTS];

/* The largest difference from `expected`, by its largest number. */
static float worst(int64_t count) {
  float error = 0, most = 1e-30f;
  for (int64_t i = 0; i < count; i++) {
    error = fmaxf(error, fabsf(y[i] - expected[i]));
    most = fmaxf(most, fabsf(expected[i]));
    if (y[i] != y[i]) return y[i];
  }
  return error / most;
}

/* What is wrong with a variant's results for this case, or NULL. */
static const char *fault(const Case *c, int index, int threads) {
  static const float MOST[] = {[FLOAT32] = 2e-6f, [BFLOAT16] = 0x1p-7f, [FLOAT16] = 0x1p-10f};
  const int64_t n = c->n, m = c->m;
  int64_t k = 0;
  for (int t = 0; t < c->count; t++) k += c->tiers[t].columns;
  run(c, index, threads, 0, y, dense);
  if (!(worst(m * n) <= MOST[c->dtype])) return "differs";
  if (memcmp(dense, expected_dense, n * k * sizeof(float))) return "decodes otherwise";
  run(c, index, threads, INFINITY, other, NULL);
  if (memcmp(other, y, (m - 1) * n * sizeof(float))) return "depends on other tokens";
  for (int64_t i = (m - 1) * n; i < m * n; i++)
    if (isfinite(other[i])) return "hides what is not finite";
  Case alone = *c;
  alone.m = 1;
  run(&alone, index, 1, 0, other, NULL);
  return m > 1 && memcmp(other, y, n * sizeof(float)) ? "depends on how many there are" : NULL;
}

int main(void) {
  static const Tier MIXES[][4] = {
      {{1, 1, 1, 0, 0}},
      {{1, 63, 63, 0, 0}},
      {{0, 7, 7, 0, 1}, {1, 61, 33, 0, 1}, {2, 30, 30, 1, 0}, {4, 95, 64, 0, 1}},
      {{5, 1, 1, 0, 0}, {8, 33, 33, 1, 1}},
      {{7, 31, 31, 0, 1}},
      {{8, 150, 64, 1, 1}, {2, 33, 33, 0, 0}, {8, 70, 70, 1, 0}, {8, 33, 33, 0, 0}},
      {{2, 360, 90, 1, 0}, {3, 640, 640, 0, 0}},
      {{1, 2100, 2100, 0, 0}},
      /* trellises of every number of taps; more words than are expanded at once */
      {{1, 2100, 2100, 1, 0, 015107, 1, 1},
       {3, 65, 65, 1, 1, 03047, 1, 1},
       {7, 33, 33, 1, 0, 05, 1}},
      {{1, 40, 40, 1, 0, 023, 2}, {3, 700, 500, 1, 0, 0147, 1}, {2, 1100, 700, 1, 1, 0615, 1, 1}},
  };
  static const int64_t SHAPES[][2] = {{1, 4}, {31, 1}, {33, 37}, {65, 3}, {130, 5}};
  static const int THREADS[] = {1, 2, 5}; /* alone, x for each, x shared */
  const int mixes = sizeof MIXES / sizeof *MIXES, shapes = sizeof SHAPES / sizeof *SHAPES;
  int checked = 0, portable = 0;
  while (pbq_variant_name(portable + 1)) portable++;
  for (int i = 0; i < mixes * shapes * 2; i++) { /* both modes; each mix meets each dtype */
    const int mix = i % mixes, size = i / mixes % shapes;
    Case c = {SHAPES[size][0], SHAPES[size][1],       MIXES[mix],
              0,               (mix + size) % 3, i / mixes / shapes};
    while (c.count < 4 && c.tiers[c.count].columns) c.count++;
    run(&c, portable, 1, 0, expected, expected_dense);
    for (int index = 0; index <= portable; index++, checked++) {
      const char *found = fault(&c, index, THREADS[i % 3]);
      if (found) {
        printf("%s, case %d: %s (%g)\n", pbq_variant_name(index), i, found,
               (double)worst(c.m * c.n));
        return 1;
      }
    }
  }
  printf("%d cases\n", checked);
  return 0;
}
