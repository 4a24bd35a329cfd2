// What do the chosen blocks say? Attention of each query row over its k blocks, ready to merge with a local window. The
// definition is `Partial::weigh` in src/memory/attend.rs.
//
//   s(j)    = R(turn) (softmax_scale * q) . k(j)          for the tokens j of a block, turned for the block's slot
//   plain   all tokens of all k blocks compete: weight e^s(j) / sum of e^s
//   hidden  as plain, without each block's last token, its landmark
//   grouped weight e^landmark / (sum of the blocks' e^landmark)  *  e^s(j) / (sum of e^s over the block's other tokens)
//   out     = sum of weight * v;  lse = log of the outermost sum
//
// Two kernels:
//
//   attend   one query row over some of its ranks, the softmax running along: (out, lse)
//   combine  one query row: the parts merged by their lse
//
// With one part per row `attend` alone is the answer: a part is what any partial attention is, an out and an lse.
//
// A page is one piece (K and V of one block, layer and KV head) in memory of its own, in the numbers of
// src/store/piece.rs: halves (2, B, D), K then V; or scales (D + B) of K's channels, then of V's tokens, and behind
// them, so that they are aligned for any D and B, signed bytes (2, B, D). GQA is in the tables: a query head's ranks
// name pages of its own KV head. Where a KV group shares its choice, its `sharing` = G heads share an entry of the
// tables; they are neighbours in the grid and find each other's pages in the second-level cache.
//
// Grid. attend: (T * Hq, parts); a warp takes every eighth token of a block, its lanes the dimensions, for K and for V,
// so that both are read in order; sums over the warps are taken once at the end. combine: T * Hq, a thread a dimension.
//
// Shared memory. attend: 4 (2 D + B + WARPS D) bytes, at most 14 KB with D = 256 and B = 1024. combine: none.
//
// Versions tried: this one. No GPU has run or timed it yet; its answers were checked on a CPU.

constexpr unsigned HEAD_DIM_MAX = 256;
// Dimensions of a lane.
constexpr unsigned LANE_DIMS = HEAD_DIM_MAX / WARP;

// Names of the normalisations.
constexpr unsigned PLAIN = 0;
constexpr unsigned GROUPED = 1;

struct AttendArguments {
    // (T, Hq, D)
    const float* queries;
    // (turns, 2, half), cosines then sines.
    const float* turns;
    // (T, Hq / sharing, k)
    const void* const* pages;
    // (T, Hq / sharing, k)
    const unsigned* turn_of;
    // (parts, T, Hq, D), out.
    float* out;
    // (parts, T, Hq), out.
    float* lse;
    unsigned k;
    unsigned parts;
    unsigned sharing;
    unsigned head_dim;
    unsigned block_tokens;
    // Half of the dimensions that are turned.
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

// Dimension d of a query turned by cosines and sines (2, half).
static __device__ __forceinline__ float turned(const float* query, const float* turn, unsigned half, unsigned d) {
    if (d < half) return query[d] * turn[d] - query[d + half] * turn[half + d];
    if (d < 2 * half) return query[d] * turn[d - half] + query[d - half] * turn[d];
    return query[d];
}

template <typename Number, bool SCALED>
static __device__ __forceinline__ void attend(const AttendArguments& a) {
    const unsigned dim = a.head_dim, tokens = a.block_tokens;
    const unsigned row = blockIdx.x, part = blockIdx.y, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const unsigned first = size_t(a.k) * part / a.parts, last = size_t(a.k) * (part + 1) / a.parts;
    float* plain = reinterpret_cast<float*>(shared_memory);  // (D)
    float* query = plain + dim;                              // (D), turned
    float* scores = query + dim;                             // (B)
    float* warp_sums = scores + tokens;                      // (WARPS, D)

    for (unsigned d = threadIdx.x; d < dim; d += THREADS) {
        plain[d] = a.queries[size_t(row) * dim + d] * a.softmax_scale;
    }
    // Of this row's blocks so far: the largest score, the sum of e^(score - top), and the lane's values weighted alike.
    float top = -infinity(), sum = 0, values[LANE_DIMS] = {};
    for (unsigned rank = first; rank < last; rank++) {
        const size_t entry = size_t(row / a.sharing) * a.k + rank;
        const float* turn = a.turns + size_t(a.turn_of[entry]) * 2 * a.half;
        const float* scales = static_cast<const float*>(a.pages[entry]);
        const Number* keys = reinterpret_cast<const Number*>(scales + (SCALED ? dim + tokens : 0));
        // The block before is done with, and `plain` is written.
        __syncthreads();
        for (unsigned d = threadIdx.x; d < dim; d += THREADS) {
            query[d] = turned(plain, turn, a.half, d) * (SCALED ? scales[d] : 1);
        }
        __syncthreads();
        for (unsigned token = warp; token < tokens; token += WARPS) {
            float score = 0;
            for (unsigned d = lane; d < dim; d += WARP) score = fmaf(query[d], widen(keys[token * dim + d]), score);
            score = lanes_sum(score, WARP);
            if (lane == 0) scores[token] = score;
        }
        __syncthreads();

        // Every warp for itself: the same numbers, and no barrier.
        const unsigned competing = a.normalisation == PLAIN ? tokens : tokens - 1;
        const TopSum inner = warp_top_sum(scores, competing);
        // The block counts as mass * e^claim.
        const bool grouped = a.normalisation == GROUPED;
        const float claim = grouped ? scores[tokens - 1] : inner.top, mass = grouped ? 1 : inner.sum;
        const float old = top;
        top = fmaxf(top, claim);
        const float keep = expf(old - top), gain = expf(claim - top);
        sum = sum * keep + gain * mass;
        const float weight = gain * (mass / inner.sum);
        for (unsigned i = 0; i < LANE_DIMS; i++) values[i] *= keep;
        const Number* block_values = keys + tokens * dim;
        for (unsigned token = warp; token < competing; token += WARPS) {
            const float share = expf(scores[token] - inner.top) * weight * (SCALED ? scales[dim + token] : 1);
#pragma unroll
            for (unsigned i = 0; i < LANE_DIMS; i++) {
                const unsigned d = lane + i * WARP;
                if (d < dim) values[i] = fmaf(share, widen(block_values[token * dim + d]), values[i]);
            }
        }
    }
#pragma unroll
    for (unsigned i = 0; i < LANE_DIMS; i++) {
        const unsigned d = lane + i * WARP;
        if (d < dim) warp_sums[warp * dim + d] = values[i];
    }
    __syncthreads();

    const size_t to = size_t(part) * gridDim.x + row;
    for (unsigned d = threadIdx.x; d < dim; d += THREADS) {
        float total = 0;
        for (unsigned from = 0; from < WARPS; from++) total += warp_sums[from * dim + d];
        a.out[to * dim + d] = total / sum;
    }
    if (threadIdx.x == 0) a.lse[to] = top + logf(sum);
}

extern "C" __global__ void __launch_bounds__(THREADS) attend_f16(AttendArguments a) {
    attend<unsigned short, false>(a);
}

extern "C" __global__ void __launch_bounds__(THREADS) attend_int8(AttendArguments a) {
    attend<signed char, true>(a);
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
