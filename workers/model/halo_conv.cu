// A causal 3x3x3 convolution for compute capability 9.0 in bfloat16: a tile's inputs with a border of one pixel come into
// shared memory once for nine places of the kernel, which tensor cores read from there, each place from another start.
//
// With PAIRS a tile is of two frames that follow each other, and inputs are the four sums and differences of frames that
// pair_conv.py describes: four times nine places for two frames instead of six.
//
// Defined by whoever compiles: C_IN and C_OUT channels, N channels of a tile (C_OUT is a multiple), TH x TW pixels of a
// tile, MB blocks of 8x8 pixels for each of two groups of four warps, NA and NB slots of inputs and of weights, PLAIN (how
// inputs lie in shared memory), PAIRS, and wgmma(), the product of 64 pixels, N channels and 16 inputs.
struct alignas(64) TensorMap { u64 opaque[16]; };

constexpr int TAPS = PAIRS ? 4 : 3, FRAMES = PAIRS ? 2 : 1;   // inputs in time, and frames of a tile

constexpr int KC = 32;                                        // input channels of a step
constexpr int HALO_W = TW + 2, HALO = (TH + 2) * HALO_W;      // pixels with their border
constexpr int A_BYTES = HALO * KC * 2, A_SLOT = (A_BYTES + 1023) / 1024 * 1024;
constexpr int B_TAP = N * KC * 2, B_SLOT = 3 * B_TAP;         // a row of places
constexpr int STEPS = C_IN / KC, TILES_N = C_OUT / N, GROUP = 64;
static_assert(TH * TW == 2 * MB * 64 && B_SLOT % 1024 == 0 && N % 32 == 0, "tile");

__device__ __forceinline__ void load_inputs(u32 to, const TensorMap* map, u32 barrier, int step, int column, int row, int frame) {
#if PLAIN
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
        ::"r"(to), "l"(map), "r"(barrier), "r"(0), "r"(column), "r"(row), "r"(step * (KC / 8)), "r"(frame) : "memory");
#else
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(to), "l"(map), "r"(barrier), "r"(step * KC), "r"(column), "r"(row), "r"(frame) : "memory");
#endif
}

__device__ __forceinline__ u64 describe_inputs(u32 slot, int pixel, int k) {  // k: 16 channels
#if PLAIN
    return describe(slot + (k * 2 * HALO + pixel) * 16, HALO_W * 16, HALO * 16, 0);
#else
    return describe(slot + pixel * 64 + k * 32, HALO_W * 64, 16, 2);
#endif
}

__device__ __forceinline__ u64 describe_weights(u32 slot, int column, int k) {
    return describe(slot + column * B_TAP + k * 32, 512, 16, 2);
}

struct Tile { int frame, row, column, first; };

// Tiles of a group take their turn frame by frame (pair by pair), so that their frames are in the cache for the next.
__device__ __forceinline__ Tile find_tile(int index, int num, int height, int width) {
    int tiles_w = (width + TW - 1) / TW, tiles = (height + TH - 1) / TH * tiles_w;
    int rest = index / TILES_N, group = rest / (GROUP * num), inside = rest % (GROUP * num);
    int size = min(GROUP, tiles - group * GROUP);
    int tile = group * GROUP + inside % size;
    return {inside / size, tile / tiles_w * TH, tile % tiles_w * TW, index % TILES_N * N};
}

__device__ __forceinline__ u32 add_pair(u32 a, u32 b) {
    return round_pair(__uint_as_float(a << 16) + __uint_as_float(b << 16),
                      __uint_as_float(a & 0xFFFF0000u) + __uint_as_float(b & 0xFFFF0000u));
}

// Sums and differences in place, as there are no registers for both beside what they are made of; and the bias, which would
// take registers if it were added when blocks are stored.
__device__ __forceinline__ void add_and_subtract(float (&a)[N / 2], float (&b)[N / 2], const float* bias, int lane) {
#pragma unroll
    for (int column = 0; column < N / 8; column++) {
        float2 added = *(const float2*)(bias + column * 8 + lane % 4 * 2);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float &x = a[column * 4 + i], &y = b[column * 4 + i], more = i % 2 ? added.y : added.x;
            x += y;
            y = fmaf(y, -2.f, x) + more;
            x += more;
        }
    }
}

