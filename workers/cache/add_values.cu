// What `_add_values` of triton_merge.py does with values of 128 channels as codes of 4 bits, to the bit: a warp takes 32
// keys that are given up and not listed, a lane each for what is one number of a key; then all lanes take a key after the
// other, 4 channels each, so that sums in memory that lie side by side are added to at once. Behind codes_of_4.cuh.
//
// Defined by whoever compiles, beside what that asks for: THREADS of a block; TOGETHER as
// average_rows.py says.
struct Adding {
    const uint4* code;
    const uint2* largest;
    const float *weight, *share;
    const long long* added;
    const int *head_of, *number, *rest, *num_rest, *num_large;
    int* summed;
    int first_head, heads, history_slots, num_slots, num_sums, num_most;
};

// As Triton divides where it is not asked for more.
__device__ __forceinline__ float divide(float a, float b) {
    float to;
    asm("div.full.f32 %0, %1, %2;" : "=f"(to) : "f"(a), "f"(b));
    return to;
}

// Of a warp: codes, steps of groups 0 and 1 and of groups 2 and 3 (nearest and rest of each), share of the group and its
// number or -1.
struct Keys {
    uint4 code[128], step[32];
    float part[32];
    int group[32];
};

// 32 keys from `first` on, where there are so many.
__device__ __forceinline__ void read_keys(Keys& to, const Adding& a, int local, int listed, bool there, int lane) {
    const long long head = a.first_head + local, mine = head * a.num_slots, held = head * a.history_slots;
    const int slot = there ? a.rest[head * a.num_most + listed] : 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const long long row = held + __shfl_sync(~0u, slot, 8 * i + lane / 4);
        to.code[32 * i + lane] = a.code[row * 4 + lane % 4];
    }
    const uint2 largest = a.largest[held + slot];
    const float w = a.share[mine + slot];
    const int newest = there ? a.head_of[mine + slot] : 0;
    const float more = divide(__ll2float_rn(a.added[mine + newest]), 16777216.0f);
    const float total = __fadd_rn(a.weight[held + newest], more);
    to.part[lane] = __fmul_rn(divide(w, fmaxf(total, 1e-30f)), 1048576.0f);
    const int group = there ? a.number[mine + newest] : a.num_sums;
    to.group[lane] = group < a.num_sums ? group : -1;
    const Step low = split_pair(largest.x), high = split_pair(largest.y);
    to.step[lane] = make_uint4(low.near, low.rest, high.near, high.rest);
}

// Adds a key to sums of channels lane, 32 + lane, 64 + lane and 96 + lane.
__device__ __forceinline__ void add_key(int (&sum)[4], const Keys& keys, int which, int lane) {
    const unsigned char* bytes = (const unsigned char*)keys.code + which * 64 + lane;
    const u32 both = bytes[0] | bytes[32] << 16;
    const uint4 step = keys.step[which];
    const u32 low = scale_both(both, {step.x, step.y}), high = scale_both(both >> 4, {step.z, step.w});
    const float part = keys.part[which];
    const u32 value[4] = {low << 16, low & 0xFFFF0000u, high << 16, high & 0xFFFF0000u};
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += __float2int_rd(__fmaf_rn(__uint_as_float(value[i]), part, 0.5f));
}

__device__ __forceinline__ void add_to_memory(int* to, const int (&sum)[4], int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) atomicAdd(to + 32 * i + lane, sum[i]);
}

// IN_WARP: keys of a group that a warp reads are added up first.
template <bool IN_WARP> __device__ __forceinline__ void add_all(const Adding& a) {
    __shared__ Keys of_warps[THREADS / 32];
    const int local = blockIdx.x % a.heads, lane = threadIdx.x % 32;
    const int listed = blockIdx.x / a.heads * THREADS + threadIdx.x, num = a.num_rest[a.first_head + local];
    if (listed - lane >= num) return;
    Keys& keys = of_warps[threadIdx.x / 32];
    read_keys(keys, a, local, listed, listed < num, lane);
    __syncwarp();
    int* to = a.summed + (long long)local * a.num_sums * 128;
    if constexpr (IN_WARP) {
        const int group = keys.group[lane];
        const u32 alike = __match_any_sync(~0u, group);
        u32 left = __ballot_sync(~0u, group >= 0);
        while (left) {
            const int leader = __ffs(left) - 1;
            u32 members = __shfl_sync(~0u, alike, leader);
            left &= ~members;
            int sum[4] = {};
            do {
                add_key(sum, keys, __ffs(members) - 1, lane);
                members &= members - 1;
            } while (members);
            add_to_memory(to + keys.group[leader] * 128LL, sum, lane);
        }
    } else {
        const int count = min(32, num - listed + lane);
#pragma unroll 4
        for (int which = 0; which < count; which++) {
            int sum[4] = {};
            add_key(sum, keys, which, lane);
            const int group = keys.group[which];
            if (group >= 0) add_to_memory(to + group * 128LL, sum, lane);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) add_values(const Adding a) { add_all<TOGETHER>(a); }

// Makes sums of groups 0 that have a number: the others are never read.
extern "C" __global__ void __launch_bounds__(THREADS) clear_sums(const Adding a) {
    const int local = blockIdx.x % a.heads, blocks = gridDim.x / a.heads;
    const int num = min(a.num_large[a.first_head + local], a.num_sums) * 32;
    int4* to = (int4*)(a.summed + (long long)local * a.num_sums * 128);
    for (int i = blockIdx.x / a.heads * THREADS + threadIdx.x; i < num; i += blocks * THREADS) to[i] = make_int4(0, 0, 0, 0);
}
