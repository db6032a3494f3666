// What `_add_values` of triton_merge.py and `average_groups` of triton_collect.py do with values of 128 channels as codes
// of 4 bits, to the bit. Behind hopper.cuh and codes_of_4.cuh.
//
// Defined by whoever compiles, beside what that asks for: LISTED, members of a list; THREADS of a block; LANES
// that make a mean.
#define WORDS (16 / LANES)
#define MEAN_BLOCKS 6  // of a multiprocessor: more have fewer registers

struct Average {
    uint4* code;
    unsigned short* largest;
    const float *weight, *share;
    const long long* added;
    const int *head_of, *tally, *number, *member, *rest, *num_rest, *groups, *num_group;
    int* summed;
    int first_head, heads, history_slots, num_slots, num_sums, num_most;
};

// Weight of the group of a slot, of weights as they are and as whole numbers.
__device__ __forceinline__ float total_weight(float own, long long added) {
    return __fadd_rn(own, divide(__ll2float_rn(added), 16777216.0f));
}

// A share of a group in units.
__device__ __forceinline__ float in_units(float share, float most) {
    return __fmul_rn(divide(share, most), 1048576.0f);
}

// Keys of a warp: codes; steps of groups 0 and 1 in the halves of x (nearest) and y (rest), of 2 and 3 in z and w; units.
struct Keys {
    uint4 code[128], step[32];
    float part[32];
};

// Steps of two groups whose largest channels are in one number, in the half where that stands.
__device__ __forceinline__ Step split_pair(u32 largest) {
    const Step a = split_step(largest & 0xFFFFu), b = split_step(largest >> 16);
    return {__byte_perm(a.near, b.near, 0x7610), __byte_perm(a.rest, b.rest, 0x7610)};
}

// A key for each lane that is `there`; gives the number of its group, or -1.
__device__ __forceinline__ int read_keys(Keys& to, const Average& a, int local, int listed, bool there, int lane) {
    const long long head = a.first_head + local, mine = head * a.num_slots, held = head * a.history_slots;
    const int slot = there ? a.rest[head * a.num_most + listed] : 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const long long row = held + __shfl_sync(~0u, slot, 8 * i + lane / 4);
        to.code[32 * i + lane] = a.code[row * 4 + lane % 4];
    }
    const uint2 largest = ((const uint2*)a.largest)[held + slot];
    const Step low = split_pair(largest.x), high = split_pair(largest.y);
    to.step[lane] = make_uint4(low.near, low.rest, high.near, high.rest);
    const int newest = there ? a.head_of[mine + slot] : 0;
    const float total = total_weight(a.weight[held + newest], a.added[mine + newest]);
    to.part[lane] = in_units(a.share[mine + slot], fmaxf(total, 1e-30f));
    const int group = there ? a.number[mine + newest] : a.num_sums;
    return group < a.num_sums ? group : -1;
}

// Adds a key to sums of channels lane, 32 + lane, 64 + lane and 96 + lane.
__device__ __forceinline__ void add_key(int (&sum)[4], const Keys& keys, int which, int lane) {
    const unsigned char* bytes = (const unsigned char*)keys.code + which * 64 + lane;
    const u32 both = bytes[0] | bytes[32] << 16;
    const uint4 step = keys.step[which];
    const u32 first = scale_both(both, {step.x, step.y}), second = scale_both(both >> 4, {step.z, step.w});
    const float value[4] = {low(first), high(first), low(second), high(second)};
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += __float2int_rd(__fmaf_rn(value[i], keys.part[which], 0.5f));
}

// A warp takes 32 keys that are given up and not listed: a lane each for what is one number of a key; then all lanes take
// group after group, so that its keys are added up before memory is, at places that lie side by side.
extern "C" __global__ void __launch_bounds__(THREADS) add_values(const Average a) {
    __shared__ Keys of_warps[THREADS / 32];
    const int local = blockIdx.x % a.heads, lane = threadIdx.x % 32;
    const int listed = blockIdx.x / a.heads * THREADS + threadIdx.x, num = a.num_rest[a.first_head + local];
    if (listed - lane >= num) return;
    Keys& keys = of_warps[threadIdx.x / 32];
    const int group = read_keys(keys, a, local, listed, listed < num, lane);
    __syncwarp();
    const u32 alike = __match_any_sync(~0u, group);
    for (u32 left = __ballot_sync(~0u, group >= 0); left;) {
        const int leader = __ffs(left) - 1;
        const u32 members = __shfl_sync(~0u, alike, leader);
        int sum[4] = {};
        for (u32 more = members; more; more &= more - 1) add_key(sum, keys, __ffs(more) - 1, lane);
        int* to = a.summed + ((long long)local * a.num_sums + __shfl_sync(~0u, group, leader)) * 128 + lane;
#pragma unroll
        for (int i = 0; i < 4; i++) atomicAdd(to + 32 * i, sum[i]);
        left &= ~members;
    }
}

// What a lane holds of a row: codes, and largest channels of low bits and of high ones.
struct Piece { u32 word[WORDS], low, high; };

