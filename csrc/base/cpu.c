#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* syscall under -std=c11 */
#endif
#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* State components that the system saves on a context switch (XCR0). */
static unsigned
saved_state(void)
{
    unsigned lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return lo;
}

#define BIT(r, n) (((r) >> (n)) & 1u)

int
mli_cpu_has_avx2(void)
{
    unsigned a, b, c, d;

    if (!__get_cpuid(1, &a, &b, &c, &d))
        return 0;
    if (!(BIT(c, 12) && BIT(c, 27) && BIT(c, 28) && BIT(c, 29))) /* FMA, OSXSAVE, AVX, F16C */
        return 0;
    if ((saved_state() & 0x6u) != 0x6u) /* xmm, ymm */
        return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && BIT(b, 5);
}

int
mli_cpu_has_avx512(void)
{
    unsigned a, b, c, d;

    if (!mli_cpu_has_avx2() || (saved_state() & 0xE6u) != 0xE6u) /* opmask, zmm */
        return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && BIT(b, 16) && BIT(b, 17) && BIT(b, 30) &&
           BIT(b, 31); /* F, DQ, BW, VL */
}

int
mli_cpu_has_avx512bf16(void)
{
    unsigned a, b, c, d;

    return mli_cpu_has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && BIT(a, 5);
}

/* The kernel saves the tiles of threads only of processes that asked for them. */
static int
tiles_granted(void)
{
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { REQUEST = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return 0;
#endif
}

int
mli_cpu_get_amx(void)
{
    unsigned a, b, c, d;

    if (!mli_cpu_has_avx512() || (saved_state() & 0x60000u) != 0x60000u) /* TILECFG, TILEDATA */
        return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !BIT(d, 22) || !BIT(d, 24)) /* BF16, TILE */
        return 0;
    return tiles_granted();
}

#else

int
mli_cpu_has_avx2(void)
{
    return 0;
}

int
mli_cpu_has_avx512(void)
{
    return 0;
}

int
mli_cpu_has_avx512bf16(void)
{
    return 0;
}

int
mli_cpu_get_amx(void)
{
    return 0;
}

#endif
