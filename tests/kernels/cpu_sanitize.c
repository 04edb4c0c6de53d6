/* Runs every variant of cpu.c over awkward sizes, each buffer exactly as large as it must be, and
 * compares with the portable one. Built with -fsanitize=address,undefined by test_cpu.py. */
#include "cpu.c"

#include <stdio.h>

#define GROUPS 8

typedef struct {
  int planes, columns, group_size, tied, offset;
} Tier;

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
      g->words = (g->columns + w->word_columns - 1) / w->word_columns;
      g->first_word = w->words;
      g->stream = w->stream;
      g->planes = tiers[t].planes;
      g->tied = tiers[t].tied;
      g->scale = w->slots;
      w->slots += g->planes == 0 ? 0 : g->tied ? 1 : g->planes;
      g->offset = tiers[t].offset ? w->slots++ : -1;
      w->words += g->words;
      w->stream += g->planes * g->words;
      if (left <= tiers[t].group_size)
        byte += ((int64_t)tiers[t].planes * tiers[t].columns + 7) / 8;
    }
  w->row_bytes = byte;
  return n;
}

static int32_t *columns_of(const Weight *w, const Group *groups) {
  int32_t *column = malloc(sizeof(int32_t) * w->words * WORD), next = 0;
  for (int i = 0; i < w->words * WORD; i++) column[i] = -1;
  for (int i = 0; i < w->groups; i++)
    for (int c = 0; c < groups[i].columns; c++)
      column[(groups[i].first_word + c / w->word_columns) * WORD + c % w->word_columns] =
          (int32_t)(w->k - 1 - next++); /* a permutation: backwards */
  return column;
}

static void run(int index, int64_t n, int64_t m, const Tier *tiers, int count, int dtype, int mode,
                int threads, float *y) {
  Group groups[GROUPS] = {0};
  Weight w = {.n = n, .variant = index, .tile = n > 64 ? 64 : 32};
  w.word_columns = pbq_variant_word_columns(index);
  for (int t = 0; t < count; t++) w.k += tiers[t].columns;
  w.groups = add_groups(&w, groups, tiers, count);
  w.group = exactly(groups, sizeof(Group) * w.groups);
  const int64_t tiles = (n + w.tile - 1) / w.tile, element = size_of(dtype);

  state = 1; /* the same bits for every variant */
  uint8_t *stored = malloc(n * w.row_bytes + (w.row_bytes == 0));
  for (int64_t i = 0; i < n * w.row_bytes; i++) stored[i] = noise() >> 24;
  uint16_t *scale = calloc(tiles * w.slots * w.tile + 1, 2);
  for (int64_t row = 0; row < n; row++)
    for (int slot = 0; slot < w.slots; slot++)
      scale[(row / w.tile * w.slots + slot) * w.tile + row % w.tile] = float_to_half(uniform());
  char *x = malloc(m * w.k * element), *out = malloc(m * n * element);
  for (int64_t i = 0; i < m * w.k; i++) store(x, i, dtype, uniform());
  int64_t *overlay_start = malloc(sizeof(int64_t) * (n + 1));
  int32_t *overlay_column = malloc(sizeof(int32_t) * n);
  float *overlay_delta = malloc(sizeof(float) * n);
  for (int64_t row = 0; row < n; row++) {
    overlay_start[row] = row;
    overlay_column[row] = (int32_t)(noise() % (uint32_t)w.k);
    overlay_delta[row] = uniform();
  }
  overlay_start[n] = n;

  uint32_t *data = malloc(tiles * w.stream * w.tile * 4 + 1);
  w.column = columns_of(&w, groups);
  w.scale = exactly(scale, tiles * w.slots * w.tile * 2);
  w.overlay_start = overlay_start;
  w.overlay_column = overlay_column;
  w.overlay_delta = overlay_delta;
  pbq_repack(&w, stored, data, threads);
  w.data = exactly(data, tiles * w.stream * w.tile * 4);
  if (pbq_matmul(&w, mode, x, dtype, m, out, dtype, threads)) exit(2);
  for (int64_t i = 0; i < m * n; i++) y[i] = load(out, i, dtype);
  char *dense = malloc(n * w.k * element), *line = malloc(threads * w.k * element);
  int64_t *to = malloc(w.k * sizeof(int64_t));
  for (int64_t c = 0; c < w.k; c++) to[c] = w.k - 1 - c;
  pbq_decode(&w, 0, n, w.k, dtype, NULL, NULL, dense, threads);
  pbq_decode(&w, 0, n, w.k, dtype, to, line, dense, threads);

  void *all[] = {(void *)w.group, stored,         scale,         x,    out,
                 overlay_start,   overlay_column, overlay_delta, data, (void *)w.column,
                 (void *)w.scale, (void *)w.data, dense, line, to};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static float worst(int64_t count, const float *a, const float *b) {
  float most = 0;
  for (int64_t i = 0; i < count; i++) most = fmaxf(most, fabsf(a[i] - b[i]) / (1 + fabsf(b[i])));
  return most;
}

int main(void) {
  static const Tier MIXES[][4] = {
      {{1, 63, 63, 0, 0}},
      {{0, 7, 7, 0, 1}, {1, 61, 33, 0, 1}, {2, 30, 30, 1, 0}, {4, 95, 64, 0, 1}},
      {{5, 1, 1, 0, 0}, {8, 33, 33, 1, 1}},
  };
  static const int COUNTS[] = {1, 4, 2};
  static const int64_t ROWS[] = {1, 33, 130}, TOKENS_OF[] = {1, 3, 37};
  static float y[37 * 130], expected[37 * 130];
  int checked = 0, portable = 0;
  while (pbq_variant_name(portable + 1)) portable++;
  for (int i = 0; i < 3 * 3 * 3 * 2 * 3; i++) {
    const Tier *mix = MIXES[i % 3];
    const int count = COUNTS[i % 3], mode = i / 27 % 2, dtype = i / 54;
    const int64_t n = ROWS[i / 3 % 3], m = TOKENS_OF[i / 9 % 3];
    run(portable, n, m, mix, count, dtype, mode, 1, expected);
    for (int index = 0; index <= portable; index++, checked++) {
      run(index, n, m, mix, count, dtype, mode, 1 + i % 2, y);
      const float error = worst(m * n, y, expected), most = dtype == FLOAT32 ? 1e-4f : 1e-2f;
      if (!(error <= most)) {
        printf("%s: case %d differs by %g\n", pbq_variant_name(index), i, (double)error);
        return 1;
      }
    }
  }
  printf("%d cases\n", checked);
  return 0;
}
