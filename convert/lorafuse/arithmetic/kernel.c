/* The compiled kernel: the passes over a tile of on_grid.py, dequantize.py and measure.py, once more.

   The torch code beside it defines the bytes, and says why. Nothing here may differ from it in a bit: floats
   are IEEE, never contracted, never reordered (setup.py has the options). The caller checks sizes and types.

   Each pass is written once, as an inline function whose `dtype` and `kind` are constants wherever it is
   called, and compiled for each level of the processor. */

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(__FAST_MATH__) || (defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0)
#error "the bytes need IEEE arithmetic in the types as written"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bytes of a number are taken to be the lowest first"
#endif
#if !defined(__GNUC__)
#error "written for gcc and clang"
#endif

#if defined(__GNUC__) && !defined(__clang__)
#define SHUFFLES /* the compiler has __builtin_shuffle */
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define ALIGNED _Alignas(64) /* vectors of it lie in one line of the cache */
#define UNLIKELY(condition) __builtin_expect(!!(condition), 0)

enum { INTERFACE = 6 }; /* of kernel.py: another number, another kernel */
enum { BFLOAT16, FLOAT16, FLOAT32 };
enum { FOUR_BIT, INT8 };
enum { BASELINE, AVX2, AVX512 };

#if defined(__x86_64__)
#define X86 1
#define FOR_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define FOR_AVX2 __attribute__((target("avx2,f16c")))
#define LEVELS(X) X(_avx512, AVX512, FOR_AVX512) X(_avx2, AVX2, FOR_AVX2) X(_baseline, BASELINE, )
#define AT_LEVEL(level, name, ...) \
    ((level) == AVX512 ? name##_avx512(__VA_ARGS__) \
     : (level) == AVX2 ? name##_avx2(__VA_ARGS__) : name##_baseline(__VA_ARGS__))
#else
#define X86 0
#define LEVELS(X) X(_baseline, BASELINE, )
#define AT_LEVEL(level, name, ...) ((void)(level), name##_baseline(__VA_ARGS__))
#endif

EXPORT int lorafuse_interface(void) { return INTERFACE; }

/* The best level of this processor. */
EXPORT int lorafuse_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return AVX512;
    unsigned eax, ebx, ecx, edx; /* gcc 10 does not know "f16c" by name */
    if (__builtin_cpu_supports("avx2") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx & bit_F16C)
        return AVX2;
#endif
    return BASELINE;
}

/* Numbers */

INLINE float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

/* `condition` (0 or 1) ? a : b, which the compiler might make a branch of. */
INLINE uint32_t pick(int condition, uint32_t a, uint32_t b) { return b ^ ((a ^ b) & -(uint32_t)condition); }

INLINE float of_half(uint32_t half) {
    uint32_t bits = (half & 0x7FFF) << 13, exponent = bits & 0x0F800000;
    float small = as_float(bits + 0x38800000) - as_float(0x38800000); /* subnormal: without the leading 1 */
    bits += 0x38000000 + pick(exponent == 0x0F800000, 0x38000000, 0);
    return as_float(pick(exponent != 0, bits, as_bits(small)) | (half & 0x8000) << 16);
}

/* To nearest even; NaN stays one. */
INLINE uint32_t to_half(float x) {
    uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
    uint32_t normal = (size + 0xC8000FFF + (size >> 13 & 1)) >> 13;
    uint32_t small = as_bits(as_float(size) + 0.5f) - 0x3F000000; /* the sum rounds to multiples of 2^-24 */
    uint32_t large = pick(size > 0x7F800000, 0x7E00, 0x7C00);
    return sign | pick(size >= 0x47800000, large, pick(size < 0x38800000, small, normal));
}

INLINE uint32_t to_bfloat(float x) {
    uint32_t bits = as_bits(x);
    return pick((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

INLINE float read_at(const void *values, int64_t i, int dtype) {
    if (dtype == FLOAT32)
        return ((const float *)values)[i];
    uint32_t bits = ((const uint16_t *)values)[i];
    return dtype == BFLOAT16 ? as_float(bits << 16) : of_half(bits);
}

INLINE void write_at(void *values, int64_t i, float x, int dtype) {
    if (dtype == FLOAT32)
        ((float *)values)[i] = x;
    else
        ((uint16_t *)values)[i] = (uint16_t)(dtype == BFLOAT16 ? to_bfloat(x) : to_half(x));
}

INLINE float rounded_to(float x, int dtype) {
    return dtype == FLOAT32 ? x : dtype == BFLOAT16 ? as_float(to_bfloat(x) << 16) : of_half(to_half(x));
}

/* measure.py */

enum { LANES = 16, SUMMED = 512 };
enum { BASE_SQ, DELTA_SQ, RESIDUAL_SQ, RESIDUAL_DELTA, N_SUMS };

/* A tile: the base, the sums, and what is stored, which is made of the sums where it is `rounded` here. */
struct measured {
    const void *base;
    void *stored;
    const float *total;
    int64_t numel;
    double base_sq, delta_sq, residual_sq, residual_delta;
    int64_t n_changed;
    int32_t base_dtype, stored_dtype, rounded, level;
};

/* The sums in lanes, so that they are the same at all levels: of at most SUMMED elements in fp32, then in
   float64. */
struct lanes {
    float some[N_SUMS][LANES];
    double all[N_SUMS][LANES];
    int32_t changed[LANES];
    int64_t all_changed;
};

INLINE void sum_lanes(
    struct lanes *sums, const struct measured *m, int64_t i, int n, int base_dtype, int stored_dtype) {
    for (int j = 0; j < n; j++) {
        float w = read_at(m->base, i + j, base_dtype), s = read_at(m->stored, i + j, stored_dtype);
        float residual = s - m->total[i + j], delta = m->total[i + j] - w;
        sums->some[BASE_SQ][j] += w * w;
        sums->some[DELTA_SQ][j] += delta * delta;
        sums->some[RESIDUAL_SQ][j] += residual * residual;
        sums->some[RESIDUAL_DELTA][j] += residual * delta;
        sums->changed[j] += s != w;
    }
}

INLINE void add_some(struct lanes *sums) {
    for (int number = 0; number < N_SUMS; number++)
        for (int j = 0; j < LANES; j++)
            sums->all[number][j] += sums->some[number][j], sums->some[number][j] = 0;
    for (int j = 0; j < LANES; j++)
        sums->all_changed += sums->changed[j], sums->changed[j] = 0;
}

#if X86

FOR_AVX512 static inline __m512 widened(__m256i numbers, int dtype) {
    __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16);
    return dtype == BFLOAT16 ? _mm512_castsi512_ps(high) : _mm512_cvtph_ps(numbers);
}

/* Of numbers that are not NaN: those of bfloat16 are the high halves. */
FOR_AVX512 static inline __m512i rounded_to_bfloat(__m512 x) {
    __m512i bits = _mm512_castps_si512(x), up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
    __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    return _mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
}

FOR_AVX512 static inline __m256i high_halves(__m512i bits) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

FOR_AVX512 static inline __m256i narrowed(__m512 x, int dtype) {
    return dtype == BFLOAT16 ? high_halves(rounded_to_bfloat(x))
                             : _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}

FOR_AVX512 static inline __m512 sixteen(const void *values, int64_t i, int dtype) {
    if (dtype == FLOAT32)
        return _mm512_loadu_ps((const float *)values + i);
    return widened(_mm256_loadu_si256((const __m256i *)((const uint16_t *)values + i)), dtype);
}

/* Writes numbers, and returns what was written. */
FOR_AVX512 static inline __m512 put_sixteen(void *values, int64_t i, __m512 x, int dtype) {
    if (dtype == FLOAT32) {
        _mm512_storeu_ps((float *)values + i, x);
        return x;
    }
    __m256i *at = (__m256i *)((uint16_t *)values + i);
    if (dtype == FLOAT16) {
        __m256i bits = narrowed(x, dtype);
        _mm256_storeu_si256(at, bits);
        return widened(bits, dtype);
    }
    __m512i bits = rounded_to_bfloat(x);
    _mm256_storeu_si256(at, high_halves(bits));
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int32_t)0xFFFF0000)));
}

/* Elements [i, stop), whole vectors of them. */
FOR_AVX512 static inline __attribute__((always_inline)) void sum_sixteens(
    struct lanes *sums, const struct measured *m, int64_t i, int64_t stop, int base_dtype, int stored_dtype,
    int rounded) {
    __m512 some[N_SUMS];
    __m512i changed = _mm512_setzero_si512();
    for (int number = 0; number < N_SUMS; number++)
        some[number] = _mm512_setzero_ps();
    for (; i < stop; i += LANES) {
        __m512 w = sixteen(m->base, i, base_dtype), x = _mm512_loadu_ps(m->total + i);
        __m512 s = rounded ? put_sixteen(m->stored, i, x, stored_dtype) : sixteen(m->stored, i, stored_dtype);
        __m512 residual = _mm512_sub_ps(s, x), delta = _mm512_sub_ps(x, w);
        some[BASE_SQ] = _mm512_add_ps(some[BASE_SQ], _mm512_mul_ps(w, w));
        some[DELTA_SQ] = _mm512_add_ps(some[DELTA_SQ], _mm512_mul_ps(delta, delta));
        some[RESIDUAL_SQ] = _mm512_add_ps(some[RESIDUAL_SQ], _mm512_mul_ps(residual, residual));
        some[RESIDUAL_DELTA] = _mm512_add_ps(some[RESIDUAL_DELTA], _mm512_mul_ps(residual, delta));
        __mmask16 differ = _mm512_cmp_ps_mask(s, w, _CMP_NEQ_UQ);
        changed = _mm512_mask_add_epi32(changed, differ, changed, _mm512_set1_epi32(1));
    }
    for (int number = 0; number < N_SUMS; number++)
        _mm512_storeu_ps(sums->some[number], some[number]);
    _mm512_storeu_si512(sums->changed, changed);
}

FOR_AVX2 static inline __m256 eight(const void *values, int64_t i, int dtype) {
    if (dtype == FLOAT32)
        return _mm256_loadu_ps((const float *)values + i);
    __m128i numbers = _mm_loadu_si128((const __m128i *)((const uint16_t *)values + i));
    return dtype == BFLOAT16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(numbers), 16))
                             : _mm256_cvtph_ps(numbers);
}