// Where a lane's pixel of a block lies in the result, in units of eight channels; past a picture: -1.
__device__ __forceinline__ long long find_pixel(
    const Tile& tile, int frame, int block, int half, int warp, int lane, int height, int width) {
    int y = tile.row + block / (TW / 8) * 8 + warp % 4 * 2 + half;
    int x = tile.column + block % (TW / 8) * 8 + lane / 4;
    if (y >= height || x >= width) return -1;
    return (((long long)frame * height + y) * width + x) * (C_OUT / 8) + tile.first / 8 + lane % 4;
}

// Without frames before, nothing is read for them.
__device__ __forceinline__ int first_tap(const Tile& tile, int has_before) {
    return PAIRS || has_before ? 0 : max(0, 2 - tile.frame);
}

// All loads first: one after the other would each wait for memory. Volatile: not earlier than they stand, which would take
// registers that are not there.
__device__ __forceinline__ void load_beside(uint4 (&other)[N / 32], const uint4* beside, long long pixel) {
#pragma unroll
    for (int j = 0; j < N / 32; j++) {
        other[j] = make_uint4(0, 0, 0, 0);
        if (beside && pixel >= 0)
            asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                : "=r"(other[j].x), "=r"(other[j].y), "=r"(other[j].z), "=r"(other[j].w) : "l"(beside + pixel + j * 4));
    }
}

