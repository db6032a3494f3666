// Attention of 128 queries at a time to listed tiles of 128 keys for compute capability 9.0, products in 8 bits (e4m3),
// head dimension 128. Tiles lie in memory as tensor cores read them (see fp8_tiles.py), so plain bulk copies bring them.
//
// Two groups of four warps have 64 queries each, a ninth warp brings tiles. While a group softens one tile's logits, its
// product with the values before runs, and the other group's products. A program takes `total / programs` entries of all
// lists in order: with one program for each tile of queries it has one list, with fewer (one for each multiprocessor) it
// ends within a list, what it has of one goes to `parts`, and join() adds the parts up.
//
// Defined by whoever compiles: STAGES of tiles in shared memory; TURNS, whether groups multiply in turn; TWO_LEVELS,
// whether a tile's products are added to the rest outside of tensor cores, which keep fewer bits of a sum; START_BIAS,
// whether products of queries and keys start from the bias; LAZY, whether nothing is rescaled where no maximum rose;
// FACTOR, from products to logits in base 2; V_SCALE; and the products wgmma_qk() and wgmma_pv() of 64 rows by 128.
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int TILE = 16384, SLOT_BIAS = 512, PART = 68 * 256;  // a part: 64 sums, two maxima, two sums of a thread
constexpr float SHIFT = 8.f;  // p reaches 2^SHIFT, e4m3 448
#define NONE __int_as_float(0xFF800000)

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

// A wait that never ends would take the GPU along: after ten seconds the kernel fails.
__device__ __forceinline__ void await(u32 barrier, u32 parity) {
    u64 begun = 0;
    while (true) {
        u32 done;
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
        if (done) return;
        if (begun == 0) begun = now();
        else if (now() - begun > 10000000000ull) __trap();
    }
}

__device__ __forceinline__ void bring(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// Rows of 128 bytes, swizzled, eight of them 1024 bytes from the next eight.
__device__ __forceinline__ u64 describe(u32 start) {
    return (u64)((start & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int LEFT> __device__ __forceinline__ void finish() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// The compiler does not see that products write until they are waited for.
__device__ __forceinline__ void hold(float (&x)[64]) {
#pragma unroll
    for (int i = 0; i < 64; i++) asm volatile("" : "+f"(x[i])::"memory");
}

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // volatile: before a wait that stands behind it
    return y;
}

__device__ __forceinline__ float of_row(float x, bool sums) {  // over the four lanes of a row
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        float other = __shfl_xor_sync(~0u, x, step);
        x = sums ? x + other : fmaxf(x, other);
    }
    return x;
}

// Products of 64 queries and a tile's keys; a thread has columns 8i + 2q and the next of rows g and g + 8.
__device__ __forceinline__ void multiply_qk(float (&s)[64], u32 q_at, u32 k_at) {
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma_qk(s, describe(q_at + k * 32), describe(k_at + k * 32), START_BIAS | k);
}

__device__ __forceinline__ void multiply_pv(float (&o)[64], const u32 (&p)[16], u32 v_at, int adds) {
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma_pv(o, p[k * 4], p[k * 4 + 1], p[k * 4 + 2], p[k * 4 + 3], describe(v_at + k * 32), adds | k);
}

__device__ __forceinline__ void start(float (&s)[64], const float* bias, int q) {
#if START_BIAS
#pragma unroll
    for (int b = 0; b < 16; b++) {
        float2 added = *(const float2*)(bias + b * 8 + q * 2);
        s[b * 4] = s[b * 4 + 2] = added.x * (1.f / FACTOR);
        s[b * 4 + 1] = s[b * 4 + 3] = added.y * (1.f / FACTOR);
    }
#endif
}

// Adds the bias; the highest logit so far of both rows, in base 2.
__device__ __forceinline__ void find_top(float (&s)[64], const float* bias, const float (&top)[2], float (&best)[2], int q) {
    float high[4] = {NONE, NONE, NONE, NONE};
#pragma unroll
    for (int b = 0; b < 16; b++) {
#if !START_BIAS
        float2 added = *(const float2*)(bias + b * 8 + q * 2);
#pragma unroll
        for (int i = 0; i < 4; i++) s[b * 4 + i] = fmaf(s[b * 4 + i], FACTOR, i & 1 ? added.y : added.x);
#endif
#pragma unroll
        for (int i = 0; i < 4; i++) high[i] = fmaxf(high[i], s[b * 4 + i]);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float row = of_row(fmaxf(high[r * 2], high[r * 2 + 1]), false);
        best[r] = fmaxf(top[r], START_BIAS ? row * FACTOR : row);
    }
}

// Logits become p; `shrink` is what comes off all that was relative to the top before.
__device__ __forceinline__ void weigh(float (&s)[64], float (&top)[2], const float (&best)[2], float (&sum)[2], float (&shrink)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float base = best[r] == NONE ? 0.f : best[r], total[2] = {0.f, 0.f};
        shrink[r] = exp2_of(top[r] - base);
        top[r] = best[r];
        base -= SHIFT;
#pragma unroll
        for (int b = 0; b < 16; b++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& x = s[b * 4 + r * 2 + i];
                x = exp2_of(START_BIAS ? fmaf(x, FACTOR, -base) : x - base);
                total[i] += x;
            }
        }
        sum[r] = fmaf(sum[r], shrink[r], total[0] + total[1]);
    }
}

