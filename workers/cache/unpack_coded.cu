// Tiles of 8-bit floats (see coded_tiles.py) from a layer of a packed table. A program of THREADS threads does TILES
// tiles one after another; copies in bulk bring codes of STAGES of them ahead, keys and values at once. Behind
// hopper.cuh.
//
// A code becomes a number without a conversion: as the lowest byte of 2^23 it is that much more, and what is taken off
// is exact. Values need no turning either: a thread picks one channel of four keys out of four words.
//
// Defined by whoever compiles: TOGETHER, programs of a multiprocessor; STAGE_BYTES, of a tile in shared memory; BITS of
// a code, GROUPS of channels with a step; STEP_K and STEP_V, from a group's largest channel to its step times the
// scale, a power of two, so that bits are those of scaling last; SCALE_K and SCALE_V; SCALE_MASS; EXTRA channels.
constexpr int ROW = 16 * BITS, CHUNKS = ROW / 16, STEPS = 2 * GROUPS;
// Of 16 keys, and where the next 16 lie in shared memory: 8 lanes that read of as many pieces meet in no bank.
constexpr int PIECE = 16 * ROW, PIECE_STEPS = 16 * STEPS, NEXT = PIECE + 16, NEXT_STEPS = PIECE_STEPS + 16;

struct __align__(16) Stage {
    char k[8 * PIECE], k_steps[8 * PIECE_STEPS], mass[512], v[8 * NEXT], v_steps[8 * NEXT_STEPS];
};
static_assert(sizeof(Stage) == STAGE_BYTES);

struct Layer {
    const char *k, *k_steps, *v, *v_steps, *mass, *end_k, *end_v;
    int first_tile, stop_tile, end_tiles, tiles;
    __device__ bool codes(int tile) const { return tile >= first_tile && tile < stop_tile; }
};

__device__ __forceinline__ u32 split(u32 codes, int channel) {
    return BITS == 4 ? codes >> channel / 64 * 4 & 0x0F0F0F0Fu : codes ^ 0x80808080u;
}

__device__ __forceinline__ float number(u32 codes, int byte) {
    return __uint_as_float(__byte_perm(codes, 0x4B000000u, 0x7440 + byte)) - (8388608.f + (1 << BITS - 1));
}

__device__ __forceinline__ float step_of(const char* steps, int channel, float step) {
    return __uint_as_float((u32)((const unsigned short*)steps)[channel / (128 / GROUPS)] << 16) * step;
}

__device__ __forceinline__ void store_mass(uint4* to, u32 mass) {
    *to = make_uint4(code_mass((low(mass) + high(mass)) * SCALE_MASS), 0, 0, 0);
}

// By 8 lanes.
__device__ __forceinline__ void bring_tile(Stage& to, const Layer& from, int head, int tile, u32 full) {
    int lane = threadIdx.x;
    long long at = (long long)head * (from.stop_tile - from.first_tile) + tile - from.first_tile;
    if (lane == 0) {
        expect(full, 16 * (PIECE + PIECE_STEPS) + 512);
        bring(address(to.k), from.k + at * 8 * PIECE, 8 * PIECE, full);
        bring(address(to.k_steps), from.k_steps + at * 8 * PIECE_STEPS, 8 * PIECE_STEPS, full);
        bring(address(to.mass), from.mass + at * 512, 512, full);
    }
    bring(address(to.v) + lane * NEXT, from.v + (at * 8 + lane) * PIECE, PIECE, full);
    bring(address(to.v_steps) + lane * NEXT_STEPS, from.v_steps + (at * 8 + lane) * PIECE_STEPS, PIECE_STEPS, full);
}

