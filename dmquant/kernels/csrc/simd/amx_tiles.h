/* The tiles of AMX: all eight of 16 rows of 64 bytes. */
#ifndef DMQUANT_SIMD_AMX_TILES_H
#define DMQUANT_SIMD_AMX_TILES_H
#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>

long syscall(long number, ...);     /* what unistd.h keeps to itself in plain C */

/* gcc's tile instructions do not say that they read and write memory */
#define COMPILER_BARRIER __asm__ volatile("" ::: "memory")

/* May this process use the tiles? 0 if so. */
int dmquant_request_amx(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0;
}

/* Steps of up to four products each, after which one tile is stored that nobody needs yet. Where more than some 130 products
 * went before without any store, the next one was seen to take 800 cycles longer; such a store in between takes none. */
#define STORE_INTERVAL 16

static void load_tile_config(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } __attribute__((packed)) config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    __asm__ volatile("" ::"r"(&config) : "memory");     /* gcc believes that the instruction reads eight bytes */
    _tile_loadconfig(&config);
}
#endif
