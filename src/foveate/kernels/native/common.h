// What all kernels share: threads, bfloat16, loads and stores of either dtype. Needs AVX-512 F, BW, DQ, VL and BF16.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define API __attribute__((visibility("default")))

enum { LANES = 16, FLOAT32 = 0, BFLOAT16 = 1 };

// Runs work(job) on several threads at once; `foveate_threads` may replace it with torch's own pool.
typedef void (*Parallel)(void (*work)(void *), void *job, unsigned threads, unsigned flags);
extern Parallel foveate_parallel;

INLINE void run(void (*work)(void *), void *job, int64_t threads) {
    if (threads > 1 && foveate_parallel)
        foveate_parallel(work, job, (unsigned)threads, 0);
    else
        work(job);
}

// A range of items that threads take in slices, until none is left.
typedef struct {
    atomic_llong next;
    int64_t count, slice;
} Queue;

INLINE int take_slice(Queue *queue, int64_t *begin, int64_t *end) {
    int64_t first = atomic_fetch_add(&queue->next, queue->slice);
    if (first >= queue->count) return 0;
    *begin = first;
    *end = first + queue->slice < queue->count ? first + queue->slice : queue->count;
    return 1;
}

// A piece of `arena`, or its size while there is none.
INLINE void *piece(char *arena, size_t *used, size_t bytes) {
    void *at = arena ? arena + *used : NULL;
    *used += (bytes + 63) / 64 * 64;
    return at;
}

INLINE __mmask16 first_lanes(int64_t count) { return count >= LANES ? (__mmask16)0xffff : (__mmask16)((1u << count) - 1); }

// Sixteen numbers of either dtype as float32; lanes outside of the mask are zero.
INLINE __m512 load16(const void *base, int64_t at, int dtype, __mmask16 mask) {
    if (dtype == FLOAT32) return _mm512_maskz_loadu_ps(mask, (const float *)base + at);
    __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)base + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE void store16(void *base, int64_t at, int dtype, __mmask16 mask, __m512 x) {
    if (dtype == FLOAT32)
        _mm512_mask_storeu_ps((float *)base + at, mask, x);
    else
        _mm256_mask_storeu_epi16((uint16_t *)base + at, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

// 2^x for x <= 0: the whole part scales, a polynomial does the rest (coefficients as in Cephes' exp2f; its relative
// error is below 2e-7); 0 far below.
INLINE __m512 exp2_16(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-150.0f));
    __m512 whole = _mm512_roundscale_ps(x, 8);
    __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.535336188e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.339887440e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618437357e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550332471e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402264791e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931472028e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

// Sixteen rows of sixteen words become columns: words of neighbouring rows, then pairs of them, then quarters.
INLINE void transpose16(__m512i rows[16]) {
    __m512i t[16];
    UNROLL for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        rows[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        rows[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        rows[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        rows[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
