// New keys and the latent frame before them turned back to before RoPE, at length 1; means of their tiles of 128; codes of
// 4 bits in groups of 32 and records of what is new: what `_turn_back` of triton_match.py does where it packs, for heads of
// 128 channels in bfloat16, to the bit. Behind hopper.cuh and codes_of_4.cuh.
//
// A program takes a tile of a head, 32 keys at a time; four lanes have a key, each a quarter of either half's channels:
// that of 16 bytes of codes. So a length takes two exchanges and a largest channel one.
//
// Defined by whoever compiles, beside what those ask for: LEAST, below which a largest channel counts as 0; LIMIT, the
// largest code; TURN_BLOCKS of a multiprocessor.
constexpr int TILE = 128, THREADS = 128, AT_ONCE = THREADS / 4, CHANNELS = 32;
#define MAGIC 12582912.0f  // 1.5 * 2^23: behind it the last bit of a float is 1
#define MAGIC_BITS 0x4B400000u
#define MEAN_UNITS 4194304.0f

struct Old {
    uint4* code;
    uint2* largest;
    float* position;
    int* m;
    float* weight;
    u32* mass;
};

struct New {
    const char* k;
    const float* position;
    long long stride_head, stride_row, stride_position;  // bytes; bytes; floats
};

// What a lane's 16 pairs of channels turn by: of either half 8, by one axis up to a pair and then by another.
struct Turns { float frequency[16]; int first[2], second[2]; u32 is_second; };

__device__ __forceinline__ void load_turns(Turns& turns, const int* axis, const float* frequency, int q) {
    turns.is_second = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int at = half * 32 + q * 8;
        turns.first[half] = axis[at], turns.second[half] = axis[at + 7];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            turns.frequency[half * 8 + i] = frequency[at + i];
            if (axis[at + i] != turns.first[half]) turns.is_second |= 1u << (half * 8 + i);
        }
    }
}

// A lane's channels, two neighbours in a word: 8 words of the first half, then of the second; and where the key is.
struct Key { u32 word[16]; float place[3]; };

__device__ __forceinline__ void load_new(Key& key, const char* at, const float* position, int q) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint4 four = *(const uint4*)(at + i / 2 * 128 + q * 32 + i % 2 * 16);
        key.word[4 * i] = four.x, key.word[4 * i + 1] = four.y, key.word[4 * i + 2] = four.z, key.word[4 * i + 3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < 3; i++) key.place[i] = position[i];
}

__device__ __forceinline__ void load_old(Key& key, const Old& of, long long row, int q) {
    uint4 four = of.code[row * 4 + q];
    uint2 both = of.largest[row];
    Step first = split_step(q < 2 ? both.x & 0xFFFFu : both.x >> 16);
    Step second = split_step(q < 2 ? both.y & 0xFFFFu : both.y >> 16);
    u32 codes[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u32 word = codes[i % 4] >> i / 4 * 4;
        Step step = i < 4 ? first : second;
        u32 even = scale_both(word, step), odd = scale_both(word >> 8, step);
        key.word[2 * i] = __byte_perm(even, odd, 0x5410), key.word[2 * i + 1] = __byte_perm(even, odd, 0x7632);
    }
#pragma unroll
    for (int i = 0; i < 3; i++) key.place[i] = of.position[row * 3 + i];
}

// Of a key's four lanes.
__device__ __forceinline__ float scale_of(const Key& key) {
    float sum[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float a = low(key.word[i]), b = high(key.word[i]), c = low(key.word[8 + i]), d = high(key.word[8 + i]);
        sum[i] = __fadd_rn(square_both(a, b), square_both(c, d));
    }
#pragma unroll
    for (int num = 4; num > 0; num /= 2)
#pragma unroll
        for (int i = 0; i < num; i++) sum[i] = __fadd_rn(sum[2 * i], sum[2 * i + 1]);
    float squares = sum[0], length;
#pragma unroll
    for (int step = 1; step < 4; step *= 2) squares = __fadd_rn(squares, __shfl_xor_sync(~0u, squares, step));
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(length) : "f"(fmaxf(squares, 1e-24f)));
    return divide(1.0f, length);
}

