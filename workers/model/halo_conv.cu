// A causal 3x3x3 convolution for compute capability 9.0 in bfloat16: a tile's inputs with a border of one pixel come into
// shared memory once for nine places of the kernel, which tensor cores read from there, each place from another start.
//
// With two or four FRAMES a tile is of as many that follow each other, and inputs are the sums of frames that winograd.py
// describes: four times nine places for two frames instead of six, six times for four instead of twelve.
//
// Defined by whoever compiles: what halo.cuh asks for, C_OUT channels (a multiple of N), FRAMES, and STAGES places of each
// group of warps for STAGED channels of a block on their way out.
constexpr bool SUMS = FRAMES > 1;                 // whether inputs are sums of frames
constexpr int TAPS = FRAMES + 2;                  // inputs in time
constexpr int SENT = FRAMES * MB * (N / STAGED);  // by each group of warps for a tile
constexpr int STAGE = 64 * STAGED * 2;            // bytes of a block on its way out
static_assert(N % STAGED == 0, "stages");

// Results of what the products that count in each of them have added up: in place, as there are no registers for both; and
// with the bias, which would take registers if it were added when blocks are stored.
__device__ __forceinline__ void combine(float (&of)[FRAMES][MB][N / 2], int m, const float* bias, int lane) {
#pragma unroll
    for (int column = 0; column < N / 8; column++) {
        float2 added = *(const float2*)(bias + column * 8 + lane % 4 * 2);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at = column * 4 + i;
            float more = i % 2 ? added.y : added.x;
#if FRAMES == 2
            float &x = of[0][m][at], &y = of[1][m][at];
            x += y;
            y = fmaf(y, -2.f, x) + more;
            x += more;
#elif FRAMES == 4
            constexpr float ROOT = 0.70710678f;  // the points are at 1, -1, 2 and -2 times this
            float near = of[0][m][at] + of[1][m][at], nears = of[0][m][at] - of[1][m][at];
            float far = of[2][m][at] + of[3][m][at], fars = of[2][m][at] - of[3][m][at];
            of[0][m][at] = near + far + more;
            of[1][m][at] = fmaf(fmaf(fars, 2.f, nears), ROOT, more);
            of[2][m][at] = fmaf(near, 0.5f, fmaf(far, 2.f, more));
            of[3][m][at] = fmaf(fmaf(fars, 8.f, nears), 0.5f * ROOT, more);
#endif
        }
    }
}

// Until all but the newest groups that this thread has committed have been read.
template <int LEFT> __device__ __forceinline__ void await_sent() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}

__device__ __forceinline__ void meet_group(int group) {
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// By a group of warps: some channels of a block, rounded, to shared memory, pixel by pixel, once the stage is free.
__device__ __forceinline__ void stage_block(
    const float (&total)[N / 2], int first, const float* bias, u32 stage, int warp, int lane) {
    if (threadIdx.x % 128 == 0) await_sent<STAGES - 1>();
    meet_group(warp / 4);
    int q = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 to = stage + (warp % 4 * 16 + half * 8 + lane / 4) * STAGED * 2 + q * 16;
#pragma unroll
        for (int j = 0; j < STAGED / 32; j++) {
            u32 word[4];
            round_columns<!SUMS>(word, total, first / 8 + j * 4, half, bias, q);
            asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                ::"r"(to + j * 64), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]) : "memory");
        }
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    meet_group(warp / 4);
}

// From shared memory to the result, or added to what stands there; what lies past a picture is left out.
__device__ __forceinline__ void send_block(
    const TensorMap* out, u32 stage, bool is_there, int adds, int first, int column, int row, int frame) {
    if (threadIdx.x % 128) return;
    if (is_there && adds)
        asm volatile(
            "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
            ::"l"(out), "r"(stage), "r"(first), "r"(column), "r"(row), "r"(frame) : "memory");
    else if (is_there)
        asm volatile(
            "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
            ::"l"(out), "r"(stage), "r"(first), "r"(column), "r"(row), "r"(frame) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");  // empty ones count too
}

extern "C" __global__ void __launch_bounds__(384, 1) convolve(
    const __grid_constant__ TensorMap before, const __grid_constant__ TensorMap fresh, const __grid_constant__ TensorMap last,
    const __grid_constant__ TensorMap out, const char* weight, const unsigned short* bias, int adds_to_out,
    int has_before, int num_fresh, int num, int height, int width, int num_tiles) {
    extern __shared__ __align__(1024) char room[];
    __shared__ __align__(16) float bias_f[C_OUT];
    __shared__ __align__(8) u64 barriers[2 * (NA + NB)];
    u32 slots = (address(room) + 1023) / 1024 * 1024, stages = slots + NA * A_SLOT + NB * B_SLOT;
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
            for (int dt = first_tap<TAPS>(tile, SUMS || has_before); dt < TAPS; dt++) {
                int frame = SUMS ? tile.frame * TAPS + dt : tile.frame + dt - 2;  // those before the first are below zero
                const TensorMap* map = SUMS ? &fresh : frame < 0 ? &before : frame < num_fresh ? &fresh : &last;
                if (!SUMS) frame = frame < 0 ? frame + 2 : frame < num_fresh ? frame : frame - num_fresh;
                for (int step = 0; step < STEPS; step++) {
                    const char* rows = weight + (u64)((tile.part * TAPS + dt) * STEPS + step) * SIDE * B_SLOT;
                    bring_step(a, b, map, step, tile.column - 1, tile.row - 1, frame, rows, true);
                }
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    int group = warp / 4, turn = 0;
    for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
        Tile tile = find_tile(index, num, height, width);
        float total[FRAMES][MB][N / 2];
        const float* bias_here = bias_f + tile.part * N;
        // Adds all products of one input in time.
        auto multiply = [&](float (&sums)[MB][N / 2], int adds) {
            for (int step = 0; step < STEPS; step++) multiply_step(sums, a, b, adds, group, lane), adds = 1;
        };
#if FRAMES > 1
#pragma unroll
        for (int product = 0; product < FRAMES; product++) multiply(total[product], 0);
        finish<0>();
#pragma unroll
        for (int m = 0; m < MB; m++) {
#pragma unroll
            for (int frame = 0; frame < FRAMES; frame++) hold(total[frame][m]);
            combine(total, m, bias_here, lane);
#pragma unroll
            for (int frame = 0; frame < FRAMES; frame++) hold(total[frame][m]);
        }
        multiply(total[0], 1);
        multiply(total[FRAMES - 1], 1);
#else
        int adds = 0;
        for (int dt = first_tap<TAPS>(tile, SUMS || has_before); dt < TAPS; dt++) multiply(total[0], adds), adds = 1;
#endif
        finish_tile(total, a, b, lane);
        // Results leave through two stages in turns, while the next tile is multiplied.
#pragma unroll
        for (int i = 0; i < SENT; i++) {
            int part = i % (N / STAGED) * STAGED, m = i / (N / STAGED) % MB, frame = i / (N / STAGED) / MB;
            u32 stage = stages + (group * STAGES + (turn + i) % STAGES) * STAGE;
            stage_block(total[frame][m], part, bias_here, stage, warp, lane);
            int block = group * MB + m, column = tile.column + block % (TW / 8) * 8, row = tile.row + block / (TW / 8) * 8;
            int at = tile.frame * FRAMES + frame;
            bool is_there = row < height && column < width && (!SUMS || at < num_fresh);  // a last group may not be full
            send_block(&out, stage, is_there, adds_to_out, tile.part * N + part, column, row, at);
        }
        turn = (turn + SENT) % STAGES;
    }
    if (threadIdx.x % 128 == 0) await_sent<0>();
}
