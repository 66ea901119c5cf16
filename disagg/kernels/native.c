/* Copying and hashing of KV blocks, many in one call and without Python's lock. Built where a compiler is
   (pyproject.toml); without it disagg/kernels/native.py says so and numpy and xxhash do the same, slower.

   Plain C behind ctypes: no Python header, so one library serves every Python. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

const int disagg_native_version = 5; /* VERSION of native.py */

enum {
    PIECE = 1 << 10, /* copied, then hashed: so few instructions that the core fetches the next piece while it hashes
                        this one; 1.5 times as fast as pieces of 32 KiB, and hardly slower than the copy alone */
    STRIPE = 64,
    BLOCK = 1024, /* stripes between two scrambles: (sizeof SECRET - STRIPE) / 8 of them */
    LANES = 8,
};

/* --- copying ------------------------------------------------------------------------------------------------------ */

/* Past the caches: a normal store reads the line it overwrites first, half as much traffic again, and throws out of the
   cache what others need. For bytes that this process will not touch soon. */
static void stream(char *to, const char *from, size_t nbytes)
{
#if defined(__x86_64__)
    size_t head = -(uintptr_t)to % 16;
    if (nbytes < 4096) {
        memcpy(to, from, nbytes);
        return;
    }
    memcpy(to, from, head);
    to += head, from += head, nbytes -= head;
    for (; nbytes >= STRIPE; nbytes -= STRIPE, to += STRIPE, from += STRIPE) {
        __m128i a = _mm_loadu_si128((const __m128i *)from), b = _mm_loadu_si128((const __m128i *)from + 1);
        __m128i c = _mm_loadu_si128((const __m128i *)from + 2), d = _mm_loadu_si128((const __m128i *)from + 3);
        _mm_stream_si128((__m128i *)to, a), _mm_stream_si128((__m128i *)to + 1, b);
        _mm_stream_si128((__m128i *)to + 2, c), _mm_stream_si128((__m128i *)to + 3, d);
    }
#endif
    memcpy(to, from, nbytes);
}

