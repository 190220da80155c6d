/* The gauge form of a basis: rows of B span the same space as [I | M] P. */
#ifndef MOLAE_FIT_GAUGE_H
#define MOLAE_FIT_GAUGE_H

#include "../molae.h"

/* As molae_gauge_<real>, which is this after its argument checks; *info is LAPACK's. */
molae_status mli_gauge_f32(float *M, int32_t *perm, const float *B, int64_t R, int64_t D, char *ws,
                           int64_t *info);
molae_status mli_gauge_f64(double *M, int32_t *perm, const double *B, int64_t R, int64_t D,
                           char *ws, int64_t *info);

/* The same from an orthonormal basis N (D-R,D) of the complement of the rows of B: cheaper where
 * R > D/2. The pivots of a QR of N are those of a Cholesky factorization of the projector N^T N
 * with diagonal pivoting, which runs at the speed of matrix products; M follows from N itself by
 * elimination, so that nothing is squared but the choice of columns. Where a pivot comes near the
 * rounding of the projector, the QR decides after all. ws: mli_gauge_complement_ws bytes.
 * Flops: 2 (D-R) D^2 + 4/3 (D-R)^3 + 2 (D-R)^2 R. */
size_t mli_gauge_complement_ws_f32(int64_t R, int64_t D);
size_t mli_gauge_complement_ws_f64(int64_t R, int64_t D);
molae_status mli_gauge_complement_f32(float *M, int32_t *perm, const float *N, int64_t R, int64_t D,
                                      char *ws, int64_t *info);
molae_status mli_gauge_complement_f64(double *M, int32_t *perm, const double *N, int64_t R,
                                      int64_t D, char *ws, int64_t *info);

/* dst (cols,rows) = scale times the transpose of src (rows,cols). */
void mli_transpose_f32(float *dst, const float *src, int64_t rows, int64_t cols, float scale);
void mli_transpose_f64(double *dst, const double *src, int64_t rows, int64_t cols, double scale);

/* B[:, perm] = [I | M], written out. */
void mli_ungauge_f32(float *B, const float *M, const int32_t *perm, int64_t R, int64_t D);
void mli_ungauge_f64(double *B, const double *M, const int32_t *perm, int64_t R, int64_t D);

#endif
