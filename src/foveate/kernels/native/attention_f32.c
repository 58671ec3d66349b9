// Attention in float32.
typedef float Number;
enum { GROUP = 1 };
#define FORMAT FLOAT32
#define MULTIPLY_ADD(sum, a, b) _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum)
#include "attention.h"

API int64_t foveate_attend_f32(const void *q, const void *k, const void *v, void *out, float *lse,
                               const int64_t *dims, const int64_t *strides, float scale, int64_t threads) {
    Job job = {.q = q, .k = k, .v = v, .out = out, .lse = lse, .scale = scale};
    return attend(attend_work, job, dims, strides, threads);
}
