/* Test hooks for the products of csrc/kern: one kernel of one table on views of arrays. */
#include "args.h"

#include "../base/mem.h"
#include "../kern/kern.h"

#include <string.h>

/* A matrix whose rows are contiguous and lie `ld` elements apart. */
typedef struct {
    void *data;
    int64_t rows, cols, ld;
} matrix;

static int
read_matrix(mli_pystate *st, const char *name, PyObject *obj, int type, matrix *m)
{
    PyArrayObject *a = (PyArrayObject *)obj;
    npy_intp size, step;

    if (!PyArray_Check(obj) || PyArray_NDIM(a) != 2 || PyArray_TYPE(a) != type ||
        !PyArray_ISALIGNED(a)) {
        PyErr_Format(st->ArgumentError, "%s: expected an aligned matrix of another type", name);
        return -1;
    }
    size = PyArray_ITEMSIZE(a);
    step = PyArray_STRIDE(a, 0);
    m->data = PyArray_DATA(a);
    m->rows = PyArray_DIM(a, 0);
    m->cols = PyArray_DIM(a, 1);
    m->ld = m->rows > 1 && m->cols > 0 ? step / size : m->cols;
    if (m->rows > 0 && ((m->cols > 1 && PyArray_STRIDE(a, 1) != size) || m->ld < m->cols ||
                        (m->rows > 1 && step % size != 0))) {
        PyErr_Format(st->ArgumentError, "%s: expected contiguous rows", name);
        return -1;
    }
    return 0;
}

static const mli_kernels *
table_named(mli_pystate *st, const char *isa)
{
    const mli_kernels *t = mli_kernels_named(isa);

    if (t == NULL)
        PyErr_Format(st->ArgumentError, "isa: '%s' is not in this build or CPU", isa);
    return t;
}

