// Pictures of twice the rows and columns, or twice the frames, for compute capability 9.0 in bfloat16, in the manner of
// halo_conv.cu: a tile's inputs come into shared memory once, with what its places see beyond it.
//
// With ENLARGED a result is of four phases (row r, column c of each pixel that becomes two by two), each a convolution of
// 2x2 places: source rows i - 1 + r, i + r and columns j - 1 + c, j + c. Otherwise it is of two phases (the first frame of
// two, the second), each a causal convolution of three frames. A tile is of one phase; those of all phases of the same
// pixels follow each other, so that inputs and lines of the result are in the cache for the next.
//
// Defined by whoever compiles: C_IN and C_OUT channels (out: of one phase), N channels of a tile (C_OUT is a multiple), KC
// input channels of a step, TH x TW pixels of a tile, MB blocks of 8x8 pixels for each of two groups of four warps, NA and
// NB slots of inputs and of weights, ENLARGED, KEPT (all weights of a tile stay in their slots: blocks are a multiple of
// phases, so each meets only one), and wgmma(), the product of 64 pixels, N channels and 16 inputs.
struct alignas(64) TensorMap { u64 opaque[16]; };

constexpr int TAPS = ENLARGED ? 1 : 3, SIDE = ENLARGED ? 2 : 1;  // places in time, and each way in a picture
constexpr int PHASES = ENLARGED ? 4 : 2, PARTS = PHASES * (C_OUT / N);

constexpr int HALO_W = TW + SIDE - 1, HALO = (TH + SIDE - 1) * HALO_W;  // pixels that a tile sees
constexpr int ROW = KC * 2;                                             // bytes of a pixel of a step, swizzled
constexpr u64 SWIZZLE = KC == 64 ? 1 : 2;
constexpr int A_BYTES = HALO * ROW, A_SLOT = (A_BYTES + 1023) / 1024 * 1024;
constexpr int B_TAP = N * ROW, B_SLOT = SIDE * B_TAP;                   // a row of places
constexpr int STEPS = C_IN / KC, SLOTS = STEPS * SIDE, GROUP = 64;      // of one place in time: steps, slots of weights
static_assert(KC == 32 || KC == 64, "swizzle");
static_assert(TH * TW == 2 * MB * 64 && B_SLOT % 1024 == 0 && N % 32 == 0 && C_IN % KC == 0 && C_OUT % N == 0, "tile");
static_assert(!KEPT || (ENLARGED && NB == SLOTS), "kept weights");

__device__ __forceinline__ void load_inputs(u32 to, const TensorMap* map, u32 barrier, int step, int column, int row, int frame) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(to), "l"(map), "r"(barrier), "r"(step * KC), "r"(column), "r"(row), "r"(frame) : "memory");
}

// Swizzles go by addresses in shared memory, not by a matrix's start, so any pixel may be the first.
__device__ __forceinline__ u64 describe_inputs(u32 slot, int pixel, int k) {  // k: 16 channels
    return describe(slot + pixel * ROW + k * 32, HALO_W * ROW, 16, SWIZZLE);
}

__device__ __forceinline__ u64 describe_weights(u32 slot, int column, int k) {
    return describe(slot + column * B_TAP + k * 32, 8 * ROW, 16, SWIZZLE);
}

struct Tile {
    int frame, row, column, part;  // part: N of the channels of all phases
    __device__ __forceinline__ int phase() const { return part / (PARTS / PHASES); }
    // The first pixel that it sees.
    __device__ __forceinline__ int from_row() const { return ENLARGED ? row - 1 + phase() / 2 : row; }
    __device__ __forceinline__ int from_column() const { return ENLARGED ? column - 1 + phase() % 2 : column; }
};

// Tiles of a group take their turn frame by frame, so that their frames are in the cache for the next.
__device__ __forceinline__ Tile find_tile(int index, int num, int height, int width) {
    int tiles_w = (width + TW - 1) / TW, tiles = (height + TH - 1) / TH * tiles_w;
    int rest = index / PARTS, group = rest / (GROUP * num), inside = rest % (GROUP * num);
    int size = min(GROUP, tiles - group * GROUP);
    int tile = group * GROUP + inside % size;
    return {inside / size, tile / tiles_w * TH, tile % tiles_w * TW, index % PARTS};
}

// Without frames before, nothing is read for them.
__device__ __forceinline__ int first_tap(const Tile& tile, int has_before) {
    return has_before ? 0 : max(0, TAPS - 1 - tile.frame);
}

