/* The instruction sets that the processor has and the operating system enables, as a mask. AVX2 includes FMA; AVX512 is F, BW,
 * VL and DQ; VNNI and VBMI are the extensions of AVX-512. Bits as in the registry of kernels. */
#include <stdint.h>

enum { AVX2 = 1, AVX512 = 2, VNNI = 4, VBMI = 8, AMX = 16, AVX_VNNI = 32 };

#if defined(__x86_64__)
#include <cpuid.h>

/* Register states that the operating system saves (XCR0): 0x06 is XMM and YMM, 0xe0 AVX-512, 0x60000 AMX tiles. */
static uint64_t enabled_states(void) {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static int has(uint32_t word, int bit) { return word >> bit & 1; }

int dmquant_instruction_sets(void) {
    uint32_t a, b, c, d, ignored, features;
    if (!__get_cpuid(1, &ignored, &ignored, &features, &ignored) || !has(features, 27)) return 0;     /* no xgetbv */
    int has_fma = has(features, 12);
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    uint64_t states = enabled_states();
    int found = 0;
    if ((states & 0x06) == 0x06 && has(b, 5) && has_fma) found |= AVX2;
    uint32_t more = 0;
    if (a && __get_cpuid_count(7, 1, &more, &ignored, &ignored, &ignored) && (found & AVX2) && has(more, 4)) found |= AVX_VNNI;
    if (!(found & AVX2) || (states & 0xe6) != 0xe6) return found;
    if (!(has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31))) return found;
    found |= AVX512;
    if (has(c, 11)) found |= VNNI;
    if (has(c, 1)) found |= VBMI;
    if ((states & 0x60000) == 0x60000 && has(d, 24) && has(d, 25)) found |= AMX;
    return found;
}
#else
int dmquant_instruction_sets(void) { return 0; }
#endif
