// Attention in bfloat16: vdpbf16ps multiplies pairs and adds in float32.
#include <stdint.h>

typedef uint16_t Number;
enum { GROUP = 2 };
#define FORMAT BFLOAT16
#define MULTIPLY_ADD(sum, a, b) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))
#include "attention.h"

API int64_t foveate_attend_bf16(const void *q, const void *k, const void *v, void *out, float *lse,
                                const int64_t *dims, const int64_t *strides, float scale, int64_t threads) {
    Job job = {.q = q, .k = k, .v = v, .out = out, .lse = lse, .scale = scale};
    return attend(attend_work, job, dims, strides, threads);
}
