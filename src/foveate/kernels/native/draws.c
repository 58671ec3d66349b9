// Keyed draws: Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in the order of numpy's
// Philox(key).random_raw, straight to float32: uniform in (0, 1), or exponential. Eight counters at a time.
#include "common.h"

enum { ROUNDS = 10, WORDS = 4, COUNTERS = 8, BOTH = WORDS * COUNTERS, SLICE = 64, LOG_DEGREE = 11 };

typedef struct {
    Queue queue;
    uint64_t seed, stream;
    float *out;
    int64_t count;
    int is_exponential;
} Draws;

// Both halves of the products of 64-bit lanes with a constant, from products of 32 bits.
INLINE __m512i multiply(__m512i x, uint64_t by, __m512i *high) {
    const __m512i by_low = _mm512_set1_epi64((int64_t)(by & 0xffffffffu)), by_high = _mm512_set1_epi64((int64_t)(by >> 32));
    const __m512i low_half = _mm512_set1_epi64(0xffffffff);
    __m512i x_high = _mm512_srli_epi64(x, 32), least = _mm512_mul_epu32(x, by_low);
    __m512i middle = _mm512_add_epi64(_mm512_mul_epu32(x_high, by_low), _mm512_srli_epi64(least, 32));
    __m512i other = _mm512_add_epi64(_mm512_mul_epu32(x, by_high), _mm512_and_si512(middle, low_half));
    __m512i top = _mm512_add_epi64(_mm512_mul_epu32(x_high, by_high), _mm512_srli_epi64(middle, 32));
    *high = _mm512_add_epi64(top, _mm512_srli_epi64(other, 32));
    return _mm512_mask_shuffle_epi32(least, 0xaaaa, other, _MM_PERM_CCAA);
}

// The draws of eight counters (c, 0, 0, 0) from `first` on, as odd numbers below 2^24: 2 (raw >> 41) + 1.
INLINE void philox(uint64_t first, const uint64_t keys[2][ROUNDS], __m512i odd[2]) {
    __m512i a = _mm512_add_epi64(_mm512_set1_epi64((int64_t)first), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
    __m512i b = _mm512_setzero_si512(), c = b, d = b;
    UNROLL for (int i = 0; i < ROUNDS; i++) {
        __m512i a_high, c_high, a_low = multiply(a, 0xD2E7470EE14C6C93u, &a_high);
        __m512i c_low = multiply(c, 0xCA5A826395121157u, &c_high);
        a = _mm512_ternarylogic_epi64(c_high, b, _mm512_set1_epi64((int64_t)keys[0][i]), 0x96);
        c = _mm512_ternarylogic_epi64(a_high, d, _mm512_set1_epi64((int64_t)keys[1][i]), 0x96);
        b = c_low;
        d = a_low;
    }
    // The upper halves of two words become one lane, then lanes of the same counter neighbours.
    __m512i ab = _mm512_mask_shuffle_epi32(b, 0x5555, a, _MM_PERM_DDBB), cd = _mm512_mask_shuffle_epi32(d, 0x5555, c, _MM_PERM_DDBB);
    odd[0] = _mm512_permutex2var_epi64(ab, _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), cd);
    odd[1] = _mm512_permutex2var_epi64(ab, _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4), cd);
    UNROLL for (int i = 0; i < 2; i++)
        odd[i] = _mm512_or_si512(_mm512_slli_epi32(_mm512_srli_epi32(odd[i], 9), 1), _mm512_set1_epi32(1));
}

// 16 / j at j % 16, for j = 12 .. 24, in 20 bits, so that its product with 24 bits is exact; and the log of it.
typedef struct {
    __m512d inverse[2], log[2];
} Table;