enum { HALVES = 2, EIGHT = LANES / HALVES };

/* rounded_to_bfloat, of half as many. */
FOR_AVX2 static inline __m256i eight_to_bfloat(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
}

/* narrowed, of two vectors. */
FOR_AVX2 static inline __m256i narrowed_eights(const __m256 *x, int dtype) {
    if (dtype == FLOAT16)
        return _mm256_set_m128i(
            _mm256_cvtps_ph(x[1], _MM_FROUND_TO_NEAREST_INT),
            _mm256_cvtps_ph(x[0], _MM_FROUND_TO_NEAREST_INT));
    __m256i low = _mm256_srli_epi32(eight_to_bfloat(x[0]), 16);
    __m256i packed = _mm256_packus_epi32(low, _mm256_srli_epi32(eight_to_bfloat(x[1]), 16));
    return _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0));
}

/* rounded_to. NaN stays one where its low 16 bits are 0, or the dtype is not BFLOAT16. */
FOR_AVX2 static inline __m256 rounded_eight(__m256 x, int dtype) {
    __m256i kept = _mm256_and_si256(eight_to_bfloat(x), _mm256_set1_epi32(~0xFFFF));
    return dtype == BFLOAT16 ? _mm256_castsi256_ps(kept)
         : dtype == FLOAT16 ? _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)) : x;
}

FOR_AVX2 static inline void put_eights(void *values, int64_t i, const __m256 *x, int dtype) {
    if (dtype == FLOAT32)
        for (int half = 0; half < HALVES; half++)
            _mm256_storeu_ps((float *)values + i + EIGHT * half, x[half]);
    else
        _mm256_storeu_si256((__m256i *)((uint16_t *)values + i), narrowed_eights(x, dtype));
}

/* sum_sixteens, in two vectors. */
FOR_AVX2 static inline __attribute__((always_inline)) void sum_eights(
    struct lanes *sums, const struct measured *m, int64_t i, int64_t stop, int base_dtype, int stored_dtype,
    int rounded) {
    __m256 some[N_SUMS][HALVES], x[HALVES];
    __m256i changed[HALVES];
    for (int half = 0; half < HALVES; half++) {
        changed[half] = _mm256_setzero_si256();
        for (int number = 0; number < N_SUMS; number++)
            some[number][half] = _mm256_setzero_ps();
    }
    for (; i < stop; i += LANES) {
        for (int half = 0; half < HALVES; half++)
            x[half] = _mm256_loadu_ps(m->total + i + EIGHT * half);
        if (rounded)
            put_eights(m->stored, i, x, stored_dtype);
        for (int half = 0; half < HALVES; half++) {
            __m256 w = eight(m->base, i + EIGHT * half, base_dtype);
            __m256 s = rounded ? rounded_eight(x[half], stored_dtype)
                               : eight(m->stored, i + EIGHT * half, stored_dtype);
            __m256 residual = _mm256_sub_ps(s, x[half]), delta = _mm256_sub_ps(x[half], w);
            __m256 made[N_SUMS] = {
                [BASE_SQ] = _mm256_mul_ps(w, w), [DELTA_SQ] = _mm256_mul_ps(delta, delta),
                [RESIDUAL_SQ] = _mm256_mul_ps(residual, residual),
                [RESIDUAL_DELTA] = _mm256_mul_ps(residual, delta),
            };
            for (int number = 0; number < N_SUMS; number++)
                some[number][half] = _mm256_add_ps(some[number][half], made[number]);
            __m256i differ = _mm256_castps_si256(_mm256_cmp_ps(s, w, _CMP_NEQ_UQ));
            changed[half] = _mm256_sub_epi32(changed[half], differ);
        }
    }
    for (int half = 0; half < HALVES; half++) {
        for (int number = 0; number < N_SUMS; number++)
            _mm256_storeu_ps(sums->some[number] + EIGHT * half, some[number][half]);
        _mm256_storeu_si256((__m256i *)(sums->changed + EIGHT * half), changed[half]);
    }
}

/* For each pair of dtypes. */
#define OF_PAIR(sum, base, stored) case 3 * (base) + (stored): \
        if (m->rounded) \
            sum(sums, m, i, stop, base, stored, 1); \
        else \
            sum(sums, m, i, stop, base, stored, 0); \
        break;
#define OF_PAIRS(sum, target) \
    target static void sum##_of(struct lanes *sums, const struct measured *m, int64_t i, int64_t stop) { \
        switch (3 * m->base_dtype + m->stored_dtype) { \
            OF_PAIR(sum, BFLOAT16, BFLOAT16) OF_PAIR(sum, BFLOAT16, FLOAT16) OF_PAIR(sum, BFLOAT16, FLOAT32) \
            OF_PAIR(sum, FLOAT16, BFLOAT16) OF_PAIR(sum, FLOAT16, FLOAT16) OF_PAIR(sum, FLOAT16, FLOAT32) \
            OF_PAIR(sum, FLOAT32, BFLOAT16) OF_PAIR(sum, FLOAT32, FLOAT16) OF_PAIR(sum, FLOAT32, FLOAT32) \
        } \
    }
OF_PAIRS(sum_sixteens, FOR_AVX512)
OF_PAIRS(sum_eights, FOR_AVX2)

#endif

/* Elements [i, stop) of a tile. */
INLINE void measure_part(
    struct lanes *sums, const struct measured *m, int64_t i, int64_t stop, int base_dtype, int stored_dtype,
    int level) {
    (void)level; /* where there is a single one */
    for (int64_t end; i < stop; i = end) {
        end = i + SUMMED < stop ? i + SUMMED : stop;
        int64_t whole = end - (end - i) % LANES;
#if X86
        if (level == AVX512)
            sum_sixteens_of(sums, m, i, whole);
        else if (level == AVX2)
            sum_eights_of(sums, m, i, whole);
        i = level == BASELINE ? i : whole;
#endif
        for (int64_t k = i; m->rounded && k < end; k++)
            write_at(m->stored, k, m->total[k], stored_dtype);
        for (; i < whole; i += LANES)
            sum_lanes(sums, m, i, LANES, base_dtype, stored_dtype);
        sum_lanes(sums, m, i, (int)(end - i), base_dtype, stored_dtype);
        add_some(sums);
    }
}

INLINE void add_up(struct measured *m, const struct lanes *sums) {
    double made[N_SUMS] = {0};
    for (int number = 0; number < N_SUMS; number++)
        for (int j = 0; j < LANES; j++)
            made[number] += sums->all[number][j];
    m->base_sq = made[BASE_SQ], m->delta_sq = made[DELTA_SQ];
    m->residual_sq = made[RESIDUAL_SQ], m->residual_delta = made[RESIDUAL_DELTA];
    m->n_changed = sums->all_changed;
}

INLINE void measure_as(struct measured *m, int base_dtype, int stored_dtype, int level) {
    ALIGNED struct lanes sums;
    memset(&sums, 0, sizeof sums);
    measure_part(&sums, m, 0, m->numel, base_dtype, stored_dtype, level);
    add_up(m, &sums);
}

INLINE void measure_base(struct measured *m, int base_dtype, int level) {
    switch (m->stored_dtype) {
    case BFLOAT16: measure_as(m, base_dtype, BFLOAT16, level); break;
    case FLOAT16: measure_as(m, base_dtype, FLOAT16, level); break;
    default: measure_as(m, base_dtype, FLOAT32, level);
    }
}

#define MEASURE(suffix, level, target) \
    target static void measure##suffix(struct measured *m) { \
        switch (m->base_dtype) { \
        case BFLOAT16: measure_base(m, BFLOAT16, level); break; \
        case FLOAT16: measure_base(m, FLOAT16, level); break; \
        default: measure_base(m, FLOAT32, level); \
        } \
    }
LEVELS(MEASURE)

/* measure_tile and store_tile, but for what is not finite; 0 where it is not done: torch rounds faster. */
EXPORT int32_t lorafuse_measure(struct measured *m) {
    if (m->rounded && m->level == BASELINE)
        return 0;
    AT_LEVEL(m->level, measure, m);
    return 1;
}

/* draws.py */

#define GAMMA 0x9E3779B97F4A7C15u

