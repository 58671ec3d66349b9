// One pass over memory each: norm with modulation, gated residual, unit heads with rotation, GELU.
#include "common.h"

Parallel foveate_parallel;

API void foveate_threads(Parallel parallel) { foveate_parallel = parallel; }

// Row of a token: `starts` has one entry per row and the total behind them.
INLINE int64_t row_of(const int64_t *starts, int64_t token, int64_t row) {
    while (token >= starts[row + 1]) row++;
    return row;
}

typedef struct {
    Queue queue;
    const float *x, *factor, *shift;
    void *out;
    const int64_t *starts;
    int64_t width, factor_row, shift_row;
    int dtype;
    float eps;
} Norm;

static void norm_work(void *arg) {
    Norm *job = arg;
    int64_t begin, end, width = job->width;
    while (take_slice(&job->queue, &begin, &end)) {
        int64_t row = 0;
        for (int64_t t = begin; t < end; t++) {
            row = row_of(job->starts, t, row);
            const float *x = job->x + t * width;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t c = 0; c < width; c += LANES)
                sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first_lanes(width - c), x + c));
            __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)width);
            __m512 squares = _mm512_setzero_ps();
            for (int64_t c = 0; c < width; c += LANES) {
                __mmask16 mask = first_lanes(width - c);
                __m512 d = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + c), mean);
                squares = _mm512_fmadd_ps(d, d, squares);
            }
            __m512 by = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)width + job->eps));
            const float *factor = job->factor + row * job->factor_row, *shift = job->shift + row * job->shift_row;
            for (int64_t c = 0; c < width; c += LANES) {
                __mmask16 mask = first_lanes(width - c);
                __m512 d = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + c), mean), by);
                __m512 y = _mm512_fmadd_ps(d, _mm512_maskz_loadu_ps(mask, factor + c), _mm512_maskz_loadu_ps(mask, shift + c));
                store16(job->out, t * width + c, job->dtype, mask, y);
            }
        }
    }
}

// out = layer_norm(x) * factor[row] + shift[row]; x float32, out of `dtype`.
API void foveate_norm(const float *x, const float *factor, int64_t factor_row, const float *shift, int64_t shift_row,
                      void *out, int64_t dtype, const int64_t *starts, int64_t tokens, int64_t width, float eps,
                      int64_t threads) {
    Norm job = {.queue = {.count = tokens, .slice = 32}, .x = x, .factor = factor, .shift = shift, .out = out,
                .starts = starts, .width = width, .factor_row = factor_row, .shift_row = shift_row,
                .dtype = (int)dtype, .eps = eps};
    run(norm_work, &job, threads);
}

typedef struct {
    Queue queue;
    float *x;
    const void *change;
    const float *gate;
    const int64_t *starts;
    int64_t width, gate_row;
    int dtype;
} Residual;

static void residual_work(void *arg) {
    Residual *job = arg;
    int64_t begin, end, width = job->width;
    while (take_slice(&job->queue, &begin, &end)) {
        int64_t row = 0;
        for (int64_t t = begin; t < end; t++) {
            row = row_of(job->starts, t, row);
            const float *gate = job->gate ? job->gate + row * job->gate_row : NULL;
            for (int64_t c = 0; c < width; c += LANES) {
                __mmask16 mask = first_lanes(width - c);
                __m512 change = load16(job->change, t * width + c, job->dtype, mask);
                // Not fused: the product is rounded first, as in plain torch.
                if (gate) change = _mm512_mul_ps(change, _mm512_maskz_loadu_ps(mask, gate + c));
                float *x = job->x + t * width + c;
                _mm512_mask_storeu_ps(x, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, x), change));
            }
        }
    }
}

// x += change * gate[row]; no gate means 1. x float32, change of `dtype`.
API void foveate_residual(float *x, const void *change, int64_t dtype, const float *gate, int64_t gate_row,
                          const int64_t *starts, int64_t tokens, int64_t width, int64_t threads) {
    Residual job = {.queue = {.count = tokens, .slice = 32}, .x = x, .change = change, .gate = gate, .starts = starts,
                    .width = width, .gate_row = gate_row, .dtype = (int)dtype};
    run(residual_work, &job, threads);
}