static Table table_of_logs(void) {
    double inverse[16] = {0}, logs[16] = {0};
    for (int j = 12; j <= 24; j++) {
        inverse[j % 16] = rint(16.0 / j * 0x1p19) * 0x1p-19;
        logs[j % 16] = log(inverse[j % 16]);
    }
    return (Table){.inverse = {_mm512_loadu_pd(inverse), _mm512_loadu_pd(inverse + 8)},
                   .log = {_mm512_loadu_pd(logs), _mm512_loadu_pd(logs + 8)}};
}

// -log(odd * 2^-24) for odd numbers below 2^24, to a few units of 2^-53: near enough that rounding to float32 gives what
// it gives for numpy's logarithm (a test goes through all of them). odd = 2^e m, m in [0.75, 1.5); beside 1 the inverse is
// 1, so nothing is lost to cancellation. log(1 + r) by its series, |r| <= 1/24.
INLINE __m256 minus_log(__m256i odd, const Table *table) {
    __m512d x = _mm512_cvtepi32_pd(odd), one = _mm512_set1_pd(1.0);
    __m512d m = _mm512_getmant_pd(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src), e = _mm512_getexp_pd(x);
    e = _mm512_mask_add_pd(e, _mm512_cmp_pd_mask(m, one, _CMP_LT_OQ), e, one);
    // The sum has its last place at 1/16.
    __m512i j = _mm512_castpd_si512(_mm512_add_pd(m, _mm512_set1_pd(0x1.8p48)));
    __m512d r = _mm512_fmsub_pd(m, _mm512_permutex2var_pd(table->inverse[0], j, table->inverse[1]), one);
    __m512d p = _mm512_set1_pd(1.0 / LOG_DEGREE);
    UNROLL for (int i = LOG_DEGREE - 1; i > 0; i--) p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(i % 2 ? 1.0 / i : -1.0 / i));
    __m512d log2s = _mm512_sub_pd(_mm512_set1_pd(24.0), e), rest = _mm512_permutex2var_pd(table->log[0], j, table->log[1]);
    rest = _mm512_fmadd_pd(log2s, _mm512_set1_pd(0x1.62e42fefa39efp-1), rest);
    return _mm512_cvtpd_ps(_mm512_fnmadd_pd(p, r, rest));
}

INLINE __m512 exponential(__m512i odd, const Table *table) {
    __m256 low = minus_log(_mm512_castsi512_si256(odd), table);
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), minus_log(_mm512_extracti32x8_epi32(odd, 1), table), 1);
}

static void draws_work(void *arg) {
    Draws *job = arg;
    Table table = table_of_logs();
    uint64_t keys[2][ROUNDS];
    for (int i = 0; i < ROUNDS; i++) {
        keys[0][i] = job->seed + (uint64_t)i * 0x9E3779B97F4A7C15u;
        keys[1][i] = job->stream + (uint64_t)i * 0xBB67AE8584CAA73Bu;
    }
    int64_t begin, end;
    while (take_slice(&job->queue, &begin, &end))
        for (int64_t i = begin; i < end; i++) {
            __m512i odd[2];
            philox((uint64_t)i * COUNTERS + 1, keys, odd);
            UNROLL for (int j = 0; j < 2; j++) {
                int64_t at = i * BOTH + j * LANES, left = job->count - at;
                __m512 x = job->is_exponential ? exponential(odd[j], &table)
                                               : _mm512_mul_ps(_mm512_cvtepi32_ps(odd[j]), _mm512_set1_ps(0x1p-24f));
                _mm512_mask_storeu_ps(job->out + at, first_lanes(left > 0 ? left : 0), x);
            }
        }
}

// `count` draws of the key (seed, stream): u = ((raw >> 41) + 0.5) * 2^-23, or -log(u) rounded to float32.
API void foveate_draws(uint64_t seed, uint64_t stream, float *out, int64_t count, int64_t is_exponential,
                       int64_t threads) {
    Draws job = {.queue = {.count = (count + BOTH - 1) / BOTH, .slice = SLICE}, .seed = seed, .stream = stream,
                 .out = out, .count = count, .is_exponential = (int)is_exponential};
    run(draws_work, &job, threads);
}
