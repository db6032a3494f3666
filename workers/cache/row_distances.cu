// What `_value_distances` and `_key_distances` of triton_pairs.py find of rows of 128 channels as codes of 4 bits, in
// groups of 32, to the bit. A thread takes a row: nothing is exchanged, and what a channel turns by stands in the
// instruction. Such kernels are bound by how many instructions they take. Behind hopper.cuh and codes_of_4.cuh.
//
// Defined by whoever compiles, beside what that asks for: of each pair of channels AXIS and FREQUENCY, 64 numbers each;
// THREADS and KEY_THREADS of a block.
#define WORDS 16
#define KEY_BLOCKS 5  // of a multiprocessor: fewer have more registers

// Codes and largest channels.
struct Row { u32 word[WORDS], largest[2]; };

__device__ __forceinline__ Row load_row(const uint4* code, const uint2* largest, long long row, bool there) {
    Row to;
    uint2 both = there ? largest[row] : make_uint2(0, 0);
    to.largest[0] = both.x, to.largest[1] = both.y;
#pragma unroll
    for (int i = 0; i < WORDS / 4; i++) {
        uint4 four = there ? code[row * 4 + i] : make_uint4(0, 0, 0, 0);
        to.word[4 * i] = four.x, to.word[4 * i + 1] = four.y, to.word[4 * i + 2] = four.z, to.word[4 * i + 3] = four.w;
    }
    return to;
}

// Steps of the first or second 8 words: those of low bits and those of high ones.
__device__ __forceinline__ void steps_of(Step (&to)[2], const Row& row, int half) {
#pragma unroll
    for (int i = 0; i < 2; i++) to[i] = split_step(half ? row.largest[i] >> 16 : row.largest[i] & 0xFFFFu);
}

// Neighbours first.
template <int NUM> __device__ __forceinline__ float add_up(const float* x) {
    if constexpr (NUM == 1) return x[0];
    else return __fadd_rn(add_up<NUM / 2>(x), add_up<NUM / 2>(x + NUM / 2));
}

// A block takes slots of one head; rows of codes lie head by head, code_slots each.
extern "C" __global__ void __launch_bounds__(THREADS) value_distances(
    const uint4* __restrict__ code, const uint2* __restrict__ largest, const int* __restrict__ m,
    const int* __restrict__ partner, float* __restrict__ of_values, float* __restrict__ lengths, long long code_slots,
    long long stride_m, long long stride_partner, int num_slots) {
    const int blocks = (num_slots + THREADS - 1) / THREADS;
    const long long head = blockIdx.x / blocks;
    const int slot = (blockIdx.x % blocks) * THREADS + threadIdx.x;
    const bool inside = slot < num_slots;
    const int other = inside ? partner[head * stride_partner + slot] : -1;
    const bool live = inside && m[head * stride_m + slot] > 0;
    const Row own = load_row(code, largest, head * code_slots + slot, live);
    const Row theirs = load_row(code, largest, head * code_slots + other, live && other >= 0);
    float length[WORDS], apart[WORDS];
    Step a[2], b[2];
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
        if (i % 8 == 0) steps_of(a, own, i / 8), steps_of(b, theirs, i / 8);
        float x[8], y[8], own_square[4], square[4];
        decode_word(x, own.word[i], a[0], a[1]);
        decode_word(y, theirs.word[i], b[0], b[1]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            own_square[j] = square_both(x[j], x[4 + j]);
            square[j] = square_both(__fsub_rn(x[j], y[j]), __fsub_rn(x[4 + j], y[4 + j]));
        }
        length[i] = add_up<4>(own_square), apart[i] = add_up<4>(square);
    }
    if (inside) {
        lengths[head * num_slots + slot] = add_up<WORDS>(length);
        of_values[head * num_slots + slot] = add_up<WORDS>(apart);
    }
}

struct Turn { int axis; float frequency; };

// Of a pair of channels; found when this is compiled.
template <int PAIR> __device__ constexpr Turn turn_of() {
    constexpr int axis[64] = {AXIS};
    constexpr float frequency[64] = {FREQUENCY};
    return {axis[PAIR], frequency[PAIR]};
}

struct Products { float inner, a, b; };

__device__ __forceinline__ Products add_both(Products x, Products y) {
    return {__fadd_rn(x.inner, y.inner), __fadd_rn(x.a, y.a), __fadd_rn(x.b, y.b)};
}

// Of one pair of channels; a and b are even and odd channel.
template <int PAIR>
__device__ __forceinline__ Products compare_pair(const float* a, const float* b, const float (&apart)[3]) {
    constexpr Turn turn = turn_of<PAIR>();
    const auto [sin, cos] = sin_cos(__fmul_rn(apart[turn.axis], turn.frequency));
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
