/* What the streaming products of every instruction set share. */
#ifndef MOLAE_KERN_STREAM_H
#define MOLAE_KERN_STREAM_H

#include "table.h"

/* Measured on a Sapphire Rapids core, from memory. Long runs along the rows of W let the hardware
 * fetch ahead; where the rows of Y leave no room for them, W is asked for a block of rows ahead. */
enum {
    N_MAX = 16,     /* rows of X for which W is read once */
    ROWS = 12,      /* rows of W that nt works on side by side: as many streams */
    NT_BYTES = 512, /* of each of them at a time */
    PIECE = 16384,  /* floats of Y that nn has in work: 64 KiB of stack */
    NN_FEW = 4, /* up to so many rows nn takes PIECE / NN_FEW columns at a time, else PIECE / N */
    NN_AHEAD = 512 /* bytes */
};

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

/* Cuts n into equal pieces of at most `most` >= 16, each a multiple of 16; returns their length. */
static inline int64_t
mli_piece(int64_t n, int64_t most)
{
    const int64_t vectors = (n + 15) / 16, pieces = (vectors + most / 16 - 1) / (most / 16);

    return pieces > 0 ? (vectors + pieces - 1) / pieces * 16 : 16;
}

#endif
