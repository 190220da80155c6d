/* molae._core: module state, exceptions, and the only import of NumPy's API. */
#define MLI_IMPORTS_NUMPY
#include "args.h"

#include "../base/blas.h"
#include "../base/status.h"

#include <stdatomic.h>

/* ------------------------------------------------------------ exceptions */

static int
set_index(PyObject *exc, const char *name, int64_t value)
{
    PyObject *number;
    int rc;

    if (value < 0)
        return PyObject_SetAttrString(exc, name, Py_None);
    number = PyLong_FromLongLong((long long)value);
    if (number == NULL)
        return -1;
    rc = PyObject_SetAttrString(exc, name, number);
    Py_DECREF(number);
    return rc;
}

/* "expert 13 of group 2: eigenvalues did not converge (info 7)" */
static PyObject *
message(molae_status status, const molae_errinfo *err)
{
    const char *what = mli_status_text(status);
    PyObject *where = NULL, *text = NULL;

    if (err == NULL)
        return PyUnicode_FromString(what);
    if (err->what != NULL)
        what = err->what;
    if (err->expert >= 0 && err->group >= 0)
        where = PyUnicode_FromFormat("expert %lld of group %lld: ", (long long)err->expert,
                                     (long long)err->group);
    else if (err->expert >= 0)
        where = PyUnicode_FromFormat("expert %lld: ", (long long)err->expert);
    else if (err->group >= 0)
        where = PyUnicode_FromFormat("group %lld: ", (long long)err->group);
    else
        where = PyUnicode_FromString("");
    if (where == NULL)
        return NULL;
    if (status == MOLAE_E_LAPACK && err->info != -1)
        text = PyUnicode_FromFormat("%U%s (info %lld)", where, what, (long long)err->info);
    else
        text = PyUnicode_FromFormat("%U%s", where, what);
    Py_DECREF(where);
    return text;
}

/* Sets an exception of `type` that carries the indices as attributes. */
static void
raise_numerical(PyObject *type, PyObject *text, const molae_errinfo *err)
{
    PyObject *exc = PyObject_CallOneArg(type, text);

    if (exc == NULL)
        return;
    if (set_index(exc, "expert", err ? err->expert : -1) == 0 &&
        set_index(exc, "group", err ? err->group : -1) == 0 &&
        set_index(exc, "info", err ? err->info : -1) == 0)
        PyErr_SetObject(type, exc);
    Py_DECREF(exc);
}

int
mli_py_raise(mli_pystate *st, molae_status status, const molae_errinfo *err)
{
    PyObject *text, *category;
    int rc = 0;

    if (PyErr_Occurred())
        return -1;
    if (status == MOLAE_OK)
        return 0;
    if (status == MOLAE_E_NOMEM) {
        PyErr_NoMemory();
        return -1;
    }
    text = message(status, err);
    if (text == NULL)
        return -1;
    if (status > 0) {
        category = status == MOLAE_W_NOT_CONVERGED ? st->ConvergenceWarning : st->PrecisionWarning;
        rc = PyErr_WarnFormat(category, 1, "%U", text);
        Py_DECREF(text);
        return rc;
    }
    switch (status) {
    case MOLAE_E_SHAPE:
        PyErr_SetObject(st->ShapeError, text);
        break;
    case MOLAE_E_NONFINITE:
        raise_numerical(st->NonFiniteError, text, err);
        break;
    case MOLAE_E_LAPACK:
        raise_numerical(st->NumericalError, text, err);
        break;
    default:
        PyErr_SetObject(st->ArgumentError, text);
        break;
    }
    Py_DECREF(text);
    return -1;
}

/* Makes an exception class in molae.errors with one or two bases and adds it to the module. */
static PyObject *
new_class(PyObject *mod, const char *name, const char *doc, PyObject *base, PyObject *other)
{
    PyObject *bases = NULL, *cls = NULL, *full = NULL;

    bases = other ? PyTuple_Pack(2, base, other) : PyTuple_Pack(1, base);
    full = PyUnicode_FromFormat("molae.errors.%s", name);
    if (bases != NULL && full != NULL)
        cls = PyErr_NewExceptionWithDoc(PyUnicode_AsUTF8(full), doc, bases, NULL);
    Py_XDECREF(bases);
    Py_XDECREF(full);
    if (cls != NULL && PyModule_AddObjectRef(mod, name, cls) < 0)
        Py_CLEAR(cls);
    return cls;
}

/* Classes that carry indices have them as class attributes too, None where nothing is known. */
static int
default_indices(PyObject *cls)
{
    return PyObject_SetAttrString(cls, "expert", Py_None) < 0 ||
                   PyObject_SetAttrString(cls, "group", Py_None) < 0 ||
                   PyObject_SetAttrString(cls, "info", Py_None) < 0
               ? -1
               : 0;
}