__device__ __forceinline__ u32 code_four(float a, float b, float c, float d) {
    u32 word;
    asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}" : "=r"(word) : "f"(a), "f"(b), "f"(c), "f"(d));
    return word;
}

// Keys of a tile of values lie so that a thread's own columns are what a product takes from it.
__device__ __forceinline__ void code(u32 (&p)[16], const float (&s)[64]) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const float* x = s + i / 4 * 16 + i / 2 % 2 * 8 + i % 2 * 2;
        p[i] = code_four(x[0], x[1], x[4], x[5]);
    }
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

struct Job { int head, tile, heads, num_queries; };

// `sum` over a row's lanes.
__device__ __forceinline__ void store(const float (&o)[64], const float (&top)[2], const float (&sum)[2], Job job, uint4* out, float* lse) {
    int lane = threadIdx.x % 32, q = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int query = job.tile * 128 + threadIdx.x / 32 * 16 + lane / 4 + r * 8;
        float scale = sum[r] > 0.f ? 1.f / (sum[r] * V_SCALE) : 0.f;
        long long row = (long long)query * job.heads + job.head;
#pragma unroll
        for (int b = 0; b < 16; b += 4) {
            u32 word[4];
#pragma unroll
            for (int i = 0; i < 4; i++) word[i] = round_pair(o[(b + i) * 4 + r * 2] * scale, o[(b + i) * 4 + r * 2 + 1] * scale);
            transpose(word, q);
            if (query < job.num_queries) out[row * 16 + b + q] = make_uint4(word[0], word[1], word[2], word[3]);
        }
        if (q == 0 && query < job.num_queries)
            lse[row] = sum[r] > 0.f ? (top[r] + log2f(sum[r]) - SHIFT) * 0.6931471805599453f : NONE;
    }
}

struct Ring {
    int slot = 0;
    u32 parity = 0;
    __device__ __forceinline__ void turn() { if (++slot == STAGES) slot = 0, parity ^= 1; }
};

__device__ __forceinline__ void wait_turn(int group) {
#if TURNS
    asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory");
#endif
}

__device__ __forceinline__ void pass_turn(int group) {
#if TURNS
    asm volatile("bar.arrive %0, 256;" ::"r"(2 - group) : "memory");
#endif
}

