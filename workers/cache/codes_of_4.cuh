// Rows of codes of 4 bits as kernels read them that stand behind this (see row_distances.py): two codes at once become
// bfloat16, by the numbers of `scaled_codes` in triton_decode.py.
//
// Defined by whoever compiles: STEP_OF_ONE, what a largest channel of 1 makes a step; NEAR_OF_ONE and REST_OF_ONE, the
// nearest bfloat16 and that of the rest, each twice.
typedef unsigned int u32;

__device__ __forceinline__ u32 fma_both(u32 a, u32 b, u32 c) {
    u32 to;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(to) : "r"(a), "r"(b), "r"(c));
    return to;
}

// The nearest bfloat16, twice.
__device__ __forceinline__ u32 round_twice(float x) {
    u32 to;
    asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(to) : "f"(x));
    return to;
}

// A step as the nearest bfloat16 and that of the rest, each twice.
struct Step { u32 near, rest; };

__device__ __forceinline__ Step split_step(u32 largest) {
    float step = __fmul_rn(__uint_as_float(largest << 16), STEP_OF_ONE);
    u32 near = round_twice(step);
    return {near, round_twice(__fsub_rn(step, __uint_as_float(near << 16)))};
}

// Of two groups whose largest channels are in one number: a step each, in the same half. What is left over is not always
// that of `split_step`; what codes become is.
__device__ __forceinline__ Step split_pair(u32 largest) {
    const u32 near = fma_both(largest, NEAR_OF_ONE, fma_both(largest, REST_OF_ONE, 0x80008000u));
    const u32 less = fma_both(largest, NEAR_OF_ONE, near ^ 0x80008000u);
    return {near, fma_both(largest, REST_OF_ONE, less)};
}

// The same, each twice.
__device__ __forceinline__ void split_both(Step& first, Step& second, u32 largest) {
    const Step both = split_pair(largest);
    first = {__byte_perm(both.near, 0, 0x1010), __byte_perm(both.rest, 0, 0x1010)};
    second = {__byte_perm(both.near, 0, 0x3232), __byte_perm(both.rest, 0, 0x3232)};
}

// Codes in the lowest 4 bits of both halves, 8 off, times a step: as `scaled_codes` of triton_decode.py.
__device__ __forceinline__ u32 scale_both(u32 code, Step step) {
    u32 whole;
    asm("lop3.b32 %0, %1, 0x000F000F, 0x43004300, 0xEA;" : "=r"(whole) : "r"(code));
    whole = fma_both(whole, 0x3F803F80u, 0xC308C308u);
    return fma_both(whole, step.near, fma_both(whole, step.rest, 0x80008000u));
}

// Channels of 4 bytes as bfloat16, each with the one 2 bytes on: those in low bits, then those in high ones.
__device__ __forceinline__ void scale_word(u32 (&to)[4], u32 word, Step low, Step high) {
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = scale_both(word >> (i % 2 * 8 + i / 2 * 4), i < 2 ? low : high);
}

// Channels of 4 bytes: those in low bits, then those in high ones.
__device__ __forceinline__ void decode_word(float (&to)[8], u32 word, Step low, Step high) {
    u32 both[4];
    scale_word(both, word, low, high);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[i / 2 * 4 + i % 2] = __uint_as_float(both[i] << 16);
        to[i / 2 * 4 + i % 2 + 2] = __uint_as_float(both[i] & 0xFFFF0000u);
    }
}

// A lane's part of a matrix with this bfloat16 where row and column are the same. Tensor cores that multiply by ones give
// each lane as float32 what it gave: 4 channels by one instruction, where others take 4. All lanes of a warp must take
// part, with numbers that are finite.
__device__ __forceinline__ u32 part_of_diagonal(u32 one, int lane) {
    return lane / 8 != lane % 4 ? 0u : one << lane / 4 % 2 * 16;
}

// Two numbers of `scale_word` as 4 channels in their order.
__device__ __forceinline__ void widen(float* to, const u32* both, u32 ones) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
        : "=f"(to[0]), "=f"(to[2]), "=f"(to[1]), "=f"(to[3])
        : "r"(both[0]), "r"(both[1]), "r"(ones), "f"(0.0f));
}

// Those of one row less those of another: exact where the larger has no more than some 2^13 of the smaller.
__device__ __forceinline__ void widen_apart(float* to, const u32* own, const u32* theirs, u32 ones, u32 less) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(to[0]), "=f"(to[2]), "=f"(to[1]), "=f"(to[3])
        : "r"(own[0]), "r"(own[1]), "r"(theirs[0]), "r"(theirs[1]), "r"(ones), "r"(less), "f"(0.0f));
}
