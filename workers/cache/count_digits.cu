// What `_count_digits` of triton_ranks.py counts, by digits that are longer: 11, 11 and 10 bits of numbers of 32, so a
// row is looked at three times. Counts of a block stand in shared memory.
//
// Defined by whoever compiles: THREADS of a block; PER_THREAD, numbers of each; EARLY and NO_LINK.
typedef unsigned int u32;
#define DIGITS 2048

__device__ __forceinline__ constexpr int bits_of(int nth) { return nth == 2 ? 10 : 11; }
__device__ __forceinline__ constexpr int shift_of(int nth) { return nth == 0 ? 21 : nth == 1 ? 10 : 0; }

struct Place { int digit, wanted; };

// The digit in which the wanted number lies, from 1, and which one it is among those.
__device__ __forceinline__ Place next_digit(const int* __restrict__ counts, int wanted) {
    __shared__ int of_warp[THREADS / 32];
    __shared__ Place found;
    constexpr int EACH = DIGITS / THREADS;
    int own[EACH], sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) own[i] = counts[threadIdx.x * EACH + i], sum += own[i];
    int up_to = sum;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const int other = __shfl_up_sync(0xFFFFFFFFu, up_to, by);
        if (threadIdx.x % 32 >= by) up_to += other;
    }
    if (threadIdx.x % 32 == 31) of_warp[threadIdx.x / 32] = up_to;
    __syncthreads();
    for (int i = 0; i < threadIdx.x / 32; i++) up_to += of_warp[i];
    int before = up_to - sum;
    if (before < wanted && wanted <= up_to) {
        int i = 0;
        while (before + own[i] < wanted) before += own[i++];
        found = {(int)threadIdx.x * EACH + i, wanted - before};
    }
    __syncthreads();
    return found;
}

// Every other link comes first, and what loses nothing.
__device__ __forceinline__ int rank_of(int loss, int jump, bool most_are_odd) {
    const bool is_early = ((jump & 1) != 0) == most_are_odd || loss == 0;
    return loss == NO_LINK || !is_early ? loss : loss | EARLY;
}

struct Count {
    int* x;
    const int *jumps, *num_odd, *num_linked;  // jumps 0: numbers are no bits of links
    int *begin, *wanted, *counts, *near, *num_near;
    int k, num, rows;
};

template <int NTH> __device__ __forceinline__ void count_digits(const Count& c) {
    constexpr int BITS = bits_of(NTH), SHIFT = shift_of(NTH);
    __shared__ int here[DIGITS];
    __shared__ int num_near_here, first_near;
    const int blocks = (c.num + THREADS * PER_THREAD - 1) / (THREADS * PER_THREAD);
    const int row = blockIdx.x / blocks, block = blockIdx.x % blocks;
    const int first = block * THREADS * PER_THREAD + threadIdx.x;
    int* x = c.x + (long long)row * c.num;
    int value[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        const int at = first + i * THREADS;
        value[i] = at < c.num ? x[at] : 0;
    }
    for (int i = threadIdx.x; i < DIGITS; i += THREADS) here[i] = 0;
    if (threadIdx.x == 0) num_near_here = 0;
    int start = 0;
    if constexpr (NTH == 0) {
        if (c.jumps != nullptr) {
            const bool most_are_odd = 2 * c.num_odd[row] >= c.num_linked[row];
            const int* jumps = c.jumps + (long long)row * c.num;
#pragma unroll
            for (int i = 0; i < PER_THREAD; i++) {
                const int at = first + i * THREADS;
                if (at < c.num) x[at] = value[i] = rank_of(value[i], jumps[at], most_are_odd);
            }
        }
        __syncthreads();
    } else {
        const int before = (NTH - 1) * c.rows + row;
        const int* counts = c.counts + (long long)before * DIGITS;
        const Place place = next_digit(counts, NTH == 1 ? c.k : c.wanted[before]);
        // As signed numbers begin.
        start = NTH == 1 ? place.digit - DIGITS / 2 : c.begin[before] * DIGITS + place.digit;
        if (block == 0 && threadIdx.x == 0) c.begin[before + c.rows] = start, c.wanted[before + c.rows] = place.wanted;
    }
    int nth_near[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        bool asked = first + i * THREADS < c.num;
        if constexpr (NTH > 0) asked = asked && (value[i] >> (SHIFT + BITS)) == start;
        nth_near[i] = -1;
        if (asked) {
            const int digit = (value[i] >> SHIFT) & ((1 << BITS) - 1);
            atomicAdd(&here[NTH == 0 ? digit ^ (DIGITS / 2) : digit], 1);  // negative numbers first
            if constexpr (NTH == 2) nth_near[i] = atomicAdd(&num_near_here, 1);
        }
    }
    __syncthreads();
    int* counts = c.counts + ((long long)NTH * c.rows + row) * DIGITS;
    for (int i = threadIdx.x; i < 1 << BITS; i += THREADS)
        if (here[i]) atomicAdd(counts + i, here[i]);
    if constexpr (NTH == 2) {
        if (threadIdx.x == 0 && num_near_here) first_near = atomicAdd(c.num_near + row, num_near_here);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++)
            if (nth_near[i] >= 0) c.near[(long long)row * c.num + first_near + nth_near[i]] = first + i * THREADS;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) count_first(const Count c) { count_digits<0>(c); }
extern "C" __global__ void __launch_bounds__(THREADS) count_second(const Count c) { count_digits<1>(c); }
extern "C" __global__ void __launch_bounds__(THREADS) count_third(const Count c) { count_digits<2>(c); }
