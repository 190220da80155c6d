/* Names for sources that are compiled once a precision.
 *
 * A file x.inc.h is written in REAL and FN(name); x.c defines REAL and SFX and includes it, twice.
 */
#ifndef MOLAE_BASE_REAL_H
#define MOLAE_BASE_REAL_H

#define MLI_CAT_(a, b) a##_##b
#define MLI_CAT(a, b) MLI_CAT_(a, b)
#define FN(name) MLI_CAT(name, SFX)

#define MLI_MIN(a, b) ((a) < (b) ? (a) : (b))
#define MLI_MAX(a, b) ((a) > (b) ? (a) : (b))

/* For functions with one exit: a failure jumps to done with rc set; a warning is kept. */
#define MLI_TRY(call)                 \
    do {                              \
        molae_status try_rc = (call); \
        if (try_rc < 0) {             \
            rc = try_rc;              \
            goto done;                \
        }                             \
        if (try_rc > rc)              \
            rc = try_rc;              \
    } while (0)

#endif
