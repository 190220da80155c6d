#include "args.h"

#include "../base/mem.h"

#include <string.h>

int
mli_py_ctx(mli_pystate *st, Py_ssize_t num_threads, int borrowed, molae_ctx *ctx)
{
    if (num_threads < 1 || num_threads > INT32_MAX) {
        PyErr_Format(st->ArgumentError, "num_threads: expected 1 or more, got %zd", num_threads);
        return -1;
    }
    *ctx = (molae_ctx){(int32_t)num_threads, borrowed ? st->team : NULL};
    return 0;
}

/* "(E=64, F=1408, R=128)"; lengths of -1 are shown as the letter alone. */
static PyObject *
shape_text(int ndim, const npy_intp *dims, const char *letters)
{
    PyObject *text = PyUnicode_FromString("("), *part, *joined;

    for (int i = 0; text != NULL && i < ndim; i++) {
        const char *sep = i + 1 < ndim ? ", " : (ndim == 1 ? ",)" : ")");
        if (letters == NULL)
            part = PyUnicode_FromFormat("%zd%s", (Py_ssize_t)dims[i], sep);
        else if (dims[i] < 0)
            part = PyUnicode_FromFormat("%c%s", letters[i], sep);
        else
            part = PyUnicode_FromFormat("%c=%zd%s", letters[i], (Py_ssize_t)dims[i], sep);
        if (part == NULL) {
            Py_DECREF(text);
            return NULL;
        }
        joined = PyUnicode_Concat(text, part);
        Py_DECREF(part);
        Py_DECREF(text);
        text = joined;
    }
    if (text != NULL && ndim == 0) {
        Py_DECREF(text);
        text = PyUnicode_FromString("()");
    }
    return text;
}

int
mli_py_check_shape(mli_pystate *st, const char *name, PyArrayObject *a, int ndim,
                   const npy_intp *want, const char *letters)
{
    int good = PyArray_NDIM(a) == ndim, swapped = ndim >= 2 && PyArray_NDIM(a) == ndim;
    const npy_intp *have = PyArray_DIMS(a);
    PyObject *wanted, *given;

    for (int i = 0; good && i < ndim; i++)
        good = want[i] < 0 || have[i] == want[i];
    if (good)
        return 0;
    for (int i = 0; swapped && i < ndim; i++) {
        int j = i < ndim - 2 ? i : (i == ndim - 2 ? ndim - 1 : ndim - 2);
        swapped = want[i] < 0 || have[j] == want[i];
    }
    wanted = shape_text(ndim, want, letters);
    given = shape_text(PyArray_NDIM(a), have, NULL);
    if (wanted != NULL && given != NULL)
        PyErr_Format(st->ShapeError, "%s: expected shape %U, got %U%s", name, wanted, given,
                     swapped ? "; transposed?" : "");
    Py_XDECREF(wanted);
    Py_XDECREF(given);
    return -1;
}

int
mli_py_check_layout(mli_pystate *st, const char *name, PyArrayObject *a)
{
    const char *fault = NULL;

    if (!PyArray_IS_C_CONTIGUOUS(a))
        fault = "not C-contiguous";
    else if (!PyArray_ISALIGNED(a))
        fault = "not aligned";
    else if (!PyArray_ISNOTSWAPPED(a))
        fault = "byte-swapped";
    if (fault == NULL)
        return 0;
    PyErr_Format(st->ArgumentError, "%s: the array is %s", name, fault);
    return -1;
}

int
mli_py_dtype(mli_pystate *st, const char *name, PyArrayObject *a, molae_dtype *dtype)
{
    PyArray_Descr *d = PyArray_DESCR(a);
    PyObject *type_name;
    int is_bf16 = 0;

    switch (PyArray_TYPE(a)) {
    case NPY_FLOAT:
        *dtype = MOLAE_F32;
        return 0;
    case NPY_DOUBLE:
        *dtype = MOLAE_F64;
        return 0;
    case NPY_HALF:
        *dtype = MOLAE_F16;
        return 0;
    default:
        break;
    }
    if (PyTypeNum_ISUSERDEF(PyArray_TYPE(a)) && PyArray_ITEMSIZE(a) == 2) {
        type_name = PyObject_GetAttrString((PyObject *)d->typeobj, "__name__");
        if (type_name == NULL)
            return -1;
        is_bf16 = PyUnicode_Check(type_name) &&
                  PyUnicode_CompareWithASCIIString(type_name, "bfloat16") == 0;
        Py_DECREF(type_name);
    }
    if (is_bf16) {
        *dtype = MOLAE_BF16;
        return 0;
    }
    PyErr_Format(st->ArgumentError, "%s: expected float32, float64, float16 or bfloat16, got %S",
                 name, (PyObject *)d);
    return -1;
}

/* Arrays from so many bytes on live in lent memory. */
enum { LARGE = 4 << 20 };

static void
return_block(PyObject *capsule)
{
    mli_return(PyCapsule_GetPointer(capsule, NULL));
}

/* An array in lent memory, which goes back with the last view of it. Takes `descr` over. */
static PyArrayObject *
large_empty(int ndim, npy_intp *dims, PyArray_Descr *descr, size_t bytes)
{
    void *data = mli_lend(bytes);
    PyObject *owner = data ? PyCapsule_New(data, NULL, return_block) : PyErr_NoMemory();
    PyObject *a;

    if (owner == NULL) {
        mli_return(data);
        Py_DECREF((PyObject *)descr);
        return NULL;
    }
    a = PyArray_NewFromDescr(&PyArray_Type, descr, ndim, dims, NULL, data, NPY_ARRAY_CARRAY, NULL);
    if (a == NULL)
        Py_DECREF(owner);
    else if (PyArray_SetBaseObject((PyArrayObject *)a, owner) < 0) /* takes it over */
        Py_CLEAR(a);
    return (PyArrayObject *)a;
}

PyArrayObject *
mli_py_empty(int ndim, npy_intp *dims, PyArray_Descr *descr)
{
    size_t bytes = (size_t)PyDataType_ELSIZE(descr);

    for (int i = 0; i < ndim; i++)
        bytes = mli_size_mul(bytes, (size_t)dims[i]);
    Py_INCREF((PyObject *)descr); /* both steal it */
    return bytes < LARGE ? (PyArrayObject *)PyArray_Empty(ndim, dims, descr, 0)
                         : large_empty(ndim, dims, descr, bytes);
}

PyArrayObject *
mli_py_int64_array(mli_pystate *st, const char *name, PyObject *obj, int ndim, const npy_intp *dims,
                   const char *letters)
{
    PyArrayObject *a =
        (PyArrayObject *)PyArray_FROMANY(obj, NPY_INT64, ndim, ndim, NPY_ARRAY_IN_ARRAY);

    if (a != NULL && mli_py_check_shape(st, name, a, ndim, dims, letters) < 0)
        Py_CLEAR(a);
    return a;
}
