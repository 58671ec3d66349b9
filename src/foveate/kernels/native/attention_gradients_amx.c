// Gradients of attention in bfloat16 by AMX, from its output and log-sum-exp (FlashAttention-2, arXiv 2307.08691, algorithm
// 2): weights are computed once more. Weights and their gradients are rounded to bfloat16 before they are multiplied; all
// sums are float32. Blocks of keys walk over all queries of a head.
#include <stdint.h>

typedef uint16_t Number;
#include "amx.h"

#ifdef __AMX_BF16__
enum { KEY_BLOCK = 64, QUERY_BLOCK = 128, UNIT = 32, KEY_UNITS = KEY_BLOCK / UNIT, QUERY_UNITS = QUERY_BLOCK / UNIT };

typedef struct {
    Number *at;
    int64_t row, head, token;
} View;

typedef struct {
    View q, k, v, out, d_out, d_q, d_k, d_v;
    const float *lse;
    const int32_t *counts;
    int64_t count_row, count_token;
    int64_t heads, queries, keys, width;
    float scale;
    Queue queue;
    atomic_int failed;
} Job;

// All queries of a head, a block of keys, and what lies between a block of queries and one of keys. `q_right` and `d_right`
// (of d_out) meet scores, `q_pairs` and `d_pairs` sums over queries. A unit is 32 keys of 16 queries, and of 16 more.
typedef struct {
    uint16_t *q_right, *d_right, *q_pairs, *d_pairs;
    float *lse, *delta, *d_q;
    int32_t *visible;
    uint16_t *k_left, *v_left, *k_left_transposed;
    float *d_k, *d_v;
    float *scores, *dots;
    uint16_t *weights_left, *changes_left, *changes_right;
} Scratch;

INLINE Number *start_of(View view, int64_t row, int64_t head) { return view.at + row * view.row + head * view.head; }

INLINE Rows rows_of(View view, int64_t row, int64_t head, int64_t first, int64_t count, int64_t width) {
    return (Rows){start_of(view, row, head) + first * view.token, view.token, count, width};
}

static void prepare_queries(const Job *job, const Scratch *s, int64_t row, int64_t head) {
    Rows q = rows_of(job->q, row, head, 0, job->queries, job->width);
    Rows out = rows_of(job->out, row, head, 0, job->queries, job->width);
    Rows d_out = rows_of(job->d_out, row, head, 0, job->queries, job->width);
    int64_t padded = ceil_div(job->queries, UNIT) * UNIT;
    pack_right_transposed(q, s->q_right);
    pack_right_transposed(d_out, s->d_right);
    pack_right(q, s->q_pairs);
    pack_right(d_out, s->d_pairs);
    memset(s->d_q, 0, sizeof(float) * (size_t)(padded * job->width));
    for (int64_t i = 0; i < padded; i++) {
        s->lse[i] = s->delta[i] = 0.0f;
        s->visible[i] = 0;
        if (i >= job->queries) continue;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < job->width; d += LANES)
            sum = _mm512_fmadd_ps(load16(out.at, i * out.stride + d, BFLOAT16, 0xffff),
                                  load16(d_out.at, i * d_out.stride + d, BFLOAT16, 0xffff), sum);
        s->delta[i] = _mm512_reduce_add_ps(sum);
        s->lse[i] = job->lse[(row * job->queries + i) * job->heads + head] * 1.44269504f;
        s->visible[i] = job->counts ? job->counts[row * job->count_row + i * job->count_token] : (int32_t)job->keys;
    }
}

// Weights and the gradients of scores of 32 keys from key `first` and of 32 queries from query `query` of the head; they
// are unit `key_unit`, `query_unit` of the block.
INLINE void weigh_unit(const Job *job, const Scratch *s, int64_t first, int64_t query, int64_t key_unit, int64_t query_unit) {
    __m512 factor = _mm512_set1_ps(job->scale * 1.44269504f), minus[2], delta[2];
    __m512i visible[2];
    UNROLL for (int g = 0; g < 2; g++) {
        minus[g] = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_loadu_ps(s->lse + query + g * SIDE));
        delta[g] = _mm512_loadu_ps(s->delta + query + g * SIDE);
        visible[g] = _mm512_loadu_si512(s->visible + query + g * SIDE);
    }
    for (int64_t j = 0; j < UNIT; j += 2) {
        __m512 weight[2][2], change[2][2];
        UNROLL for (int i = 0; i < 2; i++) UNROLL for (int g = 0; g < 2; g++) {
            int64_t at = g * UNIT * SIDE + (j + i) * SIDE;
            __mmask16 seen = _mm512_cmpgt_epi32_mask(visible[g], _mm512_set1_epi32((int)(first + j + i)));
            __m512 power = exp2_fast(_mm512_fmadd_ps(_mm512_load_ps(s->scores + at), factor, minus[g]));
            weight[i][g] = _mm512_maskz_mov_ps(seen, power);
            change[i][g] = _mm512_mul_ps(weight[i][g], _mm512_sub_ps(_mm512_load_ps(s->dots + at), delta[g]));
        }
        UNROLL for (int i = 0; i < 2; i++) {
            int64_t at = ((2 * key_unit + j / SIDE) * QUERY_UNITS + query_unit) * TILE + (j % SIDE + i) * STEP;
            _mm512_store_si512(s->weights_left + at, (__m512i)_mm512_cvtne2ps_pbh(weight[i][1], weight[i][0]));
            _mm512_store_si512(s->changes_left + at, (__m512i)_mm512_cvtne2ps_pbh(change[i][1], change[i][0]));
        }
        UNROLL for (int g = 0; g < 2; g++)
            _mm512_store_si512(s->changes_right + ((2 * query_unit + g) * KEY_UNITS + key_unit) * TILE + j / 2 * STEP,
                               pair_rows(change[0][g], change[1][g]));
    }
}

