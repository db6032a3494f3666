// What `move_history` of triton_collect.py does with codes of 4 bits of 128 channels in groups of 32, to the bit. A
// block makes a tile of 128 slots; each of its warps reads 32 rows into shared memory and sums their keys by itself:
// half a warp takes a key, a thread a word of its codes, so sums over keys stay in registers. Such a kernel is bound by
// how many instructions it takes: what depends on a key alone (steps, length) is made once a key. Means are made before
// others are waited for. Rows are counted in 32 bits. Behind hopper.cuh and codes_of_4.cuh.
#define TILE 128
#define BLOCKS 7   // of a multiprocessor: with 8, whose threads have fewer registers, or 6 it is slower
#define AT_ONCE 4  // keys of half a warp whose lengths are found together

struct Move {
    uint4 *k_code, *v_code;
    uint2 *k_largest, *v_largest;
    float* position;
    int* m;
    float* weight;
    int* partner;
    float* apart;  // or 0
    u32* log_mass;
    const int *old_partner, *source;
    const long long* added;
    const int *joined, *root, *head_of, *rank;
    int* is_read;
    unsigned short* mean;
    const int* axis;
    const float* frequency;
    int heads, history_slots, num_slots, num_keep;
    float root_dim, no_key;
};

__device__ __forceinline__ int load_now(const int* at) {
    int to;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(to) : "l"(at) : "memory");
    return to;
}

__device__ __forceinline__ void store_after_all(int* at, int x) {
    asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(at), "r"(x) : "memory");
}

__device__ __forceinline__ void copy_later(uint4* to, const uint4* from, bool there) {
    unsigned address = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ float square_root(float x) {
    float to;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(to) : "f"(x));
    return to;
}

// Of one word: channels and those two behind them, even and odd, of the first half of channels and the second.
__device__ __forceinline__ float squares_of(const u32 (&x)[4]) {
    float first = __fadd_rn(square_both(low(x[0]), low(x[1])), square_both(low(x[2]), low(x[3])));
    float second = __fadd_rn(square_both(high(x[0]), high(x[1])), square_both(high(x[2]), high(x[3])));
    return __fadd_rn(first, second);
}

// Numbers of some keys, each summed over half a warp, neighbours first: of the key that a lane's last two bits say.
__device__ __forceinline__ float add_up(const float (&x)[AT_ONCE], int lane) {
    const bool odd = lane & 1, behind = lane & 2;
    float a = __fadd_rn(odd ? x[1] : x[0], __shfl_xor_sync(0xFFFFFFFFu, odd ? x[0] : x[1], 1));
    float b = __fadd_rn(odd ? x[3] : x[2], __shfl_xor_sync(0xFFFFFFFFu, odd ? x[2] : x[3], 1));
    float sum = __fadd_rn(behind ? b : a, __shfl_xor_sync(0xFFFFFFFFu, behind ? a : b, 2));
    sum = __fadd_rn(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, 4));
    return __fadd_rn(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, 8));
}

// A pair of channels turned back, in whole units on top of the bits of 1.5 * 2^23.
__device__ __forceinline__ void add_pair(int& of_even, int& of_odd, float even, float odd, float2 turn, float scale) {
    const float sin = __fmul_rn(turn.x, scale), cos = __fmul_rn(turn.y, scale);
    const float x = __fmaf_rn(even, cos, __fmul_rn(odd, sin)), y = __fmaf_rn(odd, cos, -__fmul_rn(even, sin));
    of_even += __float_as_int(__fmaf_rn(x, 4194304.0f, 12582912.0f));
    of_odd += __float_as_int(__fmaf_rn(y, 4194304.0f, 12582912.0f));
}

// What a block has in shared memory; rows and records are those of its slots as they will be.
struct Shared {
    uint4 k_row[TILE * 4], v_row[TILE * 4], step[TILE * 2];
    uint2 k_largest[TILE], v_largest[TILE];
    float place[TILE * 3];
    int sums[4 * TILE];
    int begun;
};