static PyObject *
py_stream(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    const char *name, *isa;
    PyObject *oy, *ox, *ow;
    matrix y, x, w;
    const mli_kernels *t;
    int accumulate, nn, real, stored;

    if (!PyArg_ParseTuple(args, "ssOOOp:stream", &name, &isa, &oy, &ox, &ow, &accumulate))
        return NULL;
    if ((t = table_named(st, isa)) == NULL)
        return NULL;
    nn = strncmp(name, "nn_", 3) == 0;
    if (!(nn || strncmp(name, "nt_", 3) == 0) ||
        !(strcmp(name + 3, "f32") == 0 || strcmp(name + 3, "bf16") == 0 ||
          strcmp(name + 3, "f64") == 0))
        return PyErr_Format(st->ArgumentError, "name: no product is called '%s'", name);
    real = strcmp(name + 3, "f64") == 0 ? NPY_DOUBLE : NPY_FLOAT;
    stored = strcmp(name + 3, "bf16") == 0 ? NPY_UINT16 : real;
    if (read_matrix(st, "Y", oy, real, &y) < 0 || read_matrix(st, "X", ox, real, &x) < 0 ||
        read_matrix(st, "W", ow, stored, &w) < 0)
        return NULL;
    if (!PyArray_ISWRITEABLE((PyArrayObject *)oy) || y.rows != x.rows ||
        x.cols != (nn ? w.rows : w.cols) || y.cols != (nn ? w.cols : w.rows))
        return PyErr_Format(st->ShapeError, "Y, X, W: shapes do not fit '%s'", name);
    Py_BEGIN_ALLOW_THREADS
    if (stored == NPY_UINT16)
        (nn ? t->stream_nn_bf16 : t->stream_nt_bf16)(y.data, y.ld, x.data, x.ld, w.data, w.ld,
                                                     y.rows, y.cols, x.cols, accumulate);
    else if (real == NPY_FLOAT)
        (nn ? t->stream_nn_f32 : t->stream_nt_f32)(y.data, y.ld, x.data, x.ld, w.data, w.ld, y.rows,
                                                   y.cols, x.cols, accumulate);
    else
        (nn ? t->stream_nn_f64 : t->stream_nt_f64)(y.data, y.ld, x.data, x.ld, w.data, w.ld, y.rows,
                                                   y.cols, x.cols, accumulate);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* 0 for 'nt', 1 for 'nn', else -1 with an exception set. */
static int
layout_named(mli_pystate *st, const char *name)
{
    if (strcmp(name, "nn") == 0)
        return 1;
    if (strcmp(name, "nt") == 0)
        return 0;
    PyErr_Format(st->ArgumentError, "layout: expected 'nt' or 'nn', got '%s'", name);
    return -1;
}

static PyObject *
py_gemm_bf16(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    const char *name, *isa;
    PyObject *oc, *oa, *ob;
    matrix c, a, b;
    const mli_kernels *t;
    int accumulate, nn;
    size_t bytes;
    void *ws;

    if (!PyArg_ParseTuple(args, "ssOOOp:gemm_bf16", &name, &isa, &oc, &oa, &ob, &accumulate))
        return NULL;
    if ((t = table_named(st, isa)) == NULL)
        return NULL;
    if ((nn = layout_named(st, name)) < 0)
        return NULL;
    if (read_matrix(st, "C", oc, NPY_FLOAT, &c) < 0 ||
        read_matrix(st, "A", oa, NPY_UINT16, &a) < 0 ||
        read_matrix(st, "B", ob, NPY_UINT16, &b) < 0)
        return NULL;
    if (!PyArray_ISWRITEABLE((PyArrayObject *)oc) || c.rows != a.rows ||
        a.cols != (nn ? b.rows : b.cols) || c.cols != (nn ? b.cols : b.rows))
        return PyErr_Format(st->ShapeError, "C, A, B: shapes do not fit '%s'", name);
    bytes = t->gemm_bf16_ws(c.rows, c.cols, a.cols);
    ws = mli_alloc(bytes);
    if (ws == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    memset(ws, 0xFF, bytes); /* NaN: nothing of it may be read before it is written */
    t->gemm_bf16(nn ? MLI_NN : MLI_NT, c.data, c.ld, a.data, a.ld, b.data, b.ld, c.rows, c.cols,
                 a.cols, accumulate, ws);
    Py_END_ALLOW_THREADS
    mli_free(ws);
    Py_RETURN_NONE;
}

static PyObject *
py_rows_f32(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    const char *name, *isa;
    PyObject *oy, *ox, *ow;
    matrix y, x, w;
    const mli_kernels *t;
    int accumulate, nn;
    size_t bytes;
    void *ws;

    if (!PyArg_ParseTuple(args, "ssOOOp:rows_f32", &name, &isa, &oy, &ox, &ow, &accumulate) ||
        (nn = layout_named(st, name)) < 0)
        return NULL;
    if ((t = table_named(st, isa)) == NULL || read_matrix(st, "Y", oy, NPY_FLOAT, &y) < 0 ||
        read_matrix(st, "X", ox, NPY_FLOAT, &x) < 0 || read_matrix(st, "W", ow, NPY_FLOAT, &w) < 0)
        return NULL;
    if (!PyArray_ISWRITEABLE((PyArrayObject *)oy) || y.rows != x.rows ||
        x.cols != (nn ? w.rows : w.cols) || y.cols != (nn ? w.cols : w.rows))
        return PyErr_Format(st->ShapeError, "Y, X, W: shapes do not fit '%s'", name);
    bytes = t->rows_f32_ws(x.rows, x.cols);
    ws = mli_alloc(bytes);
    if (ws == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    memset(ws, 0xFF, bytes); /* NaN: nothing of it may be read before it is written */
    t->rows_f32(nn ? MLI_NN : MLI_NT, y.data, y.ld, x.data, x.ld, w.data, w.ld, y.rows, y.cols,
                x.cols, accumulate, ws);
    Py_END_ALLOW_THREADS
    mli_free(ws);
    Py_RETURN_NONE;
}

static PyObject *
py_rows_f32_native(PyObject *mod, PyObject *arg)
{
    const char *isa = PyUnicode_AsUTF8(arg);
    const mli_kernels *t = isa != NULL ? table_named(PyModule_GetState(mod), isa) : NULL;

    return t != NULL ? PyBool_FromLong(t->rows_f32_native) : NULL;
}

static PyObject *
py_gemm_bf16_native(PyObject *mod, PyObject *arg)
{
    const char *isa = PyUnicode_AsUTF8(arg);
    const mli_kernels *t = isa != NULL ? table_named(PyModule_GetState(mod), isa) : NULL;

    return t != NULL ? PyBool_FromLong(t->gemm_bf16_native) : NULL;
}

PyMethodDef mli_py_kern_methods[] = {
    {"stream", py_stream, METH_VARARGS,
     "stream($module, name, isa, Y, X, W, accumulate, /)\n--\n\n"
     "Test hook: a streaming product, 'nt_f32' and so on, into Y."},
    {"gemm_bf16", py_gemm_bf16, METH_VARARGS,
     "gemm_bf16($module, layout, isa, C, A, B, accumulate, /)\n--\n\n"
     "Test hook: a bf16 matrix product, 'nt' or 'nn', into C."},
    {"gemm_bf16_native", py_gemm_bf16_native, METH_O,
     "gemm_bf16_native($module, isa, /)\n--\n\n"
     "Test hook: whether the table has a bf16 matrix product of its own."},
    {"rows_f32", py_rows_f32, METH_VARARGS,
     "rows_f32($module, layout, isa, Y, X, W, accumulate, /)\n--\n\n"
     "Test hook: the f32 product 'nt' or 'nn' for tens of rows, into Y."},
    {"rows_f32_native", py_rows_f32_native, METH_O,
     "rows_f32_native($module, isa, /)\n--\n\n"
     "Test hook: whether the table has such a product of its own."},
    {NULL, NULL, 0, NULL},
};
