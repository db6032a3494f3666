// Attention of 128 queries at a time to listed tiles of 128 keys for compute capability 9.0, products in 8 bits (e4m3),
// head dimension 128. Tiles lie in memory as tensor cores read them (see coded_tiles.py), so plain bulk copies bring them.
//
// Two groups of four warps have 64 queries each, a ninth warp brings tiles, a tenth their bias. A group works on halves
// of 64 keys: while it turns one half's logits into p, tensor cores multiply the half before with its values and the
// next one with queries. p is relative to a base of the row, not to its highest logit so far: the highest is looked for
// only if some p did not fit into 8 bits, and then the base rises. Rows of ones behind the values sum p up.
// Each program takes whole lists while there are as many as programs, so that all are at like places of memory; what is
// left is shared evenly: what a program has of a list then goes to `parts`, and join() adds the parts up.
// Registers have the queries, shared memory what was added up.
//
// Defined by whoever compiles: STAGES of tiles in shared memory; PROMOTE, tiles after which products are added to the
// rest outside of tensor cores, which keep fewer bits of a sum; FACTOR, from products to logits in base 2; V_SCALE; and
// the products wgmma_qk() of 64 rows by 64 and wgmma_pv() by 136.

constexpr int TILE = 16384, V_SLOT = TILE + 1024, BIAS_SLOT = 1024;  // values with rows of ones; 128 floats, a flag
constexpr int PART = 68 * 256;                                        // a part: 64 sums, two bases, two sums of p of a thread
constexpr float TARGET = 6.f, MOST = 8.5f;  // a rising base takes the highest logit to TARGET; e4m3 ends at 2^8.8
constexpr float LOWEST = -1e30f;            // the base of a row without keys: any logit is far above
#define NONE __int_as_float(0xFF800000)

// Rows of 128 bytes, swizzled, eight of them 1024 bytes from the next eight.
__device__ __forceinline__ u64 describe(u32 start) { return describe(start, 1024, 16, 1); }

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // volatile: before a wait that stands behind it
    return y;
}

__device__ __forceinline__ float highest_of_row(float x) {  // over its four lanes
#pragma unroll
    for (int step = 1; step < 4; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

__device__ __forceinline__ u32 code_four(float a, float b, float c, float d) {
    u32 word;
    asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}" : "=r"(word) : "f"(a), "f"(b), "f"(c), "f"(d));
    return word;
}

// p of 64 keys relative to the base; true if some did not fit. Keys of a tile of values lie so that a thread's own
// columns are what a product takes from it: columns 8i + 2q and the next of rows g and g + 8.
__device__ __forceinline__ bool soften(const float (&s)[32], u32 (&p)[8], const float (&base)[2]) {
    u32 over = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float* x = s + i / 4 * 16 + i / 2 % 2 * 8 + i % 2 * 2;
        float y[4];
#pragma unroll
        for (int j = 0; j < 4; j++) y[j] = exp2_of(fmaf(x[j / 2 * 4 + j % 2], FACTOR, -base[i % 2]));
        p[i] = code_four(y[0], y[1], y[2], y[3]);
        over |= p[i] + 0x02020202u;  // 0x7E is the largest
    }
    return __any_sync(~0u, over & 0x80808080u);
}

// Rows whose p do not fit get a higher base; `by` is what comes off all that was added up before.
__device__ __forceinline__ void rise(const float (&s)[32], float (&base)[2], float (&by)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float high = NONE;
#pragma unroll
        for (int b = 0; b < 8; b++) high = fmaxf(high, fmaxf(s[b * 4 + r * 2], s[b * 4 + r * 2 + 1]));
        high = highest_of_row(high) * FACTOR;
        float next = high > base[r] + MOST ? ceilf(high) - TARGET : base[r];
        by[r] = exp2_of(base[r] - next);
        base[r] = next;
    }
}

__device__ __forceinline__ void lower(float (&acc)[68], float (&shrink)[2], const float (&by)[2]) {
#pragma unroll
    for (int i = 0; i < 68; i++) acc[i] *= by[i / 2 % 2];
#pragma unroll
    for (int r = 0; r < 2; r++) shrink[r] *= by[r];
}

struct Job { int head, tile, heads, num_queries, lse_query, lse_head; };  // lse_: from one's log-sum-exp to the next one's

__device__ __forceinline__ void store(
    const float (&o)[64], const float (&base)[2], const float (&sum)[2], Job job, uint4* out, float* lse) {
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
            lse[query * job.lse_query + job.head * job.lse_head] = sum[r] > 0.f ? (base[r] + log2f(sum[r])) * 0.6931471805599453f : NONE;
    }
}