INLINE void score_unit(const uint16_t *left, const uint16_t *right, int64_t steps, float *out) {
    multiply(left, left + steps * TILE, TILE, right, right + steps * TILE, TILE, steps, out, out + UNIT * SIDE, out + SUM,
             out + UNIT * SIDE + SUM, 0);
}

// Adds what a block of queries gives to the gradients of a block of keys, [keys / 16][width / 16] sums.
static void add_to_keys(const uint16_t *left, const uint16_t *pairs, int64_t key_units, int64_t query_units, int64_t columns,
                        float *sums) {
    for (int64_t key = 0; key < 2 * key_units; key += 2)
        for (int64_t t = 0; t < columns; t += 2) {
            int64_t next = t + 1 < columns ? t + 1 : t;
            const uint16_t *a = left + key * QUERY_UNITS * TILE;
            float *one = sums + key * columns * SUM, *two = one + columns * SUM;
            multiply(a, a + QUERY_UNITS * TILE, TILE, pairs + t * TILE, pairs + next * TILE, columns * TILE, query_units,
                     one + t * SUM, one + next * SUM, two + t * SUM, two + next * SUM, 1);
        }
}

// The same the other way round: [queries / 16][width / 16] sums, transposed.
static void add_to_queries(const Scratch *s, int64_t key_units, int64_t query_units, int64_t columns, float *sums) {
    for (int64_t query = 0; query < 2 * query_units; query += 2)
        for (int64_t t = 0; t < columns; t += 2) {
            int64_t next = t + 1 < columns ? t + 1 : t;
            const uint16_t *a = s->k_left_transposed, *b = s->changes_right + query * KEY_UNITS * TILE;
            float *one = sums + query * columns * SUM, *two = one + columns * SUM;
            multiply(a + t * TILE, a + next * TILE, columns * TILE, b, b + KEY_UNITS * TILE, TILE, key_units, one + t * SUM,
                     two + t * SUM, one + next * SUM, two + next * SUM, 1);
        }
}

static void run_block(const Job *job, const Scratch *s, int64_t first, int64_t key_units, int64_t query) {
    int64_t steps = ceil_div(job->width, STEP), columns = job->width / SIDE, units = ceil_div(job->queries - query, UNIT);
    if (units > QUERY_UNITS) units = QUERY_UNITS;
    for (int64_t i = 0; i < units; i++)
        for (int64_t j = 0; j < key_units; j++) {
            int64_t right = (query + i * UNIT) * steps * STEP, left = j * UNIT * steps * STEP;
            score_unit(s->k_left + left, s->q_right + right, steps, s->scores);
            score_unit(s->v_left + left, s->d_right + right, steps, s->dots);
            weigh_unit(job, s, first + j * UNIT, query + i * UNIT, j, i);
        }
    add_to_keys(s->weights_left, s->d_pairs + query * job->width, key_units, units, columns, s->d_v);
    add_to_keys(s->changes_left, s->q_pairs + query * job->width, key_units, units, columns, s->d_k);
    add_to_queries(s, key_units, units, columns, s->d_q + query * job->width);
}

static void store_keys(const float *sums, float factor, Number *to, int64_t stride, int64_t count, int64_t width) {
    __m512 by = _mm512_set1_ps(factor);
    for (int64_t j = 0; j < count; j++)
        for (int64_t d = 0; d < width; d += SIDE) {
            const float *from = sums + j / SIDE * SIDE * width + d * SIDE + j % SIDE * SIDE;
            store16(to, j * stride + d, BFLOAT16, 0xffff, _mm512_mul_ps(by, _mm512_load_ps(from)));
        }
}

