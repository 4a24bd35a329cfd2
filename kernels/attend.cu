// What do the chosen blocks say? Attention of each query row over its k blocks, ready to merge with a local window. The
// definition is `Partial::weigh` in src/memory/attend.rs.
//
//   s(j)    = R(rotation) (softmax_scale * q) . k(j)      for the tokens j of a block, rotated for the block's slot
//   plain   all tokens of all k blocks compete: weight e^s(j) / sum of e^s
//   hidden  as plain, without each block's last token, its landmark
//   grouped weight e^landmark / (sum of the blocks' e^landmark)  *  e^s(j) / (sum of e^s over the block's other tokens)
//   out     = sum of weight * v;  lse = log of the outermost sum
//
// A block of fewer than B tokens, a document's tail, has no landmark: its tokens compete themselves under each rule.
//
// Two kernels:
//
//   attend   one query row over some of its ranks, the softmax running along: (out, lse)
//   combine  one query row: the parts merged by their lse
//
// With one part per row `attend` alone is the answer: a part is what any partial attention is, an out and an lse.
//
// A page is one piece (K and V of one block, layer and KV head) in memory of its own, in the form of
// src/store/piece.rs, every token's D values filled up with zeros to a multiple of eight, C eights: halves (2, B, 8 C),
// K then V; or scales (D + B) of K's channels, then of V's tokens, filled up to a multiple of four, and behind them
// signed bytes (2, B, 8 C). GQA is in the tables: a query head's ranks name pages of its own KV head. Where a KV group
// shares its choice, its `sharing` = G heads share an entry of the tables; they are neighbours in the grid and find each
// other's pages in the second-level cache.
//
// Grid. attend: (T * Hq, parts). A lane takes eight dimensions, so many lanes as there are eights, up to a power of two,
// take a token, for K and for V; a thread block has EIGHTS loads of each lane under way at once. Sums over tokens are
// taken once at the end. combine: T * Hq, a thread a dimension.
//
// Shared memory. attend: 4 (2 * 8 C + B + WARPS * 8 C) bytes, at most 14 KB with D = 256 and B = 1024. combine: none.
//
// Versions tried, on an H100 (docs/performance.md): this one, and one whose lanes took a number each, one after the other.

// Loads of a lane that are under way at once.
constexpr unsigned EIGHTS = 4;

// Names of the normalisations.
constexpr unsigned PLAIN = 0;
constexpr unsigned GROUPED = 1;

struct AttendArguments {
    // (T, Hq, D)
    const float* queries;
    // (rotations, 2, half), cosines then sines.
    const float* rotations;
    // (T, Hq / sharing, k)
    const void* const* pages;
    // (T, Hq / sharing, k)
    const unsigned* rotation_of;
    // (T, Hq / sharing, k): of the page, 1 to B.
    const unsigned* tokens;
    // (parts, T, Hq, D), out.
    float* out;
    // (parts, T, Hq), out.
    float* lse;
    unsigned k;
    unsigned parts;
    unsigned sharing;
    unsigned head_dim;
    unsigned block_tokens;
    // Half of the dimensions that are rotated.
    unsigned half;
    unsigned normalisation;
    float softmax_scale;
};

struct CombineArguments {
    // (parts, rows, D)
    const float* part_out;
    // (parts, rows)
    const float* part_lse;
    // (rows, D), out.
    float* out;
    // (rows), out.
    float* lse;
    unsigned rows;
    unsigned parts;
    unsigned head_dim;
};

// Dimension d of a query rotated by cosines and sines (2, half).
static __device__ __forceinline__ float rotated(const float* query, const float* rotation, unsigned half, unsigned d) {
    if (d < half) return query[d] * rotation[d] - query[d + half] * rotation[half + d];
    if (d < 2 * half) return query[d] * rotation[d - half] + query[d - half] * rotation[d];
    return query[d];
}

// Where a lane stands among those of a thread block that read the tokens of a block.
struct Place {
    // C
    unsigned eights;
    // Lanes that take a token, a power of two.
    unsigned width;
    // Which eight of a token; none if there are no more.
    unsigned eight;
    // The first token, and from there to the next.
    unsigned token;
    unsigned stride;
};

static __device__ __forceinline__ Place place_of_lane(unsigned dim) {
    const unsigned eights = (dim + 7) / 8, lane = threadIdx.x % WARP;
    unsigned width = 1;
    while (width < eights) width *= 2;
    const unsigned tokens = WARP / width;
    return {eights, width, lane % width, threadIdx.x / WARP * tokens + lane / width, WARPS * tokens};
}

// The lane's next eights of K or of V, of tokens before `end`; zeros where there are none.
template <typename Eight>
static __device__ __forceinline__ void load(
    const Eight* __restrict__ tokens, const Place& place, unsigned first, unsigned end, Eight (&eights)[EIGHTS]) {
#pragma unroll
    for (unsigned i = 0; i < EIGHTS; i++) {
        const unsigned token = first + place.token + i * place.stride;
        const bool there = token < end && place.eight < place.eights;
        eights[i] = there ? tokens[token * place.eights + place.eight] : Eight();
    }
}

