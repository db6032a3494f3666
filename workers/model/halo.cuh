// What convolutions share that keep a tile's inputs, with what its places see beyond it, in shared memory (halo_conv.cu,
// enlarge_conv.cu): slots of inputs and of weights, which four warps fill and eight multiply, and the order of tiles.
// Stands between hopper.cuh and a kernel's own source.
//
// Defined by whoever compiles: C_IN channels, KC of them in a step, N channels of a tile, PARTS such tiles of the same
// pixels, TH x TW pixels of a tile, MB blocks of 8x8 of them for each of two groups of four warps, SIDE places each way in
// a picture, NA and NB slots of inputs and of weights, KEPT (all weights of a program stay in their slots), and wgmma(), the
// product of 64 pixels, N channels and 16 inputs.
struct alignas(64) TensorMap { u64 opaque[16]; };

constexpr int HALO_W = TW + SIDE - 1, HALO = (TH + SIDE - 1) * HALO_W;  // pixels that a tile sees
constexpr int ROW = KC * 2;                                             // bytes of a pixel of a step, swizzled
constexpr u64 SWIZZLE = KC == 64 ? 1 : 2;
constexpr int A_BYTES = HALO * ROW, A_SLOT = (A_BYTES + 1023) / 1024 * 1024;
constexpr int B_TAP = N * ROW, B_SLOT = SIDE * B_TAP;                   // a row of places
constexpr int STEPS = C_IN / KC, GROUP = 64;
static_assert(KC == 32 || KC == 64, "swizzle");
static_assert(TH * TW == 2 * MB * 64 && B_SLOT % 1024 == 0 && N % 32 == 0 && C_IN % KC == 0, "tile");

// Slots that are filled and emptied in turns. Of their barriers, those that say full stand before all that say empty.
template <int COUNT, int BYTES, bool STAYS> struct Slots {
    u32 rooms, barriers;
    int at = 0, parity = 0, last = -1;  // this one, the parity of this round through them, the one before

    __device__ __forceinline__ u32 room() const { return rooms + at * BYTES; }
    __device__ __forceinline__ u32 full() const { return barriers + at * 8; }
    __device__ __forceinline__ u32 empty(int slot) const { return barriers + (NA + NB) * 8 + slot * 8; }
    __device__ __forceinline__ void release() const { if (!STAYS) arrive(empty(last)); }
    __device__ __forceinline__ void move_on() {
        last = at;
        if (++at == COUNT) at = 0, parity ^= !STAYS;
    }
};
using Inputs = Slots<NA, A_SLOT, false>;
using Weights = Slots<NB, B_SLOT, KEPT>;

// By all threads: barriers, and the bias in float32.
template <int COUNT>
__device__ __forceinline__ void set_up(u64 (&barriers)[2 * (NA + NB)], float (&bias_f)[COUNT], const unsigned short* bias) {
    for (int i = threadIdx.x; i < COUNT; i += 384) bias_f[i] = __uint_as_float((u32)bias[i] << 16);
    if (threadIdx.x == 0) {
        for (int i = 0; i < NA + NB; i++) {
            u32 full = address(barriers) + i * 8, empty = full + (NA + NB) * 8;
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 8;" ::"r"(empty) : "memory");  // a lane of each warp
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
}

struct Tile { int frame, row, column, part; };

// Tiles of a group take their turn frame by frame, so that their frames (groups of frames, where several go at once) are in
// the cache for the next.
__device__ __forceinline__ Tile find_tile(int index, int num, int height, int width) {
    int tiles_w = (width + TW - 1) / TW, tiles = (height + TH - 1) / TH * tiles_w;
    int rest = index / PARTS, group = rest / (GROUP * num), inside = rest % (GROUP * num);
    int size = min(GROUP, tiles - group * GROUP);
    int tile = group * GROUP + inside % size;
    return {inside / size, tile / tiles_w * TH, tile % tiles_w * TW, index % PARTS};
}

// Of the inputs in time of a frame, the first that is there: without frames before, nothing is read for them.
template <int TAPS> __device__ __forceinline__ int first_tap(const Tile& tile, int has_before) {
    return has_before ? 0 : max(0, TAPS - 1 - tile.frame);
}

__device__ __forceinline__ void load_inputs(
    u32 to, const TensorMap* map, u32 barrier, int step, int column, int row, int frame) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(to), "l"(map), "r"(barrier), "r"(step * KC), "r"(column), "r"(row), "r"(frame) : "memory");
}