__device__ __forceinline__ float pick(const float (&place)[3], int axis) {
    return axis == 0 ? place[0] : axis == 1 ? place[1] : place[2];
}

__device__ __forceinline__ u32 in_mean_units(float x) { return __float_as_uint(__fmaf_rn(x, MEAN_UNITS, MAGIC)); }

// Channels are added to sums, MAGIC_BITS off; `unit` is of this lane, where even channels of the first half go.
__device__ __forceinline__ void turn_back(const Key& key, const Turns& turns, float scale, u32 (&sum)[CHANNELS], uint4* unit) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float first = pick(key.place, turns.first[half]), second = pick(key.place, turns.second[half]);
        u32 even_word[4], odd_word[4];
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            float even[2], odd[2];
#pragma unroll
            for (int j = i; j < i + 2; j++) {
                int at = half * 8 + j;
                float x = low(key.word[at]), y = high(key.word[at]);
                float place = turns.is_second & 1u << at ? second : first;
                float2 turn = sin_cos(__fmul_rn(place, turns.frequency[at]));
                float sin = __fmul_rn(turn.x, scale), cos = __fmul_rn(turn.y, scale);
                even[j - i] = __fmaf_rn(x, cos, __fmul_rn(y, sin)), odd[j - i] = __fmaf_rn(y, cos, -__fmul_rn(x, sin));
                sum[2 * at] += in_mean_units(even[j - i]), sum[2 * at + 1] += in_mean_units(odd[j - i]);
            }
            even_word[i / 2] = round_pair(even[0], even[1]), odd_word[i / 2] = round_pair(odd[0], odd[1]);
        }
        if (unit) {
            unit[half * 4] = make_uint4(even_word[0], even_word[1], even_word[2], even_word[3]);
            unit[half * 4 + 8] = make_uint4(odd_word[0], odd_word[1], odd_word[2], odd_word[3]);
        }
    }
}

// Largest channel of a group that two lanes have; a bfloat16.
__device__ __forceinline__ float largest_of(const u32* word) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) most = fmaxf(most, fmaxf(fabsf(low(word[i])), fabsf(high(word[i]))));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    return most >= LEAST ? most : 0.0f;
}

// A code, MAGIC_BITS off: rounded down by the sum. It is within the limit: half a step is more than rounding takes.
__device__ __forceinline__ u32 code_of(float x, float per_step) {
    return __float_as_uint(__fadd_rd(__fadd_rn(__fmul_rn(x, per_step), 0.5f), MAGIC));
}

// Codes of a lane; they stay in order as they are added up, each 16 times as large as the one before.
__device__ __forceinline__ void store_codes(const Key& key, const Old& of, long long row, int q, bool wanted) {
    float first = largest_of(key.word), second = largest_of(key.word + 8);
    float per_first = __fdiv_rn(LIMIT, fmaxf(first, LEAST)), per_second = __fdiv_rn(LIMIT, fmaxf(second, LEAST));
    u32 to[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[i] = 0x88888888u - 0x11111111u * MAGIC_BITS;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 a = key.word[2 * i + j / 2], b = key.word[8 + 2 * i + j / 2];
            u32 one = code_of(j % 2 ? high(a) : low(a), per_first), other = code_of(j % 2 ? high(b) : low(b), per_second);
            to[i] += (one << 8 * j) + (other << (8 * j + 4));
        }
    }
    u32 both = __float_as_uint(first) >> 16 | (__float_as_uint(second) & 0xFFFF0000u);
    u32 others = __shfl_xor_sync(~0u, both, 2);
    if (!wanted) return;
    of.code[row * 4 + q] = make_uint4(to[0], to[1], to[2], to[3]);
    if (q == 0) of.largest[row] = make_uint2(__byte_perm(both, others, 0x5410), __byte_perm(both, others, 0x7632));
}

