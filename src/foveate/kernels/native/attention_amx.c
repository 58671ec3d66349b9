// Attention in bfloat16 by AMX; scores, softmax and sums are float32. Pairs of 16 queries walk over blocks of keys with a
// running maximum (FlashAttention, arXiv 2205.14135). A query's numbers do not depend on what else is in its tile.
#include <stdint.h>

typedef uint16_t Number;
#include "amx.h"
#include "attention_job.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

enum { KEY_BLOCK = 256, PAIR = 2 * SIDE, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };

// Asks the kernel for tiles, once per process. Returns whether they may be used.
API int64_t foveate_amx(void) { return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0; }

// Of each: for 16 queries, and behind it for the other 16.
typedef struct {
    float *scores, *out;
    uint16_t *weights, *query, *keys, *values;
} Scratch;

// Running maximum, in powers of two, and sum of 16 queries, and how many keys each of them sees.
typedef struct {
    __m512 top, sum;
    __m512i visible;
} Lanes;

INLINE __mmask16 seen(const Lanes *lanes, int64_t key, const int masked) {
    return masked ? _mm512_cmpgt_epi32_mask(lanes->visible, _mm512_set1_epi32((int)key)) : (__mmask16)0xffff;
}

INLINE __m512 top_of(const Lanes *lanes, const float *scores, int64_t first, int64_t count, const int masked) {
    __m512 tops[4];
    UNROLL for (int i = 0; i < 4; i++) tops[i] = _mm512_set1_ps(-INFINITY);
    int64_t j = 0;
    for (; j + 4 <= count; j += 4)
        UNROLL for (int i = 0; i < 4; i++)
            tops[i] = _mm512_mask_max_ps(tops[i], seen(lanes, first + j + i, masked), tops[i],
                                         _mm512_load_ps(scores + (j + i) * SIDE));
    for (; j < count; j++)
        tops[0] = _mm512_mask_max_ps(tops[0], seen(lanes, first + j, masked), tops[0], _mm512_load_ps(scores + j * SIDE));
    return _mm512_max_ps(_mm512_max_ps(tops[0], tops[1]), _mm512_max_ps(tops[2], tops[3]));
}

// Scores of a block of `count` keys from key `first` become weights; sums and outputs shrink to the new maximum.
INLINE void weigh(Lanes *lanes, const float *scores, int64_t first, int64_t count, float to_log2, uint16_t *weights,
                  float *out, int64_t out_rows, const int masked) {
    __m512 factor = _mm512_set1_ps(to_log2);
    __m512 top = _mm512_max_ps(lanes->top, _mm512_mul_ps(factor, top_of(lanes, scores, first, count, masked)));
    if (first > 0 && _mm512_cmp_ps_mask(lanes->top, top, _CMP_LT_OQ)) {
        __m512 shrink = exp2_16(_mm512_sub_ps(lanes->top, top));
        lanes->sum = _mm512_mul_ps(lanes->sum, shrink);
        for (int64_t d = 0; d < out_rows; d++)
            _mm512_store_ps(out + d * SIDE, _mm512_mul_ps(shrink, _mm512_load_ps(out + d * SIDE)));
    }
    lanes->top = top;
    __m512 minus = _mm512_sub_ps(_mm512_setzero_ps(), top), low_sum = _mm512_setzero_ps(), high_sum = low_sum;
    for (int64_t j = 0; j < ceil_div(count, STEP) * STEP; j += 2) {
        __m512 low = exp2_fast(_mm512_fmadd_ps(_mm512_load_ps(scores + j * SIDE), factor, minus));
        __m512 high = exp2_fast(_mm512_fmadd_ps(_mm512_load_ps(scores + (j + 1) * SIDE), factor, minus));
        low = _mm512_maskz_mov_ps(j < count ? seen(lanes, first + j, masked) : 0, low);
        high = _mm512_maskz_mov_ps(j + 1 < count ? seen(lanes, first + j + 1, masked) : 0, high);
        low_sum = _mm512_add_ps(low_sum, low);
        high_sum = _mm512_add_ps(high_sum, high);
        _mm512_store_si512(weights + j * SIDE, pair_rows(low, high));
    }
    lanes->sum = _mm512_add_ps(lanes->sum, _mm512_add_ps(low_sum, high_sum));
}

// Keys from `first` on: outputs of 32 queries get their part.
INLINE void attend_block(const Job *job, const Scratch *s, Lanes lanes[2], int64_t first, const int masked) {
    int64_t left = job->keys - first, count = left < KEY_BLOCK ? left : KEY_BLOCK, width = job->width;
    int64_t steps = ceil_div(width, STEP), columns = width / SIDE;
    const uint16_t *keys = s->keys + first * steps * STEP, *values = s->values + first * width;
    float *other = s->scores + KEY_BLOCK * SIDE;
    for (int64_t j = 0; j < count; j += STEP) {
        const uint16_t *key = keys + j * steps * STEP;
        multiply(key, key + steps * TILE, TILE, s->query, s->query + steps * TILE, TILE, steps, s->scores + j * SIDE,
                 other + j * SIDE, s->scores + (j + SIDE) * SIDE, other + (j + SIDE) * SIDE, 0);
    }
    UNROLL for (int g = 0; g < 2; g++)
        weigh(lanes + g, s->scores + g * KEY_BLOCK * SIDE, first, count, job->scale * 1.44269504f,
              s->weights + g * KEY_BLOCK * SIDE, s->out + g * width * SIDE, width, masked);
    for (int64_t t = 0; t < columns; t += 2) {
        int64_t next = t + 1 < columns ? t + 1 : t;
        float *out = s->out + t * SUM, *beside = s->out + next * SUM;
        multiply(values + t * TILE, values + next * TILE, columns * TILE, s->weights, s->weights + KEY_BLOCK * SIDE, TILE,
                 ceil_div(count, STEP), out, out + width * SIDE, beside, beside + width * SIDE, 1);
    }
}

