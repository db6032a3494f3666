// New keys of a tile of 128 against older keys of its near tiles, which lie as codes of 4 bits in groups of 32 and after
// RoPE: what `near_tiles` of triton_near.py finds, for heads of 128 channels, to the bit. Behind hopper.cuh and
// codes_of_4.cuh.
//
// Most of it is to turn keys back. A thread does so with a whole key: nothing is exchanged, and what a channel turns by
// stands in the instruction. Then two groups of four warps compare 64 new keys each with those of all threads, while the
// other program of the multiprocessor turns back.
//
// Defined by whoever compiles, beside what those ask for: of each pair of channels AXIS and FREQUENCY, 64 numbers each;
// and wgmma_all(), the product of 64 rows in registers by 64.
constexpr int TILE = 128, THREADS = 256, KEYS = 64, HALF_BYTES = KEYS * 128, KEYS_BYTES = 2 * HALF_BYTES;
#define NONE __int_as_float(0xFF800000)

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

// Of a key: codes, largest channels, where it is, and whether it is there.
struct Key {
    u32 word[16];
    uint2 largest;
    float place[3];
    bool live;
};

struct History {
    const uint4* code;
    const uint2* largest;
    const float* position;
    const int* m;
    long long row, row_m;  // of a head's first slot
};

__device__ __forceinline__ void load_key(Key& key, const History& of, int slot, int start) {
    long long row = of.row + slot;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint4 four = of.code[row * 4 + i];
        key.word[4 * i] = four.x, key.word[4 * i + 1] = four.y, key.word[4 * i + 2] = four.z, key.word[4 * i + 3] = four.w;
    }
    key.largest = of.largest[row];
#pragma unroll
    for (int i = 0; i < 3; i++) key.place[i] = of.position[row * 3 + i];
    key.live = of.m[of.row_m + slot] > 0 && slot < start;
}

// Channels of a word of codes, two as bfloat16 at once: even and odd ones of the first half, then of the second.
struct Channels { u32 even_a, odd_a, even_b, odd_b; };

__device__ __forceinline__ Channels decode(u32 word, Step first, Step second) {
    return {scale_both(word, first), scale_both(word >> 8, first), scale_both(word >> 4, second), scale_both(word >> 12, second)};
}

__device__ __forceinline__ float square_both(float a, float b) { return __fmaf_rn(a, a, __fmul_rn(b, b)); }

__device__ __forceinline__ float squares_of(const Channels& x) {
    float first = __fadd_rn(square_both(low(x.even_a), low(x.odd_a)), square_both(low(x.even_b), low(x.odd_b)));
    return __fadd_rn(first, __fadd_rn(square_both(high(x.even_a), high(x.odd_a)), square_both(high(x.even_b), high(x.odd_b))));
}

// Neighbours first.
template <int NUM> __device__ __forceinline__ float add_squares(const Channels* x) {
    if constexpr (NUM == 1) return squares_of(*x);
    else return __fadd_rn(add_squares<NUM / 2>(x), add_squares<NUM / 2>(x + NUM / 2));
}

template <int PAIR>
__device__ __forceinline__ void turn_pair(float& even, float& odd, const float (&place)[3], float scale) {
    float sin, cos;
    constexpr Turn turn = turn_of<PAIR>();
    sin_cos(__fmul_rn(place[turn.axis], turn.frequency), sin, cos);
    sin = __fmul_rn(sin, scale), cos = __fmul_rn(cos, scale);
    float x = even;
    even = __fmaf_rn(x, cos, __fmul_rn(odd, sin)), odd = __fmaf_rn(odd, cos, -__fmul_rn(x, sin));
}

// Two pairs of neighbours, turned back, in place.
template <int PAIR>
__device__ __forceinline__ void turn_both(u32& even, u32& odd, const float (&place)[3], float scale) {
    float x[2] = {low(even), high(even)}, y[2] = {low(odd), high(odd)};
    turn_pair<PAIR>(x[0], y[0], place, scale);
    turn_pair<PAIR + 1>(x[1], y[1], place, scale);
    even = round_pair(x[0], x[1]), odd = round_pair(y[0], y[1]);
}