// Of a new key.
__device__ __forceinline__ void store_records(const Key& key, const Old& of, long long row, u32 mass, int q) {
    if (q == 3) of.m[row] = 1, of.weight[row] = 1.0f, of.mass[row] = mass;
    else of.position[row * 3 + q] = q == 0 ? key.place[0] : q == 1 ? key.place[1] : key.place[2];
}

// Sums of eight lanes that have the same channels of eight keys: half of what is left is given away each time.
template <int NUM> __device__ __forceinline__ void add_lanes(u32* sum, int lane, int step) {
    bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < NUM / 2; i++) {
        u32 given = upper ? sum[i] : sum[NUM / 2 + i], kept = upper ? sum[NUM / 2 + i] : sum[i];
        sum[i] = kept + __shfl_xor_sync(~0u, given, step);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, TURN_BLOCKS) turn_chunk(
    const __grid_constant__ Old of, const __grid_constant__ New fresh, char* __restrict__ unit,
    unsigned short* __restrict__ mean, const int* __restrict__ axis, const float* __restrict__ frequency,
    long long code_slots, long long stride_mean, int tiles, int first_tile, int before, int start, int stop) {
    __shared__ int total[TILE];
    int lane = threadIdx.x % 32, q = lane % 4, tile = first_tile + blockIdx.x % tiles;
    long long head = blockIdx.x / tiles;
    if (threadIdx.x < TILE) total[threadIdx.x] = 0;
    Turns turns;
    load_turns(turns, axis, frequency, q);
    u32 sum[CHANNELS];
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) sum[i] = 0u - TILE / AT_ONCE * MAGIC_BITS;
    unit += (head * (stop - before) - before) * 256;
#pragma unroll 1
    for (int step = 0; step < TILE; step += AT_ONCE) {
        int slot = tile * TILE + step + threadIdx.x / 4;
        long long row = head * code_slots + slot;
        bool is_old = slot < start, is_new = !is_old && slot < stop, live = is_new;
        Key key;
        u32 mass = 0;
        if (is_old) live = of.m[row] > 0;
        if (is_new) {
            const char* at = fresh.k + head * fresh.stride_head + (slot - start) * fresh.stride_row;
            load_new(key, at, fresh.position + head * fresh.stride_position + (slot - start) * 3, q);
            mass = *(const u32*)(at + 256);
        } else if (live) {
            load_old(key, of, row, q);
        } else {
#pragma unroll
            for (int i = 0; i < 16; i++) key.word[i] = 0;
#pragma unroll
            for (int i = 0; i < 3; i++) key.place[i] = 0.0f;
        }
        uint4* to = is_new || (is_old && slot >= before) ? (uint4*)(unit + (long long)slot * 256) + q : (uint4*)0;
        turn_back(key, turns, scale_of(key), sum, to);
        if (to && !live) {
            uint4 none = make_uint4(0x7FFF7FFFu, 0x7FFF7FFFu, 0x7FFF7FFFu, 0x7FFF7FFFu);
#pragma unroll
            for (int i = 0; i < 4; i++) to[i * 4] = none;
        }
        if (__any_sync(~0u, is_new)) store_codes(key, of, row, q, is_new);
        if (is_new) store_records(key, of, row, mass, q);
    }
    add_lanes<32>(sum, lane, 16), add_lanes<16>(sum, lane, 8), add_lanes<8>(sum, lane, 4);
    __syncthreads();
    // What is left are 4 of the lane's channels: an eighth of them.
    int eighth = (lane >> 4 & 1) * 4 + (lane >> 3 & 1) * 2 + (lane >> 2 & 1);
#pragma unroll
    for (int i = 0; i < 4; i++) atomicAdd(total + eighth / 4 * 64 + q * 16 + eighth % 4 * 4 + i, (int)sum[i]);
    __syncthreads();
    if (threadIdx.x < TILE / 2) {
        const float of_one = 1.0f / (MEAN_UNITS * TILE);
        float a = __fmul_rn((float)total[2 * threadIdx.x], of_one), b = __fmul_rn((float)total[2 * threadIdx.x + 1], of_one);
        ((u32*)(mean + head * stride_mean + tile * TILE))[threadIdx.x] = round_pair(a, b);
    }
}