__device__ __forceinline__ void unpack_keys(const Stage& of, uint4* to) {
#pragma unroll 1  // else loads are moved ahead of each other until registers spill
    for (int i = 0; i < 1024 / THREADS; i++) {
        int at = i * THREADS + threadIdx.x, row = at / 8, channel = (at % 8 ^ row & 7) * 16;
        uint4 codes = *(const uint4*)(of.k + row * ROW + channel / 16 % CHUNKS * 16);
        float step = step_of(of.k_steps + row * STEPS, channel, STEP_K);
        u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 word = split(words[j], channel);
            words[j] = code_four(
                number(word, 0) * step, number(word, 1) * step, number(word, 2) * step, number(word, 3) * step);
        }
        to[at] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// 16 keys of four channels, words of four keys each.
__device__ __forceinline__ void store_values(uint4* to, int channel, int piece, const u32 (&turned)[4][4]) {
#pragma unroll
    for (int j = 0; j < 4; j++, channel++)
        to[channel * 8 + (piece ^ channel & 7)] = make_uint4(turned[j][0], turned[j][1], turned[j][2], turned[j][3]);
}

// The four keys of a word, in its order.
__device__ __forceinline__ int key_of(int word, int byte) { return word * 2 + byte % 2 + byte / 2 * 8; }

__device__ __forceinline__ void unpack_values(const Stage& of, uint4* to) {
    int piece = threadIdx.x % 8;
#pragma unroll 1
    for (int i = 0; i < 256 / THREADS; i++) {
        int channel = (i * THREADS + threadIdx.x) / 8 * 4;
        const char* codes = of.v + piece * NEXT + channel % ROW;
        const char* steps = of.v_steps + piece * NEXT_STEPS;
        u32 turned[4][4];
#pragma unroll
        for (int word = 0; word < 4; word++) {
            u32 four[4];
            float step[4];
#pragma unroll
            for (int byte = 0; byte < 4; byte++) {
                int key = key_of(word, byte);
                four[byte] = split(*(const u32*)(codes + key * ROW), channel);
                step[byte] = step_of(steps + key * STEPS, channel, STEP_V);
            }
#pragma unroll
            for (int j = 0; j < 4; j++)
                turned[j][word] = code_four(
                    number(four[0], j) * step[0], number(four[1], j) * step[1], number(four[2], j) * step[2],
                    number(four[3], j) * step[3]);
        }
        store_values(to, channel, piece, turned);
    }
}

// What lies beside the history is bfloat16, log m of a key behind its channels.
__device__ __forceinline__ void cast_keys(const char* rows, uint4* to) {
#pragma unroll 2
    for (int i = 0; i < 1024 / THREADS; i++) {
        int at = i * THREADS + threadIdx.x, row = at / 8, piece = at % 8 ^ row & 7;
        const uint4* from = (const uint4*)(rows + row * (256 + 2 * EXTRA)) + piece * 2;
        uint4 a = from[0], b = from[1];
        u32 x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}, words[4];
#pragma unroll
        for (int j = 0; j < 4; j++) words[j] = code_four(x[j * 2], x[j * 2 + 1], SCALE_K);
        to[at] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

__device__ __forceinline__ void cast_values(const char* rows, uint4* to) {
    int piece = threadIdx.x % 8;
#pragma unroll 1
    for (int i = 0; i < 256 / THREADS; i++) {
        int channel = (i * THREADS + threadIdx.x) / 8 * 4;
        const char* from = rows + piece * 16 * 256 + channel * 2;
        u32 turned[4][4];
#pragma unroll
        for (int word = 0; word < 4; word++) {
            uint2 x[4];
#pragma unroll
            for (int byte = 0; byte < 4; byte++) x[byte] = *(const uint2*)(from + key_of(word, byte) * 256);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float four[4];
#pragma unroll
                for (int byte = 0; byte < 4; byte++) {
                    u32 pair = j < 2 ? x[byte].x : x[byte].y;
                    four[byte] = (j % 2 ? high(pair) : low(pair)) * SCALE_V;
                }
                turned[j][word] = code_four(four[0], four[1], four[2], four[3]);
            }
        }
        store_values(to, channel, piece, turned);
    }
}

constexpr int END_ROW = 256 + 2 * EXTRA;

struct Coded {
    uint4 *k, *v, *mass;
    __device__ __forceinline__ void take_codes(const Stage& of, int unit) const {
        if (threadIdx.x < 128) store_mass(mass + unit * 128ll + threadIdx.x, ((const u32*)of.mass)[threadIdx.x]);
        unpack_keys(of, k + unit * 1024ll);
        unpack_values(of, v + unit * 1024ll);
    }
    __device__ __forceinline__ void take_rows(const char* of_k, const char* of_v, int unit) const {
        if (threadIdx.x < 128)
            store_mass(mass + unit * 128ll + threadIdx.x, *(const u32*)(of_k + threadIdx.x * END_ROW + 256));
        cast_keys(of_k, k + unit * 1024ll);
        cast_values(of_v, v + unit * 1024ll);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, TOGETHER) unpack_coded(
    Layer from, Coded to, const unsigned char* is_seen, int units) {
    extern __shared__ __align__(128) char memory[];
    __shared__ u64 full[STAGES];
    Stage* stages = (Stage*)memory;
    int first = blockIdx.x * TILES;
    u32 left = 0, ahead = 0;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        int unit = first + i;
        if (unit >= units || is_seen[unit] == 0) continue;
        left |= 1u << i;
        if (from.codes(unit % from.tiles)) ahead |= 1u << i;
    }
    if (left == 0) return;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < STAGES; i++)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(full + i)) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    auto bring_next = [&](int slot) {
        if (ahead == 0) return;
        int unit = first + __ffs(ahead) - 1;
        ahead &= ahead - 1;
        if (threadIdx.x < 8) bring_tile(stages[slot], from, unit / from.tiles, unit % from.tiles, address(full + slot));
    };
#pragma unroll
    for (int i = 0; i < STAGES; i++) bring_next(i);
    int slot = 0, parity = 0;
    for (; left; left &= left - 1) {
        int unit = first + __ffs(left) - 1, tile = unit % from.tiles;
        if (!from.codes(tile)) {
            int before = tile < from.first_tile ? 0 : from.stop_tile - from.first_tile;
            long long row = ((long long)(unit / from.tiles) * from.end_tiles + tile - before) * 128;
            to.take_rows(from.end_k + row * END_ROW, from.end_v + row * 256, unit);
            continue;
        }
        await(address(full + slot), parity);
        to.take_codes(stages[slot], unit);
        if (TILES > STAGES) {
            __syncthreads();
            bring_next(slot);
        }
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
}
