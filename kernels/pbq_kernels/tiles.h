/* The bfloat16 units of x86 CPUs: AVX512-BF16, and AMX, which multiplies tiles of 16 x 16 pairs. */
#ifndef PBQ_TILES_H
#define PBQ_TILES_H

#include "weight.h"

enum { NO_UNIT, DOTS, TILES }; /* mirrors UNITS in cpu.py */

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAS_UNITS /* compilers that know them */

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define SIDE 16 /* rows of a tile, and 32-bit numbers in each */

#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define VECTOR __attribute__((target(AVX512 ",avx512vbmi2,avx512bf16")))
#define AMX __attribute__((target(AVX512 ",amx-tile,amx-bf16")))

INLINE VECTOR __m512i lanes(void) {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

/* 0, 16, 1, 17, ...: where the halves of 32 numbers lie side by side. */
INLINE VECTOR __m512i side_by_side(void) {
  const __m512i high = _mm512_add_epi32(lanes(), _mm512_set1_epi32(16));
  return _mm512_or_si512(lanes(), _mm512_slli_epi32(high, 16));
}

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

/* Whether the kernel lets this process use tiles, which it must ask for. */
static inline int may_use_tiles(void) {
#ifdef __linux__
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
  return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA);
#else
  return 0;
#endif
}

static inline int best_unit(void) {
  static int found = -1; /* a hypervisor takes microseconds to answer cpuid */
  unsigned a, b, c, d;
  if (found >= 0) return found;
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vbmi2") ||
      !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1))
    return found = NO_UNIT;
  const int amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 24 & 1 && d >> 22 & 1;
  return found = amx && may_use_tiles() ? TILES : DOTS;
}

#else

static inline int best_unit(void) { return NO_UNIT; }

#endif
#endif
