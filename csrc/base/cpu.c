#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>

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

#endif
