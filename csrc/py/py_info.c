/* What was built and what is in use, and hooks for tests. */
#define _GNU_SOURCE /* RTLD_NOLOAD */
#include "args.h"

#include "../base/blas.h"
#include "../base/mem.h"
#include "../base/par.h"
#include "../kern/kern.h"

#include <dlfcn.h>
#include <string.h>

#ifndef MLI_VERSION
#define MLI_VERSION "unknown"
#endif
#ifndef MLI_BUILD_FLAGS
#define MLI_BUILD_FLAGS ""
#endif
#if defined(__clang__)
#define COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define COMPILER "gcc " __VERSION__
#else
#define COMPILER "unknown"
#endif

static const char *const isa_names[] = {"ref", "avx2", "avx512", "avx512bf16", "amx"};

/* Names of the tables that the build has and this CPU runs. */
static PyObject *
isas_usable(void)
{
    PyObject *list = PyList_New(0);

    for (size_t i = 0; list != NULL && i < sizeof isa_names / sizeof *isa_names; i++) {
        PyObject *name;
        if (mli_kernels_named(isa_names[i]) == NULL)
            continue;
        name = PyUnicode_FromString(isa_names[i]);
        if (name == NULL || PyList_Append(list, name) < 0)
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

static PyObject *
py_build_info(PyObject *mod, PyObject *unused)
{
    PyObject *isas = isas_usable(), *info = NULL;

    (void)mod;
    (void)unused;
    if (isas != NULL)
        info =
            Py_BuildValue("{s:s, s:s, s:s, s:s, s:O, s:{s:s, s:s, s:s, s:O, s:N, s:i}, s:i}",
                          "version", MLI_VERSION, "compiler", COMPILER, "flags", MLI_BUILD_FLAGS,
                          "isa", mli_kernels_get()->isa, "isas", isas, "blas", "config",
                          mli_blas_config(), "core", mli_blas_core(), "prefix", mli_blas_prefix(),
                          "vendored", mli_blas_vendored() ? Py_True : Py_False, "path",
                          PyUnicode_DecodeFSDefault(mli_blas_path()), "threads",
                          mli_blas_get_num_threads(), "pool_threads", (int)mli_parallel_started());
    Py_XDECREF(isas);
    return info;
}

static PyObject *
py_mem_live(PyObject *mod, PyObject *unused)
{
    (void)mod;
    (void)unused;
    return PyLong_FromLongLong((long long)mli_mem_live());
}

static PyObject *
py_mem_fail_after(PyObject *mod, PyObject *arg)
{
    long long n = PyLong_AsLongLong(arg);

    (void)mod;
    if (n == -1 && PyErr_Occurred())
        return NULL;
    mli_mem_fail_after((int64_t)n);
    Py_RETURN_NONE;
}

static PyObject *
py_disable_isa(PyObject *mod, PyObject *arg)
{
    const char *text = PyUnicode_AsUTF8(arg);

    (void)mod;
    if (text == NULL)
        return NULL;
    mli_kernels_disable(text);
    Py_RETURN_NONE;
}

/* A kernel takes one contiguous array of `in` and gives one of `out` (or a number) and, for those
 * that check, a bool. */
enum { WIDEN_BF16, WIDEN_F16, CHECK_F32, NARROW_BF16, NARROW_F16, SUMSQ, KERNELS };

static const struct {
    const char *name;
    int in, out;
} kernel_list[KERNELS] = {
    {"bf16_to_f32", NPY_UINT16, NPY_FLOAT}, {"f16_to_f32", NPY_UINT16, NPY_FLOAT},
    {"f32_check", NPY_FLOAT, NPY_FLOAT},    {"f32_to_bf16", NPY_FLOAT, NPY_UINT16},
    {"f32_to_f16", NPY_FLOAT, NPY_UINT16},  {"f32_sumsq", NPY_FLOAT, NPY_DOUBLE},
};

static PyObject *
py_kernel(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    const char *name, *isa;
    PyObject *obj, *ret = NULL;
    PyArrayObject *x = NULL, *y = NULL;
    const mli_kernels *t;
    npy_intp n;
    int which = 0, finite = 1;
    double sum = 0.0;

    if (!PyArg_ParseTuple(args, "ssO:kernel", &name, &isa, &obj))
        return NULL;
    while (which < KERNELS && strcmp(name, kernel_list[which].name) != 0)
        which++;
    if (which == KERNELS)
        return PyErr_Format(st->ArgumentError, "name: no kernel is called '%s'", name);
    t = mli_kernels_named(isa);
    if (t == NULL)
        return PyErr_Format(st->ArgumentError, "isa: '%s' is not in this build or CPU", isa);
    if (!PyArray_Check(obj) || PyArray_TYPE((PyArrayObject *)obj) != kernel_list[which].in)
        return PyErr_Format(st->ArgumentError, "array: wrong type for '%s'", name);
    x = (PyArrayObject *)PyArray_FROMANY(obj, kernel_list[which].in, 1, 1, NPY_ARRAY_IN_ARRAY);
    if (x == NULL)
        return NULL;
    n = PyArray_SIZE(x);
    y = (PyArrayObject *)PyArray_ZEROS(1, &n, kernel_list[which].out, 0);
    if (y == NULL)
        goto done;
    Py_BEGIN_ALLOW_THREADS
    switch (which) {
    case WIDEN_BF16:
        finite = t->bf16_to_f32(PyArray_DATA(y), PyArray_DATA(x), n);
        break;
    case WIDEN_F16:
        finite = t->f16_to_f32(PyArray_DATA(y), PyArray_DATA(x), n);
        break;
    case CHECK_F32:
        finite = t->f32_check(PyArray_DATA(y), PyArray_DATA(x), n);
        break;
    case NARROW_BF16:
        t->f32_to_bf16(PyArray_DATA(y), PyArray_DATA(x), n);
        break;
    case NARROW_F16:
        t->f32_to_f16(PyArray_DATA(y), PyArray_DATA(x), n);
        break;
    default:
        sum = t->f32_sumsq(PyArray_DATA(x), n);
        break;
    }
    Py_END_ALLOW_THREADS
    if (which == SUMSQ)
        ret = PyFloat_FromDouble(sum);
    else if (which <= CHECK_F32)
        ret = Py_BuildValue("(OO)", y, finite ? Py_True : Py_False);
    else
        ret = Py_NewRef((PyObject *)y);
done:
    Py_XDECREF(x);
    Py_XDECREF(y);
    return ret;
}

/* One activation kernel: h of gate and up, or with dh (dgate, dup, hw, sum). f32 or f64, all 1-D of
 * one length. */
static PyObject *
py_act(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    const char *isa;
    PyObject *in[3], *ret = NULL;
    PyArrayObject *a[3] = {NULL}, *out[3] = {NULL}; /* gate, up, dh */
    const mli_kernels *t;
    mli_act act;
    npy_intp n;
    int kind, type;
    double w, sum;

    if (!PyArg_ParseTuple(args, "siOOOddd:act", &isa, &kind, &in[0], &in[1], &in[2], &w, &act.alpha,
                          &act.limit))
        return NULL;
    t = mli_kernels_named(isa);
    if (t == NULL)
        return PyErr_Format(st->ArgumentError, "isa: '%s' is not in this build or CPU", isa);
    act.kind = (molae_activation)kind;
    type = PyArray_Check(in[0]) && PyArray_TYPE((PyArrayObject *)in[0]) == NPY_DOUBLE ? NPY_DOUBLE
                                                                                      : NPY_FLOAT;
    for (int i = 0; i < 3; i++) {
        if (in[i] == Py_None && i == 2)
            break;
        a[i] = (PyArrayObject *)PyArray_FROMANY(in[i], type, 1, 1, NPY_ARRAY_IN_ARRAY);
        if (a[i] == NULL)
            goto done;
        n = PyArray_SIZE(a[0]);
        if (mli_py_check_shape(st, "gate, up, dh", a[i], 1, &n, "n") < 0)
            goto done;
    }
    n = PyArray_SIZE(a[0]);
    for (int i = 0; i < 3; i++)
        if ((out[i] = (PyArrayObject *)PyArray_ZEROS(1, &n, type, 0)) == NULL)
            goto done;
    if (a[2] == NULL && type == NPY_DOUBLE)
        t->act_f64(PyArray_DATA(out[0]), PyArray_DATA(a[0]), PyArray_DATA(a[1]), n, &act);
    else if (a[2] == NULL)
        t->act_f32(PyArray_DATA(out[0]), PyArray_DATA(a[0]), PyArray_DATA(a[1]), n, &act);
    if (a[2] == NULL) {
        ret = Py_NewRef((PyObject *)out[0]);
        goto done;
    }
    if (type == NPY_DOUBLE)
        sum =
            t->act_grad_f64(PyArray_DATA(out[0]), PyArray_DATA(out[1]), PyArray_DATA(out[2]),
                            PyArray_DATA(a[2]), PyArray_DATA(a[0]), PyArray_DATA(a[1]), w, n, &act);
    else
        sum = (double)t->act_grad_f32(PyArray_DATA(out[0]), PyArray_DATA(out[1]),
                                      PyArray_DATA(out[2]), PyArray_DATA(a[2]), PyArray_DATA(a[0]),
                                      PyArray_DATA(a[1]), (float)w, n, &act);
    ret = Py_BuildValue("(OOOd)", out[0], out[1], out[2], sum);
done:
    for (int i = 0; i < 3; i++) {
        Py_XDECREF((PyObject *)a[i]);
        Py_XDECREF((PyObject *)out[i]);
    }
    return ret;
}

typedef struct {
    const int64_t *status; /* what task i returns */
    int64_t *worker;       /* who ran it */
} probe_arg;

static molae_status
probe_task(void *p, int64_t index, int32_t worker)
{
    probe_arg *arg = p;

    arg->worker[index] = worker;
    return (molae_status)arg->status[index];
}

PyDoc_STRVAR(borrow_threads_doc,
             "borrow_threads($module, library, /)\n--\n\n"
             "From now on `borrowed` work runs on the threads of the OpenMP that this loaded\n"
             "library is linked with. False: it has none that lends them, and molae's own serve.");

static PyObject *
py_borrow_threads(PyObject *mod, PyObject *arg)
{
    mli_pystate *st = PyModule_GetState(mod);
    PyObject *path = NULL;
    void *library, *symbol;

    if (!PyUnicode_FSConverter(arg, &path))
        return NULL;
    st->team = NULL;
    library = dlopen(PyBytes_AS_STRING(path), RTLD_LAZY | RTLD_NOLOAD);
    Py_DECREF(path);
    if (library != NULL) {
        symbol = dlsym(library, "GOMP_parallel");
        memcpy(&st->team, &symbol, sizeof symbol); /* POSIX has the two convertible */
        /* Never closed: its threads are in use. */
    }
    return PyBool_FromLong(st->team != NULL);
}

static PyObject *
py_parallel_probe(PyObject *mod, PyObject *args, PyObject *kw)
{
    static char *names[] = {"status", "num_threads", "borrowed", NULL};
    mli_pystate *st = PyModule_GetState(mod);
    PyObject *obj, *ret = NULL;
    PyArrayObject *status = NULL, *worker = NULL;
    Py_ssize_t num_threads;
    int borrowed = 0;
    molae_ctx ctx;
    molae_status rc;
    probe_arg arg;
    npy_intp n;

    if (!PyArg_ParseTupleAndKeywords(args, kw, "On|p:parallel_probe", names, &obj, &num_threads,
                                     &borrowed))
        return NULL;
    if (mli_py_ctx(st, num_threads, borrowed, &ctx) < 0)
        return NULL;
    status = (PyArrayObject *)PyArray_FROMANY(obj, NPY_INT64, 1, 1, NPY_ARRAY_IN_ARRAY);
    if (status == NULL)
        return NULL;
    n = PyArray_SIZE(status);
    worker = (PyArrayObject *)PyArray_EMPTY(1, &n, NPY_INT64, 0);
    if (worker == NULL)
        goto done;
    arg.status = PyArray_DATA(status);
    arg.worker = PyArray_DATA(worker);
    for (npy_intp i = 0; i < n; i++)
        arg.worker[i] = -1;
    Py_BEGIN_ALLOW_THREADS
    rc = mli_parallel_for(&ctx, n, probe_task, &arg);
    Py_END_ALLOW_THREADS
    ret = Py_BuildValue("(iO)", (int)rc, worker);
done:
    Py_XDECREF(status);
    Py_XDECREF(worker);
    return ret;
}

static PyObject *
py_raise_probe(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    long long expert, group, info;
    const char *what;
    molae_errinfo err;
    int status;

    if (!PyArg_ParseTuple(args, "izLLL:raise_probe", &status, &what, &expert, &group, &info))
        return NULL;
    err = (molae_errinfo){what, (int64_t)expert, (int64_t)group, (int64_t)info};
    if (mli_py_raise(st, (molae_status)status, &err) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
py_gemm(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    PyArrayObject *a = NULL, *b = NULL, *c = NULL;
    PyObject *oa, *ob, *ret = NULL;
    molae_status rc;
    npy_intp dims[2], want[2];

    if (!PyArg_ParseTuple(args, "OO:gemm", &oa, &ob))
        return NULL;
    a = (PyArrayObject *)PyArray_FROMANY(oa, NPY_FLOAT, 2, 2, NPY_ARRAY_IN_ARRAY);
    b = (PyArrayObject *)PyArray_FROMANY(ob, NPY_FLOAT, 2, 2, NPY_ARRAY_IN_ARRAY);
    if (a == NULL || b == NULL)
        goto done;
    want[0] = PyArray_DIM(a, 1);
    want[1] = -1;
    if (mli_py_check_shape(st, "b", b, 2, want, "kn") < 0)
        goto done;
    dims[0] = PyArray_DIM(a, 0);
    dims[1] = PyArray_DIM(b, 1);
    c = (PyArrayObject *)PyArray_ZEROS(2, dims, NPY_FLOAT, 0);
    if (c == NULL)
        goto done;
    Py_BEGIN_ALLOW_THREADS
    mli_blas_enter();
    rc = mli_gemm_f32(0, 0, dims[0], dims[1], want[0], 1.0f, PyArray_DATA(a), want[0],
                      PyArray_DATA(b), dims[1], 0.0f, PyArray_DATA(c), dims[1]);
    mli_blas_leave();
    Py_END_ALLOW_THREADS
    if (mli_py_raise(st, rc, NULL) < 0)
        goto done;
    ret = Py_NewRef((PyObject *)c);
done:
    Py_XDECREF(a);
    Py_XDECREF(b);
    Py_XDECREF(c);
    return ret;
}

PyMethodDef mli_py_info_methods[] = {
    {"build_info", py_build_info, METH_NOARGS,
     "build_info($module, /)\n--\n\nWhat was built and is in use; see molae.show_config."},
    {"mem_live", py_mem_live, METH_NOARGS,
     "mem_live($module, /)\n--\n\nBlocks of native memory not yet freed."},
    {"mem_fail_after", py_mem_fail_after, METH_O,
     "mem_fail_after($module, n, /)\n--\n\nTest hook: the n-th allocation from now fails."},
    {"disable_isa", py_disable_isa, METH_O,
     "disable_isa($module, names, /)\n--\n\nInstruction sets not to use, before the first use."},
    {"kernel", py_kernel, METH_VARARGS,
     "kernel($module, name, isa, array, /)\n--\n\nTest hook: runs one kernel on a 1-D array."},
    {"act", py_act, METH_VARARGS,
     "act($module, isa, kind, gate, up, dh, w, alpha, limit, /)\n--\n\n"
     "Test hook: one activation kernel on 1-D arrays, its gradient where dh is not None."},
    {"borrow_threads", py_borrow_threads, METH_O, borrow_threads_doc},
    {"parallel_probe", (PyCFunction)(void (*)(void))py_parallel_probe, METH_VARARGS | METH_KEYWORDS,
     "parallel_probe($module, status, num_threads, borrowed=False)\n--\n\n"
     "Test hook: a parallel loop whose task i returns status[i]."},
    {"raise_probe", py_raise_probe, METH_VARARGS,
     "raise_probe($module, status, what, expert, group, info, /)\n--\n\n"
     "Test hook: a status as the exception or warning it becomes."},
    {"gemm", py_gemm, METH_VARARGS,
     "gemm($module, a, b, /)\n--\n\nfloat32 product on one thread, to measure the peak."},
    {NULL, NULL, 0, NULL},
};