INLINE uint64_t mixed(uint64_t z) {
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* on_grid.py */

enum { CHUNK = 1024, BLOCK = 8 * CHUNK, SEGMENT = 64, SETTLED = 256, WAITING = SETTLED + CHUNK };
enum { HALF, SEEDED }; /* u = 1/2 for all; or that of the weight's elements */

/* A tile: `scales` of each run; 16 `levels`, ascending, `codes_of` each place and `places_of` each code, of 4
   bits. The bound of 256 p is |update| * (numerator / (|scale| * least)), infinite where the scale is below
   `smallest`. `bytes`: of the draws, or null where the elements are those of a weight from `first` on; else
   the tile is the transpose of n_rows rows from there on. `before`: the codes that are stored, where they are
   not in `codes` yet, or null. `measured`, or null: what is measured on the way, of a BLOCK at a time, which
   the nearest caches still hold. */
struct on_grid {
    const void *base;
    const float *sums;
    void *stored;
    const uint8_t *before;
    uint8_t *codes;
    struct measured *measured;
    const float *scales, *levels;
    const uint8_t *codes_of;
    const int64_t *places_of;
    const uint8_t *bytes;
    uint64_t seed_of_bytes, seed_of_fractions;
    int64_t numel, run, skip, first, n_rows, n_cols;
    float numerator, least, smallest;
    int32_t dtype, kind, draws, level;
};

/* Of 4 bits, where the scale is not below 0: the levels, what is where, and of each code the level and the
   code above it (at 16 + code) and below it, at the ends infinity and its own. `other`: the next that is not
   equal, where there is one (a bit of `has_other`): its code, its place, and which 16 bits its rounded value
   is of those of all places, as `neighbours_of` has them. */
struct tables {
    float levels[16], next_levels[32];
    int32_t places[16], other_places[32];
    uint16_t other_codes[32], other_halves[32];
    uint8_t codes_of[16], places_of[16], next_codes[32];
    uint32_t has_other;
};

/* The run of a number, which ends before an element, and what holds in it. */
struct run {
    const struct tables *tables; /* turned around where the scale is below 0 */
    float scale;
    int64_t number, end;
};

/* Elements, until they are SETTLED or more, of which the byte does not say that they stay, with their sums
   and bases; the level, the code and the value of the neighbour, and the scale; and what becomes of them.
   `share`: 256 p, or not a number <= 256 where the sum is not between the base and the neighbour. */
struct looked_at {
    double share[WAITING];
    int64_t i[WAITING];
    float x[WAITING], w[WAITING], level[WAITING], scale[WAITING], neighbour[WAITING];
    int32_t byte[WAITING], state[WAITING];
    uint8_t code[WAITING];
    int32_t n;
};

enum { STAYS, MOVES, UNDECIDED };

INLINE float scaled(float level, float scale, int dtype, int kind) {
    return kind == INT8 ? level * scale * 7.874015718698502e-3f : rounded_to(level * scale, dtype);
}

INLINE float value_of(const struct run *run, int place, int dtype, int kind) {
    return scaled(kind == INT8 ? (float)(place - 128) : run->tables->levels[place], run->scale, dtype, kind);
}

INLINE uint8_t code_of(const struct run *run, int place, int kind) {
    return kind == INT8 ? (uint8_t)(place - 128) : run->tables->codes_of[place];
}

INLINE int four_bits(const struct on_grid *t, int64_t i) { return t->codes[i >> 1] >> ((~i & 1) << 2) & 15; }

INLINE int place_of(const struct run *run, const struct on_grid *t, int64_t i, int kind) {
    return kind == INT8 ? (int8_t)t->codes[i] + 128 : run->tables->places_of[four_bits(t, i)];
}

INLINE void put_code(const struct on_grid *t, int64_t i, uint8_t code, int kind) {
    int shift = (~i & 1) << 2;
    t->codes[kind == INT8 ? i : i >> 1] =
        kind == INT8 ? code : (uint8_t)((t->codes[i >> 1] & 0xF0 >> shift) | code << shift);
}

INLINE void begin_run(
    struct run *run, const struct on_grid *t, const struct tables *tables, int64_t number) {
    run->number = number, run->end = (number + 1) * t->run - t->skip;
    run->scale = t->scales[number];
    run->tables = tables + (run->scale < 0);
}

/* Where the run of element i, or the chunk, ends; the run is a new one where one begins. */
INLINE int64_t end_of_part(
    struct run *run, const struct on_grid *t, const struct tables *tables, int64_t i, int64_t stop) {
    if (i == run->end)
        begin_run(run, t, tables, run->number + 1);
    return run->end < stop ? run->end : stop;
}

INLINE double fraction_of(const struct on_grid *t, int64_t i) {
    if (t->draws == HALF)
        return 0;
    int64_t element = t->first + (t->bytes ? i % t->n_rows * t->n_cols + i / t->n_rows : i);
    return (double)(mixed(t->seed_of_fractions + ((uint64_t)element + 1) * GAMMA) >> 11) * 0x1p-53;
}

/* round_tile's _settle_far */
INLINE void settle_far(
    const struct run *run, const struct on_grid *t, int64_t i, int byte, int dtype, int kind) {
    int last = kind == INT8 ? 255 : 15, before = place_of(run, t, i, kind), at = before;
    double x = t->sums[i], original = value_of(run, before, dtype, kind);
    double value = original, following = original;
    int finite = x - x == 0, step = finite ? (x > value) - (x < value) : 0;
    while (step) {
        int to = at + step;
        if (to < 0 || to > last) {
            following = __builtin_inf();
            break;
        }
        double beyond = value_of(run, to, dtype, kind);
        if (!((x - beyond) * step >= 0)) {
            following = beyond;
            break;
        }
        at = to, value = beyond;
    }
    double share = (x - value) / (following - value) * 256.0;
    share = share != share ? 0 : share < 0 ? -share : share;
    double whole = share < 0x1p52 ? (double)(int64_t)share : share;
    if (byte < whole || (byte == whole && fraction_of(t, i) < share - whole))
        at += step, value = following;
    put_code(t, i, code_of(run, value == original ? before : at, kind), kind);
    write_at(t->stored, i, finite ? (float)value : (float)x, dtype);
}

/* Bit j is that of flags[j], which are 0 or 255. */
INLINE uint64_t mask_of(const uint8_t *flags) {
    uint64_t mask = 0;
#if defined(__SSE2__)
    for (int j = 0; j < SEGMENT; j += 16) {
        __m128i some = _mm_loadu_si128((const __m128i *)(flags + j));
        mask |= (uint64_t)(uint32_t)_mm_movemask_epi8(some) << j;
    }
#else
    for (int j = 0; j < SEGMENT; j += 8) {
        uint64_t some;
        memcpy(&some, flags + j, 8);
        mask |= (some & 0x0101010101010101u) * 0x0102040810204080u >> 56 << j;
    }
#endif
    return mask;
}

/* Element i is one of those that are settled later. */
INLINE void note(
    struct looked_at *found, const struct tables *tables, float scale, const struct on_grid *t, int64_t i,
    uint8_t byte, int dtype, int kind) {
    int at = found->n++, up = t->sums[i] > read_at(t->base, i, dtype);
    __asm__("" : "+r"(up)); /* else the compiler makes a branch of it */
    if (kind == FOUR_BIT) {
        int next = (up << 4) + four_bits(t, i);
        found->level[at] = tables->next_levels[next];
        found->code[at] = tables->next_codes[next];
    } else {
        int q = (int8_t)t->codes[i] + (up << 1) - 1;
        q = q < -128 ? -128 : q > 127 ? 127 : q;
        found->level[at] = (float)q;
        found->code[at] = (uint8_t)q;
    }
    found->x[at] = t->sums[i];
    found->w[at] = read_at(t->base, i, dtype);
    found->scale[at] = scale;
    found->i[at] = i;
    found->byte[at] = byte;
}

/* Of a run: its lowest and highest value, and by what an update is multiplied to bound 256 p. */
struct limits {
    float lowest, highest, factor;
};

INLINE struct limits limits_of(const struct run *run, const struct on_grid *t, int dtype, int kind) {
    float size = __builtin_fabsf(run->scale), distance = size * t->least;
    float factor = 1 / (distance <= 0 || size < t->smallest ? 0 : distance) * t->numerator;
    float low = value_of(run, 0, dtype, kind), high = value_of(run, kind == INT8 ? 255 : 15, dtype, kind);
    float neither = low + high; /* NaN where either is */
    return (struct limits){low <= high ? low : high <= low ? high : neither,
                           low <= high ? high : high <= low ? low : neither, factor};
}

/* Looks at elements [i, i + n), n <= SEGMENT, of one run. Returns how many are beyond the grid. */
INLINE int64_t look_at(
    struct looked_at *found, const struct run *run, const struct on_grid *t, int64_t i, int n,
    struct limits limits, const uint8_t *bytes, int dtype, int kind) {
    const float *sums = t->sums + i;
    uint8_t may_move[SEGMENT] = {0};
    int32_t beyond = 0;
    for (int j = 0; j < n; j++) {
        float x = sums[j], size = __builtin_fabsf(x - read_at(t->base, i + j, dtype));
        may_move[j] = size * limits.factor <= (float)bytes[j] ? 0 : 255; /* NaN is among them */
        beyond += (x > limits.highest) | (x < limits.lowest);
    }
    for (uint64_t mask = mask_of(may_move); mask; mask &= mask - 1) {
        int j = __builtin_ctzll(mask);
        note(found, run->tables, run->scale, t, i + j, bytes[j], dtype, kind);
    }
    return beyond;
}

INLINE void copy_base(const struct on_grid *t, int64_t i, int64_t stop, int dtype) {
    int64_t itemsize = dtype == FLOAT32 ? 4 : 2;
    const char *from = (const char *)t->base + i * itemsize;
    memcpy((char *)t->stored + i * itemsize, from, (size_t)((stop - i) * itemsize));
}

/* Looks at elements [i, stop) of one run, each of which has a byte. */
INLINE int64_t look_at_part(
    struct looked_at *found, const struct run *run, const struct on_grid *t, int64_t i, int64_t stop,
    const uint8_t *bytes, int dtype, int kind) {
    struct limits limits = limits_of(run, t, dtype, kind);
    int64_t n_beyond = 0;
    copy_base(t, i, stop, dtype);
    for (; i + SEGMENT <= stop; i += SEGMENT, bytes += SEGMENT)
        n_beyond += look_at(found, run, t, i, SEGMENT, limits, bytes, dtype, kind);
    if (i < stop)
        n_beyond += look_at(found, run, t, i, (int)(stop - i), limits, bytes, dtype, kind);
    return n_beyond;
}

#if X86

FOR_AVX512 static inline __mmask32 both(const __mmask16 *masks) {
    return _mm512_kunpackw(masks[1], masks[0]);
}

/* 32 codes, of 16 bytes. */
FOR_AVX512 static inline __m512i codes_of_32(const uint8_t *codes) {
    __m512i of_two = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    __m512i both = _mm512_or_si512(_mm512_srli_epi32(of_two, 4), _mm512_slli_epi32(of_two, 16));
    return _mm512_and_si512(both, _mm512_set1_epi32(0x000F000F));
}

/* Of a run: the values (16 bits) and codes of the neighbours of each code; 256 over the distance of both,
   which is off by 2^-14 of itself at most, negated for the neighbour below, and 0 where there is none; the
   lowest and the highest value. */
struct neighbours {
    __m512i values, codes;
    __m512 below, above, lowest, highest;
};

FOR_AVX512 static inline struct neighbours neighbours_of(const struct run *run, int dtype) {
    const struct tables *of_run = run->tables;
    __m512 values = _mm512_mul_ps(_mm512_loadu_ps(of_run->levels), _mm512_set1_ps(run->scale));
    __m512i halves = dtype == BFLOAT16 ? rounded_to_bfloat(values)
                                       : _mm512_castsi256_si512(narrowed(values, dtype));
    values = dtype == BFLOAT16
        ? _mm512_castsi512_ps(_mm512_and_si512(halves, _mm512_set1_epi32((int32_t)0xFFFF0000)))
        : widened(_mm512_castsi512_si256(halves), dtype);
    __m512 own = _mm512_permutexvar_ps(_mm512_loadu_si512(of_run->places), values);
    __m512 below = _mm512_permutexvar_ps(_mm512_loadu_si512(of_run->other_places), values);
    __m512 above = _mm512_permutexvar_ps(_mm512_loadu_si512(of_run->other_places + 16), values);
    /* Where both have the same value, infinity times a distance is infinite, or no number. */
    below = _mm512_maskz_rcp14_ps((__mmask16)of_run->has_other, _mm512_sub_ps(own, below));
    above = _mm512_maskz_rcp14_ps((__mmask16)(of_run->has_other >> 16), _mm512_sub_ps(above, own));
    return (struct neighbours){
        .values = _mm512_permutexvar_epi16(_mm512_loadu_si512(of_run->other_halves), halves),
        .codes = _mm512_loadu_si512(of_run->other_codes),
        .below = _mm512_mul_ps(below, _mm512_set1_ps(-256)),
        .above = _mm512_mul_ps(above, _mm512_set1_ps(256)),
        .lowest = _mm512_broadcastss_ps(_mm512_castps512_ps128(values)),
        .highest = _mm512_permutexvar_ps(_mm512_set1_epi32(15), values)};
}

/* Of 16 elements, given 256 p, which is off by 2^-13 of itself at most: which move, and which stay. What is
   neither of these is too near to say, or no number. */
FOR_AVX512 static inline void decide(__m512 share, __m128i bytes, __mmask16 *moves, __mmask16 *stays) {
    const __m512 less = _mm512_set1_ps(256 * (1 - 0x1p-12f)), margin = _mm512_set1_ps(-0x1p-5f);
    __m512 distance = _mm512_sub_ps(share, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
    __mmask16 between = _mm512_cmp_ps_mask(share, less, _CMP_LT_OQ);
    *stays = _mm512_cmp_ps_mask(distance, margin, _CMP_LT_OQ);
    *moves = _mm512_mask_cmp_ps_mask(between, distance, _mm512_set1_ps(1 + 0x1p-5f), _CMP_GT_OQ);
}

/* Where 32 elements lie, of 4 bits and a dtype of 16. */
struct places {
    const uint16_t *base;
    const float *sums;
    uint16_t *stored;
    uint8_t *codes;
    const uint8_t *bytes;
};

/* Looks at 32 elements of one run. Counts those beyond the grid. Returns the mask of those that are not
   settled at once. */
FOR_AVX512 static inline uint32_t look_at_32(
    struct places at_32, const struct neighbours *n, int64_t *n_beyond, int dtype) {
    const uint16_t *base = at_32.base;
    __m512 update[2];
    __mmask16 up[2], inside[2], moves[2], stays[2];
    __m512i code = codes_of_32(at_32.codes);
    for (int k = 0; k < 2; k++) {
        __m512 x = _mm512_loadu_ps(at_32.sums + 16 * k), w = sixteen(base, 16 * k, dtype);
        up[k] = _mm512_cmp_ps_mask(x, w, _CMP_GT_OQ);
        update[k] = _mm512_sub_ps(x, w);
        inside[k] = _mm512_cmp_ps_mask(x, n->highest, _CMP_NGT_UQ);
        inside[k] = _mm512_mask_cmp_ps_mask(inside[k], x, n->lowest, _CMP_NLT_UQ);
    }
    *n_beyond += 32 - __builtin_popcount(both(inside));
    __m512i at = _mm512_mask_add_epi16(code, both(up), code, _mm512_set1_epi16(16));
    for (int k = 0; k < 2; k++) {
        __m256i half = k ? _mm512_extracti64x4_epi64(at, 1) : _mm512_castsi512_si256(at);
        __m512 factor = _mm512_permutex2var_ps(n->below, _mm512_cvtepu16_epi32(half), n->above);
        __m128i byte = _mm_loadu_si128((const __m128i *)(at_32.bytes + 16 * k));
        decide(_mm512_mul_ps(update[k], factor), byte, moves + k, stays + k);
    }
    __m512i stored = _mm512_loadu_si512(base);
    _mm512_storeu_si512(at_32.stored, _mm512_mask_permutexvar_epi16(stored, both(moves), at, n->values));
    code = _mm512_mask_permutexvar_epi16(code, both(moves), at, n->codes);
    code = _mm512_madd_epi16(code, _mm512_set1_epi32(0x00010010)); /* 16 times the first and the second */
    _mm_storeu_si128((__m128i *)at_32.codes, _mm512_cvtepi32_epi8(code));
    return ~(both(moves) | both(stays));
}

/* look_at_chunk, of 4 bits and a dtype of 16: nearly all elements are settled at once. */
FOR_AVX512 static int64_t look_at_chunk_avx512(
    struct looked_at *found, struct run *run, const struct on_grid *t, const struct tables *tables,
    int64_t start, int64_t stop, const uint8_t *bytes, int dtype) {
    int64_t n_beyond = 0;
    struct {
        int64_t i;
        float scale;
        uint32_t left; /* the mask of those that are settled later */
    } groups[CHUNK / 32];
    int32_t n_groups = 0, n_chosen = 0, chosen[CHUNK / 32];
    for (int64_t i = start, end; i < stop; i = end) {
        end = end_of_part(run, t, tables, i, stop);
        float size = __builtin_fabsf(run->scale), span = run->tables->levels[15] - run->tables->levels[0];
        /* `decide` wants normal numbers. */
        if (size >= 1e-30f && run->scale * span <= 1e30f && i % 2 == 0 && i + 32 <= end) {
            struct neighbours n = neighbours_of(run, dtype);
            struct places at = {(const uint16_t *)t->base + i, t->sums + i, (uint16_t *)t->stored + i,
                                t->codes + i / 2, bytes + (i - start)};
            for (; i + 32 <= end; i += 32) {
                groups[n_groups].i = i, groups[n_groups].scale = run->scale;
                groups[n_groups++].left = look_at_32(at, &n, &n_beyond, dtype);
                at = (struct places){at.base + 32, at.sums + 32, at.stored + 32, at.codes + 16, at.bytes + 32};
            }
        }
        if (i < end)
            n_beyond += look_at_part(found, run, t, i, end, bytes + (i - start), dtype, FOUR_BIT);
    }
    for (int g = 0; g < n_groups; g++) {
        int32_t any = groups[g].left != 0;
        __asm__("" : "+r"(any)); /* else the compiler makes a branch of it, which is mispredicted */
        chosen[n_chosen] = g;
        n_chosen += any;
    }
    for (int k = 0; k < n_chosen; k++) {
        int64_t i = groups[chosen[k]].i;
        float scale = groups[chosen[k]].scale;
        for (uint32_t mask = groups[chosen[k]].left; mask; mask &= mask - 1) {
            int j = __builtin_ctz(mask);
            note(found, tables + (scale < 0), scale, t, i + j, bytes[i - start + j], dtype, FOUR_BIT);
        }
    }
    return n_beyond;
}

#endif

INLINE int64_t look_at_chunk(
    struct looked_at *found, struct run *run, const struct on_grid *t, const struct tables *tables,
    int64_t start, int64_t stop, const uint8_t *bytes, int dtype, int kind) {
    int64_t n_beyond = 0;
    for (int64_t i = start, end; i < stop; i = end) {
        end = end_of_part(run, t, tables, i, stop);
        n_beyond += look_at_part(found, run, t, i, end, bytes + (i - start), dtype, kind);
    }
    return n_beyond;
}

/* round_tile's _settle_near, and the rest by settle_far. Nothing branches by chance: mispredicted branches
   would cost as much as all else. */
INLINE void settle(
    struct looked_at *found, const struct on_grid *t, const struct tables *tables, int dtype, int kind) {
    int32_t moving[WAITING], undecided[WAITING], n_moving = 0, n_undecided = 0, n = found->n;
    for (int k = 0; k < (n + 15) / 16 * 16; k++) {
        found->neighbour[k] = scaled(found->level[k], found->scale[k], dtype, kind);
        double x = found->x[k], w = found->w[k], neighbour = found->neighbour[k];
        double share = found->share[k] = __builtin_fabs((x - w) / (neighbour - w) * 256.0);
        int between = share <= 256, whole = (int)(between ? share : 0.0), byte = found->byte[k];
        found->state[k] = !between || byte == whole ? UNDECIDED : byte < whole ? MOVES : STAYS;
    }
    for (int k = 0; k < n; k++) {
        moving[n_moving] = undecided[n_undecided] = k;
        n_moving += found->state[k] == MOVES;
        n_undecided += found->state[k] == UNDECIDED;
    }
    for (int at = 0; at < n_undecided; at++) {
        int k = undecided[at];
        int64_t i = found->i[k];
        if (found->share[k] <= 256) {
            moving[n_moving] = k;
            n_moving += fraction_of(t, i) < found->share[k] - found->byte[k];
        } else {
            struct run run;
            begin_run(&run, t, tables, (t->skip + i) / t->run);
            settle_far(&run, t, i, found->byte[k], dtype, kind);
        }
    }
    for (int at = 0; at < n_moving; at++) {
        int k = moving[at];
        put_code(t, found->i[k], found->code[k], kind);
        write_at(t->stored, found->i[k], found->neighbour[k], dtype);
    }
    found->n = 0;
}

INLINE void fill_tables(struct tables *tables, const struct on_grid *t, int turned) {
    tables->has_other = 0;
    for (int i = 0; i < 16; i++) {
        int from = turned ? 15 - i : i;
        tables->levels[i] = t->levels[from];
        tables->codes_of[i] = t->codes_of[from];
        tables->places_of[i] = (uint8_t)(turned ? 15 - t->places_of[i] : t->places_of[i]);
        tables->places[i] = tables->places_of[i];
    }
    for (int i = 0; i < 32; i++) {
        int at = tables->places_of[i & 15], step = i < 16 ? -1 : 1, next = at + step, other = next;
        while (other >= 0 && other <= 15 && tables->levels[other] == tables->levels[at])
            other += step;
        tables->next_levels[i] = next < 0 || next > 15 ? __builtin_inff() : tables->levels[next];
        tables->next_codes[i] = tables->codes_of[next < 0 || next > 15 ? at : next];
        int has_other = other >= 0 && other <= 15;
        tables->has_other |= (uint32_t)has_other << i;
        tables->other_places[i] = has_other ? other : at;
        tables->other_codes[i] = tables->codes_of[tables->other_places[i]];
        /* Those of bfloat16 are the high halves. */
        tables->other_halves[i] =
            (uint16_t)(t->dtype == BFLOAT16 ? 2 * tables->other_places[i] + 1 : tables->other_places[i]);
    }
}

/* The stored codes of elements [start, stop), `start` being even. */
INLINE void copy_codes(const struct on_grid *t, int64_t start, int64_t stop, int kind) {
    if (t->before) {
        int64_t first = kind == INT8 ? start : start / 2, last = kind == INT8 ? stop : (stop + 1) / 2;
        memcpy(t->codes + first, t->before + first, (size_t)(last - first));
    }
}

/* The bytes of the draws of elements [start, start + CHUNK) of the tile. */
INLINE const uint8_t *drawn(const struct on_grid *t, int64_t start, uint64_t *words) {
    if (t->bytes)
        return t->bytes + start;
    if (t->draws == HALF)
        return memset(words, 128, CHUNK);
    uint64_t first = (uint64_t)(t->first + start) / 8;
    for (int k = 0; k < CHUNK / 8 + 1; k++)
        words[k] = mixed(t->seed_of_bytes + (first + (uint64_t)k + 1) * GAMMA);
    return (const uint8_t *)words + (t->first + start) % 8;
}

INLINE int64_t round_kind(const struct on_grid *t, int dtype, int kind, int level) {
    ALIGNED uint64_t words[CHUNK / 8 + 1];
    ALIGNED struct tables tables[2];
    ALIGNED struct looked_at found;
    ALIGNED struct lanes sums;
    found.n = 0;
    memset(&sums, 0, sizeof sums);
    struct run run = {.number = -1};
    int64_t n_beyond = 0;
    (void)level; /* where there is a single one */
    for (int turned = 0; turned < (kind == FOUR_BIT ? 2 : 0); turned++)
        fill_tables(tables + turned, t, turned);
    for (int64_t start = 0, block = 0; start < t->numel; start += CHUNK) {
        int64_t stop = start + CHUNK < t->numel ? start + CHUNK : t->numel;
        int ends = stop == block + BLOCK || stop == t->numel;
        const uint8_t *bytes = drawn(t, start, words);
        copy_codes(t, start, stop, kind);
#if X86
        if (level == AVX512 && kind == FOUR_BIT && dtype != FLOAT32)
            n_beyond += look_at_chunk_avx512(&found, &run, t, tables, start, stop, bytes, dtype);
        else
#endif
            n_beyond += look_at_chunk(&found, &run, t, tables, start, stop, bytes, dtype, kind);
        if (found.n >= SETTLED || ends)
            settle(&found, t, tables, dtype, kind);
        if (ends && t->measured)
            measure_part(&sums, t->measured, block, stop, dtype, dtype, level);
        block = ends ? stop : block;
    }
    if (t->measured)
        add_up(t->measured, &sums);
    return n_beyond;
}

INLINE int64_t round_as(const struct on_grid *t, int dtype, int level) {
    return t->kind == INT8 ? round_kind(t, dtype, INT8, level) : round_kind(t, dtype, FOUR_BIT, level);
}

#define ROUND(suffix, level, target) \
    target static int64_t round##suffix(const struct on_grid *t) { \
        switch (t->dtype) { \
        case BFLOAT16: return round_as(t, BFLOAT16, level); \
        case FLOAT16: return round_as(t, FLOAT16, level); \
        default: return round_as(t, FLOAT32, level); \
        } \
    }
LEVELS(ROUND)

/* round_tile: writes codes and what they stand for. Returns how many elements are beyond the grid. */
EXPORT int64_t lorafuse_round(const struct on_grid *t) { return AT_LEVEL(t->level, round, t); }

/* dequantize.py */

/* Elements [skip, skip + numel) of packed codes: map[code] * scale of its block, rounded to the dtype. */
struct packed {
    const uint8_t *codes;
    const float *map, *scales;
    uint16_t *values;
    int64_t numel, blocksize, skip;
    int32_t dtype, level;
};

/* Scales of blocks [skip, skip + n), of codes that count from the first block of a nested block. */
EXPORT void lorafuse_scales(
    const uint8_t *codes, const float *map, const float *nested, float *scales, int64_t n, int64_t blocksize,
    int64_t skip, float offset) {
    for (int64_t i = 0, end; i < n; i = end) {
        float outer = nested[(skip + i) / blocksize];
        end = ((skip + i) / blocksize + 1) * blocksize - skip;
        end = end < n ? end : n;
        for (int64_t k = i; k < end; k++)
            scales[k] = map[codes[skip + k]] * outer + offset;
    }
}

#if defined(SHUFFLES)

/* Two values for each of n bytes, the high nibble's first: 16 bytes at a time by shuffles, of which `table` is
   looked up in two halves. */
INLINE void look_up(uint16_t *values, const uint8_t *codes, int64_t n, const uint32_t *table) {
    typedef uint8_t bytes __attribute__((vector_size(16)));
    const bytes first = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, last = first + 8;
    const bytes first_two = {0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23}, last_two = first_two + 8;
    const bytes lowest = {0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29};
    const bytes eight = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    int64_t k = 0;
    bytes quarter[4];
    memcpy(quarter, table, 64);
    /* Of 8 values each the low bytes, then the high ones. */
    bytes left = __builtin_shuffle(quarter[0], quarter[1], lowest);
    bytes right = __builtin_shuffle(quarter[2], quarter[3], lowest);
    bytes low = __builtin_shuffle(left, right, eight), high = __builtin_shuffle(left, right, eight + 8);
    for (; k + 16 <= n; k += 16) {
        bytes both, halves[2], made[4];
        memcpy(&both, codes + k, 16);
        bytes even = both >> 4, odd = both & 15;
        bytes even_low = __builtin_shuffle(low, even), even_high = __builtin_shuffle(high, even);
        bytes odd_low = __builtin_shuffle(low, odd), odd_high = __builtin_shuffle(high, odd);
        for (int half = 0; half < 2; half++) {
            halves[0] = __builtin_shuffle(even_low, even_high, half ? last : first);
            halves[1] = __builtin_shuffle(odd_low, odd_high, half ? last : first);
            made[2 * half] = __builtin_shuffle(halves[0], halves[1], first_two);
            made[2 * half + 1] = __builtin_shuffle(halves[0], halves[1], last_two);
        }
        memcpy(values + 2 * k, made, 64);
    }
    for (; k < n; k++) {
        values[2 * k] = (uint16_t)table[codes[k] >> 4];
        values[2 * k + 1] = (uint16_t)table[codes[k] & 15];
    }
}

#if X86

/* Values of whole bytes of codes of one block, 32 at a time. Returns how many. */
FOR_AVX512 static int64_t look_up_avx512(
    uint16_t *values, const uint8_t *codes, int64_t n, const uint32_t *table) {
    __m256i of_codes = _mm512_cvtepi32_epi16(_mm512_loadu_si512(table));
    __m512i values_of = _mm512_inserti64x4(_mm512_castsi256_si512(of_codes), of_codes, 1);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        _mm512_storeu_si512(values + i, _mm512_permutexvar_epi16(codes_of_32(codes + i / 2), values_of));
    return i;
}

/* In both halves the 16 bytes that are the low ones of `numbers`. */
FOR_AVX2 static inline __m256i low_bytes_twice(__m256i numbers) {
    __m256i low = _mm256_and_si256(numbers, _mm256_set1_epi16(0xFF));
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(low, low), _MM_SHUFFLE(2, 0, 2, 0));
}