__device__ __forceinline__ void store_four(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Four words of channels from 16 * PART on; even channels lie first, those of the first half before the second's.
template <int PART>
__device__ __forceinline__ void turn_words(Channels (&x)[16], const float (&place)[3], float scale, u32 to, int row) {
    Channels* at = x + 4 * PART;
    turn_both<8 * PART>(at[0].even_a, at[0].odd_a, place, scale);
    turn_both<8 * PART + 2>(at[1].even_a, at[1].odd_a, place, scale);
    turn_both<8 * PART + 4>(at[2].even_a, at[2].odd_a, place, scale);
    turn_both<8 * PART + 6>(at[3].even_a, at[3].odd_a, place, scale);
    turn_both<32 + 8 * PART>(at[0].even_b, at[0].odd_b, place, scale);
    turn_both<32 + 8 * PART + 2>(at[1].even_b, at[1].odd_b, place, scale);
    turn_both<32 + 8 * PART + 4>(at[2].even_b, at[2].odd_b, place, scale);
    turn_both<32 + 8 * PART + 6>(at[3].even_b, at[3].odd_b, place, scale);
    u32 first = to + (PART ^ row % 8) * 16, second = to + ((PART + 4) ^ row % 8) * 16;
    store_four(first, at[0].even_a, at[1].even_a, at[2].even_a, at[3].even_a);
    store_four(first + HALF_BYTES, at[0].odd_a, at[1].odd_a, at[2].odd_a, at[3].odd_a);
    store_four(second, at[0].even_b, at[1].even_b, at[2].even_b, at[3].even_b);
    store_four(second + HALF_BYTES, at[0].odd_b, at[1].odd_b, at[2].odd_b, at[3].odd_b);
}

// A key before RoPE, of length 1, as new keys lie, to row `row` of 64; one that is not there is no number.
__device__ __forceinline__ void turn_back(Key& key, u32 to, int row) {
    Channels x[16];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        Step first = split_step(half ? key.largest.x >> 16 : key.largest.x & 0xFFFFu);
        Step second = split_step(half ? key.largest.y >> 16 : key.largest.y & 0xFFFFu);
#pragma unroll
        for (int i = half * 8; i < half * 8 + 8; i++) x[i] = decode(key.word[i], first, second);
    }
    float length, scale;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(length) : "f"(fmaxf(add_squares<16>(x), 1e-24f)));
    asm("div.full.f32 %0, %1, %2;" : "=f"(scale) : "f"(1.0f), "f"(length));
    if (!key.live) scale = __int_as_float(0x7FC00000);
    // Channels are taken out of words anew: kept from when squares were added up they would not fit into registers.
#pragma unroll
    for (int i = 0; i < 16; i++)
        asm volatile("" : "+r"(x[i].even_a), "+r"(x[i].odd_a), "+r"(x[i].even_b), "+r"(x[i].odd_b));
#pragma unroll
    for (int i = 0; i < 3; i++) asm volatile("" : "+f"(key.place[i]));
    to += row * 128;
    // In turn, however independent: all at once would not fit into registers.
#pragma unroll 1
    for (int part = 0; part < 4; part++) {
        if (part == 0) turn_words<0>(x, key.place, scale, to, row);
        else if (part == 1) turn_words<1>(x, key.place, scale, to, row);
        else if (part == 2) turn_words<2>(x, key.place, scale, to, row);
        else turn_words<3>(x, key.place, scale, to, row);
    }
}

// New keys of a thread as a product takes them from registers; those that are not new are the nearest that is.
__device__ __forceinline__ void load_own(u32 (&a)[32], const u32* unit, int first, int from, int to) {
    int lane = threadIdx.x % 32, q = lane % 4, row = first + threadIdx.x / 32 * 16 + lane / 4;
    const u32* at[2];
#pragma unroll
    for (int r = 0; r < 2; r++) at[r] = unit + (long long)max(from, min(row + r * 8, to - 1)) * 64 + q;
#pragma unroll
    for (int i = 0; i < 32; i++) a[i] = at[i % 2][i / 2 * 4];
}

