// Mass of a sample of each tile's keys for a sample of the queries, keys of 128 channels as codes of 4 bits, for compute
// capability 9.0: the bits of `_coded_tile_sums` in triton_coded_choice.py. Behind hopper.cuh and codes_of_4.cuh.
//
// Keys are the rows of a product, which tensor cores take from registers: each is decoded once, where it is multiplied.
// The queries of a head are its columns; they stay in shared memory as PARTS of a product, of which one is multiplied
// while exponentials of the one before are summed up. A group of four warps has 32 tiles, two keys of each at a time: rows
// g and g + 8 of a warp are of its tile g, so all that is summed is in one thread. Eight columns are the sampled queries
// of one tile of queries.
//
// Defined by whoever compiles: GROUPS of eight queries of a program; PARTS of a product, and MOST groups of one; WARPGROUPS
// of a program; SCALE, from products to logits in base 2; and product<groups>(), of 64 rows in registers.

constexpr int TILES = 32, KEY_TILE = 128, PASSES = 8;  // tiles of a batch; keys of a tile; steps to 16 keys of it
constexpr int PANEL = GROUPS * 1024;                   // 64 channels of all queries: rows of 128 bytes
constexpr float LARGEST = 1e34f;                       // see triton_choice.py

struct Layer {
    const uint4* code;
    const uint2* largest;
    const u32* mass;
    const char* end;
    long long end_head_bytes;
    u32 end_row_bytes;
    int batches, num_history, num_ends, first_tile;  // batches of the history
};

struct Queries { const char* at; const long long* place; long long row_bytes, head_bytes; int num, tiles; };

// Where a thread's tile lies: in the history, or in what lies beside it as it was computed.
struct Place { int tile, of_table; bool there; };

// Two keys of each tile of a batch.
struct Pass { int batch, pass; };

// What a thread has of two keys: 16 bytes of either, which others need; largest channels, and both parts of log m.
struct Keys { uint4 code[2]; uint2 largest[2]; u32 mass[2]; };

// Into rows of 128 bytes, swizzled; how far they came is not waited for.
__device__ __forceinline__ void bring_queries(u32 room, const Queries& q, int head, int first) {
#pragma unroll 4
    for (int i = threadIdx.x; i < GROUPS * 128; i += WARPGROUPS * 128) {
        int row = i / 16, piece = i % 16;
        bool exists = first + row < q.num;
        const char* from = q.at + head * q.head_bytes + (exists ? q.place[first + row] * q.row_bytes : 0) + piece * 16;
        u32 to = room + piece / 8 * PANEL + row * 128 + (piece % 8 ^ row % 8) * 16, bytes = exists ? 16 : 0;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
    }
}

__device__ __forceinline__ void await_queries() {
    asm volatile("cp.async.wait_all;\nfence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
}

__device__ __forceinline__ Place find_place(const Layer& of, int batch) {
    int own = threadIdx.x / 32 % 4 * 8 + threadIdx.x % 32 / 4;
    if (batch < of.batches) {
        int tile = batch * TILES + own;
        return {tile, of.first_tile + tile, tile < of.num_history};
    }
    int tile = (batch - of.batches) * TILES + own;
    return {tile, tile < of.first_tile ? tile : tile + of.num_history, tile < of.num_ends};
}

// Row of a head's history, or of what lies beside it; see `sample_places` of tile_mass.py.
__device__ __forceinline__ u32 find_row(const Place& place, u32 stretch) {
    return place.tile * KEY_TILE + stretch * 8 + (stretch * 5 + place.of_table * 3u) % 8;
}

__device__ __forceinline__ Keys fetch(const Layer& of, Pass at, int head) {
    Keys to;
    Place place = find_place(of, at.batch);
#pragma unroll
    for (int r = 0; r < 2; r++) to.code[r] = make_uint4(0, 0, 0, 0), to.largest[r] = make_uint2(0, 0), to.mass[r] = 0;
    if (!place.there) return to;
    if (at.batch < of.batches) {
        long long slots = (long long)head * of.num_history * KEY_TILE;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            u32 row = find_row(place, at.pass * 2 + r);
            to.code[r] = (of.code + slots * 4)[row * 4 + threadIdx.x % 4];
            to.largest[r] = (of.largest + slots)[row], to.mass[r] = (of.mass + slots)[row];
        }
    } else {
#pragma unroll
        for (int r = 0; r < 2; r++)
            to.mass[r] = *(const u32*)(
                of.end + head * of.end_head_bytes + (u64)find_row(place, at.pass * 2 + r) * of.end_row_bytes + 256);
    }
    return to;
}

