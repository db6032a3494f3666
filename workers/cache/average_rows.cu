// What `average_groups` of triton_collect.py does with values of 128 channels as codes of 4 bits, to the bit: a thread
// makes two groups of 32 channels of a value, those whose codes share bytes. Behind codes_of_4.cuh.
//
// Defined by whoever compiles, beside what that asks for: LISTED, members of a list; THREADS of a block.
struct Average {
    uint4* code;
    unsigned short* largest;
    const float* weight;
    const long long* added;
    const int *tally, *number, *summed, *member;
    const float* share;
    const int *groups, *num_group;
    int first_head, heads, history_slots, num_slots, num_sums, num_most;
};

// Half a row: its codes, and their steps.
struct Half { u32 word[8]; Step step[2]; };

__device__ __forceinline__ Half load_half(const uint4* code, const unsigned short* largest, long long row, int half) {
    Half to;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint4 four = code[row * 4 + half * 2 + i];
        to.word[4 * i] = four.x, to.word[4 * i + 1] = four.y, to.word[4 * i + 2] = four.z, to.word[4 * i + 3] = four.w;
        to.step[i] = split_step(largest[row * 4 + half + 2 * i]);
    }
    return to;
}

// 32 channels as codes, the largest channel of all as bfloat16.
__device__ __forceinline__ u32 code_group(u32 (&code)[32], const float (&x)[32]) {
    float most = 0;
#pragma unroll
    for (int i = 0; i < 32; i++) most = fmaxf(most, fabsf(x[i]));
    u32 bits = __float_as_uint(most);
    bits = (bits + 0x7FFFu + (bits >> 16 & 1)) & 0xFFFF0000u;
    if (!(__uint_as_float(bits) >= 1e-30f)) bits = 0;
    const float per_step = __fdiv_rn(7.0f, fmaxf(__uint_as_float(bits), 1e-30f));
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const int near = __float2int_rd(__fadd_rn(__fmul_rn(x[i], per_step), 0.5f));
        code[i] = (u32)(min(max(near, -7), 7) + 8);
    }
    return bits >> 16;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) average_rows(const Average a) {
    const int local = blockIdx.x % a.heads, half = threadIdx.x % 2;
    const int listed = (blockIdx.x / a.heads * THREADS + threadIdx.x) / 2;
    const long long head = a.first_head + local;
    if (listed >= a.num_group[head]) return;
    const long long slot = a.groups[head * a.num_most + listed];
    const long long mine = head * a.num_slots, held = head * a.history_slots;
    const int count = a.tally[mine + slot];
    const float own = a.weight[held + slot];
    const float total = __fadd_rn(own, divide(__ll2float_rn(a.added[mine + slot]), 16777216.0f));
    const float most = fmaxf(total, 1e-30f), share_of_own = divide(own, most);
    int sum[2][32] = {};
    const int group = count > LISTED ? a.number[mine + slot] : a.num_sums;
    if (group < a.num_sums) {
        const int* from = a.summed + ((long long)local * a.num_sums + group) * 128 + half * 32;
#pragma unroll
        for (int i = 0; i < 64; i++) sum[i / 32][i % 32] = from[i / 32 * 64 + i % 32];
    }
#pragma unroll 1
    for (int which = 0; which < min(count, LISTED); which++) {
        const long long of = a.member[(mine + slot) * LISTED + which];
        const float part = __fmul_rn(divide(a.share[mine + of], most), 1048576.0f);
        const Half theirs = load_half(a.code, a.largest, held + of, half);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float x[8];
            decode_word(x, theirs.word[i], theirs.step[0], theirs.step[1]);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j / 4][4 * i + j % 4] += __float2int_rd(__fmaf_rn(x[j], part, 0.5f));
        }
    }
    const Half self = load_half(a.code, a.largest, held + slot, half);
    float mean[2][32];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float x[8];
        decode_word(x, self.word[i], self.step[0], self.step[1]);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float others = divide((float)sum[j / 4][4 * i + j % 4], 1048576.0f);
            mean[j / 4][4 * i + j % 4] = __uint_as_float(round_twice(__fmaf_rn(x[j], share_of_own, others)) << 16);
        }
    }
    u32 low[32], high[32];
    a.largest[(held + slot) * 4 + half] = code_group(low, mean[0]);
    a.largest[(held + slot) * 4 + half + 2] = code_group(high, mean[1]);
    u32 word[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        word[i] = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) word[i] |= (low[4 * i + j] | high[4 * i + j] << 4) << 8 * j;
    }
    uint4* to = a.code + (held + slot) * 4 + half * 2;
    to[0] = make_uint4(word[0], word[1], word[2], word[3]), to[1] = make_uint4(word[4], word[5], word[6], word[7]);
}
