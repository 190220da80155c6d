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

/* A product with scratch: its matrices, of which Y is f32. */
typedef struct {
    const mli_kernels *t;
    matrix y, x, w;
    int nn, accumulate;
} product;

/* From (layout, isa, Y, X, W, accumulate), with X and W of the NumPy type `stored`; `names` are
 * those of Y, X and W. -1 with an exception set. */
static int
product_from(mli_pystate *st, product *p, PyObject *args, int stored, const char names[3][2])
{
    const char *layout, *isa;
    PyObject *oy, *ox, *ow;

    if (!PyArg_ParseTuple(args, "ssOOOp", &layout, &isa, &oy, &ox, &ow, &p->accumulate) ||
        (p->t = table_named(st, isa)) == NULL)
        return -1;
    p->nn = strcmp(layout, "nn") == 0;
    if (!p->nn && strcmp(layout, "nt") != 0) {
        PyErr_Format(st->ArgumentError, "layout: expected 'nt' or 'nn', got '%s'", layout);
        return -1;
    }
    if (read_matrix(st, names[0], oy, NPY_FLOAT, &p->y) < 0 ||
        read_matrix(st, names[1], ox, stored, &p->x) < 0 ||
        read_matrix(st, names[2], ow, stored, &p->w) < 0)
        return -1;
    if (!PyArray_ISWRITEABLE((PyArrayObject *)oy) || p->y.rows != p->x.rows ||
        p->x.cols != (p->nn ? p->w.rows : p->w.cols) ||
        p->y.cols != (p->nn ? p->w.cols : p->w.rows)) {
        PyErr_Format(st->ShapeError, "%s, %s, %s: shapes do not fit '%s'", names[0], names[1],
                     names[2], layout);
        return -1;
    }
    return 0;
}

/* Scratch full of NaN: nothing of it may be read before it is written. NULL with MemoryError. */
static void *
spoiled(size_t bytes)
{
    void *ws = mli_alloc(bytes);

    if (ws == NULL)
        return PyErr_NoMemory();
    return memset(ws, 0xFF, bytes);
}

