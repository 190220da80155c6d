#include "test.h"

#include "../../csrc/base/mem.h"
#include "../../csrc/base/par.h"

long test_checks, test_failures;

int
main(void)
{
    test_mem();
    test_par();
    test_blas();
    test_eigen();
    test_fit();
    test_gram();
    test_solve();
    test_adamw();
    test_vectors();
    test_weighted();
    test_kern();
    test_ops();
    test_products();
    test_decode();
    CHECK(mli_mem_live() == 0);
    mli_parallel_shutdown();
    printf("%ld checks, %ld failed\n", test_checks, test_failures);
    return test_failures == 0 ? 0 : 1;
}
