#include "layer.h"

#include "../base/mem.h"

#include <stdlib.h>

/* ------------------------------------------------------------- the arrays */

int
mli_py_spans_add(mli_py_spans *s, const char *name, PyArrayObject *a, int out)
{
    const char *lo = PyArray_DATA(a);

    if (s->n == s->room) { /* rarely: doubles */
        const Py_ssize_t room = 2 * s->room + 64;
        struct span *more = mli_alloc((size_t)room * sizeof *more);
        if (more == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        for (Py_ssize_t i = 0; i < s->n; i++)
            more[i] = s->at[i];
        mli_free(s->at);
        s->at = more;
        s->room = room;
    }
    s->at[s->n++] = (struct span){lo, lo + PyArray_NBYTES(a), name, out};
    return 0;
}

static int
by_place(const void *a, const void *b)
{
    const char *one = ((const struct span *)a)->lo, *other = ((const struct span *)b)->lo;

    return (one > other) - (one < other);
}

int
mli_py_spans_check(mli_pystate *st, mli_py_spans *s)
{
    const struct span *last = NULL, *last_out = NULL; /* those that end last so far */

    if (s->n > 0)
        qsort(s->at, (size_t)s->n, sizeof *s->at, by_place);
    for (Py_ssize_t i = 0; i < s->n; i++) {
        const struct span *a = &s->at[i], *other = a->out ? last : last_out;
        if (a->lo == a->hi)
            continue;
        if (other != NULL && a->lo < other->hi) {
            const int first = a->out;
            PyErr_Format(st->ArgumentError, "%s: an array that is written overlaps %s",
                         first ? a->name : other->name, first ? other->name : a->name);
            return -1;
        }
        if (last == NULL || a->hi > last->hi)
            last = a;
        if (a->out && (last_out == NULL || a->hi > last_out->hi))
            last_out = a;
    }
    return 0;
}

/* One argument: its name, and the number of the item where it is a list (-1: it is none). */
typedef struct {
    const char *name;
    Py_ssize_t item;
} label;

/* Whether there is nothing to say against it: most arrays are, and names cost time. */
static int
plain(PyObject *obj, molae_dtype dtype, int ndim, const npy_intp *dims, int out)
{
    PyArrayObject *a = (PyArrayObject *)obj;
    int good = PyArray_Check(obj) && PyArray_NDIM(a) == ndim && PyArray_IS_C_CONTIGUOUS(a) &&
               PyArray_ISALIGNED(a) && PyArray_ISNOTSWAPPED(a) &&
               (!out || PyArray_ISWRITEABLE(a)) &&
               ((dtype == MOLAE_F32 && PyArray_TYPE(a) == NPY_FLOAT) ||
                (dtype == MOLAE_F64 && PyArray_TYPE(a) == NPY_DOUBLE));

    for (int i = 0; good && i < ndim; i++)
        good = dims[i] < 0 || PyArray_DIM(a, i) == dims[i];
    return good;
}

/* obj as an array of exactly this type and shape that C can use where it is; borrowed. NULL with an
 * exception. `out` asks for a writeable one. */
static PyArrayObject *
take(mli_pystate *st, mli_py_spans *s, label who, PyObject *obj, molae_dtype dtype, int ndim,
     const npy_intp *dims, const char *letters, int out)
{
    static const char *const names[] = {"float32", "float64", "float16", "bfloat16"};
    PyArrayObject *a = (PyArrayObject *)obj;
    molae_dtype given;
    char name[64];

    if (plain(obj, dtype, ndim, dims, out))
        return mli_py_spans_add(s, who.name, a, out) < 0 ? NULL : a;
    if (who.item < 0)
        PyOS_snprintf(name, sizeof name, "%s", who.name);
    else
        PyOS_snprintf(name, sizeof name, "%s[%lld]", who.name, (long long)who.item);
    if (!PyArray_Check(obj)) {
        PyErr_Format(st->ArgumentError, "%s: expected an array", name);
        return NULL;
    }
    if (mli_py_dtype(st, name, a, &given) < 0)
        return NULL;
    if (given != dtype) {
        PyErr_Format(st->ArgumentError, "%s: expected %s, got %s", name, names[dtype],
                     names[given]);
        return NULL;
    }
    if (mli_py_check_shape(st, name, a, ndim, dims, letters) < 0 ||
        mli_py_check_layout(st, name, a) < 0)
        return NULL;
    if (out && !PyArray_ISWRITEABLE(a)) {
        PyErr_Format(st->ArgumentError, "%s: the array is read-only", name);
        return NULL;
    }
    return mli_py_spans_add(s, who.name, a, out) < 0 ? NULL : a;
}

/* A list or tuple of n items; a new reference, NULL with an exception. */
static PyObject *
take_list(mli_pystate *st, const char *name, PyObject *obj, Py_ssize_t n)
{
    PyObject *seq = PySequence_Fast(obj, "expected a sequence of arrays");

    if (seq != NULL && PySequence_Fast_GET_SIZE(seq) != n) {
        PyErr_Format(st->ShapeError, "%s: expected %zd items, got %zd", name, n,
                     PySequence_Fast_GET_SIZE(seq));
        Py_CLEAR(seq);
    }
    return seq;
}

/* --------------------------------------------------------------- the layer */

static void
projection_clear(mli_py_projection *k)
{
    Py_CLEAR(k->group_of);
    Py_CLEAR(k->rank);
    for (int i = 0; i < 5; i++)
        Py_CLEAR(k->lists[i]);
    mli_free(k->private_);
    mli_free(k->shared);
    mli_free(k->perm);
    mli_free(k->dprivate);
    mli_free(k->dshared);
}

void
mli_py_call_clear(mli_py_call *c)
{
    projection_clear(&c->gate);
    projection_clear(&c->up);
    projection_clear(&c->down);
    Py_CLEAR(c->index);
    mli_free(c->spans.at);
}

typedef struct {
    const char *private_, *shared, *perm, *bias;
} names;

static const names gate_names = {"gate", "gate.shared", "gate.perm", "gate_bias"};
static const names up_names = {"up", "up.shared", "up.perm", "up_bias"};
static const names down_names = {"down", "down.shared", "down.perm", "down_bias"};
static const names dgate_names = {"dgate", "dgate.shared", "", "dgate_bias"};
static const names dup_names = {"dup", "dup.shared", "", "dup_bias"};
static const names ddown_names = {"ddown", "ddown.shared", "", "ddown_bias"};

/* The items of a list of per-expert or per-group arrays into p; None is NULL. kind: 0 private,
 * 1 shared. */
static int
take_matrices(mli_pystate *st, mli_py_call *c, const molae_projection *p, const char *name,
              PyObject *seq, void **to, molae_dtype dtype, int shared, int down, int out)
{
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(seq);

    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *item = PySequence_Fast_GET_ITEM(seq, i);
        const int64_t g = shared ? i : p->group_of[i];
        const npy_intp R = p->rank[g], D = c->l.D, F = c->l.F;
        npy_intp dims[2];
        const char *letters;
        PyArrayObject *a;
        to[i] = NULL;
        if (item == Py_None)
            continue;
        if (shared) {
            dims[0] = R;
            dims[1] = p->form == MOLAE_FORM_GAUGE ? D - R : D;
            letters = p->form == MOLAE_FORM_GAUGE ? "RM" : "RD";
            if (R < 0) {
                PyErr_Format(st->ArgumentError, "%s[%zd]: group %zd is dense", name, i, i);
                return -1;
            }
        } else {
            const npy_intp k = R < 0 ? D : R;
            dims[0] = down ? k : F;
            dims[1] = down ? F : k;
            letters = down ? (R < 0 ? "DF" : "RF") : (R < 0 ? "FD" : "FR");
        }
        a = take(st, &c->spans, (label){name, i}, item, dtype, 2, dims, letters, out);
        if (a == NULL)
            return -1;
        to[i] = PyArray_DATA(a);
    }
    return 0;
}

