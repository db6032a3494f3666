// Keys of new latent frames against all keys of the latent frame before their own, of which the highest product and its
// place are kept: what `_frame_before` of triton_match.py finds, for heads of 128 channels in bfloat16. Behind hopper.cuh.
//
// Four groups of four warps have 64 new keys each, in registers, so that shared memory is read for the other keys alone:
// with both from there it would be what tensor cores wait for. A seventeenth warp brings 64 keys at a time, which all
// groups read; while one looks for its highest, tensor cores have the other three.
// A unit of work is 64 new keys of a latent frame and head. A program takes up to four at once, that is a share, of the
// same latent frame and head; shares of four go first, so that programs end together.
//
// Defined by whoever compiles: FRAME, keys of a latent frame, a multiple of 8; STAGES of 64 keys in shared memory; and the
// products wgmma_all() of 64 rows by 64 and wgmma_rest() by FRAME % 64, rounded up to 8 if that is 0.
struct alignas(64) TensorMap { u64 opaque[16]; };

constexpr int ROWS = 64, HALF_STAGE = 8192, STAGE = 2 * HALF_STAGE;
constexpr int WHOLE = FRAME / 64, REST = FRAME % 64, STEPS = WHOLE + (REST > 0);
constexpr int UNITS = (FRAME + ROWS - 1) / ROWS;               // of a latent frame and head
constexpr int SHARES = (UNITS + GROUPS - 1) / GROUPS;          // that they are divided into, as evenly as can be
constexpr int FULLER = UNITS - UNITS / SHARES * SHARES;        // shares with a unit more than the others
constexpr int FEWER = UNITS / SHARES;                          // units of the others
constexpr int THREADS = (GROUPS * 4 + 1) * 32;
#define NONE __int_as_float(0xFF800000)

struct Share { int pair, first, units; };  // latent frame and head; units of it from the first on

// The fuller shares of all pairs, then the others, of which the last programs take the first: they had fewer before.
__device__ __forceinline__ bool take(int turn, int pairs, Share& share) {
    int programs = gridDim.x, fuller = pairs * FULLER, all = pairs * SHARES;
    int index = turn * programs + blockIdx.x;
    if (turn > fuller / programs) index = turn * programs + programs - 1 - blockIdx.x;
    if (turn * programs >= all) return false;
    if (index < fuller) {
        share = {index / max(FULLER, 1), index % max(FULLER, 1) * (FEWER + 1), FEWER + 1};
    } else {
        int rest = index - fuller;
        share = {rest / (SHARES - FULLER), FULLER * (FEWER + 1) + rest % (SHARES - FULLER) * FEWER, FEWER};
    }
    if (index >= all) share.units = 0;
    return true;
}

__device__ __forceinline__ void bring_half(u32 to, const TensorMap* map, u32 barrier, int channel, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(to), "l"(map), "r"(barrier), "r"(channel), "r"(row) : "memory");
}

// New keys of a thread as a product takes them from registers; those past the latent frame are its last one again.
__device__ __forceinline__ void load_own(u32 (&a)[32], const u32* unit, long long first_row, int first) {
    int lane = threadIdx.x % 32, q = lane % 4, row = first + threadIdx.x / 32 % 4 * 16 + lane / 4;
    const u32* at[2];
#pragma unroll
    for (int r = 0; r < 2; r++) at[r] = unit + (first_row + min(row + r * 8, FRAME - 1)) * 64 + q;
#pragma unroll
    for (int i = 0; i < 32; i++) a[i] = at[i % 2][i / 2 * 4];
}

// The highest so far of a thread's columns of two rows, and where it was: a step of 64 keys and a column of its own.
struct Best {
    float high[2] = {NONE, NONE};
    int column[2] = {0, 0}, step[2] = {0, 0};

    // Columns rise, so of equal ones the first is kept; what is no number is never higher.
    template <int NUM> __device__ __forceinline__ void keep(const float (&product)[32], int now) {
        float before[2] = {high[0], high[1]};
#pragma unroll
        for (int i = 0; i < NUM; i++) {
            int r = i / 2 % 2;
            column[r] = product[i] > high[r] ? i / 4 * 8 + i % 2 : column[r];
            high[r] = fmaxf(high[r], product[i]);
        }
#pragma unroll
        for (int r = 0; r < 2; r++)
            if (high[r] > before[r]) step[r] = now;
    }