/* n runs of bytes. The fence: streamed stores are not ordered by the lock with which the caller tells other threads. */
void disagg_copy(size_t n, char *const *to, const char *const *from, const size_t *nbytes)
{
    for (size_t i = 0; i < n; i++)
        stream(to[i], from[i], nbytes[i]);
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

/* --- XXH3-64, for more than 240 bytes, seed 0 and the default secret; written from its specification -------------- */

static const uint64_t PRIME32_1 = 0x9E3779B1, PRIME32_2 = 0x85EBCA77, PRIME32_3 = 0xC2B2AE3D;
static const uint64_t PRIME64_1 = 0x9E3779B185EBCA87, PRIME64_2 = 0xC2B2AE3D27D4EB4F, PRIME64_3 = 0x165667B19E3779F9;
static const uint64_t PRIME64_4 = 0x85EBCA77C2B2AE63, PRIME64_5 = 0x27D4EB2F165667C5, PRIME_MX1 = 0x165667919E3779F9;

static const uint8_t SECRET[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static inline uint64_t read64(const void *at)
{
    uint64_t value;
    memcpy(&value, at, 8); /* little endian, as the digest is defined: native.py loads this on such machines only */
    return value;
}

/* One pass over bytes in the cache: the hash's lanes, and per lane whether any number's exponent was all ones.
   `(value & mask) + add` carries into a number's top bit exactly when its magnitude exceeds the largest finite one. */
static void take_stripe(
    uint64_t *lanes, uint64_t *seen, const char *data, const uint8_t *secret, uint64_t mask, uint64_t add)
{
    uint64_t value[LANES], mixed;
    memcpy(value, data, STRIPE);
    for (int i = 0; i < LANES; i++) {
        mixed = value[i] ^ read64(secret + i * 8);
        lanes[i] += value[i ^ 1] + (mixed & 0xFFFFFFFF) * (mixed >> 32);
        seen[i] |= (value[i] & mask) + add;
    }
}

typedef void take_blocks_fn(
    uint64_t *lanes, uint64_t *seen, const char *data, size_t num_blocks, uint64_t mask, uint64_t add);

static void take_blocks_anywhere(
    uint64_t *lanes, uint64_t *seen, const char *data, size_t num_blocks, uint64_t mask, uint64_t add)
{
    for (; num_blocks > 0; num_blocks--, data += BLOCK) {
        for (int i = 0; i < BLOCK / STRIPE; i++)
            take_stripe(lanes, seen, data + i * STRIPE, SECRET + i * 8, mask, add);
        for (int i = 0; i < LANES; i++) {
            lanes[i] ^= lanes[i] >> 47;
            lanes[i] = (lanes[i] ^ read64(SECRET + sizeof SECRET - STRIPE + i * 8)) * PRIME32_1;
        }
    }
}

#if defined(__x86_64__)
/* The same, four lanes to a register: 256 bits, since compilers do not find the 32 x 32 bit product by themselves. */
__attribute__((target("avx2"))) static void take_blocks_avx2(
    uint64_t *lanes, uint64_t *seen, const char *data, size_t num_blocks, uint64_t mask, uint64_t add)
{
    const __m256i masks = _mm256_set1_epi64x((int64_t)mask), adds = _mm256_set1_epi64x((int64_t)add);
    const __m256i prime = _mm256_set1_epi64x((int64_t)PRIME32_1);
    __m256i lane[2], bits[2];
    memcpy(lane, lanes, sizeof lane);
    memcpy(bits, seen, sizeof bits);
    for (; num_blocks > 0; num_blocks--, data += BLOCK) {
        for (int i = 0; i < BLOCK / STRIPE; i++)
            for (int half = 0; half < 2; half++) {
                __m256i value = _mm256_loadu_si256((const __m256i *)(data + i * STRIPE) + half);
                __m256i key = _mm256_loadu_si256((const __m256i *)(SECRET + i * 8) + half);
                __m256i mixed = _mm256_xor_si256(value, key);
                __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
                __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
                lane[half] = _mm256_add_epi64(lane[half], _mm256_add_epi64(product, swapped));
                bits[half] = _mm256_or_si256(bits[half], _mm256_add_epi64(_mm256_and_si256(value, masks), adds));
            }
        for (int half = 0; half < 2; half++) {
            __m256i key = _mm256_loadu_si256((const __m256i *)(SECRET + sizeof SECRET - STRIPE) + half);
            __m256i mixed = _mm256_xor_si256(_mm256_xor_si256(lane[half], _mm256_srli_epi64(lane[half], 47)), key);
            __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
            lane[half] = _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
        }
    }
    memcpy(lanes, lane, sizeof lane);
    memcpy(seen, bits, sizeof bits);
}
#endif

static take_blocks_fn *take_blocks_here(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2"))
        return take_blocks_avx2;
#endif
    return take_blocks_anywhere;
}

static uint64_t folded(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint64_t merged(const uint64_t *lanes, size_t nbytes)
{
    uint64_t hash = nbytes * PRIME64_1;
    for (int i = 0; i < LANES; i += 2)
        hash += folded(lanes[i] ^ read64(SECRET + 11 + i * 8), lanes[i + 1] ^ read64(SECRET + 19 + i * 8));
    hash = (hash ^ hash >> 37) * PRIME_MX1;
    return hash ^ hash >> 32;
}

/* What lies at `to` once `from` was copied there (or lies there already: `from` NULL). Every byte is hashed where it
   now lies, right after its copy, while it is in the cache. */
static uint64_t land(char *to, const char *from, size_t nbytes, uint64_t mask, uint64_t add, uint64_t *seen)
{
    uint64_t lanes[LANES] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    take_blocks_fn *take_blocks = take_blocks_here();
    size_t whole = (nbytes - 1) / BLOCK * BLOCK; /* the last block, even a whole one, is not scrambled */
    for (size_t at = 0; at < nbytes; at += PIECE) {
        size_t count = nbytes - at < PIECE ? nbytes - at : PIECE;
        if (from)
            memcpy(to + at, from + at, count);
        __asm__ __volatile__("" ::: "memory"); /* read it back: the digest is of the destination */
        take_blocks(lanes, seen, to + at, ((at + count < whole ? at + count : whole) - at) / BLOCK, mask, add);
    }
    for (size_t i = 0; i < (nbytes - 1 - whole) / STRIPE; i++)
        take_stripe(lanes, seen, to + whole + i * STRIPE, SECRET + i * 8, mask, add);
    take_stripe(lanes, seen, to + nbytes - STRIPE, SECRET + sizeof SECRET - STRIPE - 7, mask, add);
    return merged(lanes, nbytes);
}

/* n units of `nbytes` each (more than 240, a multiple of 8): copied unless `from` is NULL, hashed where they lie, and
   looked at: `finite[i]` is 0 when a number of unit i is Inf or NaN. */
void disagg_land(size_t n, char *const *to, const char *const *from, size_t nbytes, uint64_t mask, uint64_t add,
                 uint64_t *digests, uint8_t *finite)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t seen[LANES] = {0}, all = 0;
        digests[i] = land(to[i], from ? from[i] : NULL, nbytes, mask, add, seen);
        for (int lane = 0; lane < LANES; lane++)
            all |= seen[lane];
        finite[i] = (all & ~mask) == 0;
    }
}
