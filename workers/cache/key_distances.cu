// Distances of keys: a part of row_distances.cu, behind which it stands.
#define KEY_BLOCKS 5  // of a multiprocessor: fewer have more registers

struct Turn { int axis; float frequency; };

// Of a pair of channels; found when this is compiled.
template <int PAIR> __device__ constexpr Turn turn_of() {
    constexpr int axis[64] = {AXIS};
    constexpr float frequency[64] = {FREQUENCY};
    return {axis[PAIR], frequency[PAIR]};
}

// As `sin_cos_by_unit` of triton_rows.py.
__device__ __forceinline__ void sin_cos(float angle, float& sin, float& cos) {
    float turns = __fsub_rn(__fmaf_rn(angle, 0.15915494309189535f, 12582912.0f), 12582912.0f);
    float r = __fmaf_rn(turns, -1.9353071795864769e-3f, __fmaf_rn(turns, -6.28125f, angle));
    asm("sin.approx.f32 %0, %1;" : "=f"(sin) : "f"(r));
    asm("cos.approx.f32 %0, %1;" : "=f"(cos) : "f"(r));
}

struct Products { float inner, a, b; };

__device__ __forceinline__ Products add_both(Products x, Products y) {
    return {__fadd_rn(x.inner, y.inner), __fadd_rn(x.a, y.a), __fadd_rn(x.b, y.b)};
}

#if KEYS_BY == 0
// Of one pair of channels; a and b are even and odd channel.
template <int PAIR>
__device__ __forceinline__ Products compare_pair(const float* a, const float* b, const float (&apart)[3]) {
    float sin, cos;
    constexpr Turn turn = turn_of<PAIR>();
    sin_cos(__fmul_rn(apart[turn.axis], turn.frequency), sin, cos);
    float along = __fmaf_rn(a[0], b[0], __fmul_rn(a[1], b[1]));
    float across = __fmaf_rn(a[1], b[0], -__fmul_rn(a[0], b[1]));
    return {__fmaf_rn(along, cos, __fmul_rn(across, sin)), square_both(a[0], a[1]), square_both(b[0], b[1])};
}

// Of NUM words from FIRST on, neighbours first; steps are those of these words.
template <int FIRST, int NUM>
__device__ __forceinline__ Products compare_words(
    const Row& own, const Row& theirs, const Step (&a)[2], const Step (&b)[2], const float (&apart)[3]) {
    if constexpr (NUM == 1) {
        float x[8], y[8];
        decode_word(x, own.word[FIRST], a[0], a[1]);
        decode_word(y, theirs.word[FIRST], b[0], b[1]);
        Products first = add_both(
            compare_pair<2 * FIRST>(x, y, apart), compare_pair<32 + 2 * FIRST>(x + 4, y + 4, apart));
        Products second = add_both(
            compare_pair<2 * FIRST + 1>(x + 2, y + 2, apart), compare_pair<32 + 2 * FIRST + 1>(x + 6, y + 6, apart));
        return add_both(first, second);
    } else {
        return add_both(compare_words<FIRST, NUM / 2>(own, theirs, a, b, apart),
                        compare_words<FIRST + NUM / 2, NUM / 2>(own, theirs, a, b, apart));
    }
}

