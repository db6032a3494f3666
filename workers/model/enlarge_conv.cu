// Pictures of twice the rows and columns, or twice the frames, for compute capability 9.0 in bfloat16, in the manner of
// halo_conv.cu: a tile's inputs come into shared memory once, with what its places see beyond it.
//
// With ENLARGED a result is of four phases (row r, column c of each pixel that becomes two by two), each a convolution of
// 2x2 places: source rows i - 1 + r, i + r and columns j - 1 + c, j + c. Otherwise it is of two phases (the first frame of
// two, the second), each a causal convolution of three frames. A tile is of one phase; those of all phases of the same
// pixels follow each other, so that inputs and lines of the result are in the cache for the next.
//
// Defined by whoever compiles: what halo.cuh asks for (with KEPT, blocks are a multiple of phases, so that each meets only
// one), C_OUT channels of one phase (a multiple of N) and ENLARGED.
constexpr int TAPS = ENLARGED ? 1 : 3, PHASES = ENLARGED ? 4 : 2;  // places in time, and of results
constexpr int PARTS_OF_PHASE = PARTS / PHASES;
static_assert(SIDE == (ENLARGED ? 2 : 1) && PARTS_OF_PHASE * N == C_OUT, "phases");
static_assert(!KEPT || (ENLARGED && NB == STEPS * SIDE), "kept weights");

// Where a lane's pixel of a block lies in the result, in units of eight channels; past a picture: -1.
__device__ __forceinline__ long long find_pixel(
    const Tile& tile, int block, int half, int warp, int lane, int height, int width) {
    int y = tile.row + block / (TW / 8) * 8 + warp % 4 * 2 + half;
    int x = tile.column + block % (TW / 8) * 8 + lane / 4;
    if (y >= height || x >= width) return -1;
    int phase = tile.part / PARTS_OF_PHASE;
    long long pixel;
    if (ENLARGED) {
        long long line = ((long long)tile.frame * height + y) * 2 + phase / 2;
        pixel = (line * width + x) * 2 + phase % 2;
    } else {
        pixel = ((long long)(tile.frame * 2 + phase) * height + y) * width + x;
    }
    return pixel * (C_OUT / 8) + tile.part % PARTS_OF_PHASE * (N / 8) + lane % 4;
}

__device__ __forceinline__ void store_block(
    float (&total)[N / 2], const float* bias, uint4* out, long long pixel, int half, int lane) {
    int q = lane % 4;
#pragma unroll
    for (int j = 0; j < N / 32; j++) {
        u32 word[4];
        round_columns<true>(word, total, j * 4, half, bias, q);
        if (pixel >= 0) out[pixel + j * 4] = make_uint4(word[0], word[1], word[2], word[3]);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) enlarge(
    const __grid_constant__ TensorMap before, const __grid_constant__ TensorMap fresh, const char* weight,
    const unsigned short* bias, uint4* out, int has_before, int num, int height, int width, int num_tiles) {
    extern __shared__ __align__(1024) char room[];
    __shared__ __align__(16) float bias_f[PHASES * C_OUT];
    __shared__ __align__(8) u64 barriers[2 * (NA + NB)];
    u32 slots = (address(room) + 1023) / 1024 * 1024;
    Inputs a{slots, address(barriers)};
    Weights b{slots + NA * A_SLOT, address(barriers) + NA * 8};
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    set_up(barriers, bias_f, bias);

    // Registers go from the four warps that bring inputs to the eight that multiply.
    if (warp >= 8) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x != 256) return;
        for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
            Tile tile = find_tile(index, num, height, width);
            int phase = tile.part / PARTS_OF_PHASE;
            // The first pixel that it sees.
            int row = tile.row - ENLARGED * (1 - phase / 2), column = tile.column - ENLARGED * (1 - phase % 2);
            for (int dt = first_tap<TAPS>(tile, has_before); dt < TAPS; dt++) {
                int frame = tile.frame + dt - (TAPS - 1);  // those before the first are below zero
                const TensorMap* map = frame < 0 ? &before : &fresh;
                if (frame < 0) frame += TAPS - 1;
                for (int step = 0; step < STEPS; step++) {
                    const char* rows = weight + (u64)((tile.part * TAPS + dt) * STEPS + step) * SIDE * B_SLOT;
                    bring_step(a, b, map, step, column, row, frame, rows, !KEPT || index == blockIdx.x);
                }
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    int group = warp / 4;
    for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
        Tile tile = find_tile(index, num, height, width);
        float total[1][MB][N / 2];
        int adds = 0;
        for (int step = first_tap<TAPS>(tile, has_before) * STEPS; step < TAPS * STEPS; step++)
            multiply_step(total[0], a, b, adds, group, lane), adds = 1;
        finish_tile(total, a, b, lane);
#pragma unroll
        for (int i = 0; i < 2 * MB; i++) {
            long long pixel = find_pixel(tile, group * MB + i / 2, i % 2, warp, lane, height, width);
            store_block(total[0][i / 2], bias_f + tile.part * N, out, pixel, i % 2, lane);
        }
    }
}