// A thread's channels of two keys as a product takes them: four of every 16, 2q and 2q + 8 and those behind.
__device__ __forceinline__ void decode(u32 (&a)[32], const Keys& keys) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const uint4& x = keys.code[r];
        u32 word[4] = {__byte_perm(x.x, x.z, 0x5140), __byte_perm(x.x, x.z, 0x7362),
                       __byte_perm(x.y, x.w, 0x5140), __byte_perm(x.y, x.w, 0x7362)};
        transpose(word, threadIdx.x % 4);
        Step step[4] = {split_step(keys.largest[r].x), split_step(keys.largest[r].x >> 16),
                        split_step(keys.largest[r].y), split_step(keys.largest[r].y >> 16)};
#pragma unroll
        for (int i = 0; i < 16; i++) {  // of four words: codes in low or high bits, of either eight channels
            int s = i / 4, high_bits = i / 2 % 2, behind = i % 2;
            a[(high_bits * 4 + s) * 4 + behind * 2 + r] =
                scale_both(word[s] >> (high_bits * 4 + behind * 8), step[high_bits * 2 + s / 2]);
        }
    }
}

__device__ __forceinline__ void load_end(u32 (&a)[32], const Layer& of, const Place& place, int pass, int head) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const char* row = of.end + head * of.end_head_bytes + (u64)find_row(place, pass * 2 + r) * of.end_row_bytes;
#pragma unroll
        for (int i = 0; i < 16; i++)
            a[i * 2 + r] = place.there ? *(const u32*)(row + i * 16 + threadIdx.x % 4 * 4) : 0;
    }
}

// Keys of a step in registers, and those of the next one on their way.
struct Ahead {
    Keys keys;
    float mass[2];

    // `later` is fetched behind `next`, which was before.
    __device__ __forceinline__ void turn(u32 (&a)[32], const Layer& of, int head, Pass next, Pass later) {
        if (next.batch < of.batches) decode(a, keys);
        else load_end(a, of, find_place(of, next.batch), next.pass, head);
#pragma unroll
        for (int r = 0; r < 2; r++) mass[r] = (low(keys.mass[r]) + high(keys.mass[r])) * SCALE;
        keys = fetch(of, later, head);
    }
};

// GROUPS_OF groups of queries from `queries` on.
template <int GROUPS_OF> __device__ __forceinline__ void multiply(float (&d)[MOST * 4], const u32 (&a)[32], u64 queries) {
    fence();
#pragma unroll
    for (int k = 0; k < 8; k++)
        product<GROUPS_OF>(
            d, a[k * 4], a[k * 4 + 1], a[k * 4 + 2], a[k * 4 + 3], queries + (k / 4 * PANEL + k % 4 * 32) / 16, k > 0);
    commit();
}

template <int GROUPS_OF> __device__ __forceinline__ void add_up(
    float* sum, const float (&d)[MOST * 4], const float (&mass)[2]) {
#pragma unroll
    for (int i = 0; i < GROUPS_OF * 2; i++) {
        const float* x = d + i / 2 * 4 + i % 2;
        sum[i] += exp2_of(fmaf(x[0], SCALE, mass[0])) + exp2_of(fmaf(x[2], SCALE, mass[1]));
    }
}

__device__ __forceinline__ constexpr int first_of(int part) { return GROUPS * part / PARTS; }

// Head, first tile of queries and number of these; where queries lie.
struct Job { int head, first, query_tiles; u64 queries; };