// `visible` holds how many keys each of the 32 queries sees, where `masked` says that they do not see all.
INLINE void attend_pair(const Job *job, const Scratch *s, const Number *q, int64_t count, const int32_t *visible,
                        Lanes lanes[2], const int masked) {
    memset(s->out, 0, sizeof(float) * (size_t)(PAIR * job->width));
    pack_right_transposed((Rows){.at = q, .stride = job->q_token, .count = count, .width = job->width}, s->query);
    int64_t keys = masked ? 0 : job->keys;
    UNROLL for (int g = 0; g < 2; g++) {
        lanes[g] = (Lanes){_mm512_set1_ps(-INFINITY), _mm512_setzero_ps(), _mm512_loadu_si512(visible + g * SIDE)};
        int64_t most = _mm512_reduce_max_epi32(lanes[g].visible);
        if (masked && most > keys) keys = most;
    }
    for (int64_t first = 0; first < keys; first += KEY_BLOCK) attend_block(job, s, lanes, first, masked);
}

static void store_pair(const Job *job, const Scratch *s, const Lanes lanes[2], int64_t count, Number *out, float *lse) {
    const double ln2 = 0.69314718055994531;
    for (int64_t g = 0; g < 2 && g * SIDE < count; g++) {
        int64_t there = count - g * SIDE < SIDE ? count - g * SIDE : SIDE;
        __m512 by = _mm512_div_ps(_mm512_set1_ps(1.0f), lanes[g].sum);
        store_transposed(s->out + g * job->width * SIDE, by, out + g * SIDE * job->out_token, job->out_token, there, job->width);
        if (!lse) continue;
        float tops[SIDE], sums[SIDE];
        _mm512_storeu_ps(tops, lanes[g].top);
        _mm512_storeu_ps(sums, lanes[g].sum);
        for (int64_t i = 0; i < there; i++) lse[(g * SIDE + i) * job->heads] = (float)(ln2 * (tops[i] + log2(sums[i])));
    }
}

static void attend_tasks(Job *job, const Scratch *s) {
    int64_t per = ceil_div(job->queries, job->parts), packed = -1, task, task_end;
    while (take_slice(&job->queue, &task, &task_end)) {
        int64_t pair = task / job->parts, row = pair / job->heads, head = pair % job->heads;
        if (pair != packed) {
            pack_left((Rows){job->k + row * job->k_row + head * job->k_head, job->k_token, job->keys, job->width}, s->keys);
            pack_left_transposed((Rows){job->v + row * job->v_row + head * job->v_head, job->v_token, job->keys, job->width},
                                 s->values);
            packed = pair;
        }
        int64_t first = task % job->parts * per, end = first + per < job->queries ? first + per : job->queries;
        const Number *q = job->q + row * job->q_row + head * job->q_head;
        Number *out = job->out + row * job->out_row + head * job->out_head;
        for (int64_t i = first; i < end; i += PAIR) {
            int64_t count = end - i < PAIR ? end - i : PAIR;
            int32_t visible[PAIR];
            for (int64_t j = 0; j < PAIR; j++)
                visible[j] = job->counts && j < count ? job->counts[row * job->count_row + (i + j) * job->count_token] : 1;
            Lanes lanes[2];
            if (job->counts) attend_pair(job, s, q + i * job->q_token, count, visible, lanes, 1);
            else attend_pair(job, s, q + i * job->q_token, count, visible, lanes, 0);
            float *lse = job->lse ? job->lse + (row * job->queries + i) * job->heads + head : NULL;
            store_pair(job, s, lanes, count, out + i * job->out_token, lse);
        }
    }
}

static Scratch lay_out(const Job *job, char *arena, size_t *used) {
    size_t width = (size_t)job->width, steps = (width + STEP - 1) / STEP, keys = ((size_t)job->keys + STEP - 1) / STEP * STEP;
    *used = 0;
    return (Scratch){
        .scores = piece(arena, used, sizeof(float) * PAIR * KEY_BLOCK),
        .out = piece(arena, used, sizeof(float) * PAIR * width),
        .weights = piece(arena, used, sizeof(Number) * PAIR * KEY_BLOCK),
        .query = piece(arena, used, sizeof(Number) * PAIR * steps * STEP),
        .keys = piece(arena, used, sizeof(Number) * keys * steps * STEP),
        .values = piece(arena, used, sizeof(Number) * keys * width),
    };
}

static void attend_work(void *arg) {
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
    attend_tasks(job, &scratch);
    restore_tiles(&before);
    free(arena);
}

// As `foveate_attend_bf16`. counts: NULL, or how many keys a query sees, with the strides of a row and of a query behind
// the others; each at least one.
API int64_t foveate_attend_amx(const void *q, const void *k, const void *v, void *out, float *lse, const int32_t *counts,
                               const int64_t *dims, const int64_t *strides, float scale, int64_t threads) {
    Job job = {.q = q, .k = k, .v = v, .out = out, .lse = lse, .scale = scale, .counts = counts};
    if (counts) job.count_row = strides[12], job.count_token = strides[13];
    return attend(attend_work, job, dims, strides, threads);
}
#else
API int64_t foveate_amx(void) { return 0; }
#endif