__device__ __forceinline__ void store_block(
    float (&total)[N / 2], const float* bias, const uint4 (&other)[N / 32], bool has_beside, uint4* out, long long pixel,
    int half, int lane) {
    int q = lane % 4;
#pragma unroll
    for (int j = 0; j < N / 32; j++) {
        u32 word[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int column = j * 4 + k;
            float2 added = PAIRS ? make_float2(0.f, 0.f) : *(const float2*)(bias + column * 8 + q * 2);
            word[k] = round_pair(total[column * 4 + half * 2] + added.x, total[column * 4 + half * 2 + 1] + added.y);
        }
        transpose(word, q);
        if (has_beside) {
            word[0] = add_pair(word[0], other[j].x), word[1] = add_pair(word[1], other[j].y);
            word[2] = add_pair(word[2], other[j].z), word[3] = add_pair(word[3], other[j].w);
        }
        if (pixel >= 0) out[pixel + j * 4] = make_uint4(word[0], word[1], word[2], word[3]);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) convolve(
    const __grid_constant__ TensorMap before, const __grid_constant__ TensorMap fresh, const __grid_constant__ TensorMap last,
    const char* weight, const unsigned short* bias, const uint4* beside, uint4* out,
    int has_before, int num_fresh, int num, int height, int width, int num_tiles) {
    extern __shared__ __align__(1024) char room[];
    __shared__ __align__(16) float bias_f[C_OUT];
    __shared__ __align__(8) u64 barriers[2 * (NA + NB)];
    u32 a_slots = (address(room) + 1023) / 1024 * 1024, b_slots = a_slots + NA * A_SLOT;
    u32 full_a = address(barriers), empty_a = full_a + NA * 8, full_b = empty_a + NA * 8, empty_b = full_b + NB * 8;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = threadIdx.x; i < C_OUT; i += 384) bias_f[i] = __uint_as_float((u32)bias[i] << 16);
    if (threadIdx.x == 0) {
        for (int i = 0; i < NA + NB; i++) {
            u32 full = i < NA ? full_a + i * 8 : full_b + (i - NA) * 8, empty = i < NA ? empty_a + i * 8 : empty_b + (i - NA) * 8;
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 8;" ::"r"(empty) : "memory");  // a lane of each warp
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    int sa = 0, pa = 0, sb = 0, pb = 0;  // slots, and the parity of this round through them

    // Registers go from the four warps that bring inputs to the eight that multiply.
    if (warp >= 8) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x != 256) return;
        for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
            Tile tile = find_tile(index, num, height, width);
            for (int dt = first_tap(tile, has_before); dt < TAPS; dt++) {
                int frame = PAIRS ? tile.frame * TAPS + dt : tile.frame + dt - 2;  // those before the first are below zero
                const TensorMap* map = PAIRS ? &fresh : frame < 0 ? &before : frame < num_fresh ? &fresh : &last;
                if (!PAIRS) frame = frame < 0 ? frame + 2 : frame < num_fresh ? frame : frame - num_fresh;
                for (int step = 0; step < STEPS; step++) {
                    await(empty_a + sa * 8, pa ^ 1);
                    expect(full_a + sa * 8, A_BYTES);
                    load_inputs(a_slots + sa * A_SLOT, map, full_a + sa * 8, step, tile.column - 1, tile.row - 1, frame);
                    if (++sa == NA) sa = 0, pa ^= 1;
                    const char* rows = weight + (u64)(((tile.first / N) * TAPS + dt) * STEPS + step) * 3 * B_SLOT;
                    for (int dy = 0; dy < 3; dy++) {
                        await(empty_b + sb * 8, pb ^ 1);
                        expect(full_b + sb * 8, B_SLOT);
                        bring(b_slots + sb * B_SLOT, rows + dy * B_SLOT, B_SLOT, full_b + sb * 8);
                        if (++sb == NB) sb = 0, pb ^= 1;
                    }
                }
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    int group = warp / 4;
    for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
        Tile tile = find_tile(index, num, height, width);
        float total[FRAMES][MB][N / 2];
        int last_a = 0, last_b = -1;
        // Adds all products of one input in time; `adds` is 0 where nothing was added up before.
        auto multiply = [&](float (&sums)[MB][N / 2], int adds) {
            for (int step = 0; step < STEPS; step++) {
                await(full_a + sa * 8, pa);
#pragma unroll 1
                for (int dy = 0; dy < 3; dy++) {
                    await(full_b + sb * 8, pb);
                    fence();
#pragma unroll
                    for (int dx = 0; dx < 3; dx++) {
#pragma unroll
                        for (int k = 0; k < KC / 16; k++) {
#pragma unroll
                            for (int m = 0; m < MB; m++) {
                                int block = group * MB + m;
                                int pixel = (block / (TW / 8) * 8 + dy) * HALO_W + block % (TW / 8) * 8 + dx;
                                wgmma(sums[m], describe_inputs(a_slots + sa * A_SLOT, pixel, k),
                                      describe_weights(b_slots + sb * B_SLOT, dx, k), adds | dx | k);
                            }
                        }
                    }
                    adds = 1;
                    commit();
                    finish<1>();
                    // All but the newest products are done: what they read may be overwritten.
                    if (lane == 0 && last_b >= 0) {
                        arrive(empty_b + last_b * 8);
                        if (dy == 0) arrive(empty_a + last_a * 8);
                    }
                    last_b = sb;
                    if (++sb == NB) sb = 0, pb ^= 1;
                }
                last_a = sa;
                if (++sa == NA) sa = 0, pa ^= 1;
            }
        };
#if PAIRS
        multiply(total[0], 0);
        multiply(total[1], 0);
        finish<0>();
#pragma unroll
        for (int m = 0; m < MB; m++) {
            hold(total[0][m]), hold(total[1][m]);
            add_and_subtract(total[0][m], total[1][m], bias_f + tile.first, lane);
            hold(total[0][m]), hold(total[1][m]);
        }
        multiply(total[0], 1);
        multiply(total[1], 1);
#else
        int adds = 0;
        for (int dt = first_tap(tile, has_before); dt < TAPS; dt++) multiply(total[0], adds), adds = 1;
#endif
        // What stands beside comes while products still run: for the whole tile where registers are enough, else for one
        // block, and then for the next one while this one is stored.
        constexpr int BLOCKS = FRAMES * 2 * MB, AHEAD = !PAIRS && MB * N <= 192 ? BLOCKS : 2;
        uint4 other[AHEAD][N / 32];
        auto find = [&](int i) -> long long {
            int frame = tile.frame * FRAMES + i / (2 * MB);
            if (PAIRS && frame >= num_fresh) return -1;  // a last frame that has no second one
            return find_pixel(tile, frame, group * MB + i / 2 % MB, i % 2, warp, lane, height, width);
        };
#pragma unroll
        for (int i = 0; i < (AHEAD == BLOCKS ? BLOCKS : 1); i++) load_beside(other[i], beside, find(i));
        finish<0>();
#pragma unroll
        for (int m = 0; m < FRAMES * MB; m++) hold(total[m / MB][m % MB]);
        if (lane == 0) arrive(empty_b + last_b * 8), arrive(empty_a + last_a * 8);
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            if (AHEAD < BLOCKS && i + 1 < BLOCKS) load_beside(other[(i + 1) % AHEAD], beside, find(i + 1));
            store_block(total[i / (2 * MB)][i / 2 % MB], bias_f + tile.first, other[i % AHEAD], beside, out, find(i), i % 2, lane);
        }
    }
}