// The highest so far of a thread's columns of two rows, and which of those listed it was.
struct Best {
    float high[2] = {NONE, NONE};
    int listed[2] = {0, 0};

    // Of equal ones the first is kept; what is no number is never higher.
    __device__ __forceinline__ void keep(const float (&product)[32], int first) {
        float before[2] = {high[0], high[1]};
        int column[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 32; i++) {
            int r = i / 2 % 2;
            column[r] = product[i] > high[r] ? i / 4 * 8 + i % 2 : column[r];
            high[r] = fmaxf(high[r], product[i]);
        }
#pragma unroll
        for (int r = 0; r < 2; r++)
            if (high[r] > before[r]) listed[r] = first + column[r];
    }
};

// A program takes the new keys of a tile of a head: heads side by side have programs of the same tile.
extern "C" __global__ void __launch_bounds__(THREADS, 2) near_keys(
    const uint4* __restrict__ code, const uint2* __restrict__ largest, const float* __restrict__ position,
    const int* __restrict__ m, const u32* __restrict__ unit, const int* __restrict__ chosen,
    const int* __restrict__ found, const float* __restrict__ best, int* __restrict__ partner,
    long long code_slots, long long stride_m, long long stride_partner, int num_own, int first_tile, int before, int start,
    int stop, int num_chosen) {
    extern __shared__ __align__(1024) char room[];
    u32 keys_at = (address(room) + 1023) / 1024 * 1024;
    int own_tile = blockIdx.x % num_own, group = threadIdx.x / 128, lane = threadIdx.x % 32;
    long long head = blockIdx.x / num_own;
    History of = {code, largest, position, m, head * code_slots, head * stride_m};
    chosen += (long long)blockIdx.x * num_chosen;
    unit += head * (stop - before) * 64;
    int first_own = (first_tile + own_tile) * TILE, total = num_chosen * TILE;
    Best kept;
    Key key;
    if (threadIdx.x < total) load_key(key, of, chosen[threadIdx.x / TILE] * TILE + threadIdx.x % TILE, start);
#pragma unroll 1
    for (int listed = 0; listed < total; listed += THREADS) {
        int mine = listed + threadIdx.x;
        if (mine < total) turn_back(key, keys_at + threadIdx.x / KEYS * KEYS_BYTES, threadIdx.x % KEYS);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        u32 a[32];
        load_own(a, unit, first_own - before, start - before, stop - before);
        mine += THREADS;
        if (mine < total) load_key(key, of, chosen[mine / TILE] * TILE + mine % TILE, start);
        int blocks = min(THREADS, total - listed) / KEYS;
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
            float product[32];
            u64 others = describe(keys_at + block * KEYS_BYTES, 1024, 16, 1);
            fence();
#pragma unroll
            for (int k = 0; k < 8; k++)
                wgmma_all(product, a[k * 4], a[k * 4 + 1], a[k * 4 + 2], a[k * 4 + 3],
                          others + k / 4 * (HALF_BYTES >> 4) + k % 4 * 2, k > 0);
            commit();
            finish<0>();
            hold(product);
            kept.keep(product, listed + block * KEYS);
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float most = kept.high[r];
        int place = kept.listed[r];
        if (num_chosen > 0) place = chosen[place / TILE] * TILE + place % TILE + lane % 4 * 2;
#pragma unroll
        for (int step = 1; step < 4; step *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        place = kept.high[r] == most ? place : 0x7FFFFFFF;
#pragma unroll
        for (int step = 1; step < 4; step *= 2) place = min(place, __shfl_xor_sync(~0u, place, step));
        int own = first_own + threadIdx.x / 32 * 16 + lane / 4 + r * 8;
        if (lane % 4 == 0 && own >= start && own < stop) {
            long long at = head * (stop - start) + own - start;
            float other = best[at];
            bool nobody = fmaxf(most, other) == NONE;
            partner[head * stride_partner + own] = nobody ? -1 : most > other ? place : found[at];
        }
    }
}
