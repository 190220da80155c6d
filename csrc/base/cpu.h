/* What the CPU and the operating system support, asked once per call (a few instructions). */
#ifndef MOLAE_BASE_CPU_H
#define MOLAE_BASE_CPU_H

int mli_cpu_has_avx2(void);       /* AVX2, FMA and F16C, with the registers saved by the system */
int mli_cpu_has_avx512(void);     /* AVX-512 F, BW, VL, DQ besides, likewise */
int mli_cpu_has_avx512bf16(void); /* AVX512_BF16 besides */

/* AMX_TILE and AMX_BF16 besides AVX-512. Asks the system for the tiles' registers, which it gives
 * to a process once and for all of its threads; 0 if the CPU lacks them or the system refuses. */
int mli_cpu_get_amx(void);

#endif