static PyObject *
py_gemm_bf16(PyObject *mod, PyObject *args)
{
    product p;
    void *ws;

    if (product_from(PyModule_GetState(mod), &p, args, NPY_UINT16,
                     (const char[3][2]){"C", "A", "B"}) < 0 ||
        (ws = spoiled(p.t->gemm_bf16_ws(p.y.rows, p.y.cols, p.x.cols))) == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    p.t->gemm_bf16(p.nn ? MLI_NN : MLI_NT, p.y.data, p.y.ld, p.x.data, p.x.ld, p.w.data, p.w.ld,
                   p.y.rows, p.y.cols, p.x.cols, p.accumulate, ws);
    Py_END_ALLOW_THREADS
    mli_free(ws);
    Py_RETURN_NONE;
}

static PyObject *
py_rows_f32(PyObject *mod, PyObject *args)
{
    product p;
    void *ws;

    if (product_from(PyModule_GetState(mod), &p, args, NPY_FLOAT,
                     (const char[3][2]){"Y", "X", "W"}) < 0 ||
        (ws = spoiled(p.t->rows_f32_ws(p.x.rows, p.x.cols))) == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    p.t->rows_f32(p.nn ? MLI_NN : MLI_NT, p.y.data, p.y.ld, p.x.data, p.x.ld, p.w.data, p.w.ld,
                  p.y.rows, p.y.cols, p.x.cols, p.accumulate, ws);
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

/* Numbers of rows (int64) or of columns (int32), all below `below`: one dimension, contiguous. */
static void *
read_numbers(mli_pystate *st, const char *name, PyObject *obj, int type, int64_t below, int64_t *n)
{
    PyArrayObject *a = (PyArrayObject *)obj;
    int good = PyArray_Check(obj) && PyArray_NDIM(a) == 1 && PyArray_TYPE(a) == type &&
               PyArray_ISCARRAY_RO(a);

    *n = good ? PyArray_DIM(a, 0) : 0;
    for (int64_t i = 0; good && i < *n; i++) {
        const int64_t at = type == NPY_INT64 ? ((const int64_t *)PyArray_DATA(a))[i]
                                             : ((const int32_t *)PyArray_DATA(a))[i];
        good = at >= 0 && at < below;
    }
    if (good)
        return PyArray_DATA(a);
    PyErr_Format(st->ArgumentError, "%s: expected numbers from 0 to %lld", name,
                 (long long)below - 1);
    return NULL;
}

static PyObject *
py_gauge_f32(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    const char *isa;
    PyObject *oz, *ox, *orow, *oown, *orest, *om;
    const mli_kernels *t;
    matrix z, x, m = {NULL, 0, 0, 0};
    int64_t cols, k = 0;
    const int32_t *own, *rest = NULL;
    mli_rows_f32 rows;
    void *ws;

    if (!PyArg_ParseTuple(args, "sOOOOOO:gauge_f32", &isa, &oz, &ox, &orow, &oown, &orest, &om) ||
        (t = table_named(st, isa)) == NULL || read_matrix(st, "Z", oz, NPY_FLOAT, &z) < 0 ||
        read_matrix(st, "X", ox, NPY_FLOAT, &x) < 0 ||
        (rows.row = read_numbers(st, "row", orow, NPY_INT64, x.rows, &rows.N)) == NULL ||
        (own = read_numbers(st, "own", oown, NPY_INT32, x.cols, &cols)) == NULL)
        return NULL;
    if (om != Py_None && (read_matrix(st, "M", om, NPY_FLOAT, &m) < 0 ||
                          (rest = read_numbers(st, "rest", orest, NPY_INT32, x.cols, &k)) == NULL))
        return NULL;
    if (!PyArray_ISWRITEABLE((PyArrayObject *)oz) || x.ld != x.cols || cols + k > x.cols ||
        z.rows != rows.N || z.cols != cols || (om != Py_None && (m.rows != cols || m.cols != k)))
        return PyErr_Format(st->ShapeError, "Z, X, row, own, rest, M: shapes do not fit");
    rows.src = x.data;
    rows.D = x.cols;
    if ((ws = spoiled(t->gauge_f32_ws(rows.N, rows.D))) == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (om == Py_None)
        t->gather_f32(z.data, z.ld, &rows, own, cols, ws);
    else
        t->gauge_f32(z.data, z.ld, &rows, own, cols, rest, k, m.data, m.ld, ws);
    Py_END_ALLOW_THREADS
    mli_free(ws);
    Py_RETURN_NONE;
}

static PyObject *
py_tn_f32(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    const char *isa;
    PyObject *ow, *oy, *ox, *orow;
    const mli_kernels *t;
    matrix w, y, x;
    mli_rows_f32 rows = {NULL, 0, 0, NULL};
    int accumulate;

    if (!PyArg_ParseTuple(args, "sOOOOp:tn_f32", &isa, &ow, &oy, &ox, &orow, &accumulate) ||
        (t = table_named(st, isa)) == NULL || read_matrix(st, "dW", ow, NPY_FLOAT, &w) < 0 ||
        read_matrix(st, "dY", oy, NPY_FLOAT, &y) < 0 || read_matrix(st, "X", ox, NPY_FLOAT, &x) < 0)
        return NULL;
    rows = (mli_rows_f32){x.data, x.ld, x.rows, NULL};
    if (orow != Py_None &&
        (rows.row = read_numbers(st, "row", orow, NPY_INT64, x.rows, &rows.N)) == NULL)
        return NULL;
    if (!PyArray_ISWRITEABLE((PyArrayObject *)ow) || y.rows != rows.N || w.rows != y.cols ||
        w.cols != x.cols)
        return PyErr_Format(st->ShapeError, "dW, dY, X, row: shapes do not fit");
    Py_BEGIN_ALLOW_THREADS
    t->tn_f32(w.data, w.ld, y.data, y.ld, &rows, w.rows, w.cols, accumulate);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
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
    {"gauge_f32", py_gauge_f32, METH_VARARGS,
     "gauge_f32($module, isa, Z, X, row, own, rest, M, /)\n--\n\n"
     "Test hook: X[row][:, own] + X[row][:, rest] M^T, or without M the first alone, into Z."},
    {"tn_f32", py_tn_f32, METH_VARARGS,
     "tn_f32($module, isa, dW, dY, X, row, accumulate, /)\n--\n\n"
     "Test hook: dY^T X[row] (None: X) into dW."},
    {NULL, NULL, 0, NULL},
};
