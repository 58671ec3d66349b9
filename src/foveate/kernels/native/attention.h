// Softmax attention without a mask, for the number format that the including file names; scores, softmax and sums are
// float32. Blocks of queries walk over blocks of keys with a running maximum (FlashAttention, arXiv 2205.14135). Keys and
// values are packed once per row and head into words of 32 bits, a float32 or a pair of bfloat16: keys
// [block][width / GROUP][KEY_BLOCK], values [keys / GROUP][width].
//
// The including file defines: Number, GROUP (numbers per word), FORMAT, MULTIPLY_ADD(sum, a, b) over vectors of words.
#include "attention_job.h"

enum { KEY_BLOCK = 512, QUERY_BLOCK = 96, KEY_STEP = 4 * LANES };

typedef struct {
    float *scores, *sums, *tops, *out;
    __m512 *lane_tops;
    Number *weights, *query;
    uint32_t *keys, *values;
} Scratch;

// Sixteen keys, of which `count` exist: column w of `block` takes word w of each; the rest is zero.
static void pack_sixteen(const Job *job, const Number *k, int64_t count, uint32_t *block) {
    int64_t words = job->width / GROUP;
    for (int64_t w = 0; w < words; w += LANES) {
        __mmask16 mask = first_lanes(words - w);
        __m512i rows[16];
        UNROLL for (int i = 0; i < 16; i++)
            rows[i] = i < count ? _mm512_maskz_loadu_epi32(mask, k + i * job->k_token + GROUP * w) : _mm512_setzero_si512();
        transpose16(rows);
        for (int64_t i = 0; i < LANES && w + i < words; i++) _mm512_storeu_si512(block + (w + i) * KEY_BLOCK, rows[i]);
    }
}

static void pack_keys(const Job *job, const Number *k, uint32_t *out) {
    for (int64_t b = 0; b < job->keys; b += KEY_BLOCK) {
        int64_t count = job->keys - b < KEY_BLOCK ? job->keys - b : KEY_BLOCK;
        uint32_t *block = out + b * (job->width / GROUP);
        for (int64_t first = 0; first < count; first += LANES) {
            int64_t there = count - first < LANES ? count - first : LANES;
            pack_sixteen(job, k + (b + first) * job->k_token, there, block + first);
        }
    }
}

// Numbers of two keys in turns: sixteen words from 32 bytes of each.
INLINE void interleave16(const void *even, const void *odd, uint32_t *out) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(even));
    __m512i high = odd ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(odd)) : _mm512_setzero_si512();
    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

static void pack_values(const Job *job, const Number *v, uint32_t *out) {
    for (int64_t key = 0; key < job->keys; key += GROUP) {
        const Number *first = v + key * job->v_token, *second = key + 1 < job->keys ? first + job->v_token : NULL;
        uint32_t *words = out + key / GROUP * job->width;
        if (GROUP == 1) memcpy(words, first, sizeof(uint32_t) * (size_t)job->width);
        for (int64_t d = 0; GROUP == 2 && d < job->width; d += LANES)
            interleave16(first + d, second ? second + d : NULL, words + d);
    }
}

INLINE __m512i broadcast_word(const Number *word) { return _mm512_set1_epi32(*(const int32_t *)word); }

// Scores of `rows` queries and `lanes` vectors of keys, and the largest of every lane so far; `rows` and `lanes` are
// constants after inlining.
INLINE void score(const int rows, const int lanes, const Number *q, const uint32_t *k, int64_t width, float *scores,
                  __m512 *tops) {
    __m512 sum[6][4];
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < lanes; j++) sum[i][j] = _mm512_setzero_ps();
    for (int64_t w = 0; w < width / GROUP; w++) {
        __m512i key[4];
        UNROLL for (int j = 0; j < lanes; j++) key[j] = _mm512_loadu_si512(k + w * KEY_BLOCK + j * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            __m512i query = broadcast_word(q + i * width + GROUP * w);
            UNROLL for (int j = 0; j < lanes; j++) sum[i][j] = MULTIPLY_ADD(sum[i][j], query, key[j]);
        }
    }
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < lanes; j++) {
        _mm512_storeu_ps(scores + i * KEY_BLOCK + j * LANES, sum[i][j]);
        tops[i] = _mm512_max_ps(tops[i], sum[i][j]);
    }
}