// Channels of 32 keys of a warp, summed: those of a lane's word, first half and second.
__device__ __forceinline__ void sum_keys(int (&sum)[8], const Shared& here, const Move& a, int warp, int lane) {
    const int word_of = lane % 16, key = warp * 32 + lane / 16;
    const u32* word = (const u32*)here.k_row + key * 16 + word_of;
    const uint4* step = here.step + key * 2 + word_of / 8;
    // Both pairs of the first half turn by the same axis.
    const float *place = here.place + key * 3, *place_a = place + a.axis[2 * word_of];
    const float *place_b = place + a.axis[32 + 2 * word_of], *place_c = place + a.axis[33 + 2 * word_of];
    float frequency[4];
#pragma unroll
    for (int i = 0; i < 4; i++) frequency[i] = a.frequency[i / 2 * 32 + 2 * word_of + i % 2];
#pragma unroll 1
    for (int done = 0; done < 16; done += AT_ONCE) {
        u32 x[AT_ONCE][4];
        float squares[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const u32 codes = word[i * 32];
            const uint4 steps = step[i * 4];
            x[i][0] = scale_both(codes, {steps.x, steps.y}), x[i][1] = scale_both(codes >> 8, {steps.x, steps.y});
            x[i][2] = scale_both(codes >> 4, {steps.z, steps.w}), x[i][3] = scale_both(codes >> 12, {steps.z, steps.w});
            squares[i] = squares_of(x[i]);
        }
        const float scales = divide(1.0f, square_root(fmaxf(add_up(squares, lane), 1e-24f)));
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const float scale = __shfl_sync(0xFFFFFFFFu, scales, lane & 16 | i), at = place_a[i * 6];
            const float2 first = sin_cos(__fmul_rn(at, frequency[0])), second = sin_cos(__fmul_rn(at, frequency[1]));
            add_pair(sum[0], sum[1], low(x[i][0]), low(x[i][1]), first, scale);
            add_pair(sum[2], sum[3], high(x[i][0]), high(x[i][1]), second, scale);
            const float2 third = sin_cos(__fmul_rn(place_b[i * 6], frequency[2]));
            const float2 fourth = sin_cos(__fmul_rn(place_c[i * 6], frequency[3]));
            add_pair(sum[4], sum[5], low(x[i][2]), low(x[i][3]), third, scale);
            add_pair(sum[6], sum[7], high(x[i][2]), high(x[i][3]), fourth, scale);
        }
        word += AT_ONCE * 32, step += AT_ONCE * 4;
        place_a += AT_ONCE * 6, place_b += AT_ONCE * 6, place_c += AT_ONCE * 6;
    }
}

// Sums of a warp, where `mean_of` finds them.
__device__ __forceinline__ void leave_sums(Shared& here, const Move& a, int warp, int lane) {
    int sum[8] = {};
    sum_keys(sum, here, a, warp, lane);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += __shfl_xor_sync(0xFFFFFFFFu, sum[i], 16);
    const bool behind = lane & 16;  // these four channels lie 64 behind those of the other half of the warp
    ((int4*)here.sums)[warp * 32 + lane] = make_int4(
        behind ? sum[4] : sum[0], behind ? sum[5] : sum[1], behind ? sum[6] : sum[2], behind ? sum[7] : sum[3]);
}

// Of a channel.
__device__ __forceinline__ unsigned short mean_of(const Shared& here, int channel) {
    u32 sum = 0u - TILE * 0x4B400000u;
#pragma unroll
    for (int warp = 0; warp < 4; warp++) sum += (u32)here.sums[warp * TILE + channel];
    return (unsigned short)(round_twice(__fmul_rn((float)(int)sum, 1.0f / (4194304.0f * TILE))) & 0xFFFFu);
}

// sqrt(D) log m in two parts, as `store_log_mass` of triton_merge.py.
__device__ __forceinline__ u32 log_mass_of(float mass, bool is_key, float root_dim, float no_key) {
    float x = fmaxf(__fmul_rn(logf(fmaxf(mass, 1e-30f)), root_dim), no_key);
    if (!(is_key && mass > 0)) x = no_key;
    const u32 high = round_twice(x) & 0xFFFFu;
    return high | round_twice(__fsub_rn(x, __uint_as_float(high << 16))) << 16;
}

// Codes of keys and values of a warp's slots; 0 where there is no key.
__device__ __forceinline__ void copy_rows(Shared& here, const Move& a, int held, int slot, int warp, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = i * 8 + lane / 4, of = __shfl_sync(0xFFFFFFFFu, slot, row);
        const int to = (warp * 32 + row) * 4 + lane % 4;
        const int at = (held + max(of, 0)) * 4 + lane % 4;
        copy_later(here.k_row + to, a.k_code + at, of >= 0), copy_later(here.v_row + to, a.v_code + at, of >= 0);
    }
}

// Of a key, for codes in low bits and in high ones.
__device__ __forceinline__ void leave_steps(Shared& here, uint2 most, int t) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const Step low = split_step(most.x >> 16 * i & 0xFFFFu), high = split_step(most.y >> 16 * i & 0xFFFFu);
        here.step[t * 2 + i] = make_uint4(low.near, low.rest, high.near, high.rest);
    }
}