// By one thread: inputs of a step, from their first pixel, and unless they stay there the weights of its rows of places.
__device__ __forceinline__ void bring_step(
    Inputs& a, Weights& b, const TensorMap* map, int step, int column, int row, int frame, const char* rows, bool brings) {
    await(a.empty(a.at), a.parity ^ 1);
    expect(a.full(), A_BYTES);
    load_inputs(a.room(), map, a.full(), step, column, row, frame);
    a.move_on();
    for (int dy = 0; dy < SIDE && brings; dy++) {
        await(b.empty(b.at), b.parity ^ 1);
        expect(b.full(), B_SLOT);
        bring(b.room(), rows + dy * B_SLOT, B_SLOT, b.full());
        b.move_on();
    }
}

// Swizzles go by addresses in shared memory, not by a matrix's start, so any pixel may be the first.
__device__ __forceinline__ u64 describe_inputs(u32 slot, int pixel, int k) {  // k: 16 channels
    return describe(slot + pixel * ROW + k * 32, HALO_W * ROW, 16, SWIZZLE);
}

__device__ __forceinline__ u64 describe_weights(u32 slot, int column, int k) {
    return describe(slot + column * B_TAP + k * 32, 8 * ROW, 16, SWIZZLE);
}

// The products of a step; `adds` is 0 where nothing was added up before.
__device__ __forceinline__ void multiply_step(
    float (&sums)[MB][N / 2], Inputs& a, Weights& b, int adds, int group, int lane) {
    await(a.full(), a.parity);
#pragma unroll 1
    for (int dy = 0; dy < SIDE; dy++) {
        await(b.full(), b.parity);
        fence();
#pragma unroll
        for (int dx = 0; dx < SIDE; dx++) {
#pragma unroll
            for (int k = 0; k < KC / 16; k++) {
#pragma unroll
                for (int m = 0; m < MB; m++) {
                    int block = group * MB + m;
                    int pixel = (block / (TW / 8) * 8 + dy) * HALO_W + block % (TW / 8) * 8 + dx;
                    wgmma(sums[m], describe_inputs(a.room(), pixel, k), describe_weights(b.room(), dx, k), adds | dx | k);
                }
            }
        }
        adds = 1;
        commit();
        finish<1>();
        // All but the newest products are done: what they read may be overwritten.
        if (lane == 0 && b.last >= 0) {
            b.release();
            if (dy == 0) a.release();
        }
        b.move_on();
    }
    a.move_on();
}

// After a tile's last products, which the compiler does not see write.
template <int COUNT>
__device__ __forceinline__ void finish_tile(float (&total)[COUNT][MB][N / 2], Inputs& a, Weights& b, int lane) {
    finish<0>();
#pragma unroll
    for (int i = 0; i < COUNT * MB; i++) hold(total[i / MB][i % MB]);
    if (lane == 0) b.release(), a.release();
    b.last = -1;
}

// Eight channels of a lane's pixel, rounded, as they lie in memory: of 32 columns of a block, whose first eight are number
// `first`; BIASED: with the bias, unless it was added before.
template <bool BIASED>
__device__ __forceinline__ void round_columns(
    u32 (&word)[4], const float (&total)[N / 2], int first, int half, const float* bias, int q) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
        int column = first + k;
        float2 added = BIASED ? *(const float2*)(bias + column * 8 + q * 2) : make_float2(0.f, 0.f);
        word[k] = round_pair(total[column * 4 + half * 2] + added.x, total[column * 4 + half * 2 + 1] + added.y);
    }
    transpose(word, q);
}