template <typename Eight, bool SCALED>
static __device__ __forceinline__ void attend(const AttendArguments& a) {
    const unsigned dim = a.head_dim, block_tokens = a.block_tokens;
    const unsigned row = blockIdx.x, part = blockIdx.y, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const unsigned first = size_t(a.k) * part / a.parts, last = size_t(a.k) * (part + 1) / a.parts;
    const Place place = place_of_lane(dim);
    const unsigned padded = 8 * place.eights, at_once = EIGHTS * place.stride;
    float* plain = reinterpret_cast<float*>(shared_memory);  // (8 C)
    float* query = plain + padded;                           // (8 C), rotated
    float* scores = query + padded;                          // (B)
    float* warp_sums = scores + block_tokens;                // (WARPS, 8 C)

    for (unsigned d = threadIdx.x; d < padded; d += THREADS) {
        plain[d] = d < dim ? a.queries[size_t(row) * dim + d] * a.softmax_scale : 0;
        query[d] = 0;
    }
    // Of this row's blocks so far: the largest score, the sum of e^(score - top), and the lane's values weighted alike.
    float top = -infinity(), sum = 0, values[8] = {};
    for (unsigned rank = first; rank < last; rank++) {
        const size_t entry = size_t(row / a.sharing) * a.k + rank;
        const float* rotation = a.rotations + size_t(a.rotation_of[entry]) * 2 * a.half;
        const float* scales = static_cast<const float*>(a.pages[entry]);
        const Eight* keys = reinterpret_cast<const Eight*>(scales + (SCALED ? (dim + block_tokens + 3) / 4 * 4 : 0));
        const unsigned tokens = a.tokens[entry];
        const bool has_landmark = a.normalisation != PLAIN && tokens == block_tokens;
        Eight eights[EIGHTS];
        load(keys, place, 0, tokens, eights);
        // The block before is done with, and `plain` is written.
        __syncthreads();
        for (unsigned d = threadIdx.x; d < dim; d += THREADS) {
            query[d] = rotated(plain, rotation, a.half, d) * (SCALED ? scales[d] : 1);
        }
        __syncthreads();
        float of_lane[8];
#pragma unroll
        for (unsigned i = 0; i < 8; i++) of_lane[i] = place.eight < place.eights ? query[8 * place.eight + i] : 0;
        for (unsigned begin = 0; begin < tokens; begin += at_once) {
            if (begin > 0) load(keys, place, begin, tokens, eights);
#pragma unroll
            for (unsigned i = 0; i < EIGHTS; i++) {
                float wide[8], score = 0;
                widen(eights[i], wide);
#pragma unroll
                for (unsigned j = 0; j < 8; j++) score = fmaf(of_lane[j], wide[j], score);
                score = lanes_sum(score, place.width);
                const unsigned token = begin + place.token + i * place.stride;
                if (place.eight == 0 && token < tokens) scores[token] = score;
            }
        }
        const Eight* block_values = keys + block_tokens * place.eights;
        const unsigned competing = has_landmark ? tokens - 1 : tokens;
        load(block_values, place, 0, competing, eights);
        __syncthreads();

        // Every warp for itself: the same values, and no barrier.
        const TopSum inner = warp_top_sum(scores, competing);
        // The block counts as mass * e^claim.
        const bool grouped = has_landmark && a.normalisation == GROUPED;
        const float claim = grouped ? scores[tokens - 1] : inner.top, mass = grouped ? 1 : inner.sum;
        const float old = top;
        top = fmaxf(top, claim);
        const float keep = expf(old - top), gain = expf(claim - top);
        sum = sum * keep + gain * mass;
        const float weight = gain * (mass / inner.sum);
#pragma unroll
        for (unsigned i = 0; i < 8; i++) values[i] *= keep;
        for (unsigned begin = 0; begin < competing; begin += at_once) {
            if (begin > 0) load(block_values, place, begin, competing, eights);
#pragma unroll
            for (unsigned i = 0; i < EIGHTS; i++) {
                const unsigned token = begin + place.token + i * place.stride;
                if (token >= competing) continue;
                const float share = expf(scores[token] - inner.top) * weight * (SCALED ? scales[dim + token] : 1);
                float wide[8];
                widen(eights[i], wide);
#pragma unroll
                for (unsigned j = 0; j < 8; j++) values[j] = fmaf(share, wide[j], values[j]);
            }
        }
    }
#pragma unroll
    for (unsigned i = 0; i < 8; i++) {
        // The lanes that took the same eight of other tokens.
        for (unsigned apart = place.width; apart < WARP; apart *= 2) {
            values[i] += __shfl_xor_sync(ALL_LANES, values[i], apart);
        }
        if (lane < place.eights) warp_sums[warp * padded + 8 * lane + i] = values[i];
    }
    __syncthreads();

    const size_t to = size_t(part) * gridDim.x + row;
    for (unsigned d = threadIdx.x; d < dim; d += THREADS) {
        float total = 0;
        for (unsigned from = 0; from < WARPS; from++) total += warp_sums[from * padded + d];
        a.out[to * dim + d] = total / sum;
    }
    if (threadIdx.x == 0) a.lse[to] = top + logf(sum);
}

extern "C" __global__ void __launch_bounds__(THREADS) attend_f16(AttendArguments a) {
    attend<uint4, false>(a);
}

extern "C" __global__ void __launch_bounds__(THREADS) attend_int8(AttendArguments a) {
    attend<uint2, true>(a);
}

extern "C" __global__ void __launch_bounds__(THREADS) combine(CombineArguments a) {
    const unsigned row = blockIdx.x;
    float top = -infinity(), sum = 0;
    for (unsigned part = 0; part < a.parts; part++) top = fmaxf(top, a.part_lse[size_t(part) * a.rows + row]);
    for (unsigned part = 0; part < a.parts; part++) sum += expf(a.part_lse[size_t(part) * a.rows + row] - top);
    for (unsigned d = threadIdx.x; d < a.head_dim; d += THREADS) {
        float mixed = 0;
        for (unsigned part = 0; part < a.parts; part++) {
            const size_t from = size_t(part) * a.rows + row;
            mixed += expf(a.part_lse[from] - top) * a.part_out[from * a.head_dim + d];
        }
        a.out[size_t(row) * a.head_dim + d] = mixed / sum;
    }
    if (threadIdx.x == 0) a.lse[row] = top + logf(sum);
}