// Adds weights times values to `rows` outputs of `lanes` vectors; `rows` and `lanes` are constants after inlining.
INLINE void mix(const int rows, const int lanes, const Number *weights, const uint32_t *v, int64_t width,
                int64_t count, float *out) {
    __m512 sum[12][4];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < lanes; j++) sum[i][j] = _mm512_loadu_ps(out + i * width + j * LANES);
    for (int64_t key = 0; key < count; key += GROUP) {
        __m512i value[4];
        UNROLL for (int j = 0; j < lanes; j++) value[j] = _mm512_loadu_si512(v + key / GROUP * width + j * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            __m512i weight = broadcast_word(weights + i * KEY_BLOCK + key);
            UNROLL for (int j = 0; j < lanes; j++) sum[i][j] = MULTIPLY_ADD(sum[i][j], weight, value[j]);
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < lanes; j++) _mm512_storeu_ps(out + i * width + j * LANES, sum[i][j]);
}

INLINE void mix_rows(const int rows, const int lanes, const Number *weights, const uint32_t *v, int64_t width,
                     int64_t queries, int64_t count, float *out) {
    int64_t i = 0;
    for (; i + rows <= queries; i += rows) mix(rows, lanes, weights + i * KEY_BLOCK, v, width, count, out + i * width);
    for (; i + 4 <= queries; i += 4) mix(4, lanes, weights + i * KEY_BLOCK, v, width, count, out + i * width);
    for (; i < queries; i++) mix(1, lanes, weights + i * KEY_BLOCK, v, width, count, out + i * width);
}

// All columns, as many at a time as fill the registers.
static void mix_all(const Scratch *s, const uint32_t *v, int64_t width, int64_t queries, int64_t count) {
    for (int64_t d = 0; d < width;) {
        int64_t left = (width - d) / LANES;
        int64_t lanes = left % 4 == 0 ? 4 : left % 3 == 0 ? 3 : left > 4 ? 4 : left;
        if (lanes == 4) mix_rows(6, 4, s->weights, v + d, width, queries, count, s->out + d);
        if (lanes == 3) mix_rows(8, 3, s->weights, v + d, width, queries, count, s->out + d);
        if (lanes == 2) mix_rows(12, 2, s->weights, v + d, width, queries, count, s->out + d);
        if (lanes == 1) mix_rows(12, 1, s->weights, v + d, width, queries, count, s->out + d);
        d += lanes * LANES;
    }
}

INLINE void score_rows(const int lanes, const Scratch *s, const uint32_t *k, int64_t width, int64_t queries, int64_t j) {
    int64_t i = 0;
    for (; i + 6 <= queries; i += 6)
        score(6, lanes, s->query + i * width, k + j, width, s->scores + i * KEY_BLOCK + j, s->lane_tops + i);
    for (; i + 4 <= queries; i += 4)
        score(4, lanes, s->query + i * width, k + j, width, s->scores + i * KEY_BLOCK + j, s->lane_tops + i);
    for (; i < queries; i++)
        score(1, lanes, s->query + i * width, k + j, width, s->scores + i * KEY_BLOCK + j, s->lane_tops + i);
}

static void score_all(const Scratch *s, const uint32_t *k, int64_t width, int64_t queries, int64_t count) {
    for (int64_t i = 0; i < queries; i++) s->lane_tops[i] = _mm512_set1_ps(-INFINITY);
    for (int64_t j = 0; j < count; j += KEY_STEP) {
        if (count - j > 2 * LANES) score_rows(4, s, k, width, queries, j);
        else if (count - j > LANES) score_rows(2, s, k, width, queries, j);
        else score_rows(1, s, k, width, queries, j);
    }
}

INLINE float top_of(const float *scores, __m512 lane_top, int64_t count) {
    if (count % KEY_STEP == 0) return _mm512_reduce_max_ps(lane_top);
    // Lanes behind the last key hold scores of no key.
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (int64_t j = 0; j < count; j += LANES) {
        __mmask16 mask = first_lanes(count - j);
        top = _mm512_mask_max_ps(top, mask, top, _mm512_maskz_loadu_ps(mask, scores + j));
    }
    return _mm512_reduce_max_ps(top);
}