extern "C" __global__ void __launch_bounds__(384, 1) attend(
    const char* queries, const char* keys, const char* values, const float* biases, const int* lists, uint4* out, float* lse,
    float* parts, int heads, int query_tiles, int num_queries, int tiles, int length) {
    extern __shared__ __align__(1024) char room[];
    __shared__ __align__(8) u64 barriers[4 * STAGES + 2];
    char* base = room + (1024 - (address(room) & 1023)) % 1024;
    u32 q_at = address(base), k_at = q_at + TILE, v_at = k_at + STAGES * TILE, b_at = v_at + STAGES * TILE;
    const float* bias_rows = (const float*)(base + (1 + 2 * STAGES) * TILE);
    u32 full_k = address(barriers), full_v = full_k + STAGES * 8, empty_k = full_v + STAGES * 8, empty_v = empty_k + STAGES * 8;
    u32 full_q = empty_v + STAGES * 8, empty_q = full_q + 8;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4 * STAGES + 2; i++) {
            u32 count = i < 2 * STAGES || i == 4 * STAGES ? 1 : 8;  // a lane of each warp leaves
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(full_k + i * 8), "r"(count) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    long long total = (long long)heads * query_tiles * length;
    int begin = (int)(total * blockIdx.x / gridDim.x), end = (int)(total * (blockIdx.x + 1) / gridDim.x);
    Ring at_k, at_v;
    u32 parity_q = 0;

    // Registers go from the four warps that bring tiles to the eight that multiply.
    if (warp >= 8) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x != 256) return;
        for (int entry = begin; entry < end;) {
            int unit = entry / length, stop = min(end, (unit + 1) * length), head = unit / query_tiles;
            await(empty_q, parity_q ^ 1);
            expect(full_q, TILE);
            bring(q_at, queries + (u64)unit * TILE, TILE, full_q);
            parity_q ^= 1;
            int next = lists ? lists[entry] : entry - unit * length;
            while (entry < stop) {
                u64 tile = (u64)head * tiles + next;
                entry++;
                if (entry < stop) next = lists ? lists[entry] : entry - unit * length;
                await(empty_k + at_k.slot * 8, at_k.parity ^ 1);
                expect(full_k + at_k.slot * 8, TILE + SLOT_BIAS);
                bring(k_at + at_k.slot * TILE, keys + tile * TILE, TILE, full_k + at_k.slot * 8);
                bring(b_at + at_k.slot * SLOT_BIAS, biases + tile * 128, SLOT_BIAS, full_k + at_k.slot * 8);
                at_k.turn();
                await(empty_v + at_v.slot * 8, at_v.parity ^ 1);
                expect(full_v + at_v.slot * 8, TILE);
                bring(v_at + at_v.slot * TILE, values + tile * TILE, TILE, full_v + at_v.slot * 8);
                at_v.turn();
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    int group = warp / 4, q = lane % 4;
    q_at += group * (TILE / 2);
    if (group == 1) pass_turn(group);
    for (int entry = begin; entry < end;) {
        int unit = entry / length, first = unit * length, stop = min(end, first + length);
        bool is_whole = stop - entry == length, begins = entry == first;
        float s[64], o[64], top[2] = {NONE, NONE}, sum[2] = {0.f, 0.f}, shrink[2], best[2];
#if TWO_LEVELS
        float fresh[64];
#pragma unroll
        for (int i = 0; i < 64; i++) o[i] = 0.f;
#endif
        u32 p[16];
        await(full_q, parity_q);
        parity_q ^= 1;
        await(full_k + at_k.slot * 8, at_k.parity);
        start(s, bias_rows + at_k.slot * 128, q);
        fence();
        multiply_qk(s, q_at, k_at + at_k.slot * TILE);
        commit();
        finish<0>();
        hold(s);
        find_top(s, bias_rows + at_k.slot * 128, top, best, q);
        if (lane == 0) arrive(empty_k + at_k.slot * 8);
        at_k.turn();
        weigh(s, top, best, sum, shrink);
        code(p, s);
        if (entry + 1 < stop) await(full_k + at_k.slot * 8, at_k.parity);
        [[maybe_unused]] int adds = 0;
#pragma unroll 1
        for (entry++; entry < stop; entry++) {
            start(s, bias_rows + at_k.slot * 128, q);
            wait_turn(group);
            fence();
            multiply_qk(s, q_at, k_at + at_k.slot * TILE);
            commit();
            await(full_v + at_v.slot * 8, at_v.parity);
#if TWO_LEVELS
            multiply_pv(fresh, p, v_at + at_v.slot * TILE, 0);
#else
            multiply_pv(o, p, v_at + at_v.slot * TILE, adds);
#endif
            commit();
            pass_turn(group);
            finish<1>();
            hold(s);
            find_top(s, bias_rows + at_k.slot * 128, top, best, q);
            if (lane == 0) arrive(empty_k + at_k.slot * 8);
            at_k.turn();
#if TWO_LEVELS
            float before[2] = {shrink[0], shrink[1]};
#endif
            weigh(s, top, best, sum, shrink);
            // The next keys are waited for here since the compiler puts no exponential behind a loop, but any behind a wait.
            if (entry + 1 < stop) await(full_k + at_k.slot * 8, at_k.parity);
            finish<0>();
#if TWO_LEVELS
            hold(fresh);
#else
            hold(o);
#endif
            if (lane == 0) arrive(empty_v + at_v.slot * 8);
            at_v.turn();
            code(p, s);
#if TWO_LEVELS
#pragma unroll
            for (int i = 0; i < 64; i++) o[i] = fmaf(o[i], before[i / 2 % 2], fresh[i]);
#else
            if (!LAZY || __any_sync(~0u, shrink[0] != 1.f || shrink[1] != 1.f)) {
#pragma unroll
                for (int i = 0; i < 64; i++) o[i] *= shrink[i / 2 % 2];
            }
            adds = 1;
#endif
        }
        if (lane == 0) arrive(empty_q);
        await(full_v + at_v.slot * 8, at_v.parity);
        fence();
#if TWO_LEVELS
        multiply_pv(fresh, p, v_at + at_v.slot * TILE, 0);
        commit();
        finish<0>();
        hold(fresh);
#pragma unroll
        for (int i = 0; i < 64; i++) o[i] = fmaf(o[i], shrink[i / 2 % 2], fresh[i]);
#else
        multiply_pv(o, p, v_at + at_v.slot * TILE, adds);
        commit();
        finish<0>();
        hold(o);
#endif
        if (lane == 0) arrive(empty_v + at_v.slot * 8);
        at_v.turn();
        sum[0] = of_row(sum[0], true), sum[1] = of_row(sum[1], true);
        if (is_whole) {
            store(o, top, sum, {unit / query_tiles, unit % query_tiles, heads, num_queries}, out, lse);
        } else {
            float* part = parts + (blockIdx.x * 2 + begins) * PART + threadIdx.x;
#pragma unroll
            for (int i = 0; i < 64; i++) part[i * 256] = o[i];
#pragma unroll
            for (int r = 0; r < 2; r++) part[(64 + r) * 256] = top[r], part[(66 + r) * 256] = sum[r];
        }
    }
    if (group == 0) wait_turn(group);
}

// Tiles of queries whose lists were shared by several of attend()'s programs, each by a program of 256 threads.
extern "C" __global__ void __launch_bounds__(256, 2) join(
    const float* parts, uint4* out, float* lse, int heads, int query_tiles, int num_queries, int length, int programs) {
    long long total = (long long)heads * query_tiles * length, first = (long long)blockIdx.x * length;
    int from = (int)(((first + 1) * programs - 1) / total), to = (int)(((first + length) * programs - 1) / total);
    if (from == to) return;
    float o[64], top[2] = {NONE, NONE}, sum[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 64; i++) o[i] = 0.f;
    for (int program = from; program <= to; program++) {
        bool begins = total * program / programs <= first;
        const float* part = parts + (program * 2 + begins) * PART + threadIdx.x;
        float old[2], fresh[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float other = part[(64 + r) * 256], best = fmaxf(top[r], other), base = best == NONE ? 0.f : best;
            old[r] = exp2_of(top[r] - base), fresh[r] = exp2_of(other - base);
            top[r] = best, sum[r] = sum[r] * old[r] + part[(66 + r) * 256] * fresh[r];
        }
#pragma unroll
        for (int i = 0; i < 64; i++) o[i] = o[i] * old[i / 2 % 2] + part[i * 256] * fresh[i / 2 % 2];
    }
    int unit = blockIdx.x;
    store(o, top, sum, {unit / query_tiles, unit % query_tiles, heads, num_queries}, out, lse);
}