/* A list of pointers with room for n, NULL with an exception. */
static void *
pointers(Py_ssize_t n)
{
    void *p = mli_alloc((size_t)n * sizeof(void *));

    if (p == NULL)
        PyErr_NoMemory();
    return p;
}

/* *type of an array of weights: that of the arithmetic, or bfloat16 for float32. */
static int
stored_type(mli_pystate *st, const mli_py_call *c, const char *name, PyObject *obj,
            molae_dtype *type)
{
    if (!PyArray_Check(obj)) {
        PyErr_Format(st->ArgumentError, "%s: expected an array", name);
        return -1;
    }
    if (mli_py_dtype(st, name, (PyArrayObject *)obj, type) < 0)
        return -1;
    if (*type != c->work && !(c->work == MOLAE_F32 && *type == MOLAE_BF16)) {
        PyErr_Format(st->ArgumentError, "%s: expected %s for this x, got %S", name,
                     c->work == MOLAE_F64 ? "float64" : "float32 or bfloat16",
                     (PyObject *)PyArray_DESCR((PyArrayObject *)obj));
        return -1;
    }
    return 0;
}

/* p and k from (private, group_of, rank, shared, perm, gauge, dtype of, bias). */
static int
projection_from(mli_pystate *st, mli_py_call *c, mli_py_projection *k, molae_projection *p,
                PyObject *tuple, const names *name, int down)
{
    PyObject *private_, *group_of, *rank, *shared, *perm, *bias, *like;
    const npy_intp E = c->l.E;
    npy_intp dims[2] = {-1, -1};
    int gauge;

    if (!PyArg_ParseTuple(tuple, "OOOOOpOO", &private_, &group_of, &rank, &shared, &perm, &gauge,
                          &like, &bias))
        return -1;
    if ((k->group_of = mli_py_int64_array(st, name->private_, group_of, 1, &E, "E")) == NULL ||
        (k->rank = mli_py_int64_array(st, name->private_, rank, 1, dims, "G")) == NULL)
        return -1;
    p->G = PyArray_DIM(k->rank, 0);
    p->group_of = PyArray_DATA(k->group_of);
    p->rank = PyArray_DATA(k->rank);
    p->form = gauge ? MOLAE_FORM_GAUGE : MOLAE_FORM_PLAIN;
    for (npy_intp e = 0; e < E; e++)
        if (p->group_of[e] < 0 || p->group_of[e] >= p->G) {
            PyErr_Format(st->ArgumentError, "%s: expert %zd is in no group", name->private_,
                         (Py_ssize_t)e);
            return -1;
        }
    if (stored_type(st, c, name->private_, like, &p->dtype) < 0)
        return -1;
    if ((k->lists[0] = take_list(st, name->private_, private_, E)) == NULL ||
        (k->lists[1] = take_list(st, name->shared, shared, p->G)) == NULL ||
        (k->lists[2] = take_list(st, name->perm, perm, p->G)) == NULL ||
        (k->private_ = pointers(E)) == NULL || (k->shared = pointers(p->G)) == NULL ||
        (k->perm = pointers(p->G)) == NULL)
        return -1;
    if (take_matrices(st, c, p, name->private_, k->lists[0], (void **)k->private_, p->dtype, 0,
                      down, 0) < 0 ||
        take_matrices(st, c, p, name->shared, k->lists[1], (void **)k->shared, p->dtype, 1, down,
                      0) < 0)
        return -1;
    for (int64_t g = 0; g < p->G; g++) {
        PyArrayObject *a = (PyArrayObject *)PySequence_Fast_GET_ITEM(k->lists[2], g);
        const npy_intp D = c->l.D;
        k->perm[g] = NULL;
        if ((PyObject *)a == Py_None)
            continue;
        if (!PyArray_Check((PyObject *)a) || PyArray_TYPE(a) != NPY_INT32) {
            PyErr_Format(st->ArgumentError, "%s[%lld]: expected an array of int32", name->perm,
                         (long long)g);
            return -1;
        }
        if (mli_py_check_shape(st, name->perm, a, 1, &D, "D") < 0 ||
            mli_py_check_layout(st, name->perm, a) < 0 ||
            mli_py_spans_add(&c->spans, name->perm, a, 0) < 0)
            return -1;
        k->perm[g] = PyArray_DATA(a);
    }
    p->private_ = k->private_;
    p->shared = k->shared;
    p->perm = k->perm;
    if (bias != Py_None) {
        PyArrayObject *a;
        dims[0] = E;
        dims[1] = down ? c->l.D : c->l.F;
        a = take(st, &c->spans, (label){name->bias, -1}, bias, p->dtype, 2, dims,
                 down ? "ED" : "EF", 0);
        if (a == NULL)
            return -1;
        p->bias = PyArray_DATA(a);
    }
    return 0;
}

