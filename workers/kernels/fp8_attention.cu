// Attention of 128 queries at a time to listed tiles of 128 keys for compute capability 9.0, products in 8 bits (e4m3),
// head dimension 128. Tiles lie in memory as tensor cores read them (see coded_tiles.py), so plain bulk copies bring them.
//
// Two groups of four warps have 64 queries each, a ninth warp brings tiles. The groups take turns: while one turns logits
// into p, tensor cores multiply the other's queries with its next keys and its p with values. Warps that begin a product
// out of registers are held until it has read these, so no group does both at once. p is relative to a base of the row,
// not to its highest logit so far: that of the first tile is looked for, and another only if some p did not fit into 8
// bits; then the base rises. Log m of keys is a product too: of four codes with the same numbers for all queries. Rows of
// ones behind the values sum p up.
// Each program takes whole lists while there are as many as programs, so that all are at like places of memory; what is
// left is shared evenly: what a program has of a list then goes to `parts`, and join() adds the parts up.
// Registers have the queries, shared memory what was added up.
//
// Defined by whoever compiles: STAGES of tiles in shared memory; PROMOTE, tiles after which products are added to the
// rest outside of tensor cores, which keep fewer bits of a sum; FACTOR, from products to logits in base 2; V_SCALE; MASSES,
// what codes of log m are multiplied by, as four codes; and the products wgmma_qk() of 64 rows by 128, wgmma_pv() by 136.

constexpr int TILE = 16384, MASS = 2048, V_SLOT = TILE + 1024;  // log m of keys; values with rows of ones
constexpr int K_SLOT = TILE + MASS;
constexpr int PART = 68 * 256;  // a part: 64 sums, two bases, two sums of p of a thread
constexpr float TARGET = 6.f, MOST = 362.f;  // a rising base takes the highest p to 2^TARGET; e4m3 ends at 448
constexpr float LOWEST = -60.f;  // of bases: float32 has p from 2^-66 to 2^127 of logits, and those of absent keys are 0
constexpr int WORDS = 16, EARLY = 10;  // of p of a thread; whose p are worked out while those before are multiplied
#define NONE __int_as_float(0xFF800000)

// Rows of 128 bytes, swizzled, eight of them 1024 bytes from the next eight.
__device__ __forceinline__ u64 describe(u32 start) { return describe(start, 1024, 16, 1); }

