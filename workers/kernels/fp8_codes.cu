// Tiles of coded_tiles.py from queries, keys and values in bfloat16, all in one launch: a program of 256 threads makes a
// tile of one of them. Values come first, they take longest. Behind hopper.cuh.
//
// Defined by whoever compiles: SCALE_QK, SCALE_V.

// Rows of a head.
struct Source { const char* at; long long row_bytes, head_bytes; int rows, tiles; };

// Pieces of 16 channels, every 256th of the tile's 1024 that a thread has.
__device__ __forceinline__ void code_pieces(uint4 (&piece)[4], const Source& from, const char* rows, int first, float scale) {
    uint4 x[4][2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = i * 32 + threadIdx.x / 8;
        const uint4* at = (const uint4*)(rows + row * from.row_bytes) + threadIdx.x % 8 * 2;
#pragma unroll
        for (int j = 0; j < 2; j++) x[i][j] = first + row < from.rows ? at[j] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        piece[i].x = code_four(x[i][0].x, x[i][0].y, scale), piece[i].y = code_four(x[i][0].z, x[i][0].w, scale);
        piece[i].z = code_four(x[i][1].x, x[i][1].y, scale), piece[i].w = code_four(x[i][1].z, x[i][1].w, scale);
    }
}

// Bytes of 16 keys as a product takes them, for four channels; from rows of 128 channels to pieces of channels.
__device__ __forceinline__ void turn(const u32* rows, uint4* lines) {
    int piece = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 turned[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 w[4];
#pragma unroll
        for (int j = 0; j < 4; j++) w[j] = rows[(piece / 2 * 32 + piece % 2 * 16 + j / 2 * 8 + i * 2 + j % 2) * 32 + lane];
        u32 a = __byte_perm(w[0], w[1], 0x5140), b = __byte_perm(w[2], w[3], 0x5140);
        u32 c = __byte_perm(w[0], w[1], 0x7362), d = __byte_perm(w[2], w[3], 0x7362);
        turned[0][i] = __byte_perm(a, b, 0x5410), turned[1][i] = __byte_perm(a, b, 0x7632);
        turned[2][i] = __byte_perm(c, d, 0x5410), turned[3][i] = __byte_perm(c, d, 0x7632);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int channel = lane * 4 + j;
        lines[channel * 8 + (piece ^ (channel & 7))] = make_uint4(turned[j][0], turned[j][1], turned[j][2], turned[j][3]);
    }
}

__device__ __forceinline__ float read_mass(const char* row) {
    u32 two = *(const u32*)(row + 256);
    return low(two) + high(two);
}

extern "C" __global__ void __launch_bounds__(256) code(
    Source q, Source k, Source v, uint4* to_q, uint4* to_k, uint4* to_v, uint4* masses, int heads, int has_mass) {
    __shared__ uint4 rows[1024], lines[1024];
    int unit = blockIdx.x, kind = 0;
    if (unit >= heads * v.tiles) unit -= heads * v.tiles, kind = 1;
    if (kind == 1 && unit >= heads * k.tiles) unit -= heads * k.tiles, kind = 2;
    const Source& from = kind == 0 ? v : kind == 1 ? k : q;
    uint4* to = (kind == 0 ? to_v : kind == 1 ? to_k : to_q) + unit * 1024ll;
    int head = unit / from.tiles, first = unit % from.tiles * 128;
    const char* at = from.at + head * from.head_bytes + first * from.row_bytes;
    uint4 piece[4];
    code_pieces(piece, from, at, first, kind == 0 ? SCALE_V : SCALE_QK);
    if (kind == 0) {
#pragma unroll
        for (int i = 0; i < 4; i++) rows[i * 256 + threadIdx.x] = piece[i];
        __syncthreads();
        turn((const u32*)rows, lines);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; i++) to[i * 256 + threadIdx.x] = lines[i * 256 + threadIdx.x];
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = i * 32 + threadIdx.x / 8;
        to[row * 8 + (threadIdx.x % 8 ^ row & 7)] = piece[i];
    }
    if (kind == 1 && threadIdx.x < 128) {
        bool exists = first + (int)threadIdx.x < from.rows;
        float mass = !exists ? -1e30f : has_mass ? read_mass(at + threadIdx.x * from.row_bytes) : 0.f;
        masses[unit * 128 + threadIdx.x] = make_uint4(code_mass(mass * (SCALE_QK * SCALE_QK)), 0, 0, 0);
    }
}
