/* What the CPU and the operating system support, asked once per call (a few instructions). */
#ifndef MOLAE_BASE_CPU_H
#define MOLAE_BASE_CPU_H

int mli_cpu_has_avx2(void);   /* AVX2, FMA and F16C, with the registers saved by the system */
int mli_cpu_has_avx512(void); /* AVX-512 F, BW, VL, DQ besides, likewise */

#endif
