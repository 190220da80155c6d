/* Reading experts: rows of X_i in working precision, whatever the storage type and the side.
 *
 * X_i is W_i (input side) or W_i^T (output side), (F,D) row-major. Everything in fit/ is written
 * for X_i; this is the only place that knows about the two sides on the way in, and
 * FN(mli_rows_store) the only one on the way out. */
#ifndef MOLAE_FIT_ROWS_H
#define MOLAE_FIT_ROWS_H

#include "../molae.h"

/* Columns converted at a time when a matrix is transposed on the way. */
enum { MLI_ROWS_TILE = 16 };

size_t mli_dtype_size(molae_dtype t);

/* X (nr,D) = rows r0 .. r0+nr-1 of X_e; *sumsq (unless NULL) = their sum of squares. tmp:
 * MLI_ROWS_TILE * nr.
 * Returns MOLAE_E_NONFINITE if a value is NaN or Inf. */
molae_status mli_rows_load_f32(float *X, const molae_stack *s, int64_t e, int64_t r0, int64_t nr,
                               float *tmp, double *sumsq);
molae_status mli_rows_load_f64(double *X, const molae_stack *s, int64_t e, int64_t r0, int64_t nr,
                               double *tmp, double *sumsq);

/* Rounds A (nr,R) to the storage type and writes it as rows r0 .. of the private factor `dst`:
 * (F,R) on the input side, (R,F), transposed, on the output side. A is replaced by what was
 * stored, so that later arithmetic sees the rounded values. tmp: nr. Returns
 * MOLAE_E_NONFINITE if a value does not fit the storage type. */
molae_status mli_rows_store_f32(void *dst, const molae_stack *s, int64_t r0, int64_t nr, int64_t R,
                                float *A, float *tmp);
molae_status mli_rows_store_f64(void *dst, const molae_stack *s, int64_t r0, int64_t nr, int64_t R,
                                double *A, double *tmp);

/* y = x widened, n values that start at element `at` of an array of type t; 0 if one is not
 * finite. */
int mli_widen_f32(float *y, const void *x, molae_dtype t, int64_t at, int64_t n);
int mli_widen_f64(double *y, const void *x, molae_dtype t, int64_t at, int64_t n);

/* Sum of squares in double, in an order that depends on n alone. */
double mli_sumsq_f32(const float *x, int64_t n);
double mli_sumsq_f64(const double *x, int64_t n);

/* dst = x rounded to t, n values; x is replaced by the rounded values. 0 if one overflows. */
int mli_round_f32(void *dst, molae_dtype t, float *x, int64_t n);
int mli_round_f64(void *dst, molae_dtype t, double *x, int64_t n);

#endif