__device__ __forceinline__ float highest_of_row(float x) {  // over its four lanes
#pragma unroll
    for (int step = 1; step < 4; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// Keys of a tile of values lie so that a thread's own columns are what a product takes from it: columns 8i + 2q and the
// next of rows g and g + 8. Word i of p is of row i % 2.
__device__ __forceinline__ int first_of(int word) { return word / 4 * 16 + word / 2 % 2 * 8 + word % 2 * 2; }

// Logits of a word become p relative to the base, in place.
__device__ __forceinline__ void soften(float (&s)[64], int word, const float (&base)[2]) {
    float* x = s + first_of(word);
#pragma unroll
    for (int j = 0; j < 4; j++) x[j / 2 * 4 + j % 2] = exp2_of(fmaf(x[j / 2 * 4 + j % 2], FACTOR, -base[word % 2]));
}

__device__ __forceinline__ u32 to_word(const float (&s)[64], int word) {
    const float* x = s + first_of(word);
    return code_four(x[0], x[1], x[4], x[5]);
}

__device__ __forceinline__ u32 flag_largest(u32 word) { return word + 0x02020202u; }  // 0x7E is the largest

// Rows whose p do not fit get a higher base; `by` is what comes off all that was added up before.
__device__ __forceinline__ void rise(float (&s)[64], float (&base)[2], float (&by)[2]) {
    float high[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 64; i++) high[i / 2 % 2] = fmaxf(high[i / 2 % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float most = highest_of_row(high[r]), up = most > MOST ? ceilf(log2f(fminf(most, 1e38f))) - TARGET : 0.f;
        by[r] = exp2_of(-up);
        base[r] += up;
    }
#pragma unroll
    for (int i = 0; i < 64; i++) s[i] *= by[i / 2 % 2];
}

// Bases by the logits of a first tile.
__device__ __forceinline__ void find_base(const float (&s)[64], float (&base)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float high = NONE;
#pragma unroll
        for (int b = 0; b < 16; b++) high = fmaxf(high, fmaxf(s[b * 4 + r * 2], s[b * 4 + r * 2 + 1]));
        base[r] = fmaxf(ceilf(highest_of_row(high) * FACTOR) - TARGET, LOWEST);
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
            for (int i = 0; i < 4; i++)
                word[i] = round_pair(o[(b + i) * 4 + r * 2] * scale, o[(b + i) * 4 + r * 2 + 1] * scale);
            transpose(word, q);
            if (query < job.num_queries) out[row * 16 + b + q] = make_uint4(word[0], word[1], word[2], word[3]);
        }
        if (q == 0 && query < job.num_queries)
            lse[query * job.lse_query + job.head * job.lse_head] =
                sum[r] > 0.f ? (base[r] + log2f(sum[r])) * 0.6931471805599453f : NONE;
    }
}

struct Ring {
    int slot = 0;
    u32 parity = 0;
    __device__ __forceinline__ void turn() { if (++slot == STAGES) slot = 0, parity ^= 1; }
};

// Queries of a thread as a product takes them from registers.
__device__ __forceinline__ void take_queries(u32 (&a)[20], const char* queries) {
    int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    queries += (threadIdx.x / 32 * 16 + g) * 128 + q * 4;
#pragma unroll
    for (int i = 0; i < 16; i++) a[i] = *(const u32*)(queries + i % 2 * 1024 + ((i / 4 * 2 + i / 2 % 2) ^ g) * 16);
}

// Queries, and behind them the same numbers for log m, times keys; there a row is 16 bytes, read twice and once times 0.
__device__ __forceinline__ void multiply_qk(float (&s)[64], const u32 (&a)[20], u32 k_at) {
    u64 keys = describe(k_at);
#pragma unroll
    for (int k = 0; k < 5; k++)
        wgmma_qk(
            s, a[k * 4], a[k * 4 + 1], a[k * 4 + 2], a[k * 4 + 3],
            k < 4 ? keys + k * 2 : describe(k_at + TILE, 128, 0, 0), k > 0);
    commit();
}

__device__ __forceinline__ void multiply_pv(float (&acc)[68], const u32 (&p)[WORDS], u32 v_at, int adds) {
    u64 values = describe(v_at);
#pragma unroll
    for (int k = 0; k < 4; k++)
        wgmma_pv(acc, p[k * 4], p[k * 4 + 1], p[k * 4 + 2], p[k * 4 + 3], values + k * 2, k ? 1 : adds);
    commit();
}

// Products still read p: registers that are read later are not used for anything else. Never stored.
__device__ __forceinline__ void keep(const u32 (&p)[WORDS], u32 room, int never) {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4)
        asm volatile("{\n.reg .pred q;\nsetp.ne.b32 q, %5, 0;\n@q st.shared.v4.b32 [%4], {%0, %1, %2, %3};\n}"
            ::"r"(p[i]), "r"(p[i + 1]), "r"(p[i + 2]), "r"(p[i + 3]), "r"(room), "r"(never) : "memory");
}

// Of the two groups one at a time begins products; group 0 has the first turn.
__device__ __forceinline__ void await_turn(int group) { asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory"); }
__device__ __forceinline__ void end_turn(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(2 - group) : "memory"); }

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