// Where a lane's pixel of a block lies in the result, in units of eight channels; past a picture: -1.
__device__ __forceinline__ long long find_pixel(
    const Tile& tile, int block, int half, int warp, int lane, int height, int width) {
    int y = tile.row + block / (TW / 8) * 8 + warp % 4 * 2 + half;
    int x = tile.column + block % (TW / 8) * 8 + lane / 4;
    if (y >= height || x >= width) return -1;
    long long pixel;
    if (ENLARGED) {
        long long line = ((long long)tile.frame * height + y) * 2 + tile.phase() / 2;
        pixel = (line * width + x) * 2 + tile.phase() % 2;
    } else {
        pixel = ((long long)(tile.frame * 2 + tile.phase()) * height + y) * width + x;
    }
    return pixel * (C_OUT / 8) + tile.part % (PARTS / PHASES) * (N / 8) + lane % 4;
}

__device__ __forceinline__ void store_block(
    float (&total)[N / 2], const float* bias, uint4* out, long long pixel, int half, int lane) {
    int q = lane % 4;
#pragma unroll
    for (int j = 0; j < N / 32; j++) {
        u32 word[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int column = j * 4 + k;
            float2 added = *(const float2*)(bias + column * 8 + q * 2);
            word[k] = round_pair(total[column * 4 + half * 2] + added.x, total[column * 4 + half * 2 + 1] + added.y);
        }
        transpose(word, q);
        if (pixel >= 0) out[pixel + j * 4] = make_uint4(word[0], word[1], word[2], word[3]);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) enlarge(
    const __grid_constant__ TensorMap before, const __grid_constant__ TensorMap fresh, const char* weight,
    const unsigned short* bias, uint4* out, int has_before, int num, int height, int width, int num_tiles) {
    extern __shared__ __align__(1024) char room[];
    __shared__ __align__(16) float bias_f[PHASES * C_OUT];
    __shared__ __align__(8) u64 barriers[2 * (NA + NB)];
    u32 a_slots = (address(room) + 1023) / 1024 * 1024, b_slots = a_slots + NA * A_SLOT;
    u32 full_a = address(barriers), empty_a = full_a + NA * 8, full_b = empty_a + NA * 8, empty_b = full_b + NB * 8;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = threadIdx.x; i < PHASES * C_OUT; i += 384) bias_f[i] = __uint_as_float((u32)bias[i] << 16);
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
            bool brings = !KEPT || index == blockIdx.x;
            for (int dt = first_tap(tile, has_before); dt < TAPS; dt++) {
                int frame = tile.frame + dt - (TAPS - 1);  // those before the first are below zero
                const TensorMap* map = frame < 0 ? &before : &fresh;
                if (frame < 0) frame += TAPS - 1;
                for (int step = 0; step < STEPS; step++) {
                    await(empty_a + sa * 8, pa ^ 1);
                    expect(full_a + sa * 8, A_BYTES);
                    load_inputs(a_slots + sa * A_SLOT, map, full_a + sa * 8, step, tile.from_column(), tile.from_row(), frame);
                    if (++sa == NA) sa = 0, pa ^= 1;
                    const char* rows = weight + (u64)((tile.part * TAPS + dt) * STEPS + step) * SIDE * B_SLOT;
                    for (int dy = 0; dy < SIDE && brings; dy++) {
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
        float total[MB][N / 2];
        int last_a = 0, last_b = -1, adds = 0;
        for (int step = first_tap(tile, has_before) * STEPS; step < TAPS * STEPS; step++) {
            await(full_a + sa * 8, pa);
#pragma unroll 1
            for (int dy = 0; dy < SIDE; dy++) {
                await(full_b + sb * 8, pb);
                fence();
#pragma unroll
                for (int dx = 0; dx < SIDE; dx++) {
#pragma unroll
                    for (int k = 0; k < KC / 16; k++) {
#pragma unroll
                        for (int m = 0; m < MB; m++) {
                            int block = group * MB + m;
                            int pixel = (block / (TW / 8) * 8 + dy) * HALO_W + block % (TW / 8) * 8 + dx;
                            wgmma(total[m], describe_inputs(a_slots + sa * A_SLOT, pixel, k),
                                  describe_weights(b_slots + sb * B_SLOT, dx, k), adds | dx | k);
                        }
                    }
                }
                adds = 1;
                commit();
                finish<1>();
                // All but the newest products are done: what they read may be overwritten.
                if (lane == 0 && last_b >= 0) {
                    if (!KEPT) arrive(empty_b + last_b * 8);
                    if (dy == 0) arrive(empty_a + last_a * 8);
                }
                last_b = sb;
                if (++sb == NB) sb = 0, pb ^= !KEPT;
            }
            last_a = sa;
            if (++sa == NA) sa = 0, pa ^= 1;
        }
        finish<0>();
#pragma unroll
        for (int m = 0; m < MB; m++) hold(total[m]);
        if (lane == 0) {
            if (!KEPT) arrive(empty_b + last_b * 8);
            arrive(empty_a + last_a * 8);
        }
#pragma unroll
        for (int i = 0; i < 2 * MB; i++) {
            long long pixel = find_pixel(tile, group * MB + i / 2, i % 2, warp, lane, height, width);
            store_block(total[i / 2], bias_f + tile.part * N, out, pixel, i % 2, lane);
        }
    }
}
