// What `_value_distances` and `_key_distances` of triton_pairs.py find of rows of 128 channels as codes of 4 bits, in
// groups of 32, to the bit. A thread takes a row: nothing is exchanged, and what a channel turns by stands in the
// instruction. Such kernels are bound by how many instructions they take. Behind codes_of_4.cuh.
//
// Defined by whoever compiles, beside what that asks for: of each pair of channels AXIS and FREQUENCY, 64 numbers each;
// THREADS and KEY_THREADS of a block; and what row_distances.py says.
#define WORDS 16

// Codes and largest channels.
struct Row { u32 word[WORDS], largest[2]; };

__device__ __forceinline__ Row load_row(const uint4* code, const uint2* largest, long long row, bool there) {
    Row to;
    uint2 both = there ? largest[row] : make_uint2(0, 0);
    to.largest[0] = both.x, to.largest[1] = both.y;
#pragma unroll
    for (int i = 0; i < WORDS / 4; i++) {
        uint4 four = there ? code[row * 4 + i] : make_uint4(0, 0, 0, 0);
        to.word[4 * i] = four.x, to.word[4 * i + 1] = four.y, to.word[4 * i + 2] = four.z, to.word[4 * i + 3] = four.w;
    }
    return to;
}

// Steps of the first or second 8 words: those of low bits and those of high ones.
__device__ __forceinline__ void steps_of(Step (&to)[2], const Row& row, int half) {
#pragma unroll
    for (int i = 0; i < 2; i++) to[i] = split_step(half ? row.largest[i] >> 16 : row.largest[i] & 0xFFFFu);
}

// Neighbours first.
template <int NUM> __device__ __forceinline__ float add_up(const float* x) {
    if constexpr (NUM == 1) return x[0];
    else return __fadd_rn(add_up<NUM / 2>(x), add_up<NUM / 2>(x + NUM / 2));
}

__device__ __forceinline__ float square_both(float a, float b) { return __fmaf_rn(a, a, __fmul_rn(b, b)); }

#if VALUES_BY == 0
// A block takes slots of one head; rows of codes lie head by head, code_slots each.
extern "C" __global__ void __launch_bounds__(THREADS) value_distances(
    const uint4* __restrict__ code, const uint2* __restrict__ largest, const int* __restrict__ m,
    const int* __restrict__ partner, float* __restrict__ of_values, float* __restrict__ lengths, long long code_slots,
    long long stride_m, long long stride_partner, int num_slots) {
    const int blocks = (num_slots + THREADS - 1) / THREADS;
    const long long head = blockIdx.x / blocks;
    const int slot = (blockIdx.x % blocks) * THREADS + threadIdx.x;
    const bool inside = slot < num_slots;
    const int other = inside ? partner[head * stride_partner + slot] : -1;
    const bool live = inside && m[head * stride_m + slot] > 0;
    const Row own = load_row(code, largest, head * code_slots + slot, live);
    const Row theirs = load_row(code, largest, head * code_slots + other, live && other >= 0);
    float length[WORDS], apart[WORDS];
    Step a[2], b[2];
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
        if (i % 8 == 0) steps_of(a, own, i / 8), steps_of(b, theirs, i / 8);
        float x[8], y[8], own_square[4], square[4];
        decode_word(x, own.word[i], a[0], a[1]);
        decode_word(y, theirs.word[i], b[0], b[1]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            own_square[j] = square_both(x[j], x[4 + j]);
            square[j] = square_both(__fsub_rn(x[j], y[j]), __fsub_rn(x[4 + j], y[4 + j]));
        }
        length[i] = add_up<4>(own_square), apart[i] = add_up<4>(square);
    }
    if (inside) {
        lengths[head * num_slots + slot] = add_up<WORDS>(length);
        of_values[head * num_slots + slot] = add_up<WORDS>(apart);
    }
}
#else
struct Sums { float own, apart; };

// Of 4 words: sums over their channels of squares, and of squares of differences. With BY_PRODUCTS, codes become float32
// by tensor cores.
template <bool BY_PRODUCTS>
__device__ __forceinline__ Sums compare_four(
    uint4 own, uint4 theirs, const Step (&a)[2], const Step (&b)[2], u32 ones, u32 less) {
    const u32 own_word[4] = {own.x, own.y, own.z, own.w}, their_word[4] = {theirs.x, theirs.y, theirs.z, theirs.w};
    float length[4], apart[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float x[8], d[8], own_square[4], square[4];
        if constexpr (BY_PRODUCTS) {
            u32 left[4], right[4];
            scale_word(left, own_word[i], a[0], a[1]);
            scale_word(right, their_word[i], b[0], b[1]);
            widen(x, left, ones), widen(x + 4, left + 2, ones);
            widen_apart(d, left, right, ones, less), widen_apart(d + 4, left + 2, right + 2, ones, less);
        } else {
            decode_word(x, own_word[i], a[0], a[1]);
            decode_word(d, their_word[i], b[0], b[1]);
#pragma unroll
            for (int j = 0; j < 8; j++) d[j] = __fsub_rn(x[j], d[j]);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            own_square[j] = square_both(x[j], x[4 + j]);
            square[j] = square_both(d[j], d[4 + j]);
        }
        length[i] = add_up<4>(own_square), apart[i] = add_up<4>(square);
    }
    return {add_up<4>(length), add_up<4>(apart)};
}

__device__ __forceinline__ Sums add_sums(Sums x, Sums y) {
    return {__fadd_rn(x.own, y.own), __fadd_rn(x.apart, y.apart)};
}

