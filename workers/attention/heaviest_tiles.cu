// The tiles with the highest mean share of the softmax, of each tile of queries, in rising order: what `_heaviest` of
// triton_choice.py lists, by counting digits. Shares that are not negative are in the order of their bits, of which 30
// are left; three times the tiles are counted by their next ten, until the exact limit of either list is known.
//
// Defined by whoever compiles: THREADS of a block, and EACH tiles of a thread.
typedef unsigned int u32;

constexpr int AT_ONCE = 4;  // blocks of a multiprocessor: fewer, with more registers, were slower on an H200
constexpr int QUERIES = 8, WARPS = THREADS / 32, DIGIT = 10, BINS = 1 << DIGIT, HALF = THREADS / 2, BINS_EACH = BINS / HALF;
constexpr int MOST_BITS = (1 << 30) - 1;  // see triton_choice.py
constexpr float LEAST = 1e-37f;

struct Lists { int* to[2]; int num_chosen[2], num_listed[2]; };

// Of a tile, as coded_choice.cu writes them.
__device__ __forceinline__ void load(float (&x)[QUERIES], const float* sums, int tile, int num_tiles) {
    int row = blockIdx.x;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float4 four = make_float4(0.f, 0.f, 0.f, 0.f);
        if (tile < num_tiles) four = ((const float4*)sums)[((long long)row * 2 + i) * num_tiles + tile];
        x[i * 4] = four.x, x[i * 4 + 1] = four.y, x[i * 4 + 2] = four.z, x[i * 4 + 3] = four.w;
    }
}

// What a sum is to be multiplied by, by what a thread has of each query's.
__device__ __forceinline__ void find_shares(float (&x)[QUERIES]) {
    __shared__ float of_warp[WARPS][QUERIES];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < QUERIES; i++) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) x[i] += __shfl_xor_sync(~0u, x[i], step);
        if (lane == i) of_warp[warp][i] = x[i];
    }
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += of_warp[i][lane % QUERIES];
    float share = 1.f / (fmaxf(sum, LEAST) * QUERIES);
#pragma unroll
    for (int i = 0; i < QUERIES; i++) x[i] = __shfl_sync(~0u, share, i);
}

// Bits of the mean shares of a thread's tiles, every THREADS-th; of no candidate: -1. Sums are read twice: kept, they
// would take the registers of other blocks.
__device__ __forceinline__ void weigh(int (&bits)[EACH], const float* sums, const int* is_candidate, int num_tiles) {
    float share[QUERIES] = {}, x[QUERIES];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        load(x, sums, e * THREADS + threadIdx.x, num_tiles);
#pragma unroll
        for (int i = 0; i < QUERIES; i++) share[i] += x[i];
    }
    find_shares(share);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        int tile = e * THREADS + threadIdx.x;
        load(x, sums, tile, num_tiles);
        float mass = 0.f;
#pragma unroll
        for (int i = 0; i < QUERIES; i++) mass = fmaf(x[i], share[i], mass);
        bool may = tile < num_tiles && is_candidate[tile] > 0;
        bits[e] = may ? min(__float_as_int(mass), MOST_BITS) : -1;
    }
}

// Highest digits of a list's limit, and how many it still lacks of the tiles that begin with these.
struct Limit { int digits, lacks; };

// One more digit of both limits. Half of the threads have a list's counts, BINS_EACH each; above these are higher ones.
__device__ __forceinline__ void find_digit(Limit (&limit)[2], const int (&bits)[EACH], int shift) {
    __shared__ int count[2][BINS];
    __shared__ int of_warp[WARPS];
    __shared__ Limit found[2];
    for (int i = threadIdx.x; i < 2 * BINS; i += THREADS) count[i / BINS][i % BINS] = 0;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < EACH; e++)
#pragma unroll
        for (int which = 0; which < 2; which++)
            if (bits[e] >= 0 && bits[e] >> (shift + DIGIT) == limit[which].digits)
                atomicAdd(&count[which][(bits[e] >> shift) % BINS], 1);
    __syncthreads();
    int which = threadIdx.x / HALF, own = threadIdx.x % HALF, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int mine[BINS_EACH], sum = 0;
#pragma unroll
    for (int i = 0; i < BINS_EACH; i++) sum += mine[i] = count[which][own * BINS_EACH + i];
    int above = sum;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        int got = __shfl_down_sync(~0u, above, step);
        if (lane + step < 32) above += got;
    }
    if (lane == 0) of_warp[warp] = above;
    above -= sum;
    __syncthreads();
    for (int i = warp + 1; i < (which + 1) * (WARPS / 2); i++) above += of_warp[i];
    Limit known = which ? limit[1] : limit[0];
    if (above < known.lacks && (above + sum >= known.lacks || own == 0)) {
#pragma unroll
        for (int i = BINS_EACH - 1; i >= 0; i--) {
            if (above < known.lacks && (above + mine[i] >= known.lacks || own + i == 0))
                found[which] = {known.digits << DIGIT | own * BINS_EACH + i, known.lacks - above};
            above += mine[i];
        }
    }
    __syncthreads();
    limit[0] = found[0], limit[1] = found[1];
}

// Tiles above the limit, and the first that are equal to it.
__device__ __forceinline__ void write(const int (&bits)[EACH], Limit limit, int* to) {
    __shared__ u32 before[EACH * WARPS];  // those that are equal stand in the high half: rows are shorter than 2 to the 15
    constexpr int ENTRIES = (EACH * WARPS + 31) / 32;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 above[EACH], equal[EACH], lower = (1u << lane) - 1;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        above[e] = __ballot_sync(~0u, bits[e] > limit.digits), equal[e] = __ballot_sync(~0u, bits[e] == limit.digits);
        if (lane == 0) before[e * WARPS + warp] = __popc(above[e]) | __popc(equal[e]) << 16;
    }
    __syncthreads();
    if (warp == 0) {
        u32 sum = 0, own[ENTRIES];
#pragma unroll
        for (int i = 0; i < ENTRIES; i++) {
            int at = lane * ENTRIES + i;
            own[i] = sum, sum += at < EACH * WARPS ? before[at] : 0;
        }
        u32 all = sum;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            u32 got = __shfl_up_sync(~0u, all, step);
            if (lane >= step) all += got;
        }
#pragma unroll
        for (int i = 0; i < ENTRIES; i++)
            if (lane * ENTRIES + i < EACH * WARPS) before[lane * ENTRIES + i] = all - sum + own[i];
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        u32 at = before[e * WARPS + warp];
        int heavier = (at & 0xFFFF) + __popc(above[e] & lower), equals = (at >> 16) + __popc(equal[e] & lower);
        bool is_taken = bits[e] > limit.digits || bits[e] == limit.digits && equals < limit.lacks;
        if (is_taken) to[heavier + min(equals, limit.lacks)] = e * THREADS + threadIdx.x;
    }
    __syncthreads();
}

// A block lists the tiles of one tile of queries; a second list may be missing.
extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE) list_heaviest(
    const float* sums, const int* is_candidate, const Lists lists, int num_tiles) {
    int bits[EACH];
    weigh(bits, sums, is_candidate, num_tiles);
    Limit limit[2] = {{0, lists.num_chosen[0]}, {0, lists.num_chosen[1]}};
#pragma unroll 1
    for (int shift = 2 * DIGIT; shift >= 0; shift -= DIGIT) find_digit(limit, bits, shift);
    write(bits, limit[0], lists.to[0] + (long long)blockIdx.x * lists.num_listed[0]);
    if (lists.to[1]) write(bits, limit[1], lists.to[1] + (long long)blockIdx.x * lists.num_listed[1]);
}
