#include "test.h"

#include "../../csrc/base/mem.h"
#include "../../csrc/molae.h"

#include <math.h>
#include <string.h>

enum { ROWS = 131, COLS = 333, BLOCK = 100, GROUPS = 9 };

/* FP8 by the fields of a byte. */
static float
fp8(uint8_t byte)
{
    const int e = byte >> 3 & 15, m = byte & 7;
    const double v = e ? ldexp(1 + m / 8.0, e - 7) : ldexp(m, -9);

    return (float)(byte & 128 ? -v : v);
}

/* Blocks of their exact sizes, so that a sanitizer sees a step beyond. */
static void
test_fp8(void)
{
    const int64_t across = (COLS + BLOCK - 1) / BLOCK, down = (ROWS + BLOCK - 1) / BLOCK;
    uint8_t *w = mli_alloc(ROWS * COLS);
    float *scale = mli_alloc((size_t)(down * across) * sizeof(float));
    float *out = mli_alloc(ROWS * COLS * sizeof(float));
    uint16_t *narrow = mli_alloc(ROWS * COLS * sizeof(uint16_t));
    molae_errinfo err;
    uint64_t seed = 3;

    for (int64_t i = 0; i < down * across; i++)
        scale[i] = (float)(2 + test_random(&seed));
    for (int i = 0; i < ROWS * COLS; i++)
        w[i] = (uint8_t)(i % 127 + (i % 3 == 0 ? 128 : 0));
    for (int32_t threads = 1; threads <= 3; threads += 2) {
        const molae_ctx ctx = {threads, NULL};
        CHECK(molae_decode_fp8(&ctx, out, MOLAE_F32, w, scale, ROWS, COLS, BLOCK, BLOCK, &err) ==
              MOLAE_OK);
        CHECK(molae_decode_fp8(&ctx, narrow, MOLAE_BF16, w, scale, ROWS, COLS, BLOCK, BLOCK,
                               &err) == MOLAE_OK);
        for (int i = 0; i < ROWS * COLS; i++) {
            const float want = fp8(w[i]) * scale[i / COLS / BLOCK * across + i % COLS / BLOCK];
            uint32_t bits;
            CHECK(memcmp(&want, &out[i], sizeof want) == 0);
            memcpy(&bits, &want, sizeof bits);
            CHECK(narrow[i] == (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
        }
        w[70 * COLS + 332] = 0xFF;
        CHECK(molae_decode_fp8(&ctx, out, MOLAE_F32, w, scale, ROWS, COLS, BLOCK, BLOCK, &err) ==
              MOLAE_E_NONFINITE);
        CHECK(err.info == 70 * COLS + 332 && err.what != NULL);
        w[70 * COLS + 332] = 0;
    }
    {
        const molae_ctx ctx = {1, NULL};
        CHECK(molae_decode_fp8(&ctx, out, MOLAE_F64, w, scale, 1, 1, 1, 1, &err) == MOLAE_E_ARG);
        CHECK(molae_decode_fp8(&ctx, out, MOLAE_F32, w, scale, 1, 1, 0, 1, &err) == MOLAE_E_SHAPE);
        CHECK(molae_decode_fp8(&ctx, NULL, MOLAE_F32, NULL, NULL, 0, 5, 1, 1, &err) == MOLAE_OK);
    }
    mli_free(w);
    mli_free(scale);
    mli_free(out);
    mli_free(narrow);
}

static void
test_mxfp4(void)
{
    static const float value[16] = {0, .5f,  1,  1.5f,  2,  3,  4,  6,
                                    0, -.5f, -1, -1.5f, -2, -3, -4, -6};
    const molae_ctx ctx = {2, NULL};
    const size_t cols = 32 * GROUPS;
    uint8_t *blocks = mli_alloc(ROWS * GROUPS * 16), *scales = mli_alloc(ROWS * GROUPS);
    float *out = mli_alloc(ROWS * cols * sizeof(float));
    uint16_t *narrow = mli_alloc(ROWS * cols * sizeof(uint16_t));
    molae_errinfo err;

    for (int i = 0; i < ROWS * GROUPS; i++)
        scales[i] = (uint8_t)(i % 250);
    for (int i = 0; i < ROWS * GROUPS * 16; i++)
        blocks[i] = (uint8_t)(i * 7);
    CHECK(molae_decode_mxfp4(&ctx, out, MOLAE_F32, blocks, scales, ROWS, GROUPS, &err) == MOLAE_OK);
    CHECK(molae_decode_mxfp4(&ctx, narrow, MOLAE_BF16, blocks, scales, ROWS, GROUPS, &err) ==
          MOLAE_OK);
    for (size_t i = 0; i < ROWS * cols; i++) {
        const uint8_t byte = blocks[i / 2];
        const int four = i % 2 ? byte >> 4 : byte & 15;
        const float want = (float)ldexp(value[four], scales[i / 32] - 127);
        const uint32_t wide = (uint32_t)narrow[i] << 16;
        float back;
        memcpy(&back, &wide, sizeof back);
        CHECK(out[i] == want && back == want);
    }
    scales[40 * GROUPS + 3] = 255;
    CHECK(molae_decode_mxfp4(&ctx, out, MOLAE_F32, blocks, scales, ROWS, GROUPS, &err) ==
          MOLAE_E_NONFINITE);
    CHECK(err.info == (int64_t)(40 * cols + 96));
    mli_free(blocks);
    mli_free(scales);
    mli_free(out);
    mli_free(narrow);
}

void
test_decode(void)
{
    test_fp8();
    test_mxfp4();
}