/* Values of whole bytes of codes of one block, 64 at a time, by look_up's shuffles. Returns how many. */
FOR_AVX2 static inline int64_t look_up_avx2(
    uint16_t *values, const uint8_t *codes, int64_t n, const float *map, float scale, int dtype) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256 made[HALVES] = {_mm256_loadu_ps(map), _mm256_loadu_ps(map + EIGHT)};
    for (int half = 0; half < HALVES; half++)
        made[half] = _mm256_mul_ps(made[half], _mm256_set1_ps(scale));
    __m256i of_codes = narrowed_eights(made, dtype);
    __m256i low = low_bytes_twice(of_codes), high = low_bytes_twice(_mm256_srli_epi16(of_codes, 8));
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        __m256i both = _mm256_loadu_si256((const __m256i *)(codes + i / 2));
        __m256i even = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
        __m256i odd = _mm256_and_si256(both, nibble);
        __m256i even_low = _mm256_shuffle_epi8(low, even), even_high = _mm256_shuffle_epi8(high, even);
        __m256i odd_low = _mm256_shuffle_epi8(low, odd), odd_high = _mm256_shuffle_epi8(high, odd);
        __m256i *at = (__m256i *)(values + i), evens, odds, first, last;
        evens = _mm256_unpacklo_epi8(even_low, even_high), odds = _mm256_unpacklo_epi8(odd_low, odd_high);
        first = _mm256_unpacklo_epi16(evens, odds), last = _mm256_unpackhi_epi16(evens, odds);
        _mm256_storeu_si256(at, _mm256_permute2x128_si256(first, last, 0x20));
        _mm256_storeu_si256(at + 2, _mm256_permute2x128_si256(first, last, 0x31));
        evens = _mm256_unpackhi_epi8(even_low, even_high), odds = _mm256_unpackhi_epi8(odd_low, odd_high);
        first = _mm256_unpacklo_epi16(evens, odds), last = _mm256_unpackhi_epi16(evens, odds);
        _mm256_storeu_si256(at + 1, _mm256_permute2x128_si256(first, last, 0x20));
        _mm256_storeu_si256(at + 3, _mm256_permute2x128_si256(first, last, 0x31));
    }
    return i;
}