/* Compressed experts from None or (vectors, n): vectors (E,3,D), of the second of which the first F
 * numbers count, or (E, 2 D + F). */
static int
compressed_from(mli_pystate *st, mli_py_call *c, PyObject *given)
{
    molae_compressed *to = &c->l.compressed;
    const npy_intp D = c->l.D, F = c->l.F;
    npy_intp dims[3] = {c->l.E, 3, D};
    PyArrayObject *a;
    PyObject *vectors;
    Py_ssize_t n;
    int wide;

    if (given == Py_None)
        return 0;
    if (!PyArg_ParseTuple(given, "On", &vectors, &n))
        return -1;
    if (n < 0 || n >= c->K) {
        PyErr_Format(st->ArgumentError, "num_compressed: expected 0 to K - 1 = %zd, got %zd",
                     (Py_ssize_t)c->K - 1, n);
        return -1;
    }
    if (stored_type(st, c, "embeddings", vectors, &to->dtype) < 0)
        return -1;
    a = (PyArrayObject *)vectors;
    wide = PyArray_NDIM(a) == 3;
    if (wide && F > D) {
        PyErr_Format(
            st->ShapeError,
            "embeddings: (E, 3, D) has no room for F=%zd above D=%zd; expected (E, 2 D + F)",
            (Py_ssize_t)F, (Py_ssize_t)D);
        return -1;
    }
    if (!wide)
        dims[1] = 2 * D + F;
    if (take(st, &c->spans, (label){"embeddings", -1}, vectors, to->dtype, wide ? 3 : 2, dims,
             wide ? "E3D" : "ET", 0) == NULL)
        return -1;
    c->compressed_wide = wide;
    to->n = n;
    to->vectors = PyArray_DATA(a);
    to->stride = wide ? 3 * D : 2 * D + F;
    to->e2 = D;
    to->e3 = wide ? 2 * D : D + F;
    return 0;
}

