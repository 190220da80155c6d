/* State of the extension module, and what every wrapper shares. */
#ifndef MOLAE_PYSTATE_H
#define MOLAE_PYSTATE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../molae.h"

typedef struct {
    PyObject *MolaeError;
    PyObject *ShapeError;
    PyObject *ArgumentError;
    PyObject *NumericalError;
    PyObject *NonFiniteError;
    PyObject *ConvergenceWarning;
    PyObject *PrecisionWarning;
    molae_team team; /* see borrow_threads; NULL: none */
} mli_pystate;

/* A status as Python sees it: negative sets an exception, positive issues a warning (which the
 * user's filters may turn into an exception). Returns -1 with an exception set, else 0.
 * A pending exception is never overwritten. err may be NULL. */
int mli_py_raise(mli_pystate *st, molae_status status, const molae_errinfo *err);

/* Added to the module by module.c; each is defined in the file of that name. */
extern PyMethodDef mli_py_info_methods[];
extern PyMethodDef mli_py_fit_methods[];
extern PyMethodDef mli_py_factor_methods[];
extern PyMethodDef mli_py_ops_methods[];
extern PyMethodDef mli_py_kern_methods[];
extern PyMethodDef mli_py_decode_methods[];

#endif