// Scores of one query become weights; its sum and output shrink to the new maximum.
static void weigh(const Scratch *s, int64_t i, int64_t count, int64_t width, float to_log2) {
    const float *scores = s->scores + i * KEY_BLOCK;
    float before = s->tops[i], top = top_of(scores, s->lane_tops[i], count) * to_log2;
    top = before > top ? before : top;
    s->tops[i] = top;
    if (before < top && s->sums[i] != 0.0f) {
        float shrink = exp2f(before - top);
        __m512 by = _mm512_set1_ps(shrink);
        s->sums[i] *= shrink;
        for (float *o = s->out + i * width; o < s->out + (i + 1) * width; o += LANES)
            _mm512_storeu_ps(o, _mm512_mul_ps(by, _mm512_loadu_ps(o)));
    }
    __m512 factor = _mm512_set1_ps(to_log2), minus = _mm512_set1_ps(-top), sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < count; j += LANES) {
        __mmask16 mask = first_lanes(count - j);
        __m512 x = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, scores + j), factor, minus);
        __m512 weight = _mm512_maskz_mov_ps(mask, exp2_16(x));
        sum = _mm512_add_ps(sum, weight);
        // Also the lanes behind the last key, as zeros: the last word of values may hold one that is none.
        store16(s->weights, i * KEY_BLOCK + j, FORMAT, 0xffff, weight);
    }
    s->sums[i] += _mm512_reduce_add_ps(sum);
}

static void attend_queries(const Job *job, const Scratch *s, const Number *q, int64_t queries, Number *out) {
    int64_t width = job->width;
    memset(s->out, 0, sizeof(float) * (size_t)(queries * width));
    for (int64_t i = 0; i < queries; i++) {
        s->sums[i] = 0.0f;
        s->tops[i] = -INFINITY;
        memcpy(s->query + i * width, q + i * job->q_token, sizeof(Number) * (size_t)width);
    }
    for (int64_t b = 0; b < job->keys; b += KEY_BLOCK) {
        int64_t count = job->keys - b < KEY_BLOCK ? job->keys - b : KEY_BLOCK;
        score_all(s, s->keys + b * width / GROUP, width, queries, count);
        for (int64_t i = 0; i < queries; i++) weigh(s, i, count, width, job->scale * 1.44269504f);
        mix_all(s, s->values + b / GROUP * width, width, queries, count);
    }
    for (int64_t i = 0; i < queries; i++) {
        __m512 by = _mm512_set1_ps(1.0f / s->sums[i]);
        for (int64_t d = 0; d < width; d += LANES)
            store16(out, i * job->out_token + d, FORMAT, 0xffff, _mm512_mul_ps(by, _mm512_loadu_ps(s->out + i * width + d)));
    }
}

// Log-sum-exp of the scores of the queries that `attend_queries` did last; one token's heads lie together.
static void store_lse(const Job *job, const Scratch *s, int64_t queries, float *lse) {
    const double ln2 = 0.69314718055994531;
    for (int64_t i = 0; i < queries; i++) lse[i * job->heads] = (float)(ln2 * (s->tops[i] + log2(s->sums[i])));
}

static void attend_tasks(Job *job, const Scratch *s) {
    int64_t per = (job->queries + job->parts - 1) / job->parts, packed = -1, task, task_end;
    while (take_slice(&job->queue, &task, &task_end)) {
        int64_t pair = task / job->parts, row = pair / job->heads, head = pair % job->heads;
        if (pair != packed) {
            pack_keys(job, job->k + row * job->k_row + head * job->k_head, s->keys);
            pack_values(job, job->v + row * job->v_row + head * job->v_head, s->values);
            packed = pair;
        }
        int64_t first = task % job->parts * per, end = first + per < job->queries ? first + per : job->queries;
        const Number *q = job->q + row * job->q_row + head * job->q_head;
        Number *out = job->out + row * job->out_row + head * job->out_head;
        for (int64_t i = first; i < end; i += QUERY_BLOCK) {
            int64_t count = end - i < QUERY_BLOCK ? end - i : QUERY_BLOCK;
            attend_queries(job, s, q + i * job->q_token, count, out + i * job->out_token);
            if (job->lse) store_lse(job, s, count, job->lse + (row * job->queries + i) * job->heads + head);
        }
    }
}

static Scratch lay_out(const Job *job, char *arena, size_t *used) {
    size_t width = (size_t)job->width, keys = (size_t)((job->keys + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK);
    *used = 0;
    return (Scratch){
        .scores = piece(arena, used, sizeof(float) * QUERY_BLOCK * KEY_BLOCK),
        .sums = piece(arena, used, sizeof(float) * QUERY_BLOCK),
        .tops = piece(arena, used, sizeof(float) * QUERY_BLOCK),
        .out = piece(arena, used, sizeof(float) * QUERY_BLOCK * width),
        .lane_tops = piece(arena, used, sizeof(__m512) * QUERY_BLOCK),
        .weights = piece(arena, used, sizeof(Number) * QUERY_BLOCK * KEY_BLOCK),
        .query = piece(arena, used, sizeof(Number) * QUERY_BLOCK * width),
        .keys = piece(arena, used, sizeof(Number) * keys * width),
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
    attend_tasks(job, &scratch);
    free(arena);
}