typedef struct {
    Queue queue;
    void *qkv;
    const float *gain, *rotation;
    int64_t heads, width;
    int dtype;
} Heads;

INLINE void head_work(const Heads *job, int64_t at, float gain, const float *rotation) {
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    int64_t width = job->width;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t d = 0; d < width; d += LANES) {
        __m512 x = load16(job->qkv, at + d, job->dtype, first_lanes(width - d));
        squares = _mm512_fmadd_ps(x, x, squares);
    }
    float length = sqrtf(_mm512_reduce_add_ps(squares));
    __m512 by = _mm512_set1_ps(1.0f / (length > 1e-12f ? length : 1e-12f)), times = _mm512_set1_ps(gain);
    for (int64_t d = 0; d < width; d += LANES) {
        __mmask16 mask = first_lanes(width - d);
        __m512 x = _mm512_mul_ps(_mm512_mul_ps(load16(job->qkv, at + d, job->dtype, mask), by), times);
        if (rotation) {
            __mmask16 half = first_lanes((width - d) / 2 < LANES / 2 ? (width - d) / 2 : LANES / 2);
            __m512 cosine = _mm512_permutexvar_ps(twice, _mm512_maskz_loadu_ps(half, rotation + d / 2));
            __m512 sine = _mm512_permutexvar_ps(twice, _mm512_maskz_loadu_ps(half, rotation + width / 2 + d / 2));
            x = _mm512_fmaddsub_ps(x, cosine, _mm512_mul_ps(_mm512_permute_ps(x, 0xB1), sine));
        }
        store16(job->qkv, at + d, job->dtype, mask, x);
    }
}

static void heads_work(void *arg) {
    Heads *job = arg;
    int64_t begin, end, token = 3 * job->heads * job->width;
    while (take_slice(&job->queue, &begin, &end))
        for (int64_t t = begin; t < end; t++) {
            const float *rotation = job->rotation ? job->rotation + t * job->width : NULL;
            for (int64_t h = 0; h < job->heads; h++) {
                int64_t at = t * token + h * job->width;
                head_work(job, at, job->gain[h], rotation);
                head_work(job, at + job->heads * job->width, 1.0f, rotation);
            }
        }
}

// Queries and keys of qkv (tokens, 3, heads, width) in place: length 1, queries times gain, both rotated if asked for.
API void foveate_heads(void *qkv, int64_t dtype, const float *gain, const float *rotation, int64_t tokens,
                       int64_t heads, int64_t width, int64_t threads) {
    Heads job = {.queue = {.count = tokens, .slice = 16}, .qkv = qkv, .gain = gain, .rotation = rotation,
                 .heads = heads, .width = width, .dtype = (int)dtype};
    run(heads_work, &job, threads);
}

typedef struct {
    Queue queue;
    void *x;
    int dtype;
} Gelu;

// x * sigmoid(2 u) is x / 2 * (1 + tanh(u)); both signs of u use 2^-|.|, which never overflows.
INLINE __m512 gelu16(__m512 x) {
    __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f));
    __m512 t = _mm512_mul_ps(_mm512_mul_ps(x, cubic), _mm512_set1_ps(2.0f * 0.79788456f * 1.44269504f));
    __m512 small = exp2_16(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(t)));
    __m512 whole = _mm512_add_ps(_mm512_set1_ps(1.0f), small);
    __mmask16 is_positive = _mm512_cmp_ps_mask(t, _mm512_setzero_ps(), _CMP_GE_OQ);
    __m512 above = _mm512_mask_blend_ps(is_positive, small, _mm512_set1_ps(1.0f));
    return _mm512_mul_ps(x, _mm512_div_ps(above, whole));
}