struct Ring {
    int slot = 0;
    u32 parity = 0;
    __device__ __forceinline__ void turn() { if (++slot == STAGES) slot = 0, parity ^= 1; }
};

// Queries of a thread as a product takes them from registers.
__device__ __forceinline__ void take_queries(u32 (&a)[16], const char* queries) {
    int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    queries += (threadIdx.x / 32 * 16 + g) * 128 + q * 4;
#pragma unroll
    for (int i = 0; i < 16; i++) a[i] = *(const u32*)(queries + i % 2 * 1024 + ((i / 4 * 2 + i / 2 % 2) ^ g) * 16);
}

// Products of a group's queries and 64 keys begin, from the keys' bias where there is any; `bias` has it in a thread's order.
__device__ __forceinline__ int start(float (&s)[32], const float* bias) {
    int has_bias = *(const int*)(bias + 128);
    bias += threadIdx.x % 4 * 4;
    if (has_bias) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float4 x = *(const float4*)(bias + i * 16);
            s[i * 8] = s[i * 8 + 2] = x.x, s[i * 8 + 1] = s[i * 8 + 3] = x.y;
            s[i * 8 + 4] = s[i * 8 + 6] = x.z, s[i * 8 + 5] = s[i * 8 + 7] = x.w;
        }
    }
    return has_bias;
}

__device__ __forceinline__ void multiply_qk(float (&s)[32], const u32 (&a)[16], u32 k_at, int adds) {
#pragma unroll
    for (int k = 0; k < 4; k++)
        wgmma_qk(s, a[k * 4], a[k * 4 + 1], a[k * 4 + 2], a[k * 4 + 3], describe(k_at + k * 32), k ? 1 : adds);
}

__device__ __forceinline__ void multiply_pv(float (&acc)[68], const u32 (&p)[8], u32 v_at, int adds) {
#pragma unroll
    for (int k = 0; k < 2; k++)
        wgmma_pv(acc, p[k * 4], p[k * 4 + 1], p[k * 4 + 2], p[k * 4 + 3], describe(v_at + k * 32), k ? 1 : adds);
}

// What was added up outside of tensor cores: 64 sums of products and two of p a thread.
struct Total {
    float sum[2];
    float4* at;  // every 256th is a thread's

    __device__ __forceinline__ void clear() {
        sum[0] = sum[1] = 0.f;
#pragma unroll
        for (int i = 0; i < 16; i++) at[i * 256] = make_float4(0.f, 0.f, 0.f, 0.f);
    }

    __device__ __forceinline__ void add(const float (&acc)[68], float (&shrink)[2]) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float4 x = at[i * 256];
            x.x = fmaf(x.x, shrink[0], acc[i * 4]), x.y = fmaf(x.y, shrink[0], acc[i * 4 + 1]);
            x.z = fmaf(x.z, shrink[1], acc[i * 4 + 2]), x.w = fmaf(x.w, shrink[1], acc[i * 4 + 3]);
            at[i * 256] = x;
        }
#pragma unroll
        for (int r = 0; r < 2; r++) sum[r] = fmaf(sum[r], shrink[r], acc[64 + r * 2]), shrink[r] = 1.f;
    }

    __device__ __forceinline__ void read(float (&to)[64]) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float4 x = at[i * 256];
            to[i * 4] = x.x, to[i * 4 + 1] = x.y, to[i * 4 + 2] = x.z, to[i * 4 + 3] = x.w;
        }
    }
};

// Entries of all lists that a program takes in its `turn`; false after the last.
__device__ __forceinline__ bool take(int turn, int units, int length, int& begin, int& end) {
    int programs = gridDim.x, whole = units / programs, first = whole * programs * length;
    if (turn < whole) {
        begin = (turn * programs + blockIdx.x) * length, end = begin + length;
    } else {
        int rest = units % programs * length, sharers = min(programs, rest), i = min((int)blockIdx.x, sharers);
        begin = end = first;
        if (i < sharers) begin += (int)((long long)rest * i / sharers), end += (int)((long long)rest * (i + 1) / sharers);
    }
    return turn <= whole;
}