    // Over all columns of a row, by its four lanes.
    __device__ __forceinline__ void finish_row(int r, float& most, int& key) {
        most = high[r], key = step[r] * 64 + column[r] + threadIdx.x % 4 * 2;
#pragma unroll
        for (int lane = 1; lane < 4; lane *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, lane));
        key = high[r] == most ? key : 0x7FFFFFFF;
#pragma unroll
        for (int lane = 1; lane < 4; lane *= 2) key = min(key, __shfl_xor_sync(~0u, key, lane));
    }
};

// Products of a group's new keys with 64 others, of which NUM / 32 count.
template <int NUM> __device__ __forceinline__ void compare(float (&product)[32], const u32 (&a)[32], u32 others) {
    u64 keys = describe(others, 1024, 16, 1);
    fence();
#pragma unroll
    for (int k = 0; k < 8; k++) {
        u64 at = keys + k / 4 * (HALF_STAGE >> 4) + k % 4 * 2;
        if (NUM == 32) wgmma_all(product, a[k * 4], a[k * 4 + 1], a[k * 4 + 2], a[k * 4 + 3], at, k > 0);
        else wgmma_rest(product, a[k * 4], a[k * 4 + 1], a[k * 4 + 2], a[k * 4 + 3], at, k > 0);
    }
    commit();
    finish<0>();
    hold(product);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) frame_before(
    const __grid_constant__ TensorMap map, const u32* __restrict__ unit, int* __restrict__ found, float* __restrict__ best,
    int heads, int frames, int num_rows, int skip, int before) {
    extern __shared__ __align__(1024) char room[];
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    u32 slots = (address(room) + 1023) / 1024 * 1024, full = address(barriers), empty = full + STAGES * 8;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pairs = heads * frames;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + i * 8) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + i * 8), "r"(GROUPS * 4) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    int slot = 0;
    u32 parity = 0;
    Share share;

    if (warp == GROUPS * 4) {
        if (lane > 0) return;
        for (int turn = 0; take(turn, pairs, share); turn++) {
            int number = share.pair % frames, first_other = skip + (number - 1) * FRAME;
            if (share.units == 0 || first_other < 0) continue;
            int row = share.pair / frames * num_rows + first_other;
#pragma unroll 1
            for (int step = 0; step < STEPS; step++, row += 64) {
                await(empty + slot * 8, parity ^ 1);
                expect(full + slot * 8, STAGE);
                bring_half(slots + slot * STAGE, &map, full + slot * 8, 0, row);
                bring_half(slots + slot * STAGE + HALF_STAGE, &map, full + slot * 8, 64, row);
                if (++slot == STAGES) slot = 0, parity ^= 1;
            }
        }
        return;
    }

    int group = warp / 4;
    for (int turn = 0; take(turn, pairs, share); turn++) {
        int number = share.pair % frames, head = share.pair / frames, first_other = skip + (number - 1) * FRAME;
        if (share.units == 0) continue;
        int first = (share.first + group) * ROWS;
        bool works = group < share.units;
        u32 a[32];
        float product[32];
        Best kept;
        if (works) load_own(a, unit, (long long)head * num_rows + skip + number * FRAME, first);
        if (first_other >= 0) {
#pragma unroll 1
            for (int step = 0; step < WHOLE; step++) {
                await(full + slot * 8, parity);
                if (works) compare<32>(product, a, slots + slot * STAGE);
                if (lane == 0) arrive(empty + slot * 8);
                if (works) kept.keep<32>(product, step);
                if (++slot == STAGES) slot = 0, parity ^= 1;
            }
            if (REST) {
                await(full + slot * 8, parity);
                if (works) compare<(REST + 7) / 8 * 4>(product, a, slots + slot * STAGE);
                if (lane == 0) arrive(empty + slot * 8);
                if (works) kept.keep<REST / 2>(product, WHOLE);
                if (++slot == STAGES) slot = 0, parity ^= 1;
            }
        }
        if (!works) continue;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most;
            int key, own = first + warp % 4 * 16 + lane / 4 + r * 8;
            kept.finish_row(r, most, key);
            // Where nothing is higher than nothing, Triton's way names slot 0.
            long long at = (long long)head * (num_rows - skip) + number * FRAME + own;
            if (lane % 4 == 0 && own < FRAME) {
                found[at] = most == NONE ? 0 : before + first_other + key;
                best[at] = most;
            }
        }
    }
}