/* *to = where their gradient goes, NULL where obj is None. */
int
mli_py_vectors_output(mli_pystate *st, mli_py_call *c, PyObject *obj, void **to)
{
    const int wide = c->compressed_wide;
    const npy_intp dims[3] = {c->l.E, wide ? 3 : (npy_intp)c->l.compressed.stride, c->l.D};
    PyArrayObject *a;

    if (obj == Py_None)
        return 0;
    if (c->l.compressed.vectors == NULL) {
        PyErr_SetString(st->ArgumentError, "dembeddings: there are no embeddings");
        return -1;
    }
    a = take(st, &c->spans, (label){"dembeddings", -1}, obj, c->work, wide ? 3 : 2, dims,
             wide ? "E3D" : "ET", 1);
    if (a == NULL)
        return -1;
    *to = PyArray_DATA(a);
    return 0;
}

/* The call from (x, index, weight, gate, up, down, E, F, activation, alpha, limit, compressed). */
int
mli_py_call_from(mli_pystate *st, mli_py_call *c, PyObject *tuple)
{
    PyObject *x, *index, *weight, *gate, *up, *down, *compressed;
    npy_intp dims[2] = {-1, -1};
    Py_ssize_t E, F;
    int activation;

    if (!PyArg_ParseTuple(tuple, "OOOOOOnniddO", &x, &index, &weight, &gate, &up, &down, &E, &F,
                          &activation, &c->l.alpha, &c->l.limit, &compressed))
        return -1;
    if (!PyArray_Check(x)) {
        PyErr_SetString(st->ArgumentError, "x: expected an array");
        return -1;
    }
    if (E < 1 || F < 1) {
        PyErr_Format(st->ShapeError, "gate, up, down: expected E, F >= 1, got E=%zd, F=%zd", E, F);
        return -1;
    }
    c->x = (PyArrayObject *)x;
    if (mli_py_dtype(st, "x", c->x, &c->l.io) < 0)
        return -1;
    if (c->l.io == MOLAE_F16) {
        PyErr_SetString(st->ArgumentError, "x: expected float32, float64 or bfloat16, got float16");
        return -1;
    }
    c->work = c->l.io == MOLAE_F64 ? MOLAE_F64 : MOLAE_F32;
    if (take(st, &c->spans, (label){"x", -1}, x, c->l.io, 2, dims, "ND", 0) == NULL)
        return -1;
    c->N = PyArray_DIM(c->x, 0);
    c->l.D = PyArray_DIM(c->x, 1);
    c->l.E = E;
    c->l.F = F;
    c->l.activation = (molae_activation)activation;
    dims[0] = c->N;
    if ((c->index = mli_py_int64_array(st, "top_k_index", index, 2, dims, "NK")) == NULL ||
        mli_py_spans_add(&c->spans, "top_k_index", c->index, 0) < 0)
        return -1;
    c->K = dims[1] = PyArray_DIM(c->index, 1);
    c->weight =
        take(st, &c->spans, (label){"top_k_weights", -1}, weight, c->work, 2, dims, "NK", 0);
    if (c->weight == NULL)
        return -1;
    return compressed_from(st, c, compressed) < 0 ||
                   projection_from(st, c, &c->gate, &c->l.gate, gate, &gate_names, 0) < 0 ||
                   projection_from(st, c, &c->up, &c->l.up, up, &up_names, 0) < 0 ||
                   projection_from(st, c, &c->down, &c->l.down, down, &down_names, 1) < 0
               ? -1
               : 0;
}