#endif

/* Returns 0 where a scale or a value of the map is not finite: what bits NaN has is torch's to say. */
INLINE int decode_as(const struct packed *p, int dtype, int level) {
    (void)level; /* where there is a single one */
    for (int code = 0; code < 16; code++)
        if (p->map[code] - p->map[code] != 0)
            return 0;
    for (int64_t i = 0, end, block = 0; i < p->numel; i = end, block++) {
        uint32_t table[16];
        float scale = p->scales[block];
        if (scale - scale != 0)
            return 0;
        end = (block + 1) * p->blocksize - p->skip;
        end = end < p->numel ? end : p->numel;
        const uint8_t *codes = p->codes + ((p->skip + i) >> 1);
#if X86
        if (level == AVX2 && !((p->skip + i) & 1)) {
            int64_t n = look_up_avx2(p->values + i, codes, end - i, p->map, scale, dtype);
            i += n, codes += n / 2;
            if (i == end)
                continue;
        }
#endif
        for (int code = 0; code < 16; code++) {
            float value = p->map[code] * scale;
            table[code] = dtype == BFLOAT16 ? to_bfloat(value) : to_half(value);
        }
        if ((p->skip + i) & 1)
            p->values[i++] = (uint16_t)table[*codes++ & 15];
#if X86
        if (level == AVX512) {
            int64_t n = look_up_avx512(p->values + i, codes, end - i, table);
            i += n, codes += n / 2;
        }
#endif
        look_up(p->values + i, codes, (end - i) >> 1, table);
        if ((end - i) & 1)
            p->values[end - 1] = (uint16_t)table[codes[(end - i) >> 1] >> 4];
    }
    return 1;
}