// [heads, tiles of queries, 2, tiles, 4]: a tile's sums for half of the eight queries stand together.
__device__ __forceinline__ void store(
    float (&sum)[GROUPS * 2], float* sums, const Place& place, const Job& job, int num_tiles) {
    int q = threadIdx.x % 4, exist = job.query_tiles - job.first;
    int row = (job.head * job.query_tiles + job.first) * 2 + q / 2;
    float* to = sums + ((long long)row * num_tiles + place.of_table) * 4 + q % 2 * 2;
    if (place.there) {
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
            if (i < exist)
                *(float2*)(to + (long long)i * num_tiles * 8) =
                    make_float2(fminf(sum[i * 2], LARGEST), fminf(sum[i * 2 + 1], LARGEST));
    }
#pragma unroll
    for (int i = 0; i < GROUPS * 2; i++) sum[i] = 0.f;
}

// A pass over all parts of a product, of which the first one was begun before; begins the first one of the next pass.
template <int PART = 0> __device__ __forceinline__ void go_on(
    float (&sum)[GROUPS * 2], float (&d)[2][MOST * 4], u32 (&a)[32], Ahead& ahead, const Layer& of, const Job& job,
    Pass next, Pass later) {
    float mass[2] = {ahead.mass[0], ahead.mass[1]};
    finish<0>();
    if constexpr (PART + 1 < PARTS) {
        constexpr int begin = first_of(PART + 1);
        multiply<first_of(PART + 2) - begin>(d[(PART + 1) % 2], a, job.queries + begin * 64);
    } else {
        ahead.turn(a, of, job.head, next, later);
        multiply<first_of(1)>(d[0], a, job.queries);
    }
    hold(d[PART % 2]);
    add_up<first_of(PART + 1) - first_of(PART)>(sum + first_of(PART) * 2, d[PART % 2], mass);
    if constexpr (PART + 1 < PARTS) go_on<PART + 1>(sum, d, a, ahead, of, job, next, later);
}

// All queries of a program and some batches, every `stride`th.
__device__ __forceinline__ void sum_batches(
    const Layer& of, float* sums, const Job& job, int batch, int stride, int count) {
    static_assert(PARTS % 2 == 0, "parts take turns with two sets of registers");
    float sum[GROUPS * 2] = {}, d[2][MOST * 4] = {};
    u32 a[32];
    hold(d[0]), hold(d[1]);
    Ahead ahead;
    ahead.keys = fetch(of, {batch, 0}, job.head);
    ahead.turn(a, of, job.head, {batch, 0}, {batch, 1});
    await_queries();
    multiply<first_of(1)>(d[0], a, job.queries);
#pragma unroll 1
    for (; count > 0; count--) {
        int next = count > 1 ? batch + stride : batch;  // behind the last one are products that are not looked at
#pragma unroll 1
        for (int pass = 0; pass < PASSES; pass++)
            go_on(sum, d, a, ahead, of, job, {pass + 1 < PASSES ? batch : next, (pass + 1) % PASSES},
                  {pass + 2 < PASSES ? batch : next, (pass + 2) % PASSES});
        store(sum, sums, find_place(of, batch), job, of.num_history + of.num_ends);
        batch = next;
    }
    finish<0>();
    hold(d[0]);
}

// A program has GROUPS of eight queries of one head; its groups of warps share that head's batches with other programs.
extern "C" __global__ void __launch_bounds__(WARPGROUPS * 128, 1) sum_tiles(
    const __grid_constant__ Queries q, const __grid_constant__ Layer of, float* sums, int heads, int programs) {
    extern __shared__ __align__(1024) char room[];
    u32 at = (address(room) + 1023) / 1024 * 1024;
    int program = blockIdx.x % programs, head = blockIdx.x / programs % heads;
    int first = blockIdx.x / programs / heads * GROUPS;
    bring_queries(at, q, head, first * 8);
    Job job = {head, first, q.tiles, describe(at, 1024, 16, 1)};
    int batches = of.batches + (of.num_ends + TILES - 1) / TILES, all = programs * WARPGROUPS;
    int own = __shfl_sync(~0u, threadIdx.x / 128, 0) * programs + program;
    int count = batches / all + (own < batches % all);
    if (count) sum_batches(of, sums, job, own, all, count);
    else await_queries();
}