// Of listed keys from the one that `other` names, before RoPE, written at their slots; blocks of a head share its list.
extern "C" __global__ void __launch_bounds__(KEY_THREADS, KEY_BLOCKS) key_distances(
    const uint4* __restrict__ code, const uint2* __restrict__ largest, const float* __restrict__ position,
    const int* __restrict__ other, const int* __restrict__ listed, const int* __restrict__ count,
    float* __restrict__ to, long long code_slots, long long stride_other, long long stride_listed, long long stride_to,
    int heads) {
    const long long head = blockIdx.x % heads;
    const int num = count[head], step = gridDim.x / heads * KEY_THREADS;
    for (int at = blockIdx.x / heads * KEY_THREADS + threadIdx.x; at < num; at += step) {
        const int slot = listed[head * stride_listed + at];
        const long long row_a = head * code_slots + slot;
        const Row own = load_row(code, largest, row_a, true);
        const long long row_b = head * code_slots + other[head * stride_other + slot];
        const Row theirs = load_row(code, largest, row_b, true);
        float apart[3];
#pragma unroll
        for (int i = 0; i < 3; i++) apart[i] = __fsub_rn(position[row_a * 3 + i], position[row_b * 3 + i]);
        Step a[2], b[2];
        steps_of(a, own, 0), steps_of(b, theirs, 0);
        Products first = compare_words<0, 8>(own, theirs, a, b, apart);
        steps_of(a, own, 1), steps_of(b, theirs, 1);
        first = add_both(first, compare_words<8, 8>(own, theirs, a, b, apart));
        to[head * stride_to + slot] = fmaxf(__fsub_rn(__fadd_rn(first.a, first.b), 2.0f * first.inner), 0.0f);
    }
}
#else
// Sines and cosines of two pairs of channels from PAIR on, by what angles are.
struct ByAngle {
    float apart[3];
    template <int PAIR> __device__ __forceinline__ float4 of_two() const {
        constexpr Turn first = turn_of<PAIR>(), second = turn_of<PAIR + 1>();
        float4 to;
        sin_cos(__fmul_rn(apart[first.axis], first.frequency), to.x, to.y);
        sin_cos(__fmul_rn(apart[second.axis], second.frequency), to.z, to.w);
        return to;
    }
};

// Of an axis the first pair, which is even; 32 pairs from there on stand in a row of the table.
template <int PAIR> __device__ constexpr int place_of() {
    constexpr int axis[64] = {AXIS};
    int first = 0;
    while (axis[first] != axis[PAIR]) first++;
    return PAIR - first / 2 * 2;
}

// The same from a table of whole numbers up to FARTHEST either way, 3 axes one after the other.
struct ByTable {
    const float2* row[3];
    template <int PAIR> __device__ __forceinline__ float4 of_two() const {
        constexpr int first = turn_of<PAIR>().axis, second = turn_of<PAIR + 1>().axis;
        if constexpr (first == second) return __ldg((const float4*)(row[first] + place_of<PAIR>()));
        const float2 a = __ldg(row[first] + place_of<PAIR>()), b = __ldg(row[second] + place_of<PAIR + 1>());
        return make_float4(a.x, a.y, b.x, b.y);
    }
};

__device__ __forceinline__ const float2* turns_of(const float2* turns, int axis, int apart) {
    return turns + ((long long)axis * (2 * FARTHEST + 1) + apart + FARTHEST) * 32;
}

template <int PAIR> __device__ __forceinline__ void fill_from(float2* turns, int axis, int apart) {
    if constexpr (PAIR < 64) {
        constexpr Turn turn = turn_of<PAIR>();
        if (turn.axis == axis) {
            float2 to;
            sin_cos(__fmul_rn((float)apart, turn.frequency), to.x, to.y);
            ((float2*)turns_of(turns, axis, apart))[place_of<PAIR>()] = to;
        }
        fill_from<PAIR + 1>(turns, axis, apart);
    }
}

extern "C" __global__ void fill_turns(float2* turns) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < 3 * (2 * FARTHEST + 1)) fill_from<0>(turns, at / (2 * FARTHEST + 1), at % (2 * FARTHEST + 1) - FARTHEST);
}

// Of channels in their order: 4 of low bits and 4 of high ones, from word FIRST.
template <int FIRST, class Turns>
__device__ __forceinline__ Products compare_word(const float (&x)[8], const float (&y)[8], const Turns& turns) {
    const float4 low = turns.template of_two<2 * FIRST>(), high = turns.template of_two<32 + 2 * FIRST>();
    const float sin[4] = {low.x, high.x, low.z, high.z}, cos[4] = {low.y, high.y, low.w, high.w};
    Products to[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *a = x + i % 2 * 4 + i / 2 * 2, *b = y + i % 2 * 4 + i / 2 * 2;
        const float along = __fmaf_rn(a[0], b[0], __fmul_rn(a[1], b[1]));
        const float across = __fmaf_rn(a[1], b[0], -__fmul_rn(a[0], b[1]));
        to[i] = {__fmaf_rn(along, cos[i], __fmul_rn(across, sin[i])), square_both(a[0], a[1]), square_both(b[0], b[1])};
    }
    return add_both(add_both(to[0], to[1]), add_both(to[2], to[3]));
}

