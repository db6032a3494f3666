// Rows of codes of 4 bits as kernels read them that stand behind this and hopper.cuh (see nvrtc.py): two codes at once
// become bfloat16, by the numbers of `scaled_codes` in triton_decode.py. Float32 is as Triton has it.
#define STEP_OF_ONE (0.14285714285714285f)  // what a largest channel of 1 makes a step: the largest code is 7

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

__device__ __forceinline__ float square_both(float a, float b) { return __fmaf_rn(a, a, __fmul_rn(b, b)); }

// As Triton divides where it is not asked for more.
__device__ __forceinline__ float divide(float a, float b) {
    float to;
    asm("div.full.f32 %0, %1, %2;" : "=f"(to) : "f"(a), "f"(b));
    return to;
}

// Sine and cosine, as `sin_cos_by_unit` of triton_rows.py.
__device__ __forceinline__ float2 sin_cos(float angle) {
    float2 to;
    float turns = __fsub_rn(__fmaf_rn(angle, 0.15915494309189535f, 12582912.0f), 12582912.0f);
    float r = __fmaf_rn(turns, -1.9353071795864769e-3f, __fmaf_rn(turns, -6.28125f, angle));
    asm("sin.approx.f32 %0, %1;" : "=f"(to.x) : "f"(r));
    asm("cos.approx.f32 %0, %1;" : "=f"(to.y) : "f"(r));
    return to;
}

// A step as the nearest bfloat16 and that of the rest, each twice.
struct Step { u32 near, rest; };

__device__ __forceinline__ Step split_step(u32 largest) {
    float step = __fmul_rn(__uint_as_float(largest << 16), STEP_OF_ONE);
    u32 near = round_twice(step);
    return {near, round_twice(__fsub_rn(step, __uint_as_float(near << 16)))};
}

// Codes in the lowest 4 bits of both halves, 8 off, times a step: as `scaled_codes` of triton_decode.py.
__device__ __forceinline__ u32 scale_both(u32 code, Step step) {
    u32 whole;
    asm("lop3.b32 %0, %1, 0x000F000F, 0x43004300, 0xEA;" : "=r"(whole) : "r"(code));
    whole = fma_both(whole, 0x3F803F80u, 0xC308C308u);
    return fma_both(whole, step.near, fma_both(whole, step.rest, 0x80008000u));
}

// Channels of 4 bytes: those in low bits, then those in high ones.
__device__ __forceinline__ void decode_word(float (&to)[8], u32 word, Step first, Step second) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 both = scale_both(word >> (i % 2 * 8 + i / 2 * 4), i < 2 ? first : second);
        to[i / 2 * 4 + i % 2] = low(both), to[i / 2 * 4 + i % 2 + 2] = high(both);
    }
}
