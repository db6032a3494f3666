// A causal 3x3x3 convolution for compute capability 9.0 in bfloat16: a tile's inputs with a border of one pixel come into
// shared memory once for nine places of the kernel, which tensor cores read from there, each place from another start.
//
// With two or four FRAMES a tile is of as many that follow each other, and inputs are the sums of frames that winograd.py
// describes: four times nine places for two frames instead of six, six times for four instead of twelve.
//
// Defined by whoever compiles: C_IN and C_OUT channels, N channels of a tile (C_OUT is a multiple), TH x TW pixels of a
// tile, MB blocks of 8x8 pixels for each of two groups of four warps, NA and NB slots of inputs and of weights, FRAMES,
// STAGED channels on their way out at once, and wgmma(), the product of 64 pixels, N channels and 16 inputs.
struct alignas(64) TensorMap { u64 opaque[16]; };

constexpr bool SUMS = FRAMES > 1;                             // whether inputs are sums of frames
constexpr int TAPS = FRAMES + 2;                              // inputs in time

constexpr int KC = 32;                                        // input channels of a step
constexpr int HALO_W = TW + 2, HALO = (TH + 2) * HALO_W;      // pixels with their border
constexpr int A_BYTES = HALO * KC * 2, A_SLOT = (A_BYTES + 1023) / 1024 * 1024;
constexpr int B_TAP = N * KC * 2, B_SLOT = 3 * B_TAP;         // a row of places
constexpr int STEPS = C_IN / KC, TILES_N = C_OUT / N, GROUP = 64;
constexpr int STAGE = 64 * STAGED * 2;                         // bytes of a block on its way out
constexpr int SENT = FRAMES * MB * (N / STAGED);               // by each group of warps for a tile
static_assert(TH * TW == 2 * MB * 64 && B_SLOT % 1024 == 0 && N % 32 == 0, "tile");
static_assert(N % STAGED == 0, "stages");

__device__ __forceinline__ void load_inputs(u32 to, const TensorMap* map, u32 barrier, int step, int column, int row, int frame) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(to), "l"(map), "r"(barrier), "r"(step * KC), "r"(column), "r"(row), "r"(frame) : "memory");
}

__device__ __forceinline__ u64 describe_inputs(u32 slot, int pixel, int k) {  // k: 16 channels
    return describe(slot + pixel * 64 + k * 32, HALO_W * 64, 16, 2);
}

__device__ __forceinline__ u64 describe_weights(u32 slot, int column, int k) {
    return describe(slot + column * B_TAP + k * 32, 512, 16, 2);
}

struct Tile { int frame, row, column, first; };

// Tiles of a group take their turn frame by frame (group of frames by group), so that their frames are in the cache for the
// next.
__device__ __forceinline__ Tile find_tile(int index, int num, int height, int width) {
    int tiles_w = (width + TW - 1) / TW, tiles = (height + TH - 1) / TH * tiles_w;
    int rest = index / TILES_N, group = rest / (GROUP * num), inside = rest % (GROUP * num);
    int size = min(GROUP, tiles - group * GROUP);
    int tile = group * GROUP + inside % size;
    return {inside / size, tile / tiles_w * TH, tile % tiles_w * TW, index % TILES_N * N};
}

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

// Without frames before, nothing is read for them.
__device__ __forceinline__ int first_tap(const Tile& tile, int has_before) {
    return SUMS || has_before ? 0 : max(0, 2 - tile.frame);
}

// Some channels of a block, rounded, to shared memory: pixel by pixel.
__device__ __forceinline__ void stage_block(
    const float (&total)[N / 2], int first, const float* bias, u32 stage, int warp, int lane) {
    int q = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 to = stage + (warp % 4 * 16 + half * 8 + lane / 4) * STAGED * 2 + q * 16;
#pragma unroll
        for (int j = 0; j < STAGED / 32; j++) {
            u32 word[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int column = first / 8 + j * 4 + k;
                float2 added = SUMS ? make_float2(0.f, 0.f) : *(const float2*)(bias + column * 8 + q * 2);
                word[k] = round_pair(total[column * 4 + half * 2] + added.x, total[column * 4 + half * 2 + 1] + added.y);
            }
            transpose(word, q);
            asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                ::"r"(to + j * 64), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]) : "memory");
        }
    }
}

