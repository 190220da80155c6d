#include "table.h"

#include "../base/cpu.h"

#include <stdatomic.h>
#include <string.h>

enum { REF, AVX2, AVX512, AVX512BF16, AMX, COUNT };

static const char *const names[COUNT] = {"ref", "avx2", "avx512", "avx512bf16", "amx"};

static mli_kernels tables[COUNT];
static int usable[COUNT];    /* built, and the CPU has it */
static atomic_int state;     /* 0 empty, 1 being filled, 2 ready */
static atomic_uint disabled; /* one bit an ISA */
static atomic_int chosen = -1;

static void
prepare(void)
{
    int empty = 0;

    if (atomic_load(&state) == 2)
        return;
    if (atomic_compare_exchange_strong(&state, &empty, 1)) {
        /* the CPU is asked first: the functions that fill a table are compiled for its ISA too */
        mli_kernels_fill_ref(&tables[REF]);
        mli_kernels_fill_ref_stream(&tables[REF]);
        usable[REF] = 1;
        tables[AVX2] = tables[REF];
        usable[AVX2] = mli_cpu_has_avx2() && mli_kernels_add_avx2(&tables[AVX2]) &&
                       mli_kernels_add_avx2_stream(&tables[AVX2]) &&
                       mli_kernels_add_avx2_rows(&tables[AVX2]);
        tables[AVX512] = tables[AVX2];
        usable[AVX512] = mli_cpu_has_avx512() && mli_kernels_add_avx512(&tables[AVX512]) &&
                         mli_kernels_add_avx512_stream(&tables[AVX512]) &&
                         mli_kernels_add_avx512_rows(&tables[AVX512]);
        tables[AVX512BF16] = tables[AVX512];
        usable[AVX512BF16] = usable[AVX512] && mli_cpu_has_avx512bf16() &&
                             mli_kernels_add_avx512bf16(&tables[AVX512BF16]);
        tables[AMX] = tables[AVX512];
        usable[AMX] = usable[AVX512] && mli_cpu_get_amx() && mli_kernels_add_amx(&tables[AMX]) &&
                      mli_kernels_add_amx_stream(&tables[AMX]);
        atomic_store(&state, 2);
    }
    while (atomic_load(&state) != 2) {
        /* another thread is filling the tables: a few stores */
    }
}

const mli_kernels *
mli_kernels_get(void)
{
    int best = atomic_load(&chosen);

    if (best < 0) {
        unsigned off = atomic_load(&disabled);
        prepare();
        best = REF;
        for (int i = REF + 1; i < COUNT && !((off >> i) & 1u); i++)
            if (usable[i])
                best = i;
        atomic_store(&chosen, best); /* every thread finds the same */
    }
    return &tables[best];
}

const mli_kernels *
mli_kernels_named(const char *isa)
{
    prepare();
    for (int i = 0; i < COUNT; i++)
        if (usable[i] && strcmp(isa, names[i]) == 0)
            return &tables[i];
    return NULL;
}

void
mli_kernels_disable(const char *isas)
{
    unsigned off = atomic_load(&disabled);

    while (*isas != '\0') {
        size_t len = strcspn(isas, ", ");
        for (int i = REF + 1; i < COUNT; i++)
            if (len == strlen(names[i]) && strncmp(isas, names[i], len) == 0)
                off |= 1u << i;
        isas += len;
        isas += strspn(isas, ", ");
    }
    atomic_store(&disabled, off);
}