/* The five arrays that forward saves. */
int
mli_py_saved_from(mli_pystate *st, mli_py_call *c, PyObject *tuple, void *to[5], int out)
{
    static const char *const name[5] = {"saved.gate", "saved.up", "saved.z_gate", "saved.z_up",
                                        "saved.u"};
    const molae_projection *p[5] = {NULL, NULL, &c->l.gate, &c->l.up, &c->l.down};
    PyObject *item[5];

    if (!PyArg_ParseTuple(tuple, "OOOOO", &item[0], &item[1], &item[2], &item[3], &item[4]))
        return -1;
    for (int i = 0; i < 5; i++) {
        npy_intp dims[2];
        PyArrayObject *a;
        dims[0] = p[i] ? c->N : c->N * c->K;
        dims[1] = p[i] ? (npy_intp)molae_projection_width(p[i], c->K) : (npy_intp)c->l.F;
        a = take(st, &c->spans, (label){name[i], -1}, item[i], c->work, 2, dims, p[i] ? "NR" : "SF",
                 out);
        if (a == NULL)
            return -1;
        to[i] = PyArray_DATA(a);
    }
    return 0;
}

/* Where a projection's gradients go, from (private or None, shared or None, bias or None). */
static int
grads_of(mli_pystate *st, mli_py_call *c, mli_py_projection *k, const molae_projection *p,
         PyObject *tuple, const names *name, int down)
{
    PyObject *private_, *shared, *bias;

    if (!PyArg_ParseTuple(tuple, "OOO", &private_, &shared, &bias))
        return -1;
    if (private_ != Py_None) {
        if ((k->lists[3] = take_list(st, name->private_, private_, c->l.E)) == NULL ||
            (k->dprivate = pointers(c->l.E)) == NULL ||
            take_matrices(st, c, p, name->private_, k->lists[3], k->dprivate, c->work, 0, down, 1) <
                0)
            return -1;
    }
    if (shared != Py_None) {
        if ((k->lists[4] = take_list(st, name->shared, shared, p->G)) == NULL ||
            (k->dshared = pointers(p->G)) == NULL ||
            take_matrices(st, c, p, name->shared, k->lists[4], k->dshared, c->work, 1, down, 1) < 0)
            return -1;
    }
    if (bias != Py_None) {
        npy_intp dims[2] = {c->l.E, down ? c->l.D : c->l.F};
        PyArrayObject *a = take(st, &c->spans, (label){name->bias, -1}, bias, c->work, 2, dims,
                                down ? "ED" : "EF", 1);
        if (a == NULL)
            return -1;
        k->dbias = PyArray_DATA(a);
    }
    return 0;
}

/* *to = data of an optional output (N,cols). */
int
mli_py_output(mli_pystate *st, mli_py_call *c, const char *name, PyObject *obj, molae_dtype dtype,
              npy_intp cols, const char *letters, void **to)
{
    const npy_intp dims[2] = {c->N, cols};
    PyArrayObject *a;

    if (obj == Py_None)
        return 0;
    a = take(st, &c->spans, (label){name, -1}, obj, dtype, 2, dims, letters, 1);
    if (a == NULL)
        return -1;
    *to = PyArray_DATA(a);
    return 0;
}

int
mli_py_grads_from(mli_pystate *st, mli_py_call *c, PyObject *gate, PyObject *up, PyObject *down)
{
    return grads_of(st, c, &c->gate, &c->l.gate, gate, &dgate_names, 0) < 0 ||
                   grads_of(st, c, &c->up, &c->l.up, up, &dup_names, 0) < 0 ||
                   grads_of(st, c, &c->down, &c->l.down, down, &ddown_names, 1) < 0
               ? -1
               : 0;
}

int
mli_py_input(mli_pystate *st, mli_py_call *c, const char *name, PyObject *obj, const void **data)
{
    const npy_intp dims[2] = {c->N, (npy_intp)c->l.D};
    PyArrayObject *a = take(st, &c->spans, (label){name, -1}, obj, c->l.io, 2, dims, "ND", 0);

    if (a == NULL)
        return -1;
    *data = PyArray_DATA(a);
    return 0;
}
