// What kernels for compute capability 9.0 share: barriers and copies in bulk, products of tensor cores and how their
// matrices lie, results on their way to memory, 8-bit floats. Stands before a kernel's own source (see nvrtc.py).
//
// Defined by whoever compiles: LONGEST_WAIT_S, after which a wait fails.
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ u64 now() {
    u64 t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

// A wait that never ends would take the GPU along: the kernel fails, after longer than a machine is ever paused.
__device__ __forceinline__ void await(u32 barrier, u32 parity) {
    u64 begun = 0;
    while (true) {
        u32 done;
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
        if (done) return;
        if (begun == 0) begun = now();
        else if (now() - begun > LONGEST_WAIT_S * 1000000000ull) __trap();
    }
}

__device__ __forceinline__ void bring(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// Where a matrix of rows of 8 lies: start, bytes from 8 rows to the next 8, bytes from 8 columns to the next, swizzle.
__device__ __forceinline__ u64 describe(u32 start, u32 rows, u32 columns, u64 swizzle) {
    return (u64)((start & 0x3FFFF) >> 4) | (u64)(columns >> 4) << 16 | (u64)(rows >> 4) << 32 | swizzle << 62;
}

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int LEFT> __device__ __forceinline__ void finish() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// The compiler does not see that products write until they are waited for.
template <int COUNT> __device__ __forceinline__ void hold(float (&x)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(x[i])::"memory");
}

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // volatile: before a wait that stands behind it
    return y;
}

__device__ __forceinline__ u32 round_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Four lanes hold four words each; lane q leaves with word q of every lane, in order.
__device__ __forceinline__ void transpose(u32 (&w)[4], int q) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        u32 got = __shfl_xor_sync(~0u, q & 1 ? w[i] : w[i + 1], 1);
        if (q & 1) w[i] = got; else w[i + 1] = got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 got = __shfl_xor_sync(~0u, q & 2 ? w[i] : w[i + 2], 2);
        if (q & 2) w[i] = got; else w[i + 2] = got;
    }
}

__device__ __forceinline__ u32 code_four(float a, float b, float c, float d) {
    u32 word;
    asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}" : "=r"(word) : "f"(a), "f"(b), "f"(c), "f"(d));
    return word;
}

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }  // of two bfloat16
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

__device__ __forceinline__ u32 code_four(u32 first, u32 second, float scale) {
    return code_four(low(first) * scale, high(first) * scale, low(second) * scale, high(second) * scale);
}

// Four codes of log m, which products multiply by 448, 1, 1 and 1; see coded_tiles.py.
__device__ __forceinline__ u32 code_mass(float left) {
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 code = code_four(left * (i ? 1.f : 1.f / 448.f), 0.f, 0.f, 0.f);
        float number;
        asm("{\n.reg .b16 code, low, high;\n.reg .b32 two;\nmov.b32 {code, high}, %1;\ncvt.rn.f16x2.e4m3x2 two, code;\n"
            "mov.b32 {low, high}, two;\ncvt.f32.f16 %0, low;\n}" : "=f"(number) : "r"(code));
        left -= number * (i ? 1.f : 448.f);
        word |= code << i * 8;
    }
    return word;
}