#define DECODE(suffix, level, target) \
    target static int decode##suffix(const struct packed *p) { \
        return p->dtype == BFLOAT16 ? decode_as(p, BFLOAT16, level) : decode_as(p, FLOAT16, level); \
    }
LEVELS(DECODE)

#endif

/* decode_four_bit; 0 where it is not done: without shuffles torch is faster. */
EXPORT int32_t lorafuse_decode(const struct packed *p) {
#if defined(SHUFFLES)
    if (!X86 || p->level > BASELINE)
        return AT_LEVEL(p->level, decode, p);
#endif
    (void)p;
    return 0;
}

/* bit_stream.py */

/* Rows of `n_codes` codes of so many bits, one after another, in `row_nbytes` bytes: of each, code - less. */
struct stream {
    const uint8_t *packed;
    float *values;
    int64_t n_rows, row_nbytes, n_codes;
    int32_t bits, less, level;
};

INLINE void unpack_eight(float *values, uint64_t word, int n, int bits, int less) {
    typedef int32_t eight __attribute__((vector_size(32)));
    typedef float floats __attribute__((vector_size(32)));
    int32_t low = (int32_t)word, high = (int32_t)(word >> 4 * bits);
    eight codes = {low, low, low, low, high, high, high, high};
    const eight shifts = {0, bits, 2 * bits, 3 * bits, 0, bits, 2 * bits, 3 * bits};
    codes = (codes >> shifts & ((1 << bits) - 1)) - less;
    floats made = __builtin_convertvector(codes, floats);
    memcpy(values, &made, 4 * (size_t)n);
}

/* Eight codes are as many bytes as a code has bits. */
INLINE void unpack_row(
    float *values, const uint8_t *packed, int64_t nbytes, int64_t n_codes, int bits, int less) {
    int64_t i = 0, at = 0;
    for (uint64_t word; i + 8 <= n_codes && at + 8 <= nbytes; i += 8, at += bits) {
        memcpy(&word, packed + at, 8);
        unpack_eight(values + i, word, 8, bits, less);
    }
    for (; i < n_codes; i += 8, at += bits) {
        uint64_t word = 0;
        for (int64_t k = at; k < at + 8 && k < nbytes; k++)
            word |= (uint64_t)packed[k] << 8 * (k - at);
        unpack_eight(values + i, word, n_codes - i < 8 ? (int)(n_codes - i) : 8, bits, less);
    }
}

INLINE void unpack_as(const struct stream *s) {
    for (int64_t row = 0; row < s->n_rows; row++) {
        const uint8_t *packed = s->packed + row * s->row_nbytes;
        unpack_row(s->values + row * s->n_codes, packed, s->row_nbytes, s->n_codes, s->bits, s->less);
    }
}

#define UNPACK(suffix, level, target) \
    target static void unpack##suffix(const struct stream *s) { unpack_as(s); }
LEVELS(UNPACK)

/* unpack_floats. */
EXPORT void lorafuse_unpack(const struct stream *s) { AT_LEVEL(s->level, unpack, s); }

/* units.py, vectors.py */

enum { PART = 512 }; /* what lies in L1, of each of a few arrays */

/* n whole numbers, (unit >> shift) & mask; element k has the zero point and the scale (skip + k) / period, or
   with period 0, (skip + k) % n_numbers. */
struct units {
    const void *units, *zeros, *scales;
    void *values;
    int64_t n, n_numbers, period, skip;
    int32_t unit_nbytes, shift, mask, numbers_dtype, dtype, level;
};

/* Some elements, with the zero point and the scale of each. */
struct part {
    float x[PART], zero[PART], scale[PART];
};

/* What becomes of them: (x - zero) * scale, the difference rounded or not, or x * scale, rounded, + zero. */
enum { ROUNDED_DIFFERENCE, DIFFERENCE, BIASED };

#if X86

/* read_at, of so many halves. */
FOR_AVX512 static void widen_halves_avx512(float *made, const uint16_t *halves, int n) {
    int k = 0;
    for (; k + 16 <= n; k += 16)
        _mm512_storeu_ps(made + k, sixteen(halves, k, FLOAT16));
    for (; k < n; k++)
        made[k] = of_half(halves[k]);
}

FOR_AVX2 static void widen_halves_avx2(float *made, const uint16_t *halves, int n) {
    int k = 0;
    for (; k + 8 <= n; k += 8)
        _mm256_storeu_ps(made + k, eight(halves, k, FLOAT16));
    for (; k < n; k++)
        made[k] = of_half(halves[k]);
}

/* rounded_to. NaN stays one where its low 16 bits are 0, or the dtype is not BFLOAT16. */
FOR_AVX512 static inline __m512 rounded(__m512 x, int dtype) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    bits = _mm512_and_si512(bits, _mm512_set1_epi32(~0xFFFF));
    return dtype == BFLOAT16 ? _mm512_castsi512_ps(bits)
         : dtype == FLOAT16 ? widened(narrowed(x, FLOAT16), FLOAT16) : x;
}

/* finish_as, of as many elements as are whole vectors, which it returns. What is NaN before the product is NaN
   after it: in bfloat16 its bits are those of a number of 16 bits. */
FOR_AVX512 static inline __attribute__((always_inline)) int finish_vectors(
    const struct part *part, void *values, int64_t i, int n, int how, int via, int dtype, int *n_nan) {
    __mmask16 not_numbers = 0;
    int k = 0;
    for (; k + 16 <= n; k += 16) {
        __m512 x = _mm512_load_ps(part->x + k), zero = _mm512_load_ps(part->zero + k);
        x = how == BIASED ? x : _mm512_sub_ps(x, zero);
        x = _mm512_mul_ps(how == ROUNDED_DIFFERENCE ? rounded(x, via) : x, _mm512_load_ps(part->scale + k));
        not_numbers |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        if (how == BIASED) {
            x = _mm512_add_ps(rounded(x, via), zero);
            not_numbers |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        }
        x = via == dtype ? x : rounded(x, via);
        if (dtype == FLOAT32)
            _mm512_storeu_ps((float *)values + i + k, x);
        else
            _mm256_storeu_si256((__m256i *)((uint16_t *)values + i + k), narrowed(x, dtype));
    }
    *n_nan = not_numbers != 0;
    return k;
}

