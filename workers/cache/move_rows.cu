// What `move_history` of triton_collect.py does with codes of 4 bits of 128 channels, and the means of its tiles, to the
// bit: records stay with it. A thread reads a key, as row_distances.cu does, which stands before this text; a block makes
// a tile of 128 slots. Rows wait in shared memory, so what is in registers is the key whose channels are turned back.
//
// Defined by whoever compiles, beside what row_distances.cu asks for: MOVE_BLOCKS, of a multiprocessor.
#define TILE 128

struct Move {
    uint4 *k_code, *v_code;
    uint2 *k_largest, *v_largest;
    const float* position;
    const int *source, *rank;
    int* is_read;
    unsigned short* mean;
    int heads, history_slots, num_slots, num_keep;
};

__device__ __forceinline__ int load_now(const int* at) {
    int to;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(to) : "l"(at) : "memory");
    return to;
}

__device__ __forceinline__ void store_after_all(int* at, int x) {
    asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(at), "r"(x) : "memory");
}

// Where a quarter of a row lies, so that neither four threads of a row nor a thread of each row wait for one another.
__device__ __forceinline__ int quarter_at(int row, int quarter) { return row * 4 + (quarter ^ (row >> 1 & 3)); }

// A channel in whole units, on top of the bits of 1.5 * 2^23, summed over the keys of a warp; one lane keeps it.
template <int CHANNEL> __device__ __forceinline__ void sum_channel(int (&kept)[4], float x) {
    int sum = __reduce_add_sync(0xFFFFFFFFu, __float_as_int(__fmaf_rn(x, 4194304.0f, 12582912.0f)));
    if (threadIdx.x % 32 == CHANNEL % 32) kept[CHANNEL / 32] = sum;
}

// Of the pair of channels in two halves of words, even and odd.
template <int PAIR>
__device__ __forceinline__ void sum_pair(int (&kept)[4], float even, float odd, float scale, const float (&place)[3]) {
    constexpr Turn turn = turn_of<PAIR>();
    float sin, cos;
    sin_cos(__fmul_rn(place[turn.axis], turn.frequency), sin, cos);
    sin = __fmul_rn(sin, scale), cos = __fmul_rn(cos, scale);
    sum_channel<2 * PAIR>(kept, __fmaf_rn(even, cos, __fmul_rn(odd, sin)));
    sum_channel<2 * PAIR + 1>(kept, __fmaf_rn(odd, cos, -__fmul_rn(even, sin)));
}

// Two channels at a time: channel and the one two behind it, as `decode_word` finds them before it parts them.
__device__ __forceinline__ float low_of(u32 both) { return __uint_as_float(both << 16); }
__device__ __forceinline__ float high_of(u32 both) { return __uint_as_float(both & 0xFFFF0000u); }

template <int FIRST, int NUM> __device__ __forceinline__ float squares_of(const u32 (&both)[64]) {
    if constexpr (NUM == 1) {
        const u32 *x = both + 4 * FIRST;
        float first = __fadd_rn(square_both(low_of(x[0]), low_of(x[1])), square_both(low_of(x[2]), low_of(x[3])));
        float second = __fadd_rn(square_both(high_of(x[0]), high_of(x[1])), square_both(high_of(x[2]), high_of(x[3])));
        return __fadd_rn(first, second);
    } else return __fadd_rn(squares_of<FIRST, NUM / 2>(both), squares_of<FIRST + NUM / 2, NUM / 2>(both));
}

template <int WORD>
__device__ __forceinline__ void sum_words(int (&kept)[4], const u32 (&both)[64], float scale, const float (&place)[3]) {
    const u32 *x = both + 4 * WORD;
    sum_pair<2 * WORD>(kept, low_of(x[0]), low_of(x[1]), scale, place);
    sum_pair<2 * WORD + 1>(kept, high_of(x[0]), high_of(x[1]), scale, place);
    sum_pair<32 + 2 * WORD>(kept, low_of(x[2]), low_of(x[3]), scale, place);
    sum_pair<32 + 2 * WORD + 1>(kept, high_of(x[2]), high_of(x[3]), scale, place);
    if constexpr (WORD < 15) sum_words<WORD + 1>(kept, both, scale, place);
}