// A warp brings the bias of tiles, in units of products and in the order of threads, and whether there is any.
__device__ __forceinline__ void bring_bias(
    Ring& at_k, char* slots, u32 full_k, u32 empty_k, const float* biases, const int* lists, int begin, int end, int query_tiles,
    int tiles, int length) {
    int lane = threadIdx.x % 32;
    auto look = [&](int entry) {
        int unit = entry / length;
        u64 tile = (u64)(unit / query_tiles) * tiles + (lists ? lists[entry] : entry - unit * length);
        return ((const float4*)biases)[tile * 32 + lane];
    };
    if (begin == end) return;
    float4 next = look(begin);
    for (int entry = begin; entry < end; entry++) {
        float4 x = next;
        if (entry + 1 < end) next = look(entry + 1);
        await(empty_k + at_k.slot * 8, at_k.parity ^ 1);
        float* slot = (float*)(slots + at_k.slot * BIAS_SLOT);
        bool any = __any_sync(~0u, x.x != 0.f || x.y != 0.f || x.z != 0.f || x.w != 0.f);
        // Lane 2b + h has columns 8b + 4h and so on: what lanes 2h and 2h + 1 of a row take of b.
        float* to = slot + lane / 4 * 16 + lane % 2 * 8 + lane / 2 % 2 * 2;
        *(float2*)to = make_float2(x.x * (1.f / FACTOR), x.y * (1.f / FACTOR));
        *(float2*)(to + 4) = make_float2(x.z * (1.f / FACTOR), x.w * (1.f / FACTOR));
        if (lane < 2) *(int*)(slot + 128 + lane * 64) = any;
        arrive(full_k + at_k.slot * 8);
        at_k.turn();
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) attend(
    const char* queries, const char* keys, const char* values, const float* biases, const int* lists, uint4* out, float* lse,
    float* parts, int heads, int query_tiles, int num_queries, int tiles, int length, int lse_query, int lse_head) {
    extern __shared__ __align__(1024) char room[];
    __shared__ __align__(8) u64 barriers[4 * STAGES + 2];
    char* base_at = room + (1024 - (address(room) & 1023)) % 1024;
    char* bias_at = base_at + TILE + STAGES * (TILE + V_SLOT);
    u32 q_at = address(base_at), k_at = q_at + TILE, v_at = k_at + STAGES * TILE;
    u32 full_k = address(barriers), full_v = full_k + STAGES * 8, empty_k = full_v + STAGES * 8, empty_v = empty_k + STAGES * 8;
    u32 full_q = empty_v + STAGES * 8, empty_q = full_q + 8;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4 * STAGES + 2; i++) {
            u32 count = i < STAGES ? 33 : i < 2 * STAGES || i == 4 * STAGES ? 1 : 8;  // tile and lanes of bias; a lane a warp
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(full_k + i * 8), "r"(count) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    for (int i = threadIdx.x; i < STAGES * 256; i += 384)  // ones behind values
        *(u32*)(base_at + (v_at - q_at) + i / 256 * V_SLOT + TILE + i % 256 * 4) = 0x38383838u;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    int units = heads * query_tiles, begin, end;
    Ring at_k, at_v;
    u32 parity_q = 0;

    // Registers go from the four warps that bring tiles to the eight that multiply; all have 168 before.
    if (warp >= 8) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == 9) {
            for (int turn = 0; take(turn, units, length, begin, end); turn++)
                bring_bias(at_k, bias_at, full_k, empty_k, biases, lists, begin, end, query_tiles, tiles, length);
        }
        if (threadIdx.x != 256) return;
        for (int turn = 0; take(turn, units, length, begin, end); turn++) {
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
                    expect(full_k + at_k.slot * 8, TILE);
                    bring(k_at + at_k.slot * TILE, keys + tile * TILE, TILE, full_k + at_k.slot * 8);
                    at_k.turn();
                    await(empty_v + at_v.slot * 8, at_v.parity ^ 1);
                    expect(full_v + at_v.slot * 8, TILE);
                    bring(v_at + at_v.slot * V_SLOT, values + tile * TILE, TILE, full_v + at_v.slot * 8);
                    at_v.turn();
                }
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    u32 a[16];
    Total kept;
    kept.at = (float4*)(bias_at + STAGES * BIAS_SLOT) + threadIdx.x;
    for (int turn = 0; take(turn, units, length, begin, end); turn++) {
        for (int entry = begin; entry < end;) {
            int unit = entry / length, first = unit * length, stop = min(end, first + length);
            bool is_whole = stop - entry == length, begins = entry == first;
            float s0[32], s1[32], acc[68], base[2] = {LOWEST, LOWEST}, shrink[2] = {1.f, 1.f}, by[2] = {1.f, 1.f};
            u32 p0[8], p1[8];
#pragma unroll
            for (int i = 0; i < 68; i++) acc[i] = 0.f;
            hold(acc);  // set before products begin, or the compiler lets none overlap
            kept.clear();
            await(full_q, parity_q);
            parity_q ^= 1;
            take_queries(a, base_at);
            __syncwarp();
            if (lane == 0) arrive(empty_q);
            await(full_k + at_k.slot * 8, at_k.parity);
            const float* bias = (const float*)(bias_at + at_k.slot * BIAS_SLOT);
            u32 keys_at = k_at + at_k.slot * TILE;
            int adds = start(s0, bias);
            start(s1, bias + 64);
            fence();
            multiply_qk(s0, a, keys_at, adds);
            commit();
            finish<0>();
            fence();
            multiply_qk(s1, a, keys_at + TILE / 2, adds);
            commit();
            int since = 0, used_v = -1;
#pragma unroll 1
            for (; entry < stop; entry++) {
                finish<2>();
                hold(s0);
                bool over = soften(s0, p0, base);
                if (over) {
                    rise(s0, base, by);
                    soften(s0, p0, base);
                }
                finish<1>();  // behind a branch on p, or the compiler waits before it works out p
                hold(acc);
                if (over) lower(acc, shrink, by);
                if (lane == 0 && used_v >= 0) arrive(empty_v + used_v * 8);
                if (since == PROMOTE) {
                    kept.add(acc, shrink);
                    since = 0;
                }
                int slot = at_k.slot;
                bool more = entry + 1 < stop;
                // After the last tile its own keys are multiplied once more, for nothing: a way less.
                if (more) at_k.turn(), await(full_k + at_k.slot * 8, at_k.parity);
                bias = (const float*)(bias_at + at_k.slot * BIAS_SLOT);
                keys_at = k_at + at_k.slot * TILE;
                adds = start(s0, bias);
                await(full_v + at_v.slot * 8, at_v.parity);
                u32 values_at = v_at + at_v.slot * V_SLOT;
                fence();
                multiply_pv(acc, p0, values_at, since);
                commit();
                multiply_qk(s0, a, keys_at, adds);
                commit();
                finish<2>();
                hold(s1);
                over = soften(s1, p1, base);
                if (over) {
                    rise(s1, base, by);
                    soften(s1, p1, base);
                }
                finish<1>();
                hold(acc);
                if (over) lower(acc, shrink, by);
                if (lane == 0 && more) arrive(empty_k + slot * 8);
                start(s1, bias + 64);
                fence();
                multiply_pv(acc, p1, values_at + 64, 1);
                commit();
                multiply_qk(s1, a, keys_at + TILE / 2, adds);
                commit();
                since++;
                used_v = at_v.slot;
                at_v.turn();
            }
            finish<0>();
            hold(s0), hold(s1), hold(acc);
            if (lane == 0) arrive(empty_k + at_k.slot * 8), arrive(empty_v + used_v * 8);
            at_k.turn();
            kept.add(acc, shrink);
            float o[64];
            kept.read(o);
            if (is_whole) {
                Job job = {unit / query_tiles, unit % query_tiles, heads, num_queries, lse_query, lse_head};
                store(o, base, kept.sum, job, out, lse);
            } else {
                float* part = parts + (blockIdx.x * 2 + begins) * PART + threadIdx.x;
#pragma unroll
                for (int i = 0; i < 64; i++) part[i * 256] = o[i];
#pragma unroll
                for (int r = 0; r < 2; r++) part[(64 + r) * 256] = base[r], part[(66 + r) * 256] = kept.sum[r];
            }
        }
    }
}

