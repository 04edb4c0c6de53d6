/* The bfloat16 units of x86 CPUs: AVX512-BF16, and AMX, which multiplies tiles of 16 x 16 pairs. */
#ifndef PBQ_TILES_H
#define PBQ_TILES_H

#include "weight.h"

enum { NO_UNIT, DOTS, TILES }; /* mirrors UNITS in cpu.py */

/* The best unit of this machine. */
EXPORT int pbq_unit(void);

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAS_UNITS /* compilers that know them */

#define SIDE 16 /* rows of a tile, and 32-bit numbers in each */

#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define VECTOR __attribute__((target(AVX512 ",avx512vbmi2,avx512bf16")))
#define AMX __attribute__((target(AVX512 ",amx-tile,amx-bf16")))

typedef struct {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} TileConfig;

/* Of this thread, which had *before: others that use tiles may rely on what they set. */
static inline AMX void configure_tiles(TileConfig *before) {
  static const TileConfig all = {.palette = 1,
                                 .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                                 .rows = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE}};
  _tile_storeconfig(before);
  __asm__ volatile("" ::"r"(before) : "memory"); /* a compiler may take it for 8 bytes */
  _tile_loadconfig(&all);
}

static inline AMX void restore_tiles(const TileConfig *before) {
  __asm__ volatile("" ::"r"(before) : "memory");
  _tile_loadconfig(before);
}

#endif
#endif