__device__ __forceinline__ void sum_key(int (&kept)[4], const uint4* rows, uint2 largest, const float (&place)[3]) {
    u32 both[64];
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++) {
        const Step low = split_step(quarter < 2 ? largest.x & 0xFFFFu : largest.x >> 16);
        const Step high = split_step(quarter < 2 ? largest.y & 0xFFFFu : largest.y >> 16);
        const uint4 four = rows[quarter_at(threadIdx.x, quarter)];
        const u32 word[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < 16; i++)
            both[16 * quarter + i] = scale_both(word[i / 4] >> (i % 2 * 8 + i / 2 % 2 * 4), i / 2 % 2 ? high : low);
    }
    const float squares = squares_of<0, 16>(both);
    float length, scale;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(length) : "f"(fmaxf(squares, 1e-24f)));
    asm("div.full.f32 %0, %1, %2;" : "=f"(scale) : "f"(1.0f), "f"(length));
    sum_words<0>(kept, both, scale, place);
}

__device__ __forceinline__ void copy_later(uint4* to, const uint4* from, bool there) {
    unsigned address = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(there ? 16 : 0) : "memory");
}

extern "C" __global__ void __launch_bounds__(TILE, MOVE_BLOCKS) move_rows(const Move a) {
    __shared__ uint4 k_row[TILE * 4], v_row[TILE * 4];
    __shared__ int slots[TILE], sums[TILE], begun;
    const int t = threadIdx.x, pieces = a.history_slots / TILE;
    // Counted as they begin, so those that this one waits for run already.
    if (t == 0) begun = atomicAdd(a.is_read + a.heads * pieces, 1);
    __syncthreads();
    const int piece = begun / a.heads, head = begun % a.heads, place = piece * TILE + t;
    const long long held = (long long)head * a.history_slots;
    const int slot = place < a.num_keep ? a.source[(long long)head * a.num_keep + place] : -1;
    slots[t] = slot, sums[t] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = i * 32 + t / 4, quarter = t % 4, of = slots[row];
        const long long at = (held + max(of, 0)) * 4 + quarter;
        copy_later(k_row + quarter_at(row, quarter), a.k_code + at, of >= 0);
        copy_later(v_row + quarter_at(row, quarter), a.v_code + at, of >= 0);
    }
    uint2 k_most = make_uint2(0, 0), v_most = make_uint2(0, 0);
    float at[3] = {0, 0, 0};
    if (slot >= 0) {
        k_most = a.k_largest[held + slot], v_most = a.v_largest[held + slot];
#pragma unroll
        for (int i = 0; i < 3; i++) at[i] = a.position[(held + slot) * 3 + i];
    }
    const int* rank = a.rank + (long long)head * a.num_slots;
    const int first = rank[min(piece * TILE, a.num_slots - 1)] + a.num_keep - rank[a.num_slots - 1] - 1;
    asm volatile("cp.async.wait_all;" ::: "memory");
    // What is in registers is there too before others may write.
    asm volatile("" ::"r"(k_most.x ^ k_most.y ^ v_most.x ^ v_most.y) : "memory");
    __threadfence();
    __syncthreads();
    int* is_read = a.is_read + head * pieces;
    if (t == 0) store_after_all(is_read + piece, 1);
    // The key is looked at before others are waited for.
    int kept[4];
    sum_key(kept, k_row, k_most, at);
#pragma unroll
    for (int i = 0; i < 4; i++) atomicAdd(sums + 32 * i + t % 32, (int)((u32)kept[i] - 32u * 0x4B400000u));
    for (int reader = max(first, 0) / TILE + t; reader < piece; reader += TILE)
        while (load_now(is_read + reader) == 0) {}
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = i * 32 + t / 4, quarter = t % 4;
        if (piece * TILE + row >= a.num_keep) continue;
        const long long to = (held + piece * TILE + row) * 4 + quarter;
        a.k_code[to] = k_row[quarter_at(row, quarter)], a.v_code[to] = v_row[quarter_at(row, quarter)];
    }
    if (place < a.num_keep) a.k_largest[held + place] = k_most, a.v_largest[held + place] = v_most;
    const float mean = __fmul_rn((float)sums[t], 1.0f / (4194304.0f * TILE));
    a.mean[(held + piece * TILE) + t] = (unsigned short)(round_twice(mean) & 0xFFFFu);
}