// Tiles of queries whose lists were shared by several of attend()'s programs, each by a program of 256 threads.
extern "C" __global__ void __launch_bounds__(256, 2) join(
    const float* parts, uint4* out, float* lse, int heads, int query_tiles, int num_queries, int length, int programs,
    int lse_query, int lse_head) {
    int units = heads * query_tiles, unit = units / programs * programs + blockIdx.x;
    long long total = (long long)(units % programs) * length, first = (long long)blockIdx.x * length;
    programs = (int)min((long long)programs, total);  // that shared
    int from = (int)(((first + 1) * programs - 1) / total), to = (int)(((first + length) * programs - 1) / total);
    if (from == to) return;
    float o[64], base[2] = {LOWEST, LOWEST}, sum[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 64; i++) o[i] = 0.f;
    for (int program = from; program <= to; program++) {
        bool begins = total * program / programs <= first;
        const float* part = parts + (program * 2 + begins) * PART + threadIdx.x;
        float old[2], fresh[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float other = part[(64 + r) * 256], best = fmaxf(base[r], other);
            old[r] = exp2_of(base[r] - best), fresh[r] = exp2_of(other - best);
            base[r] = best, sum[r] = sum[r] * old[r] + part[(66 + r) * 256] * fresh[r];
        }
#pragma unroll
        for (int i = 0; i < 64; i++) o[i] = o[i] * old[i / 2 % 2] + part[i * 256] * fresh[i / 2 % 2];
    }
    store(o, base, sum, {unit / query_tiles, unit % query_tiles, heads, num_queries, lse_query, lse_head}, out, lse);
}
