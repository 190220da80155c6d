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