__device__ __forceinline__ Piece load_piece(const Average& a, long long row, int quarter) {
    const uint4 four = a.code[row * 4 + quarter];
    const unsigned short* largest = a.largest + row * 4 + quarter / 2;
    return {{four.x, four.y, four.z, four.w}, largest[0], largest[2]};
}

// Half the channels of a group as codes, and the largest of all as bfloat16; the lane beside has the others.
__device__ __forceinline__ u32 code_half(u32 (&code)[4 * WORDS], const float (&x)[4 * WORDS]) {
    float most = 0;
#pragma unroll
    for (int i = 0; i < 4 * WORDS; i++) most = fmaxf(most, fabsf(x[i]));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    u32 bits = __float_as_uint(most);
    bits = (bits + 0x7FFFu + (bits >> 16 & 1)) & 0xFFFF0000u;
    if (!(__uint_as_float(bits) >= 1e-30f)) bits = 0;
    const float per_step = __fdiv_rn(7.0f, fmaxf(__uint_as_float(bits), 1e-30f));
#pragma unroll
    for (int i = 0; i < 4 * WORDS; i++) {
        const int near = __float2int_rd(__fadd_rn(__fmul_rn(x[i], per_step), 0.5f));
        code[i] = (u32)(min(max(near, -7), 7) + 8);
    }
    return bits >> 16;
}

__device__ __forceinline__ void store_piece(
    const Average& a, long long row, int quarter, const float (&mean)[2][4 * WORDS], bool there) {
    u32 low[4 * WORDS], high[4 * WORDS], word[WORDS] = {};
    const u32 most_low = code_half(low, mean[0]), most_high = code_half(high, mean[1]);
    if (!there) return;
    unsigned short* largest = a.largest + row * 4 + quarter / 2;
    if (quarter % 2 == 0) largest[0] = most_low, largest[2] = most_high;
#pragma unroll
    for (int i = 0; i < 4 * WORDS; i++) word[i / 4] |= (low[i] | high[i] << 4) << i % 4 * 8;
    a.code[row * 4 + quarter] = make_uint4(word[0], word[1], word[2], word[3]);
}

// 4 lanes make a mean; all members that are listed are read before one is added.
extern "C" __global__ void __launch_bounds__(THREADS, MEAN_BLOCKS) average_rows(const Average a) {
    const int local = blockIdx.x % a.heads, quarter = threadIdx.x % LANES;
    const int listed = (blockIdx.x / a.heads * THREADS + threadIdx.x) / LANES;
    const long long head = a.first_head + local;
    const int num = a.num_group[head];
    if (listed - (int)threadIdx.x % 32 / LANES >= num) return;  // a whole warp: others exchange what is largest
    const long long slot = a.groups[head * a.num_most + min(listed, num - 1)];
    const long long mine = head * a.num_slots, held = head * a.history_slots;
    const Piece self = load_piece(a, held + slot, quarter);
    const int count = a.tally[mine + slot];
    const float own = a.weight[held + slot], most = fmaxf(total_weight(own, a.added[mine + slot]), 1e-30f);
    Piece theirs[LISTED + 1];  // one more than needed: there may be no lists
    float share[LISTED + 1];
#pragma unroll
    for (int which = 0; which < LISTED; which++) {
        if (which >= count) continue;
        const long long of = a.member[(mine + slot) * LISTED + which];
        share[which] = a.share[mine + of];
        theirs[which] = load_piece(a, held + of, quarter);
    }
    int sum[2][4 * WORDS] = {};
    const int group = count > LISTED ? a.number[mine + slot] : a.num_sums;
    if (group < a.num_sums) {
        const int4* from = (const int4*)(a.summed + ((long long)local * a.num_sums + group) * 128) + quarter * WORDS;
#pragma unroll
        for (int i = 0; i < 2 * WORDS; i++) {
            const int4 four = from[i / WORDS * 16 + i % WORDS];
            int* to = sum[i / WORDS] + i % WORDS * 4;
            to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        }
    }
#pragma unroll
    for (int which = 0; which < LISTED; which++) {
        if (which >= count) continue;
        const float part = in_units(share[which], most);
        const Step first = split_step(theirs[which].low), second = split_step(theirs[which].high);
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            float x[8];
            decode_word(x, theirs[which].word[i], first, second);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j / 4][4 * i + j % 4] += __float2int_rd(__fmaf_rn(x[j], part, 0.5f));
        }
    }
    float mean[2][4 * WORDS];
    const float share_of_own = divide(own, most);
    const Step first = split_step(self.low), second = split_step(self.high);
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
        float x[8];
        decode_word(x, self.word[i], first, second);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float others = divide((float)sum[j / 4][4 * i + j % 4], 1048576.0f);
            mean[j / 4][4 * i + j % 4] = low(round_twice(__fmaf_rn(x[j], share_of_own, others)));
        }
    }
    store_piece(a, held + slot, quarter, mean, listed < num);
}
