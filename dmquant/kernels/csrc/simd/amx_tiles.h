/* AMX: permission and configuration. All eight tiles have 16 rows of 64 bytes. Linux only. */
#ifndef DMQUANT_SIMD_AMX_TILES_H
#define DMQUANT_SIMD_AMX_TILES_H
#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>

long syscall(long number, ...);     /* unistd.h does not declare it under -std=c11 */

/* Against reordering: gcc does not know that tile instructions read and write memory. */
#define COMPILER_BARRIER __asm__ volatile("" ::: "memory")

/* Asks Linux for permission to use the tiles in this process. Returns 0 if it is granted. */
int dmquant_request_amx(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0;
}

/* Steps (of up to four tile products) after which one tile is stored although its sums are unfinished. Measured: behind more
 * than about 130 products without a store the next store took 800 cycles longer; these early stores take no time. */
#define STORE_INTERVAL 16

/* Configures the tiles of this thread, until _tile_release(). */
static void load_tile_config(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } __attribute__((packed)) config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    __asm__ volatile("" ::"r"(&config) : "memory");     /* gcc takes the instruction to read eight bytes only */
    _tile_loadconfig(&config);
}
#endif