// From shared memory to the result, or added to what stands there; what lies past a picture is left out.
__device__ __forceinline__ void send_block(const TensorMap* out, u32 stage, int adds, int first, int column, int row, int frame) {
    if (adds)
        asm volatile(
            "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
            ::"l"(out), "r"(stage), "r"(first), "r"(column), "r"(row), "r"(frame) : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
            ::"l"(out), "r"(stage), "r"(first), "r"(column), "r"(row), "r"(frame) : "memory");
}

// Until all but the newest groups that this thread has committed have been read.
template <int LEFT> __device__ __forceinline__ void await_sent() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}

__device__ __forceinline__ void meet_group(int group) {
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

extern "C" __global__ void __launch_bounds__(384, 1) convolve(
    const __grid_constant__ TensorMap before, const __grid_constant__ TensorMap fresh, const __grid_constant__ TensorMap last,
    const __grid_constant__ TensorMap out, const char* weight, const unsigned short* bias, int adds_to_out,
    int has_before, int num_fresh, int num, int height, int width, int num_tiles) {
    extern __shared__ __align__(1024) char room[];
    __shared__ __align__(16) float bias_f[C_OUT];
    __shared__ __align__(8) u64 barriers[2 * (NA + NB)];
    u32 a_slots = (address(room) + 1023) / 1024 * 1024, b_slots = a_slots + NA * A_SLOT, stages = b_slots + NB * B_SLOT;
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
                int frame = SUMS ? tile.frame * TAPS + dt : tile.frame + dt - 2;  // those before the first are below zero
                const TensorMap* map = SUMS ? &fresh : frame < 0 ? &before : frame < num_fresh ? &fresh : &last;
                if (!SUMS) frame = frame < 0 ? frame + 2 : frame < num_fresh ? frame : frame - num_fresh;
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
    int group = warp / 4, turn = 0;
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
#if FRAMES > 1
#pragma unroll
        for (int product = 0; product < FRAMES; product++) multiply(total[product], 0);
        finish<0>();
#pragma unroll
        for (int m = 0; m < MB; m++) {
#pragma unroll
            for (int frame = 0; frame < FRAMES; frame++) hold(total[frame][m]);
            combine(total, m, bias_f + tile.first, lane);
#pragma unroll
            for (int frame = 0; frame < FRAMES; frame++) hold(total[frame][m]);
        }
        multiply(total[0], 1);
        multiply(total[FRAMES - 1], 1);
#else
        int adds = 0;
        for (int dt = first_tap(tile, has_before); dt < TAPS; dt++) multiply(total[0], adds), adds = 1;
#endif
        finish<0>();
#pragma unroll
        for (int m = 0; m < FRAMES * MB; m++) hold(total[m / MB][m % MB]);
        if (lane == 0) arrive(empty_b + last_b * 8), arrive(empty_a + last_a * 8);
        // Results leave through two stages in turns, while the next tile is multiplied.
#pragma unroll
        for (int i = 0; i < SENT; i++) {
            int part = i % (N / STAGED) * STAGED, m = i / (N / STAGED) % MB, frame = i / (N / STAGED) / MB;
            u32 stage = stages + (group * 2 + (turn + i) % 2) * STAGE;
            bool sends = threadIdx.x % 128 == 0;
            if (sends) await_sent<1>();
            meet_group(group);
            stage_block(total[frame][m], part, bias_f + tile.first, stage, warp, lane);
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            meet_group(group);
            int block = group * MB + m, column = tile.column + block % (TW / 8) * 8, row = tile.row + block / (TW / 8) * 8;
            int at = tile.frame * FRAMES + frame;
            bool is_there = row < height && column < width && (!SUMS || at < num_fresh);  // a last group may not be full
            if (sends && is_there) send_block(&out, stage, adds_to_out, tile.first + part, column, row, at);
            if (sends) asm volatile("cp.async.bulk.commit_group;" ::: "memory");  // empty ones count too
        }
        turn = (turn + SENT) % 2;
    }
    if (threadIdx.x % 128 == 0) await_sent<0>();
}