static void gelu_work(void *arg) {
    Gelu *job = arg;
    int64_t begin, end;
    while (take_slice(&job->queue, &begin, &end))
        for (int64_t i = begin; i < end; i += LANES) {
            __mmask16 mask = first_lanes(end - i);
            store16(job->x, i, job->dtype, mask, gelu16(load16(job->x, i, job->dtype, mask)));
        }
}

// GELU in its tanh form, in place.
API void foveate_gelu(void *x, int64_t dtype, int64_t count, int64_t threads) {
    Gelu job = {.queue = {.count = count, .slice = 16384}, .x = x, .dtype = (int)dtype};
    run(gelu_work, &job, threads);
}

typedef struct {
    Queue queue;
    const void *from;
    void *to;
    const int64_t *row_low, *column_low;
    const float *row_share, *column_share;
    int64_t source_rows, source_columns, rows, columns, width;
    int from_dtype, adds;
} Resize;

// One token as a mix of four neighbours, rounded to their dtype; written, or added to float32.
INLINE void resize_token(const Resize *job, int64_t token) {
    int64_t place = token % (job->rows * job->columns), map = token / (job->rows * job->columns);
    int64_t y = place / job->columns, x = place % job->columns, width = job->width, source_columns = job->source_columns;
    int64_t top = job->row_low[y], left = job->column_low[x];
    int64_t bottom = top + 1 < job->source_rows ? top + 1 : top, right = left + 1 < source_columns ? left + 1 : left;
    int64_t base = map * job->source_rows * source_columns;
    int64_t a = (base + top * source_columns + left) * width, b = (base + top * source_columns + right) * width;
    int64_t c = (base + bottom * source_columns + left) * width, d = (base + bottom * source_columns + right) * width;
    __m512 down = _mm512_set1_ps(job->row_share[y]), across = _mm512_set1_ps(job->column_share[x]);
    for (int64_t i = 0; i < width; i += LANES) {
        __mmask16 mask = first_lanes(width - i);
        __m512 p = load16(job->from, a + i, job->from_dtype, mask), q = load16(job->from, b + i, job->from_dtype, mask);
        __m512 r = load16(job->from, c + i, job->from_dtype, mask), s = load16(job->from, d + i, job->from_dtype, mask);
        __m512 above = _mm512_fmadd_ps(across, _mm512_sub_ps(q, p), p), below = _mm512_fmadd_ps(across, _mm512_sub_ps(s, r), r);
        __m512 mixed = _mm512_fmadd_ps(down, _mm512_sub_ps(below, above), above);
        if (!job->adds) {
            store16(job->to, token * width + i, job->from_dtype, mask, mixed);
            continue;
        }
        uint16_t rounded[LANES];
        if (job->from_dtype == BFLOAT16) {
            store16(rounded, 0, BFLOAT16, mask, mixed);
            mixed = load16(rounded, 0, BFLOAT16, mask);
        }
        float *to = (float *)job->to + token * width + i;
        _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), mixed));
    }
}

static void resize_work(void *arg) {
    Resize *job = arg;
    int64_t begin, end;
    while (take_slice(&job->queue, &begin, &end))
        for (int64_t t = begin; t < end; t++) resize_token(job, t);
}

// Bilinear maps of tokens: from (maps, source_rows, source_columns, width) to (maps, rows, columns, width). The tables hold
// for every target row and column the source in front of it and the share of the next one.
API void foveate_resize(const void *from, int64_t from_dtype, int64_t source_rows, int64_t source_columns, void *to,
                        int64_t adds, int64_t maps, int64_t rows, int64_t columns, int64_t width,
                        const int64_t *row_low, const float *row_share, const int64_t *column_low,
                        const float *column_share, int64_t threads) {
    Resize job = {.queue = {.count = maps * rows * columns, .slice = 64}, .from = from, .to = to, .row_low = row_low,
                  .column_low = column_low, .row_share = row_share, .column_share = column_share,
                  .source_rows = source_rows, .source_columns = source_columns, .rows = rows, .columns = columns,
                  .width = width, .from_dtype = (int)from_dtype, .adds = (int)adds};
    run(resize_work, &job, threads);
}