// As `compare_words`, by tensor cores.
template <int FIRST, int NUM, class Turns>
__device__ __forceinline__ Products compare_widened(
    const Row& own, const Row& theirs, const Step (&a)[2], const Step (&b)[2], const Turns& turns, u32 ones) {
    if constexpr (NUM == 1) {
        float x[8], y[8];
        u32 left[4], right[4];
        scale_word(left, own.word[FIRST], a[0], a[1]);
        scale_word(right, theirs.word[FIRST], b[0], b[1]);
        widen(x, left, ones), widen(x + 4, left + 2, ones), widen(y, right, ones), widen(y + 4, right + 2, ones);
        return compare_word<FIRST>(x, y, turns);
    } else {
        return add_both(compare_widened<FIRST, NUM / 2>(own, theirs, a, b, turns, ones),
                        compare_widened<FIRST + NUM / 2, NUM / 2>(own, theirs, a, b, turns, ones));
    }
}

template <class Turns>
__device__ __forceinline__ float compare_keys(const Row& own, const Row& theirs, const Turns& turns, u32 ones) {
    Step a[2], b[2];
    split_both(a[0], a[1], __byte_perm(own.largest[0], own.largest[1], 0x5410));
    split_both(b[0], b[1], __byte_perm(theirs.largest[0], theirs.largest[1], 0x5410));
    Products first = compare_widened<0, 8>(own, theirs, a, b, turns, ones);
    split_both(a[0], a[1], __byte_perm(own.largest[0], own.largest[1], 0x7632));
    split_both(b[0], b[1], __byte_perm(theirs.largest[0], theirs.largest[1], 0x7632));
    first = add_both(first, compare_widened<8, 8>(own, theirs, a, b, turns, ones));
    return fmaxf(__fsub_rn(__fadd_rn(first.a, first.b), 2.0f * first.inner), 0.0f);
}

// As `key_distances`, with what tensor cores can do left to them; with TABLED, sines and cosines stand in a table where
// positions are whole numbers.
template <bool TABLED>
__device__ __forceinline__ void compare_listed(
    const uint4* code, const uint2* largest, const float* position, const int* other, const int* listed,
    const int* count, float* to, long long code_slots, long long stride_other, long long stride_listed,
    long long stride_to, int heads, const float2* table) {
    const long long head = blockIdx.x % heads;
    const int num = count[head], step = gridDim.x / heads * KEY_THREADS, lane = threadIdx.x % 32;
    const u32 ones = part_of_diagonal(0x3F80u, lane);
    for (int first = blockIdx.x / heads * KEY_THREADS + threadIdx.x - lane; first < num; first += step) {
        const int slot = listed[head * stride_listed + min(first + lane, num - 1)];
        const long long row_a = head * code_slots + slot;
        const Row own = load_row(code, largest, row_a, true);
        const long long row_b = head * code_slots + other[head * stride_other + slot];
        const Row theirs = load_row(code, largest, row_b, true);
        ByAngle by_angle;
        ByTable by_table;
        bool is_whole = true;
#pragma unroll
        for (int i = 0; i < 3; i++) {
            const float apart = __fsub_rn(position[row_a * 3 + i], position[row_b * 3 + i]);
            const int near = (int)fminf(fmaxf(apart, -FARTHEST), FARTHEST);
            by_angle.apart[i] = apart, is_whole &= (float)near == apart;
            by_table.row[i] = turns_of(table, i, near);
        }
        float found;
        if (TABLED && __all_sync(~0u, is_whole)) found = compare_keys(own, theirs, by_table, ones);
        else found = compare_keys(own, theirs, by_angle, ones);
        if (first + lane < num) to[head * stride_to + slot] = found;
    }
}

extern "C" __global__ void __launch_bounds__(KEY_THREADS, KEY_BLOCKS) key_distances(
    const uint4* __restrict__ code, const uint2* __restrict__ largest, const float* __restrict__ position,
    const int* __restrict__ other, const int* __restrict__ listed, const int* __restrict__ count,
    float* __restrict__ to, long long code_slots, long long stride_other, long long stride_listed, long long stride_to,
    int heads, const float2* __restrict__ table) {
    compare_listed<KEYS_BY == 2>(
        code, largest, position, other, listed, count, to, code_slots, stride_other, stride_listed, stride_to, heads,
        table);
}
#endif