/* The same in two vectors. */
FOR_AVX2 static inline __attribute__((always_inline)) int finish_eights(
    const struct part *part, void *values, int64_t i, int n, int how, int via, int dtype, int *n_nan) {
    __m256 not_numbers = _mm256_setzero_ps(), made[HALVES];
    int k = 0;
    for (; k + LANES <= n; k += LANES) {
        for (int half = 0, at = k; half < HALVES; half++, at += EIGHT) {
            __m256 x = _mm256_load_ps(part->x + at), zero = _mm256_load_ps(part->zero + at);
            x = how == BIASED ? x : _mm256_sub_ps(x, zero);
            x = how == ROUNDED_DIFFERENCE ? rounded_eight(x, via) : x;
            x = _mm256_mul_ps(x, _mm256_load_ps(part->scale + at));
            not_numbers = _mm256_or_ps(not_numbers, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
            if (how == BIASED) {
                x = _mm256_add_ps(rounded_eight(x, via), zero);
                not_numbers = _mm256_or_ps(not_numbers, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
            }
            made[half] = via == dtype ? x : rounded_eight(x, via);
        }
        put_eights(values, i + k, made, dtype);
    }
    *n_nan = _mm256_movemask_ps(not_numbers) != 0;
    return k;
}

#define FINISH_VECTORS(finish, how, via, dtype) finish(part, values, i, n, how, via, dtype, n_nan)
#define FINISH_VECTORS_VIA(finish, how, via) \
    (dtype == BFLOAT16 ? FINISH_VECTORS(finish, how, via, BFLOAT16) \
     : dtype == FLOAT16 ? FINISH_VECTORS(finish, how, via, FLOAT16) \
     : FINISH_VECTORS(finish, how, via, FLOAT32))
#define FINISH_VECTORS_HOW(finish, how) \
    (via == BFLOAT16 ? FINISH_VECTORS_VIA(finish, how, BFLOAT16) \
     : via == FLOAT16 ? FINISH_VECTORS_VIA(finish, how, FLOAT16) : FINISH_VECTORS_VIA(finish, how, FLOAT32))
#define FINISH_PART(finish, target) \
    target static int finish##_of( \
        const struct part *part, void *values, int64_t i, int n, int how, int via, int dtype, int *n_nan) { \
        return how == ROUNDED_DIFFERENCE ? FINISH_VECTORS_HOW(finish, ROUNDED_DIFFERENCE) \
             : how == DIFFERENCE ? FINISH_VECTORS_HOW(finish, DIFFERENCE) \
             : FINISH_VECTORS_HOW(finish, BIASED); \
    }
FINISH_PART(finish_vectors, FOR_AVX512)
FINISH_PART(finish_eights, FOR_AVX2)

#endif

/* values[i…] = what becomes of each, rounded to `via`, then to `dtype`. Returns whether any is NaN. */
INLINE int finish_as(
    const struct part *part, void *values, int64_t i, int n, int how, int via, int dtype, int level) {
    int n_nan = 0, k = 0;
    (void)level;
#if X86
    if (level == AVX512)
        k = finish_vectors_of(part, values, i, n, how, via, dtype, &n_nan);
    else if (level == AVX2)
        k = finish_eights_of(part, values, i, n, how, via, dtype, &n_nan);
#endif
    for (; k < n; k++) {
        float x = part->x[k], zero = how == BIASED ? 0 : part->zero[k], first = x - zero;
        float product = (how == ROUNDED_DIFFERENCE ? rounded_to(first, via) : first) * part->scale[k];
        float value = how == BIASED ? rounded_to(product, via) + part->zero[k] : product;
        value = rounded_to(value, via == dtype ? FLOAT32 : via);
        n_nan += value != value;
        write_at(values, i + k, value, dtype);
    }
    return n_nan != 0;
}

INLINE int finish_via(
    const struct part *part, void *values, int64_t i, int n, int how, int via, int dtype, int level) {
    switch (dtype) {
    case BFLOAT16: return finish_as(part, values, i, n, how, via, BFLOAT16, level);
    case FLOAT16: return finish_as(part, values, i, n, how, via, FLOAT16, level);
    default: return finish_as(part, values, i, n, how, via, FLOAT32, level);
    }
}

INLINE void fill(float *made, int n, float x) {
    for (int k = 0; k < n; k++)
        made[k] = x;
}

INLINE void widen(float *made, const void *numbers, int64_t from, int n, int dtype, int level) {
    (void)level;
#if X86
    if (level != BASELINE && dtype == FLOAT16) {
        const uint16_t *halves = (const uint16_t *)numbers + from;
        if (level == AVX512)
            widen_halves_avx512(made, halves, n);
        else
            widen_halves_avx2(made, halves, n);
        return;
    }
#endif
    for (int k = 0; k < n; k++)
        made[k] = read_at(numbers, from + k, dtype);
}

/* The zero points and scales of elements [i, i + n). */
INLINE void spread(struct part *part, const struct units *u, int64_t i, int n, int dtype, int level) {
    for (int k = 0, many; k < n; k += many) {
        int64_t at = u->skip + i + k, period = u->period ? u->period : u->n_numbers;
        int64_t in_period = at % period, left = period - in_period;
        many = left < n - k ? (int)left : n - k;
        if (u->period) {
            fill(part->zero + k, many, read_at(u->zeros, at / period, dtype));
            fill(part->scale + k, many, read_at(u->scales, at / period, dtype));
        } else {
            widen(part->zero + k, u->zeros, in_period, many, dtype, level);
            widen(part->scale + k, u->scales, in_period, many, dtype, level);
        }
    }
}

INLINE void take_codes(float *made, const struct units *u, int64_t i, int n) {
    if (u->unit_nbytes == 1)
        for (int k = 0; k < n; k++)
            made[k] = (float)(((const uint8_t *)u->units)[i + k] >> u->shift & u->mask);
    else
        for (int k = 0; k < n; k++)
            made[k] = (float)(((const int32_t *)u->units)[i + k] >> u->shift & u->mask);
}

INLINE int units_as(const struct units *u, int via, int level) {
    ALIGNED struct part part;
    for (int64_t i = 0; i < u->n; i += PART) {
        int n = u->n - i < PART ? (int)(u->n - i) : PART;
        take_codes(part.x, u, i, n);
        spread(&part, u, i, n, via, level);
        if (finish_via(&part, u->values, i, n, ROUNDED_DIFFERENCE, via, u->dtype, level))
            return 0;
    }
    return 1;
}

/* `n_rows` sums of vectors of each row: codes, `n_books` beside each other, of that many vectors of `size`
   elements, out of books of `length`, and a scale for each row. */
struct vectors {
    const void *codes, *books, *scales;
    void *values;
    int64_t n_rows, n_vectors, n_books, length, size;
    int32_t code_nbytes, books_dtype, dtype, level;
};

INLINE int64_t code_at(const void *codes, int64_t i, int nbytes) {
    return nbytes == 1 ? ((const int8_t *)codes)[i]
         : nbytes == 2 ? ((const int16_t *)codes)[i] : ((const int32_t *)codes)[i];
}

/* Vectors from number `at` on, of one of the books. */
struct chosen {
    const char *book;
    int64_t first, step, n_codes; /* where the codes are: the first, how far apart, how many in all */
    int count;
};

/* Their bytes. Of a book that does not stay in L1, those are fetched that come AHEAD vectors later. */
INLINE void gather(
    char *made, const struct vectors *v, struct chosen c, int64_t nbytes, int code_nbytes, int is_large) {
    enum { AHEAD = 48 };
    for (int k = 0; k < c.count; k++) {
        int64_t code = code_at(v->codes, c.first + k * c.step, code_nbytes) & (v->length - 1);
        if (is_large) {
            int64_t later = c.first + (k + AHEAD) * c.step;
            later = code_at(v->codes, later < c.n_codes ? later : c.first, code_nbytes) & (v->length - 1);
            __builtin_prefetch(c.book + later * nbytes);
        }
        memcpy(made + k * nbytes, c.book + code * nbytes, (size_t)nbytes);
    }
}

INLINE void gather_of(
    char *made, const struct vectors *v, struct chosen c, int64_t nbytes, int is_large) {
    switch (v->code_nbytes) {
    case 1: gather(made, v, c, nbytes, 1, is_large); break;
    case 2: gather(made, v, c, nbytes, 2, is_large); break;
    default: gather(made, v, c, nbytes, 4, is_large);
    }
}

/* Sums of `count` vectors, of which the first is number `at`. */
INLINE void sum_up(
    struct part *part, const struct vectors *v, int64_t at, int count, int dtype, int level) {
    ALIGNED char found[4 * PART];
    ALIGNED float term[PART];
    int64_t nbytes = v->size * (dtype == FLOAT32 ? 4 : 2);
    int n = count * (int)v->size;
    for (int64_t number = 0; number < v->n_books; number++) {
        struct chosen c = {
            .book = (const char *)v->books + number * v->length * nbytes,
            .first = at * v->n_books + number, .step = v->n_books,
            .n_codes = v->n_rows * v->n_vectors * v->n_books, .count = count};
        if (nbytes != 16)
            gather_of(found, v, c, nbytes, 0);
        else if (v->length * nbytes > 1 << 15) /* of 8 elements of 16 bits: a copy of one register */
            gather_of(found, v, c, 16, 1);
        else
            gather_of(found, v, c, 16, 0);
        widen(number ? term : part->x, found, 0, n, dtype, level);
        for (int k = 0; k < (number ? n : 0); k++)
            part->x[k] += term[k];
    }
}

INLINE int vectors_as(const struct vectors *v, int dtype, int level) {
    ALIGNED struct part part;
    int64_t step = PART / v->size;
    fill(part.zero, PART, 0);
    for (int64_t row = 0; row < v->n_rows; row++) {
        fill(part.scale, PART, read_at(v->scales, row, dtype));
        for (int64_t i = 0; i < v->n_vectors; i += step) {
            int64_t at = row * v->n_vectors + i;
            int count = (int)(v->n_vectors - i < step ? v->n_vectors - i : step);
            sum_up(&part, v, at, count, dtype, level);
            int n = count * (int)v->size;
            if (finish_via(&part, v->values, at * v->size, n, ROUNDED_DIFFERENCE, dtype, v->dtype, level))
                return 0;
        }
    }
    return 1;
}

#define BY_DTYPE(suffix, level, target) \
    target static int units##suffix(const struct units *u) { \
        switch (u->numbers_dtype) { \
        case BFLOAT16: return units_as(u, BFLOAT16, level); \
        case FLOAT16: return units_as(u, FLOAT16, level); \
        default: return units_as(u, FLOAT32, level); \
        } \
    } \
    target static int vectors##suffix(const struct vectors *v) { \
        switch (v->books_dtype) { \
        case BFLOAT16: return vectors_as(v, BFLOAT16, level); \
        case FLOAT16: return vectors_as(v, FLOAT16, level); \
        default: return vectors_as(v, FLOAT32, level); \
        } \
    }
LEVELS(BY_DTYPE)

/* decode_units; 0 where a value is NaN, whose bits are torch's to say. */
EXPORT int32_t lorafuse_units(const struct units *u) { return AT_LEVEL(u->level, units, u); }

/* decode_vectors, of vectors that lie in one row; 0 as above, or where a vector is too long. */
EXPORT int32_t lorafuse_vectors(const struct vectors *v) {
    return v->size <= PART && AT_LEVEL(v->level, vectors, v);
}

/* small_floats.py */

INLINE float of_e4m3(uint32_t byte) {
    uint32_t bits = (byte & 0x7F) << 20, exponent = bits & 0x07800000;
    float small = as_float(bits + 0x3C800000) - as_float(0x3C800000); /* subnormal: without the leading 1 */
    bits = pick(exponent != 0, bits + 0x3C000000, as_bits(small)) | (byte & 0x80) << 24;
    return as_float(pick((byte & 0x7F) == 0x7F, 0x7FC00000, bits));
}

#define E4M3(suffix, level, target) \
    target static void e4m3##suffix(const uint8_t *codes, float *values, int64_t n) { \
        for (int64_t i = 0; i < n; i++) \
            values[i] = of_e4m3(codes[i]); \
    }
LEVELS(E4M3)

/* e4m3. */
EXPORT void lorafuse_e4m3(const uint8_t *codes, float *values, int64_t n, int32_t level) {
    AT_LEVEL(level, e4m3, codes, values, n);
}

/* coded_rows.py */

enum { AS_TABLE, AS_WHOLE, AS_SIGNED, AS_E4M3 };
enum { PADDED_PART = 480, TURNED_ROWS = 32, TURNED_PART = 120, TURNED_STEP = TURNED_PART + 8 };

/* Rows of `n_cols` codes of `bits` bits, each of which stands for levels[code]; the `kind` says where these
   are code + levels[0], or of 8 bits signed numbers, or E4M3. `padded`: no code crosses two words of 32 bits,
   which are not `turned`. A row has a scale and a zero point (or no row has one) for `width` columns, or for
   those of a group in `group_of`; those of the next row come `numbers_step` later. Values of the next row
   come `step` later; `turned`: those of the next column, of which the first `skip` are left out. */
struct rows {
    const uint8_t *packed;
    const float *levels, *scales, *zeros;
    const int32_t *group_of;
    void *values;
    int64_t n_rows, row_nbytes, n_cols, width, numbers_step, step, skip;
    int32_t bits, kind, padded, turned, how, via, dtype, level;
};

