/* Which rows go to which expert, and which tokens to which group. */
#include <string.h>

#include "../base/mem.h"
#include "experts.h"

molae_status
mli_index_check(const int64_t *index, int64_t N, int64_t K, int64_t E, molae_errinfo *err)
{
    *err = (molae_errinfo){NULL, -1, -1, -1};
    if (N < 0 || K < 1 || E < 1) {
        err->what = "top_k_index: expected N >= 0, K >= 1 and E >= 1";
        return MOLAE_E_SHAPE;
    }
    for (int64_t i = 0; i < N * K; i++)
        if (index[i] < 0 || index[i] > E) {
            err->what = "top_k_index: expected 0 to E, where E means no expert";
            err->info = index[i];
            return MOLAE_E_ARG;
        }
    return MOLAE_OK;
}

/* Counts in ptr[1..] become starts in ptr[0..]; what follows moves ptr[i] from start to end, and
 * starts_again moves it back. */
static void
sum_up(int64_t *ptr, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        ptr[i + 1] += ptr[i];
}

static void
starts_again(int64_t *ptr, int64_t n)
{
    memmove(ptr + 1, ptr, (size_t)n * sizeof *ptr);
    ptr[0] = 0;
}

molae_status
molae_route(int64_t *expert_ptr, int64_t *rows, const int64_t *index, int64_t N, int64_t K,
            int64_t E, molae_errinfo *err)
{
    const molae_status rc = mli_index_check(index, N, K, E, err);

    if (rc < 0)
        return rc;
    memset(expert_ptr, 0, (size_t)(E + 1) * sizeof *expert_ptr);
    for (int64_t i = 0; i < N * K; i++)
        if (index[i] < E)
            expert_ptr[index[i] + 1]++;
    sum_up(expert_ptr, E);
    for (int64_t i = 0; i < N * K; i++)
        if (index[i] < E)
            rows[expert_ptr[index[i]]++] = i;
    starts_again(expert_ptr, E);
    return MOLAE_OK;
}

size_t
molae_route_groups_ws(int64_t G)
{
    return G < 0 ? 0 : mli_carve_size((size_t)G, sizeof(int64_t));
}

molae_status
molae_route_groups(int64_t *group_ptr, int64_t *tokens, int64_t *slot_row, const int64_t *index,
                   const int64_t *group_of, int64_t N, int64_t K, int64_t E, int64_t G, void *ws,
                   size_t ws_bytes, molae_errinfo *err)
{
    char *p = ws;
    int64_t *last; /* (G,): the token that a group met last */
    molae_status rc = mli_index_check(index, N, K, E, err);

    if (rc < 0)
        return rc;
    if (G < 0 || ws_bytes < molae_route_groups_ws(G)) {
        err->what = G < 0 ? "groups: expected G >= 0" : "ws: too small";
        return MOLAE_E_ARG;
    }
    for (int64_t e = 0; e < E; e++)
        if (group_of[e] < -1 || group_of[e] >= G) {
            err->what = "group_of: expected a group of 0 to G - 1";
            err->expert = e;
            return MOLAE_E_ARG;
        }
    last = mli_carve(&p, (size_t)G, sizeof *last);
    memset(group_ptr, 0, (size_t)(G + 1) * sizeof *group_ptr);
    for (int pass = 0; pass < 2; pass++) { /* count, then place */
        memset(last, 0xFF, (size_t)G * sizeof *last);
        for (int64_t i = 0; i < N * K; i++) {
            const int64_t g = index[i] < E ? group_of[index[i]] : -1;
            if (g >= 0 && last[g] != i / K) {
                last[g] = i / K;
                if (pass == 0)
                    group_ptr[g + 1]++;
                else
                    tokens[group_ptr[g]++] = i / K;
            }
            if (pass == 1) /* an absolute row so far */
                slot_row[i] = g >= 0 ? group_ptr[g] - 1 : -1;
        }
        if (pass == 0)
            sum_up(group_ptr, G);
    }
    starts_again(group_ptr, G);
    for (int64_t i = 0; i < N * K; i++)
        if (slot_row[i] >= 0)
            slot_row[i] -= group_ptr[group_of[index[i]]];
    return MOLAE_OK;
}
