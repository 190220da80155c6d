#include "status.h"

const char *
mli_status_text(molae_status status)
{
    switch (status) {
    case MOLAE_OK:
        return "done";
    case MOLAE_E_SHAPE:
        return "array of the wrong shape";
    case MOLAE_E_ARG:
        return "argument out of range";
    case MOLAE_E_NOMEM:
        return "out of memory";
    case MOLAE_E_TOO_LARGE:
        return "matrix too large for a BLAS with 32-bit sizes";
    case MOLAE_E_NONFINITE:
        return "NaN or Inf in a weight";
    case MOLAE_E_LAPACK:
        return "a LAPACK routine failed";
    case MOLAE_E_ISA:
        return "instruction set not supported by this CPU";
    case MOLAE_W_NOT_CONVERGED:
        return "not converged";
    case MOLAE_W_RANK_DEFICIENT:
        return "rank deficient";
    case MOLAE_W_PRECISION:
        return "the Gram matrix was too coarse; a direct SVD was used";
    }
    return "unknown status";
}
