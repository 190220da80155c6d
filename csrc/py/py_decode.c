/* Thin wrappers of csrc/ops/decode.c. Public functions: molae/ops/decode.py. */
#include "args.h"

/* Whether `a` is of that NumPy type and C can use it as it lies; else an exception. */
static int
takes(mli_pystate *st, const char *name, PyArrayObject *a, int type, const char *wanted)
{
    if (PyArray_TYPE(a) != type) {
        PyErr_Format(st->ArgumentError, "%s: expected %s, got %S", name, wanted,
                     (PyObject *)PyArray_DESCR(a));
        return 0;
    }
    return mli_py_check_layout(st, name, a) == 0;
}

/* Whether `out` can be written to and has these sizes; *type is its own. */
static int
takes_out(mli_pystate *st, PyArrayObject *out, npy_intp rows, npy_intp cols, molae_dtype *type)
{
    const npy_intp dims[2] = {rows, cols};

    return mli_py_dtype(st, "out", out, type) == 0 && mli_py_check_layout(st, "out", out) == 0 &&
           mli_py_check_shape(st, "out", out, 2, dims, "RC") == 0 &&
           PyArray_FailUnlessWriteable(out, "out") == 0;
}

PyDoc_STRVAR(decode_fp8_doc,
             "decode_fp8($module, out, weight, scale, block_rows, block_cols, "
             "num_threads, /)\n--\n\nSets out (rows,cols); see molae.ops.decode_fp8.");

static PyObject *
py_decode_fp8(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    PyArrayObject *out, *w, *scale;
    Py_ssize_t block_rows, block_cols, num_threads;
    npy_intp dims[2] = {-1, -1};
    molae_ctx ctx;
    molae_dtype type;
    molae_errinfo err = {0};
    molae_status rc;

    if (!PyArg_ParseTuple(args, "O!O!O!nnn:decode_fp8", &PyArray_Type, &out, &PyArray_Type, &w,
                          &PyArray_Type, &scale, &block_rows, &block_cols, &num_threads) ||
        mli_py_ctx(st, num_threads, 0, &ctx) < 0)
        return NULL;
    if (block_rows < 1 || block_cols < 1)
        return PyErr_Format(st->ArgumentError, "block: expected 1 and more, got (%zd, %zd)",
                            block_rows, block_cols);
    if (!takes(st, "weight", w, NPY_UINT8, "uint8") ||
        mli_py_check_shape(st, "weight", w, 2, dims, "RC") < 0 ||
        !takes_out(st, out, PyArray_DIM(w, 0), PyArray_DIM(w, 1), &type))
        return NULL;
    dims[0] = PyArray_DIM(w, 0) / block_rows + (PyArray_DIM(w, 0) % block_rows != 0);
    dims[1] = PyArray_DIM(w, 1) / block_cols + (PyArray_DIM(w, 1) % block_cols != 0);
    if (!takes(st, "scale", scale, NPY_FLOAT, "float32") ||
        mli_py_check_shape(st, "scale", scale, 2, dims, "rc") < 0)
        return NULL;

    Py_BEGIN_ALLOW_THREADS
    rc = molae_decode_fp8(&ctx, PyArray_DATA(out), type, PyArray_DATA(w), PyArray_DATA(scale),
                          PyArray_DIM(w, 0), PyArray_DIM(w, 1), block_rows, block_cols, &err);
    Py_END_ALLOW_THREADS

    if (mli_py_raise(st, rc, &err) < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(decode_mxfp4_doc, "decode_mxfp4($module, out, blocks, scales, num_threads, /)\n--\n\n"
                               "Sets out (rows, 32 groups); see molae.ops.decode_mxfp4.");

static PyObject *
py_decode_mxfp4(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    PyArrayObject *out, *blocks, *scales;
    Py_ssize_t num_threads;
    npy_intp dims[3] = {-1, -1, 16};
    molae_ctx ctx;
    molae_dtype type;
    molae_errinfo err = {0};
    molae_status rc;

    if (!PyArg_ParseTuple(args, "O!O!O!n:decode_mxfp4", &PyArray_Type, &out, &PyArray_Type, &blocks,
                          &PyArray_Type, &scales, &num_threads) ||
        mli_py_ctx(st, num_threads, 0, &ctx) < 0)
        return NULL;
    if (!takes(st, "blocks", blocks, NPY_UINT8, "uint8") ||
        mli_py_check_shape(st, "blocks", blocks, 3, dims, "RGB") < 0)
        return NULL;
    dims[0] = PyArray_DIM(blocks, 0);
    dims[1] = PyArray_DIM(blocks, 1);
    if (!takes(st, "scales", scales, NPY_UINT8, "uint8") ||
        mli_py_check_shape(st, "scales", scales, 2, dims, "RG") < 0 ||
        !takes_out(st, out, dims[0], 32 * dims[1], &type))
        return NULL;

    Py_BEGIN_ALLOW_THREADS
    rc = molae_decode_mxfp4(&ctx, PyArray_DATA(out), type, PyArray_DATA(blocks),
                            PyArray_DATA(scales), dims[0], dims[1], &err);
    Py_END_ALLOW_THREADS

    if (mli_py_raise(st, rc, &err) < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyMethodDef mli_py_decode_methods[] = {
    {"decode_fp8", py_decode_fp8, METH_VARARGS, decode_fp8_doc},
    {"decode_mxfp4", py_decode_mxfp4, METH_VARARGS, decode_mxfp4_doc},
    {NULL, NULL, 0, NULL},
};
