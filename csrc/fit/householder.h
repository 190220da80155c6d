/* A symmetric matrix to tridiagonal form by Householder vectors, and vectors turned back. */
#ifndef MOLAE_FIT_HOUSEHOLDER_H
#define MOLAE_FIT_HOUSEHOLDER_H

#include "../molae.h"

/* Householder vectors that are applied at a time. */
enum { MLI_PANEL = 32, MLI_REFLECTORS = 64 };

/* Q^T A Q = T for the row-major upper triangle of A (n,n): d (n) and e (n-1) the diagonals of T.
 * Row j of A keeps vector j from column j+1 on, where it is 1, and tau[j] (n-1) its factor: Q = H_0
 * H_1 .., H_j = I - tau_j v_j v_j^T. W (MLI_PANEL,n) is scratch. Half of the 4/3 n^3 flops are
 * products of the matrix with one vector, bound by memory: the passes go back and forth. */
molae_status mli_tridiagonalize_f32(int64_t n, float *A, float *d, float *e, float *tau, float *W);
molae_status mli_tridiagonalize_f64(int64_t n, double *A, double *d, double *e, double *tau,
                                    double *W);

/* Rows of Z (count,n), eigenvectors of T, become those of A, 2 n^2 count flops. scratch:
 * mli_turn_back_scratch numbers. */
molae_status mli_turn_back_f32(int64_t n, const float *A, const float *tau, float *Z, int64_t count,
                               float *scratch);
molae_status mli_turn_back_f64(int64_t n, const double *A, const double *tau, double *Z,
                               int64_t count, double *scratch);
size_t mli_turn_back_scratch(int64_t n, int64_t count);

#endif
