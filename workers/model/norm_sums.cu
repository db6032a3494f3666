// Norm and SiLU of frames in bfloat16, and at once the sums of frames, in float16, that winograd.py convolves. Memory sets
// the pace: each frame is read and normed once, by threads that go through time with some channels of a pixel.
//
// Defined by whoever compiles: CHANNELS, and ROOT of their number; NUM frames of a group, whose TAPS sums add_up() makes;
// THREADS of a program, of which TOGETHER share a multiprocessor; VECTORS of a pixel that a thread holds, each a VECTOR of
// WORDS pairs of channels; STAGES, groups that come into shared memory ahead of their turn, or 0: they come into registers
// as soon as those of the group before are free; STREAMED, whether what is written leaves the cache first.
constexpr int LANES = CHANNELS / (2 * WORDS * VECTORS);  // of a pixel; vectors alternate, so that they read side by side
constexpr int PIXELS = THREADS / LANES, FRAME = PIXELS * LANES * VECTORS;  // of a program: in vectors
static_assert(LANES * VECTORS * WORDS * 2 == CHANNELS && LANES <= 32 && (LANES & LANES - 1) == 0, "lanes");
static_assert(THREADS % 32 == 0 && TAPS == NUM + 2, "threads and frames");

union Pairs {
    VECTOR vector;
    u32 word[WORDS];
};
typedef Pairs Share[VECTORS];  // what a thread holds of a frame

__device__ __forceinline__ void put(VECTOR* to, const Pairs& value) {
#if STREAMED
    __stcs(to, value.vector);
#else
    *to = value.vector;
#endif
}

__device__ __forceinline__ u32 round_halves(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float2 widen(u32 halves) {
    float2 wide;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(wide.x), "=f"(wide.y) : "r"(halves));
    return wide;
}

// Off by less than 2^-19 of it, far below float16; where its power is infinite, nothing is left of x.
__device__ __forceinline__ float silu(float x) {
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + power));
    return x * inverse;
}

__device__ __forceinline__ u32 norm_pair(u32 x, u32 gamma, float scale) {
    return round_halves(silu(low(x) * scale * low(gamma)), silu(high(x) * scale * high(gamma)));
}

// What frames are multiplied by: the square root of the channels by their length. Halves of a word are parted otherwise
// than by norm_pair(), or the compiler would keep what it parted until then, in twice the registers.
template <class Take> __device__ __forceinline__ void measure(const Take& take, float (&scale)[NUM]) {
#pragma unroll
    for (int f = 0; f < NUM; f++) {
        float squares = 0.f;
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            Pairs x = take(f, v);
#pragma unroll
            for (int i = 0; i < WORDS; i++) {
                float a = __uint_as_float(__byte_perm(x.word[i], 0, 0x1044));
                float b = __uint_as_float(__byte_perm(x.word[i], 0, 0x3244));
                squares = fmaf(b, b, fmaf(a, a, squares));
            }
        }
        scale[f] = squares;
    }
#pragma unroll
    for (int distance = LANES / 2; distance; distance /= 2)
#pragma unroll
        for (int f = 0; f < NUM; f++) scale[f] += __shfl_xor_sync(~0u, scale[f], distance);
#pragma unroll
    for (int f = 0; f < NUM; f++) {
        float inverse;
        asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(fmaxf(scale[f], 1e-24f)));
        scale[f] = inverse * ROOT;
    }
}

// Frames that are not there are zeros, and so are their norms.
__device__ __forceinline__ Pairs load(const VECTOR* from, bool is_there) {
    Pairs found;
#pragma unroll
    for (int i = 0; i < WORDS; i++) found.word[i] = 0;
    if (is_there) found.vector = *from;
    return found;
}

// Weights, from the nearest cache: volatile, as there is no room for them in registers.
__device__ __forceinline__ Pairs reload(const VECTOR* from) {
    Pairs found;
#if WORDS == 4
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(found.word[0]), "=r"(found.word[1]), "=r"(found.word[2]), "=r"(found.word[3]) : "l"(from));
#else
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(found.word[0]), "=r"(found.word[1]) : "l"(from));
#endif
    return found;
}