static void run_head(const Job *job, const Scratch *s, int64_t row, int64_t head) {
    int64_t width = job->width;
    prepare_queries(job, s, row, head);
    for (int64_t first = 0; first < job->keys; first += KEY_BLOCK) {
        int64_t count = job->keys - first < KEY_BLOCK ? job->keys - first : KEY_BLOCK;
        Rows k = rows_of(job->k, row, head, first, count, width);
        pack_left(k, s->k_left);
        pack_left(rows_of(job->v, row, head, first, count, width), s->v_left);
        pack_left_transposed(k, s->k_left_transposed);
        memset(s->d_k, 0, sizeof(float) * (size_t)(KEY_BLOCK * width));
        memset(s->d_v, 0, sizeof(float) * (size_t)(KEY_BLOCK * width));
        for (int64_t query = 0; query < job->queries; query += QUERY_BLOCK)
            run_block(job, s, first, ceil_div(count, UNIT), query);
        Number *d_k = start_of(job->d_k, row, head) + first * job->d_k.token;
        Number *d_v = start_of(job->d_v, row, head) + first * job->d_v.token;
        store_keys(s->d_k, job->scale, d_k, job->d_k.token, count, width);
        store_keys(s->d_v, 1.0f, d_v, job->d_v.token, count, width);
    }
    Number *d_q = start_of(job->d_q, row, head);
    for (int64_t i = 0; i < job->queries; i += SIDE) {
        int64_t count = job->queries - i < SIDE ? job->queries - i : SIDE;
        store_transposed(s->d_q + i * width, _mm512_set1_ps(job->scale), d_q + i * job->d_q.token, job->d_q.token, count, width);
    }
}

static Scratch lay_out(const Job *job, char *arena, size_t *used) {
    size_t width = (size_t)job->width, wide = (width + STEP - 1) / STEP * STEP;
    size_t queries = ((size_t)job->queries + UNIT - 1) / UNIT * UNIT, block = KEY_BLOCK * QUERY_BLOCK;
    *used = 0;
    return (Scratch){
        .q_right = piece(arena, used, sizeof(Number) * queries * wide),
        .d_right = piece(arena, used, sizeof(Number) * queries * wide),
        .q_pairs = piece(arena, used, sizeof(Number) * queries * width),
        .d_pairs = piece(arena, used, sizeof(Number) * queries * width),
        .lse = piece(arena, used, sizeof(float) * queries),
        .delta = piece(arena, used, sizeof(float) * queries),
        .d_q = piece(arena, used, sizeof(float) * queries * width),
        .visible = piece(arena, used, sizeof(int32_t) * queries),
        .k_left = piece(arena, used, sizeof(Number) * KEY_BLOCK * wide),
        .v_left = piece(arena, used, sizeof(Number) * KEY_BLOCK * wide),
        .k_left_transposed = piece(arena, used, sizeof(Number) * KEY_BLOCK * width),
        .d_k = piece(arena, used, sizeof(float) * KEY_BLOCK * width),
        .d_v = piece(arena, used, sizeof(float) * KEY_BLOCK * width),
        .scores = piece(arena, used, sizeof(float) * 4 * SUM),
        .dots = piece(arena, used, sizeof(float) * 4 * SUM),
        .weights_left = piece(arena, used, sizeof(Number) * block),
        .changes_left = piece(arena, used, sizeof(Number) * block),
        .changes_right = piece(arena, used, sizeof(Number) * block),
    };
}

static void work(void *arg) {
    Job *job = arg;
    size_t bytes;
    lay_out(job, NULL, &bytes);
    char *arena = aligned_alloc(64, bytes);
    if (!arena) {
        atomic_store(&job->failed, 1);
        return;
    }
    Scratch scratch = lay_out(job, arena, &bytes);
    TileConfig before = take_tiles();
    int64_t pair, end;
    while (take_slice(&job->queue, &pair, &end)) run_head(job, &scratch, pair / job->heads, pair % job->heads);
    restore_tiles(&before);
    free(arena);
}

// tensors: q, k, v, out, and the gradients of out, q, k, v, of which the last three are written; strides, in elements: row,
// head, token of each, then those of `counts` (row, query). lse, counts and dims are those of `foveate_attend_amx`. Returns
// 1 without memory, else 0.
API int64_t foveate_attend_gradients(void *const *tensors, const float *lse, const int32_t *counts, const int64_t *dims,
                                     const int64_t *strides, float scale, int64_t threads) {
    View views[8];
    for (int i = 0; i < 8; i++) views[i] = (View){tensors[i], strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
    Job job = {
        .q = views[0], .k = views[1], .v = views[2], .out = views[3], .d_out = views[4], .d_q = views[5], .d_k = views[6],
        .d_v = views[7], .lse = lse, .counts = counts, .count_row = strides[24], .count_token = strides[25],
        .heads = dims[1], .queries = dims[2], .keys = dims[3], .width = dims[4], .scale = scale,
        .queue = {.count = dims[0] * dims[1], .slice = 1},
    };
    run(work, &job, threads);
    return atomic_load(&job.failed);
}
#endif