extern "C" __global__ void __launch_bounds__(384, 1) attend(
    const char* queries, const char* keys, const char* values, const char* masses, const int* lists, uint4* out, float* lse,
    float* parts, int heads, int query_tiles, int num_queries, int tiles, int length, int lse_query, int lse_head) {
    extern __shared__ __align__(1024) char room[];
    __shared__ __align__(8) u64 barriers[4 * STAGES + 2];
    char* base_at = room + (1024 - (address(room) & 1023)) % 1024;
    u32 q_at = address(base_at), k_at = q_at + TILE, v_at = k_at + STAGES * K_SLOT;
    u32 full_k = address(barriers), full_v = full_k + STAGES * 8, empty_k = full_v + STAGES * 8, empty_v = empty_k + STAGES * 8;
    u32 full_q = empty_v + STAGES * 8, empty_q = full_q + 8;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4 * STAGES + 2; i++) {
            u32 count = i < 2 * STAGES || i == 4 * STAGES ? 1 : 8;  // who brings; a lane a warp
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
                    expect(full_k + at_k.slot * 8, K_SLOT);
                    bring(k_at + at_k.slot * K_SLOT, keys + tile * TILE, TILE, full_k + at_k.slot * 8);
                    bring(k_at + at_k.slot * K_SLOT + TILE, masses + tile * MASS, MASS, full_k + at_k.slot * 8);
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
    u32 a[20];
    int group = warp / 4;
    if (group == 1) end_turn(group);
    Total kept;
    kept.at = (float4*)(base_at + TILE + STAGES * (K_SLOT + V_SLOT)) + threadIdx.x;
#pragma unroll
    for (int i = 16; i < 20; i++)  // volatile: in four registers of their own
        asm volatile("mov.b32 %0, %1;" : "=r"(a[i]) : "r"(i < 18 && lane % 4 == 0 ? MASSES : 0));
    for (int turn = 0; take(turn, units, length, begin, end); turn++) {
        for (int entry = begin; entry < end;) {
            int unit = entry / length, first = unit * length, stop = min(end, first + length);
            bool is_whole = stop - entry == length, begins = entry == first;
            float s[64], acc[68], base[2], shrink[2] = {1.f, 1.f};
            u32 p[WORDS];
#pragma unroll
            for (int i = 0; i < 68; i++) acc[i] = 0.f;
#pragma unroll
            for (int i = 0; i < 64; i++) s[i] = 0.f;
#pragma unroll
            for (int i = 0; i < WORDS; i++) p[i] = 0;
            hold(acc), hold(s);  // set before products begin, or the compiler lets none overlap
            kept.clear();
            await(full_q, parity_q);
            parity_q ^= 1;
            take_queries(a, base_at);
            __syncwarp();
            if (lane == 0) arrive(empty_q);
            await(full_k + at_k.slot * 8, at_k.parity);
            fence();
            multiply_qk(s, a, k_at + at_k.slot * K_SLOT);
            finish<0>();
            hold(s);
            find_base(s, base);
            int since = 0, used_v = -1;
#pragma unroll 1
            for (; entry < stop; entry++) {
                finish<1>();
                hold(s);
                if (lane == 0) arrive(empty_k + at_k.slot * 8);
#pragma unroll
                for (int i = 0; i < EARLY; i++) soften(s, i, base);
                finish<0>();
                hold(acc);
                keep(p, full_k, heads >> 31);
                if (lane == 0 && used_v >= 0) arrive(empty_v + used_v * 8);
                u32 over = 0;
                int done = 0;
#pragma unroll
                for (int i = EARLY; i < WORDS; i++) {
                    soften(s, i, base);
#pragma unroll
                    for (; done < (i - EARLY + 1) * 3; done++) p[done] = to_word(s, done), over |= flag_largest(p[done]);
                }
#pragma unroll
                for (; done < WORDS; done++) p[done] = to_word(s, done), over |= flag_largest(p[done]);
                if (__any_sync(~0u, over & 0x80808080u)) {
                    float by[2];
                    rise(s, base, by);
#pragma unroll
                    for (int i = 0; i < WORDS; i++) p[i] = to_word(s, i);
                    lower(acc, shrink, by);
                }
                at_k.turn();
                if (since == PROMOTE) {
                    kept.add(acc, shrink);
                    since = 0;
                }
                await_turn(group);
                if (entry + 1 < stop) {
                    await(full_k + at_k.slot * 8, at_k.parity);
                    fence();
                    multiply_qk(s, a, k_at + at_k.slot * K_SLOT);
                }
                await(full_v + at_v.slot * 8, at_v.parity);
                fence();
                multiply_pv(acc, p, v_at + at_v.slot * V_SLOT, since);
                end_turn(group);
                since++;
                used_v = at_v.slot;
                at_v.turn();
            }
            finish<0>();
            hold(s), hold(acc);
            if (lane == 0) arrive(empty_v + used_v * 8);
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