// Frames become normed ones, and their sums are written.
__device__ __forceinline__ void add_up_frames(
    Pairs (&fresh)[NUM], const Pairs& first, const Pairs& second, const Pairs& gamma, const float (&scale)[NUM],
    VECTOR* sums, long long frame) {
    Pairs out[TAPS];
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
        float2 wide[TAPS] = {widen(first.word[i]), widen(second.word[i])};
#pragma unroll
        for (int f = 0; f < NUM; f++) {
            u32& pair = fresh[f].word[i];
            pair = norm_pair(pair, gamma.word[i], scale[f]);
            wide[2 + f] = widen(pair);
        }
        float even[TAPS], odd[TAPS];  // of the two channels
        add_up([&](int f) { return wide[f].x; }, even);
        add_up([&](int f) { return wide[f].y; }, odd);
#pragma unroll
        for (int p = 0; p < TAPS; p++) out[p].word[i] = round_halves(even[p], odd[p]);
    }
#pragma unroll
    for (int p = 0; p < TAPS; p++) put(sums + p * frame, out[p]);
}

// A group's frames on their way into shared memory; by one thread.
__device__ __forceinline__ void bring_group(
    VECTOR* slot, u32 barrier, const VECTOR* x, long long frame, int num_frames, int bytes) {
    num_frames = min(num_frames, NUM);
    if (num_frames <= 0) return;
    expect(barrier, num_frames * bytes);
#pragma unroll 1
    for (int f = 0; f < num_frames; f++) bring(address(slot + f * FRAME), x + f * frame, bytes, barrier);
}

extern "C" __global__ void __launch_bounds__(THREADS, TOGETHER) norm_sums(
    const VECTOR* __restrict__ x, const VECTOR* __restrict__ before, const VECTOR* __restrict__ gamma,
    VECTOR* __restrict__ sums, VECTOR* __restrict__ last, int num_pixels, int num_frames) {
    extern __shared__ __align__(128) VECTOR room[];
    __shared__ __align__(8) u64 barriers[STAGES + 1];
    const int pixel = blockIdx.x * PIXELS + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const long long frame = (long long)num_pixels * (LANES * VECTORS);  // from one to the next
    const long long at = (long long)pixel * (LANES * VECTORS) + lane;
    if (STAGES && threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(barriers + i)) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    if (STAGES) __syncthreads();
    if (pixel >= num_pixels) return;
    const int bytes = min(PIXELS, num_pixels - pixel) * (CHANNELS * 2);  // of a frame, for the first thread
    x += at, sums += at, last += at, gamma += lane;
    if (STAGES && threadIdx.x == 0)
#pragma unroll 1
        for (int i = 0; i < STAGES; i++)
            bring_group(room + i * NUM * FRAME, address(barriers + i), x + i * NUM * frame, frame, num_frames - i * NUM, bytes);

    Share old[2], fresh[STAGES ? 1 : NUM];
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
#pragma unroll
        for (int f = 0; f < 2; f++) old[f][v] = load(before + at + f * frame + v * LANES, before);
#pragma unroll
        for (int f = 0; f < (STAGES ? 0 : NUM); f++) fresh[f][v] = load(x + f * frame + v * LANES, f < num_frames);
    }
    int stage = 0, parity = 0;
#pragma unroll 1
    for (int left = num_frames; left > 0; left -= NUM) {
        const VECTOR* slot = room + stage * NUM * FRAME + threadIdx.x / LANES * (LANES * VECTORS) + lane;
        auto take = [&](int f, int v) { return STAGES ? load(slot + f * FRAME + v * LANES, f < left) : fresh[f][v]; };
        float scale[NUM];
        if (STAGES) await(address(barriers + stage), parity);
        measure(take, scale);
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            Pairs now[NUM];
#pragma unroll
            for (int f = 0; f < NUM; f++) now[f] = take(f, v);
            add_up_frames(now, old[0][v], old[1][v], reload(gamma + v * LANES), scale, sums + v * LANES, frame);
#pragma unroll
            for (int f = 1; f <= NUM; f++) {  // the last two, by how many there are
                if (f < NUM ? f != left : left < NUM) continue;
                old[0][v] = f == 1 ? old[1][v] : now[f == 1 ? 0 : f - 2], old[1][v] = now[f - 1];
            }
#pragma unroll
            for (int f = 0; f < (STAGES ? 0 : NUM); f++)  // on their way while other channels are added up
                fresh[f][v] = load(x + (NUM + f) * frame + v * LANES, NUM + f < left);
        }
        if (STAGES) {
            __syncthreads();
            if (threadIdx.x == 0)
                bring_group(room + stage * NUM * FRAME, address(barriers + stage), x + STAGES * NUM * frame, frame,
                            left - STAGES * NUM, bytes);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        x += NUM * frame, sums += TAPS * frame;
    }
#pragma unroll
    for (int v = 0; v < VECTORS; v++) put(last + v * LANES, old[0][v]), put(last + frame + v * LANES, old[1][v]);
}
