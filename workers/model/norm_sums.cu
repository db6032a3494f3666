// Norm and SiLU of frames in bfloat16, and at once the sums of frames, in float16, that winograd.py convolves. Memory sets
// the pace: each frame is read and normed once, by threads that go through time with some channels of a pixel.
//
// Defined by whoever compiles: CHANNELS, and ROOT of their number; NUM frames of a group, whose TAPS sums add_up() makes;
// THREADS of a program, of which TOGETHER share a multiprocessor; VECTORS of four channels of a pixel that a thread holds.
constexpr int LANES = CHANNELS / (4 * VECTORS);  // of a pixel; vectors alternate, so that they read side by side
constexpr int PIXELS = THREADS / LANES;          // of a program
static_assert(LANES * VECTORS * 4 == CHANNELS && LANES <= 32 && (LANES & LANES - 1) == 0, "lanes");
static_assert(THREADS % 32 == 0 && TAPS == NUM + 2, "threads and frames");

union Pairs {
    uint2 vector;
    u32 word[2];
};
typedef Pairs Share[VECTORS];  // what a thread holds of a frame

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
__device__ __forceinline__ void measure(const Share (&frames)[NUM], float (&scale)[NUM]) {
#pragma unroll
    for (int f = 0; f < NUM; f++) {
        float squares = 0.f;
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float a = __uint_as_float(__byte_perm(frames[f][v].word[i], 0, 0x1044));
                float b = __uint_as_float(__byte_perm(frames[f][v].word[i], 0, 0x3244));
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
__device__ __forceinline__ Pairs load(const uint2* from, bool is_there) {
    Pairs found;
    found.vector = is_there ? *from : make_uint2(0, 0);
    return found;
}

// Weights, from the nearest cache: volatile, as there is no room for them in registers.
__device__ __forceinline__ Pairs reload(const uint2* from) {
    Pairs found;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(found.word[0]), "=r"(found.word[1]) : "l"(from));
    return found;
}

// Frames become normed ones, and their sums are written.
__device__ __forceinline__ void add_up_frames(
    Pairs (&fresh)[NUM], const Pairs& first, const Pairs& second, const Pairs& gamma, const float (&scale)[NUM],
    uint2* sums, long long frame) {
    Pairs out[TAPS];
#pragma unroll
    for (int i = 0; i < 2; i++) {
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
    for (int p = 0; p < TAPS; p++) sums[p * frame] = out[p].vector;
}

extern "C" __global__ void __launch_bounds__(THREADS, TOGETHER) norm_sums(
    const uint2* __restrict__ x, const uint2* __restrict__ before, const uint2* __restrict__ gamma,
    uint2* __restrict__ sums, uint2* __restrict__ last, int num_pixels, int num_frames) {
    const int pixel = blockIdx.x * PIXELS + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const long long frame = (long long)num_pixels * (LANES * VECTORS);  // from one to the next
    const long long at = (long long)pixel * (LANES * VECTORS) + lane;
    if (pixel >= num_pixels) return;
    x += at, sums += at, last += at, gamma += lane;
    Share old[2], fresh[NUM];
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
#pragma unroll
        for (int f = 0; f < 2; f++) old[f][v] = load(before + at + f * frame + v * LANES, before);
#pragma unroll
        for (int f = 0; f < NUM; f++) fresh[f][v] = load(x + f * frame + v * LANES, f < num_frames);
    }
#pragma unroll 1
    for (int left = num_frames; left > 0; left -= NUM) {
        float scale[NUM];
        measure(fresh, scale);
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            Pairs now[NUM];
#pragma unroll
            for (int f = 0; f < NUM; f++) now[f] = fresh[f][v];
            add_up_frames(now, old[0][v], old[1][v], reload(gamma + v * LANES), scale, sums + v * LANES, frame);
#pragma unroll
            for (int f = 1; f <= NUM; f++) {  // the last two, by how many there are
                if (f < NUM ? f != left : left < NUM) continue;
                old[0][v] = f == 1 ? old[1][v] : now[f == 1 ? 0 : f - 2], old[1][v] = now[f - 1];
            }
#pragma unroll
            for (int f = 0; f < NUM; f++)  // on their way while other channels are added up
                fresh[f][v] = load(x + (NUM + f) * frame + v * LANES, NUM + f < left);
        }
        x += NUM * frame, sums += TAPS * frame;
    }
#pragma unroll
    for (int v = 0; v < VECTORS; v++) last[v * LANES] = old[0][v].vector, last[frame + v * LANES] = old[1][v].vector;
}
