/* Philox4x32-10, the noise of native_sampling.c: one word for each of BLOCK consecutive ids; see engine/philox.py. */

#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { BLOCK = 64 };

static const uint32_t M0 = 0xD2511F53, M1 = 0xCD9E8D57, W0 = 0x9E3779B9, W1 = 0xBB67AE85;

void disagg_words_anywhere(uint64_t block, uint64_t position, uint64_t seed, uint32_t *words)
{
    for (int i = 0; i < BLOCK / 4; i++) {
        uint32_t c0 = (uint32_t)(block * (BLOCK / 4) + (uint64_t)i), c1 = (uint32_t)position;
        uint32_t c2 = (uint32_t)(position >> 32), c3 = 0, k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        for (int round = 0; round < 10; round++, k0 += W0, k1 += W1) {
            uint64_t p0 = (uint64_t)M0 * c0, p1 = (uint64_t)M1 * c2;
            c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
            c1 = (uint32_t)p1, c3 = (uint32_t)p0;
        }
        words[4 * i] = c0, words[4 * i + 1] = c1, words[4 * i + 2] = c2, words[4 * i + 3] = c3;
    }
}

#if defined(__x86_64__)
/* A counter's words lie in the low halves of 64-bit lanes; the product reads nothing else, so high halves may hold
   anything. Two vectors of counters at once: a round waits for its product, the other's fills the time. Lanes are
   numbered so that interleaving within 128 bits leaves the words in the order of ids. */
#define ROUNDS(VECTOR, MUL, SHIFT, XOR, SET1)                                                                \
    for (int round = 0; round < 10; round++, k0 += W0, k1 += W1)                                             \
        for (int j = 0; j < 2; j++) {                                                                        \
            VECTOR p0 = MUL(c0[j], SET1((int64_t)M0)), p1 = MUL(c2[j], SET1((int64_t)M1));                   \
            c0[j] = XOR(XOR(SHIFT(p1, 32), c1[j]), SET1((int64_t)k0));                                       \
            c2[j] = XOR(XOR(SHIFT(p0, 32), c3[j]), SET1((int64_t)k1));                                       \
            c1[j] = p1, c3[j] = p0;                                                                          \
        }

__attribute__((target("avx512f"))) void disagg_words_avx512(
    uint64_t block, uint64_t position, uint64_t seed, uint32_t *words)
{
    const __m512i low = _mm512_set1_epi64(0xFFFFFFFF), order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    __m512i c0[2], c1[2], c2[2], c3[2];
    for (int j = 0; j < 2; j++) {
        c0[j] = _mm512_add_epi64(order, _mm512_set1_epi64((int64_t)(block * (BLOCK / 4)) + 8 * j));
        c1[j] = _mm512_set1_epi64((int64_t)position);
        c2[j] = _mm512_set1_epi64((int64_t)(position >> 32));
        c3[j] = _mm512_setzero_si512();
    }
    ROUNDS(__m512i, _mm512_mul_epu32, _mm512_srli_epi64, _mm512_xor_si512, _mm512_set1_epi64)
    for (int j = 0; j < 2; j++) {
        __m512i a = _mm512_or_si512(_mm512_and_si512(c0[j], low), _mm512_slli_epi64(c1[j], 32));
        __m512i b = _mm512_or_si512(_mm512_and_si512(c2[j], low), _mm512_slli_epi64(c3[j], 32));
        _mm512_storeu_si512(words + 32 * j, _mm512_unpacklo_epi64(a, b));
        _mm512_storeu_si512(words + 32 * j + 16, _mm512_unpackhi_epi64(a, b));
    }
}

__attribute__((target("avx2"))) static void half_avx2(
    uint64_t counter, uint64_t position, uint64_t seed, uint32_t *words)
{
    const __m256i low = _mm256_set1_epi64x(0xFFFFFFFF), order = _mm256_set_epi64x(3, 1, 2, 0);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    __m256i c0[2], c1[2], c2[2], c3[2];
    for (int j = 0; j < 2; j++) {
        c0[j] = _mm256_add_epi64(order, _mm256_set1_epi64x((int64_t)counter + 4 * j));
        c1[j] = _mm256_set1_epi64x((int64_t)position);
        c2[j] = _mm256_set1_epi64x((int64_t)(position >> 32));
        c3[j] = _mm256_setzero_si256();
    }
    ROUNDS(__m256i, _mm256_mul_epu32, _mm256_srli_epi64, _mm256_xor_si256, _mm256_set1_epi64x)
    for (int j = 0; j < 2; j++) {
        __m256i a = _mm256_or_si256(_mm256_and_si256(c0[j], low), _mm256_slli_epi64(c1[j], 32));
        __m256i b = _mm256_or_si256(_mm256_and_si256(c2[j], low), _mm256_slli_epi64(c3[j], 32));
        _mm256_storeu_si256((__m256i *)(words + 16 * j), _mm256_unpacklo_epi64(a, b));
        _mm256_storeu_si256((__m256i *)(words + 16 * j + 8), _mm256_unpackhi_epi64(a, b));
    }
}

__attribute__((target("avx2"))) void disagg_words_avx2(
    uint64_t block, uint64_t position, uint64_t seed, uint32_t *words)
{
    half_avx2(block * (BLOCK / 4), position, seed, words);
    half_avx2(block * (BLOCK / 4) + 8, position, seed, words + BLOCK / 2);
}
#endif
