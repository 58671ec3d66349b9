// Matrix products of bfloat16 by AMX: tiles of 16 rows of 64 bytes, sums in float32. A left tile holds 16 rows of 32
// numbers; a right tile holds 16 pairs of rows of 16 columns, the two numbers of a pair side by side; a sum 16 rows of
// 16 float32. A tile lies together in memory. Scores stand transposed, a row for a key and a lane for a query, so that
// what softmax does to a query it does in its lane.
#pragma once
#include "common.h"

#ifdef __AMX_BF16__
enum { SIDE = 16, STEP = 32, TILE = SIDE * STEP, SUM = SIDE * SIDE };

// The compiler does not know that tiles read memory: stores in front of this line are done behind it.
#define SETTLE __asm__ volatile("" ::: "memory")

typedef struct {
    _Alignas(64) uint8_t bytes[64];
} TileConfig;

// Tiles of full size. Another library's configuration is kept for `restore_tiles`: it may rely on finding it again.
INLINE TileConfig take_tiles(void) {
    TileConfig before, ours = {{0}};
    _tile_storeconfig(before.bytes);
    ours.bytes[0] = 1;
    for (int t = 0; t < 8; t++) {
        ours.bytes[16 + 2 * t] = 64;
        ours.bytes[48 + t] = SIDE;
    }
    SETTLE;
    _tile_loadconfig(ours.bytes);
    return before;
}

INLINE void restore_tiles(const TileConfig *before) {
    SETTLE;
    if (before->bytes[0]) _tile_loadconfig(before->bytes);
    else _tile_release();
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Four sums of products: two left tiles by two right ones, `steps` times, `*_next` numbers apart. Two equal pointers give
// one result twice.
INLINE void multiply(const uint16_t *a0, const uint16_t *a1, int64_t a_next, const uint16_t *b0, const uint16_t *b1,
                     int64_t b_next, int64_t steps, float *c00, float *c01, float *c10, float *c11, const int adds) {
    SETTLE;
    if (adds) {
        _tile_loadd(0, c00, 64);
        _tile_loadd(1, c01, 64);
        _tile_loadd(2, c10, 64);
        _tile_loadd(3, c11, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s++) {
        _tile_loadd(4, a0 + s * a_next, 64);
        _tile_loadd(6, b0 + s * b_next, 64);
        _tile_loadd(7, b1 + s * b_next, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a1 + s * a_next, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c00, 64);
    _tile_stored(1, c01, 64);
    _tile_stored(2, c10, 64);
    _tile_stored(3, c11, 64);
    SETTLE;
}

// Rows of `width` numbers, `stride` apart, of which `count` exist, as a matrix to pack; the rest is zero.
typedef struct {
    const uint16_t *at;
    int64_t stride, count, width;
} Rows;

// Left tiles [rows / 16][width / 32]: the rows as they are.
static void pack_left(Rows m, uint16_t *to) {
    for (int64_t row = 0; row < ceil_div(m.count, STEP) * STEP; row += SIDE)
        for (int64_t d = 0; d < m.width; d += STEP, to += TILE)
            for (int64_t i = 0; i < SIDE; i++) {
                __mmask16 mask = row + i < m.count ? first_lanes((m.width - d) / 2) : 0;
                const uint16_t *from = m.at + (row + i < m.count ? row + i : 0) * m.stride + d;
                _mm512_store_si512(to + i * STEP, _mm512_maskz_loadu_epi32(mask, from));
            }
}

// Right tiles [rows / 16][width / 32] of the transposed rows.
static void pack_right_transposed(Rows m, uint16_t *to) {
    for (int64_t row = 0; row < ceil_div(m.count, STEP) * STEP; row += SIDE)
        for (int64_t d = 0; d < m.width; d += STEP, to += TILE) {
            __mmask16 mask = first_lanes((m.width - d) / 2);
            __m512i words[16];
            UNROLL for (int i = 0; i < 16; i++)
                words[i] = row + i < m.count ? _mm512_maskz_loadu_epi32(mask, m.at + (row + i) * m.stride + d)
                                             : _mm512_setzero_si512();
            transpose16(words);
            UNROLL for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * STEP, words[i]);
        }
}

INLINE __m512i load_words(Rows m, int64_t row, int64_t d) {
    if (row >= m.count) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(m.at + row * m.stride + d)));
}

// Tiles [rows / 32][width / 16] that sum over rows: right ones of pairs of rows, or, transposed, left ones.
INLINE void pack_pairs(Rows m, uint16_t *to, const int transposes) {
    for (int64_t row = 0; row < m.count; row += STEP)
        for (int64_t d = 0; d < m.width; d += SIDE, to += TILE) {
            __m512i words[16];
            UNROLL for (int i = 0; i < 16; i++)
                words[i] = _mm512_or_si512(load_words(m, row + 2 * i, d), _mm512_slli_epi32(load_words(m, row + 2 * i + 1, d), 16));
            if (transposes) transpose16(words);
            UNROLL for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * STEP, words[i]);
        }
}

static void pack_right(Rows m, uint16_t *to) { pack_pairs(m, to, 0); }

static void pack_left_transposed(Rows m, uint16_t *to) { pack_pairs(m, to, 1); }

// A transposed sum [width / 16][16 of the width][16 rows], times a factor for each row, as rows of bfloat16.
INLINE void store_transposed(const float *sums, __m512 factor, uint16_t *to, int64_t stride, int64_t count, int64_t width) {
    for (int64_t d = 0; d < width; d += SIDE, sums += SUM) {
        __m512i words[16];
        UNROLL for (int i = 0; i < 16; i++)
            words[i] = _mm512_castps_si512(_mm512_mul_ps(factor, _mm512_load_ps(sums + i * SIDE)));
        transpose16(words);
        UNROLL for (int i = 0; i < 16; i++)
            if (i < count) store16(to, i * stride + d, BFLOAT16, 0xffff, _mm512_castsi512_ps(words[i]));
    }
}

// 2^x: VSCALEF scales by the whole part, a polynomial does the rest (minimax on [0, 1], relative error below 2e-7).
INLINE __m512 exp2_fast(__m512 x) {
    __m512 f = _mm512_reduce_ps(x, 9);
    __m512 p = _mm512_set1_ps(1.877576683e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.989340141e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.582631793e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.401536171e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931530732e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.999999251e-1f));
    return _mm512_scalef_ps(p, x);
}

// A row of pairs of bfloat16 from two rows of float32: what a right tile holds.
INLINE __m512i pair_rows(__m512 low, __m512 high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
#endif