// Of two rows, a quarter after the other. `turn` says in what order: quarters change places within halves, and halves;
// sums are the same. First of all come `largest` of the half that is first then, in lower halves of numbers.
template <bool BY_PRODUCTS>
__device__ __forceinline__ Sums compare_rows(
    const uint4* own, const uint4* theirs, uint2 largest_a, uint2 largest_b, int turn, int lane) {
    const u32 ones = part_of_diagonal(0x3F80u, lane), less = part_of_diagonal(0xBF80u, lane);
    Sums sums = {0, 0};
#pragma unroll UNROLLED
    for (int half = 0; half < 2; half++) {
        Step a[2], b[2];
        const u32 which = half ? 0x7632 : 0x5410;
        split_both(a[0], a[1], __byte_perm(largest_a.x, largest_a.y, which));
        split_both(b[0], b[1], __byte_perm(largest_b.x, largest_b.y, which));
        const int first = 2 * half ^ turn, second = first ^ 1;
        const Sums of_half = add_sums(compare_four<BY_PRODUCTS>(own[first], theirs[first], a, b, ones, less),
                                      compare_four<BY_PRODUCTS>(own[second], theirs[second], a, b, ones, less));
        if (half) sums = add_sums(sums, of_half);
        else sums = of_half;
    }
    return sums;
}

__device__ __forceinline__ u32 most_of_both(u32 a, u32 b) {
    u32 to;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(to) : "r"(a), "r"(b));
    return to;
}

__device__ __forceinline__ u32 least_of_both(u32 a, u32 b) {
    u32 to;
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(to) : "r"(a), "r"(b));
    return to;
}

// Whether differences of two rows are exact by tensor cores: no group is much smaller than another, none is 0, all are
// finite. Codes go up to 7, so channels that are not 0 are within 2^12 then.
__device__ __forceinline__ bool are_alike(uint2 a, uint2 b) {
    u32 most = most_of_both(most_of_both(a.x, a.y), most_of_both(b.x, b.y));
    u32 least = least_of_both(least_of_both(a.x, a.y), least_of_both(b.x, b.y));
    most = most_of_both(most, most << 16), least = least_of_both(least, least << 16);
    const float high = __uint_as_float(most & 0xFFFF0000u), low = __uint_as_float(least & 0xFFFF0000u);
    return low > 0 && high < 3e38f && high <= 512.0f * low;
}

__device__ __forceinline__ void copy_quarter(uint4* to, const uint4* from) {
    const u32 at = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}

// As `value_distances`, with what tensor cores can do left to them. Of a slot without a partner the distance is
// anything. With COPIED, a row is read by 4 lanes at once.
template <bool COPIED>
__device__ __forceinline__ void compare_values(
    const uint4* code, const uint2* largest, const int* m, const int* partner, float* of_values, float* lengths,
    long long code_slots, long long stride_m, long long stride_partner, int num_slots) {
    const int blocks = (num_slots + THREADS - 1) / THREADS, lane = threadIdx.x % 32;
    const long long head = blockIdx.x / blocks, before = head * code_slots;
    const int slot = (blockIdx.x % blocks) * THREADS + threadIdx.x, here = min(slot, num_slots - 1);
    int other = partner[head * stride_partner + here];
    other = other < 0 ? here : other;
    const bool live = m[head * stride_m + here] > 0;
    const uint4 *own = code + (before + here) * 4, *theirs = code + (before + other) * 4;
    const uint2 a = largest[before + here], b = largest[before + other];
    Sums found;
    // Slots without a key hold anything.
    if (!__all_sync(~0u, live && are_alike(a, b))) found = compare_rows<false>(own, theirs, a, b, 0, lane);
    else if constexpr (COPIED) {
        __shared__ uint4 copies[THREADS / 32][2][128];
        uint4 (&copy)[2][128] = copies[threadIdx.x / 32];
        const uint4* at = code + before * 4 + lane % 4;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            copy_quarter(&copy[0][32 * i + lane], at + __shfl_sync(~0u, here, 8 * i + lane / 4) * 4LL);
            copy_quarter(&copy[1][32 * i + lane], at + __shfl_sync(~0u, other, 8 * i + lane / 4) * 4LL);
        }
        // 8 lanes that follow one another read from all banks: each second one has an order of quarters of its own.
        const int turn = lane / 2 % 4, bits = turn / 2 * 16;
        const uint2 first = {__funnelshift_l(a.x, a.x, bits), __funnelshift_l(a.y, a.y, bits)};
        const uint2 second = {__funnelshift_l(b.x, b.x, bits), __funnelshift_l(b.y, b.y, bits)};
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncwarp();
        found = compare_rows<true>(&copy[0][lane * 4], &copy[1][lane * 4], first, second, turn, lane);
    } else {
        found = compare_rows<true>(own, theirs, a, b, 0, lane);
    }
    if (slot < num_slots) {
        lengths[head * num_slots + slot] = live ? found.own : 0.0f;
        of_values[head * num_slots + slot] = found.apart;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) value_distances(
    const uint4* __restrict__ code, const uint2* __restrict__ largest, const int* __restrict__ m,
    const int* __restrict__ partner, float* __restrict__ of_values, float* __restrict__ lengths, long long code_slots,
    long long stride_m, long long stride_partner, int num_slots) {
    compare_values<VALUES_BY == 2>(
        code, largest, m, partner, of_values, lengths, code_slots, stride_m, stride_partner, num_slots);
}
#endif
