/* Checks of arguments that wrappers share. Messages name the argument, what was given and what was
 * wanted. */
#ifndef MOLAE_PY_ARGS_H
#define MOLAE_PY_ARGS_H

#include "pystate.h"

#ifndef PY_ARRAY_UNIQUE_SYMBOL
#define PY_ARRAY_UNIQUE_SYMBOL mli_numpy_api
#endif
#ifndef MLI_IMPORTS_NUMPY /* module.c alone */
#define NO_IMPORT_ARRAY
#endif
#define NPY_NO_DEPRECATED_API NPY_1_25_API_VERSION
#define NPY_TARGET_VERSION NPY_1_25_API_VERSION
#include <numpy/arrayobject.h>

/* *ctx from the argument num_threads; on the threads that are lent where `borrowed`, else, or where
 * none are, on molae's own. -1 with ArgumentError set if the number is not in 1..2^31-1. */
int mli_py_ctx(mli_pystate *st, Py_ssize_t num_threads, int borrowed, molae_ctx *ctx);

/* A new int64 array of this shape (-1 takes any length), NULL with an exception. */
PyArrayObject *mli_py_int64_array(mli_pystate *st, const char *name, PyObject *obj, int ndim,
                                  const npy_intp *dims, const char *letters);

/* -1 with ShapeError set unless `a` has `ndim` axes of the lengths `want`; -1 there takes any
 * length. `letters` has one character an axis, for the message ("EFD"). */
int mli_py_check_shape(mli_pystate *st, const char *name, PyArrayObject *a, int ndim,
                       const npy_intp *want, const char *letters);

/* -1 with ArgumentError set unless `a` is C-contiguous, aligned and in native byte order. */
int mli_py_check_layout(mli_pystate *st, const char *name, PyArrayObject *a);

/* The storage type of `a`; bfloat16 is told by the type's name, since it is ml_dtypes' own.
 * -1 with ArgumentError set for any other type. */
int mli_py_dtype(mli_pystate *st, const char *name, PyArrayObject *a, molae_dtype *dtype);

/* A new array, not set; a large one in memory that is lent, see base/mem.h. NULL with an exception
 * set. */
PyArrayObject *mli_py_empty(int ndim, npy_intp *dims, PyArray_Descr *descr);

#endif