// Codes, largest channels and positions of a tile, where they go.
__device__ __forceinline__ void write_rows(const Move& a, const Shared& here, int held, int piece, int t) {
    const int lane = t % 32, warp = t / 32, place = piece * TILE + t, to = held + place;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = warp * 32 + i * 8 + lane / 4;
        const int at = (held + piece * TILE + row) * 4 + lane % 4;
        if (piece * TILE + row < a.num_keep) {
            a.k_code[at] = here.k_row[row * 4 + lane % 4], a.v_code[at] = here.v_row[row * 4 + lane % 4];
        }
    }
    if (piece * TILE + TILE <= a.num_keep) {
        if (t < TILE * 3 / 4) ((float4*)(a.position + (held + piece * TILE) * 3))[t] = ((const float4*)here.place)[t];
    } else if (place < a.num_keep) {
#pragma unroll
        for (int i = 0; i < 3; i++) a.position[to * 3 + i] = here.place[t * 3 + i];
    }
    if (place < a.num_keep) a.k_largest[to] = here.k_largest[t], a.v_largest[to] = here.v_largest[t];
}

extern "C" __global__ void __launch_bounds__(TILE, BLOCKS) move_rows(const Move a) {
    __shared__ Shared here;
    const int t = threadIdx.x, lane = t % 32, warp = t / 32, pieces = a.history_slots / TILE;
    // Counted as they begin, so those that this one waits for run already.
    if (t == 0) here.begun = atomicAdd(a.is_read + a.heads * pieces, 1);
    __syncthreads();
    const int piece = here.begun / a.heads, head = here.begun % a.heads, place = piece * TILE + t;
    const int held = head * a.history_slots, mine = head * a.num_slots;
    const int slot = place < a.num_keep ? a.source[head * a.num_keep + place] : -1;
    const bool is_key = slot >= 0;
    copy_rows(here, a, held, slot, warp, lane);
    uint2 k_most = make_uint2(0, 0), v_most = make_uint2(0, 0);
    float at[3] = {0, 0, 0}, own = 0, distance = -1;
    int mass = 0, joined = 0, root = -1;
    long long added = 0;
    if (is_key) {
        k_most = a.k_largest[held + slot], v_most = a.v_largest[held + slot];
#pragma unroll
        for (int i = 0; i < 3; i++) at[i] = a.position[(held + slot) * 3 + i];
        mass = a.m[held + slot], own = a.weight[held + slot];
        if (a.apart) distance = a.apart[held + slot];
        joined = a.joined[mine + slot], added = a.added[mine + slot], root = a.root[mine + slot];
    }
    const int shift = a.num_keep - a.rank[mine + a.num_slots - 1] - 1;
    // The first key of these slots goes there, or further behind.
    const int first = a.rank[mine + min(piece * TILE, a.num_slots - 1)] + shift;
    mass += joined;
    const float total = __fadd_rn(own, divide(__ll2float_rn(added), 16777216.0f));
    here.k_largest[t] = k_most, here.v_largest[t] = v_most;
    leave_steps(here, mass > 0 ? k_most : make_uint2(0, 0), t);  // of slots without a key all channels are 0
#pragma unroll
    for (int i = 0; i < 3; i++) here.place[t * 3 + i] = at[i];
    wait_for_copies();
    // What is in registers is there too before others may write.
    asm volatile("" ::"r"(__float_as_uint(total) ^ __float_as_uint(distance)) : "memory");
    __threadfence();
    const bool is_empty = !__syncthreads_or(mass > 0);
    int* is_read = a.is_read + head * pieces;
    if (t == 0) store_after_all(is_read + piece, 1);
    // Nobody writes what partners are found by, so they are looked for on the way.
    const int older = is_key ? a.old_partner[mine + root] : -1;
    const bool is_root = root == slot;
    if (!is_empty) leave_sums(here, a, warp, lane);
    const int newest = older >= 0 ? a.head_of[mine + older] : -1;
    for (int reader = max(first, 0) / TILE + t; reader < piece; reader += TILE)
        while (load_now(is_read + reader) == 0) {}
    __syncthreads();
    write_rows(a, here, held, piece, t);
    const int to = held + place;
    if (place < a.num_slots) {
        a.m[to] = mass, a.weight[to] = is_key ? total : 0.0f;
        a.log_mass[to] = log_mass_of(total, is_key, a.root_dim, a.no_key);
        a.partner[to] = older >= 0 ? a.rank[mine + newest] + shift : -1;
        // Known of a key that follows no other one and whose partner stays.
        if (a.apart) a.apart[to] = is_root && older >= 0 && newest == older ? distance : -1.0f;
    }
    a.mean[held + piece * TILE + t] = is_empty ? 0 : mean_of(here, t);
}
