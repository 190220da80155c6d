#include "pystate.h"

PyMethodDef mli_py_fit_methods[] = {
    {NULL, NULL, 0, NULL},
};