/* The numbers of each byte of two codes, that of the low half first. */
struct pairs {
    float of[256][2];
};

INLINE void pair_up(struct pairs *pairs, const struct rows *r) {
    for (int byte = 0; byte < (r->bits == 4 ? 256 : 0); byte++)
        pairs->of[byte][0] = r->levels[byte & 15], pairs->of[byte][1] = r->levels[byte >> 4];
}

#if X86

/* take_halves, of as many elements as are whole vectors, which it returns. */
FOR_AVX512 static int take_halves_avx512(float *x, const uint8_t *packed, int n, const float *levels) {
    __m512 table = _mm512_loadu_ps(levels);
    int k = 0;
    for (; k + 32 <= n; k += 32) {
        __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(packed + k / 2)));
        bytes = _mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)); /* of 4 bits, the lowest count */
        __m512i first = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(bytes));
        __m512i last = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(bytes, 1));
        _mm512_storeu_ps(x + k, _mm512_permutexvar_ps(first, table));
        _mm512_storeu_ps(x + k + 16, _mm512_permutexvar_ps(last, table));
    }
    return k;
}

#endif

INLINE void take_halves(
    float *x, const uint8_t *packed, int n, const float *levels, const struct pairs *pairs, int level) {
    int k = 0;
    (void)level, (void)levels;
#if X86
    if (level == AVX512)
        k = take_halves_avx512(x, packed, n, levels);
#endif
    for (; k + 2 <= n; k += 2)
        memcpy(x + k, pairs->of[packed[k / 2]], 8);
    if (k < n)
        x[k] = pairs->of[packed[k / 2]][0];
}

INLINE void take_bytes(float *x, const uint8_t *packed, int n, const struct rows *r) {
    const float *levels = r->levels, first = levels[0];
    if (r->kind == AS_WHOLE)
        for (int k = 0; k < n; k++)
            x[k] = (float)packed[k] + first;
    else if (r->kind == AS_SIGNED)
        for (int k = 0; k < n; k++)
            x[k] = (float)(int8_t)packed[k];
    else if (r->kind == AS_E4M3)
        for (int k = 0; k < n; k++)
            x[k] = of_e4m3(packed[k]);
    else
        for (int k = 0; k < n; k++)
            x[k] = levels[packed[k]];
}

INLINE void take_words(float *x, const uint8_t *packed, int n, int bits, const float *levels) {
    uint32_t word, mask = (1u << bits) - 1;
    for (int k = 0, per_word = 32 / bits; k < n; k += per_word, packed += 4) {
        memcpy(&word, packed, 4);
        for (int j = 0; j < per_word && k + j < n; j++)
            x[k + j] = levels[word >> j * bits & mask];
    }
}

/* What codes [c, c + n) of a row stand for; c is a multiple of that many which fill whole bytes, or words. */
INLINE void take(
    float *x, const struct rows *r, const struct pairs *pairs, int64_t row, int64_t c, int n, int level) {
    const uint8_t *packed = r->packed + row * r->row_nbytes;
    int64_t at = c * r->bits / 8;
    if (r->padded)
        take_words(x, packed + 4 * (c / (32 / r->bits)), n, r->bits, r->levels);
    else if (r->bits == 8)
        take_bytes(x, packed + at, n, r);
    else if (r->bits == 4)
        take_halves(x, packed + at, n, r->levels, pairs, level);
    else {
        int less = r->kind == AS_WHOLE ? -(int)r->levels[0] : 0;
        unpack_row(x, packed + at, (r->n_cols * r->bits + 7) / 8 - at, n, r->bits, less);
        for (int k = 0; k < (r->kind == AS_WHOLE ? 0 : n); k++)
            x[k] = r->levels[(int)x[k]];
    }
}

/* Without zeros, `part` has them. */
INLINE void choose(
    struct part *part, const float *scales, const float *zeros, const int32_t *group_of, int n) {
    for (int k = 0; k < n; k++) {
        int32_t group = group_of[k];
        __asm__("" : "+r"(group)); /* else the compiler makes gathers of it, which take four times as long */
        part->scale[k] = scales[group];
        if (zeros)
            part->zero[k] = zeros[group];
    }
}

/* The scales and zero points of columns [c, c + n) of a row. */
INLINE void number(struct part *part, const struct rows *r, int64_t row, int64_t c, int n) {
    const float *scales = r->scales + row * r->numbers_step;
    const float *zeros = r->zeros ? r->zeros + row * r->numbers_step : 0;
    if (r->group_of) {
        if (zeros) /* asked once, not for each column */
            choose(part, scales, zeros, r->group_of + c, n);
        else
            choose(part, scales, 0, r->group_of + c, n);
        return;
    }
    int64_t block = c / r->width, left = (block + 1) * r->width - c;
    for (int k = 0, many; k < n; k += many, block++, left = r->width) {
        many = left < n - k ? (int)left : n - k;
        fill(part->scale + k, many, scales[block]);
        if (zeros)
            fill(part->zero + k, many, zeros[block]);
    }
}

#define FINISH_ROWS(how, via, level) finish_via(part, values, i, n, how, via, r->dtype, level)
#define FINISH_ROWS_HOW(how, level) \
    (r->via == BFLOAT16 ? FINISH_ROWS(how, BFLOAT16, level) \
     : r->via == FLOAT16 ? FINISH_ROWS(how, FLOAT16, level) : FINISH_ROWS(how, FLOAT32, level))
#define FINISH(suffix, level, target) \
    target static int finish##suffix( \
        const struct part *part, const struct rows *r, void *values, int64_t i, int n) { \
        return r->how == BIASED ? FINISH_ROWS_HOW(BIASED, level) : FINISH_ROWS_HOW(DIFFERENCE, level); \
    }
LEVELS(FINISH)

/* Columns [c, c + n) of a row, of which the first is written as element i; 0 where a value is NaN. */
#define SOME_OF_ROW(suffix, level, target) \
    target static int some_of_row##suffix( \
        struct part *part, const struct rows *r, const struct pairs *pairs, int64_t row, int64_t c, int n, \
        void *values, int64_t i) { \
        take(part->x, r, pairs, row, c, n, level); \
        number(part, r, row, c, n); \
        return !finish##suffix(part, r, values, i, n); \
    }
LEVELS(SOME_OF_ROW)

/* values[c][row…] = block[…][c], of so many rows and columns; of 16 bits, four of a column make one number,
   which vectors do, and are stored at once. */
INLINE void turn(
    void *values, int64_t step, int64_t row, const void *block, int n_rows, int from, int n_cols,
    int nbytes) {
    uint64_t fours[TURNED_PART];
    int j = 0;
    for (; nbytes == 2 && j + 4 <= n_rows; j += 4) {
        const uint16_t *taken = (const uint16_t *)block + j * TURNED_STEP;
        for (int c = 0; c < TURNED_PART; c++) {
            uint32_t low = taken[c] | (uint32_t)taken[c + TURNED_STEP] << 16;
            uint32_t high = taken[c + 2 * TURNED_STEP] | (uint32_t)taken[c + 3 * TURNED_STEP] << 16;
            fours[c] = low | (uint64_t)high << 32;
        }
        for (int c = from; c < n_cols; c++)
            memcpy((uint16_t *)values + (c - from) * step + row + j, fours + c, 8);
    }
    for (int c = from; c < n_cols; c++)
        for (int k = j; k < n_rows; k++)
            memcpy((char *)values + ((c - from) * step + row + k) * nbytes,
                   (const char *)block + (c + k * TURNED_STEP) * nbytes, (size_t)nbytes);
}

/* TURNED_ROWS rows at a time, or as many as there are, from that one on. */
INLINE int turned_as(
    struct part *part, const struct rows *r, const struct pairs *pairs, int64_t row, int level) {
    ALIGNED char block[TURNED_ROWS * TURNED_STEP * 4];
    int n_rows = (int)(r->n_rows - row < TURNED_ROWS ? r->n_rows - row : TURNED_ROWS);
    int nbytes = r->dtype == FLOAT32 ? 4 : 2;
    for (int64_t c = r->skip / TURNED_PART * TURNED_PART; c < r->n_cols; c += TURNED_PART) {
        int n = (int)(r->n_cols - c < TURNED_PART ? r->n_cols - c : TURNED_PART);
        int from = (int)(r->skip > c ? r->skip - c : 0);
        for (int j = 0; j < n_rows; j++) {
            /* Rows may lie too far apart for the processor to foresee. Behind the last it does no harm. */
            const uint8_t *later = r->packed + (row + j + TURNED_ROWS / 2) * r->row_nbytes;
            __builtin_prefetch(later + c * r->bits / 8);
            __builtin_prefetch(later + ((c + n) * r->bits - 1) / 8);
            if (!AT_LEVEL(level, some_of_row, part, r, pairs, row + j, c, n, block, j * TURNED_STEP))
                return 0;
        }
        char *values = (char *)r->values + (c + from - r->skip) * r->step * nbytes;
        if (nbytes == 2)
            turn(values, r->step, row, block, n_rows, from, n, 2);
        else
            turn(values, r->step, row, block, n_rows, from, n, 4);
    }
    return 1;
}

INLINE int rows_as(const struct rows *r, int level) {
    ALIGNED struct part part;
    ALIGNED struct pairs pairs;
    int64_t step = r->padded ? PADDED_PART : PART;
    fill(part.zero, PART, 0);
    pair_up(&pairs, r);
    for (int64_t row = 0; row < r->n_rows; row += r->turned ? TURNED_ROWS : 1) {
        if (r->turned && !turned_as(&part, r, &pairs, row, level))
            return 0;
        for (int64_t c = 0; c < (r->turned ? 0 : r->n_cols); c += step) {
            int n = (int)(r->n_cols - c < step ? r->n_cols - c : step);
            if (!AT_LEVEL(level, some_of_row, &part, r, &pairs, row, c, n, r->values, row * r->step + c))
                return 0;
        }
    }
    return 1;
}

#define ROWS(suffix, level, target) \
    target static int rows##suffix(const struct rows *r) { return rows_as(r, level); }
LEVELS(ROWS)

/* decode_rows and decode_turned; 0 where a value is NaN, whose bits are torch's to say. */
EXPORT int32_t lorafuse_rows(const struct rows *r) { return AT_LEVEL(r->level, rows, r); }