static int
add_classes(PyObject *mod, mli_pystate *st)
{
    st->MolaeError = new_class(mod, "MolaeError", "Base of molae's errors.", PyExc_Exception, NULL);
    if (st->MolaeError == NULL)
        return -1;
    st->ShapeError = new_class(mod, "ShapeError", "An array has the wrong shape.", st->MolaeError,
                               PyExc_ValueError);
    st->ArgumentError = new_class(mod, "ArgumentError", "An argument is out of range.",
                                  st->MolaeError, PyExc_ValueError);
    st->NumericalError =
        new_class(mod, "NumericalError",
                  "A computation failed. expert, group and info say where, None if unknown.",
                  st->MolaeError, PyExc_ArithmeticError);
    if (st->NumericalError == NULL)
        return -1;
    st->NonFiniteError = new_class(mod, "NonFiniteError", "NaN or Inf in a weight of `expert`.",
                                   st->NumericalError, NULL);
    st->ConvergenceWarning = new_class(mod, "ConvergenceWarning", "An iteration stopped early.",
                                       PyExc_UserWarning, NULL);
    st->PrecisionWarning =
        new_class(mod, "PrecisionWarning", "A slower, more accurate way had to be taken.",
                  PyExc_UserWarning, NULL);
    if (st->ShapeError == NULL || st->ArgumentError == NULL || st->NonFiniteError == NULL ||
        st->ConvergenceWarning == NULL || st->PrecisionWarning == NULL)
        return -1;
    return default_indices(st->NumericalError);
}

/* ----------------------------------------------------------------- module */

static int
core_exec(PyObject *mod)
{
    static atomic_int loaded;
    mli_pystate *st = PyModule_GetState(mod);

    /* NumPy's API table and the kernels are process-wide. */
    if (atomic_exchange(&loaded, 1)) {
        PyErr_SetString(PyExc_ImportError, "molae._core: cannot be loaded twice in one process");
        return -1;
    }
    if (PyArray_ImportNumPyAPI() < 0)
        return -1;
    if (add_classes(mod, st) < 0)
        return -1;
    if (PyModule_AddFunctions(mod, mli_py_info_methods) < 0 ||
        PyModule_AddFunctions(mod, mli_py_fit_methods) < 0 ||
        PyModule_AddFunctions(mod, mli_py_factor_methods) < 0 ||
        PyModule_AddFunctions(mod, mli_py_kern_methods) < 0 ||
        PyModule_AddFunctions(mod, mli_py_decode_methods) < 0 ||
        PyModule_AddFunctions(mod, mli_py_ops_methods) < 0)
        return -1;
    /* molae threads over groups and experts; its own copy of OpenBLAS never does. */
    if (mli_blas_vendored())
        mli_blas_set_num_threads(1);
    return 0;
}

static int
core_traverse(PyObject *mod, visitproc visit, void *arg)
{
    mli_pystate *st = PyModule_GetState(mod);

    Py_VISIT(st->MolaeError);
    Py_VISIT(st->ShapeError);
    Py_VISIT(st->ArgumentError);
    Py_VISIT(st->NumericalError);
    Py_VISIT(st->NonFiniteError);
    Py_VISIT(st->ConvergenceWarning);
    Py_VISIT(st->PrecisionWarning);
    return 0;
}

static int
core_clear(PyObject *mod)
{
    mli_pystate *st = PyModule_GetState(mod);

    Py_CLEAR(st->MolaeError);
    Py_CLEAR(st->ShapeError);
    Py_CLEAR(st->ArgumentError);
    Py_CLEAR(st->NumericalError);
    Py_CLEAR(st->NonFiniteError);
    Py_CLEAR(st->ConvergenceWarning);
    Py_CLEAR(st->PrecisionWarning);
    return 0;
}

static void
core_free(void *mod)
{
    (void)core_clear((PyObject *)mod);
}

/* The slot's type is a data pointer; the functions go in through one cast each. */
static PyModuleDef_Slot core_slots[] = {
    {Py_mod_exec, (void *)core_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#ifdef Py_mod_gil
    /* Free-threaded builds turn the GIL on and say so, since molae is not tested without. */
    {Py_mod_gil, Py_MOD_GIL_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef core_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "molae._core",
    .m_doc = "Native part of molae. Private: use molae.fit, molae.ops and molae.show_config.",
    .m_size = sizeof(mli_pystate),
    .m_slots = core_slots,
    .m_traverse = core_traverse,
    .m_clear = core_clear,
    .m_free = core_free,
};

PyMODINIT_FUNC PyInit__core(void);

PyMODINIT_FUNC
PyInit__core(void)
{
    return PyModuleDef_Init(&core_def);
}
