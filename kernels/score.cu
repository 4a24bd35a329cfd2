// Which k blocks does each row of choices want? The definition is src/index/exact.rs.
//
//   score(t, h, block)  = max or log-sum-exp over the block's m keys of  softmax_scale * q(t, h) . key
//   total(t, h)         = log-sum-exp over the N blocks of score(t, h, block)
//   share(row, block)   = max, or for a KV group log-sum-exp, over the row's (t, h) of  score - total
//   answer(row)         = the k blocks of largest share, equal ones by position; in order of position
//
// Four kernels, one after the other:
//
//   score   one pass over the keys for all query rows of a KV head: scores, and their log-sum-exp over each tile
//   total   log-sum-exp over the tiles
//   choose  shares of a slice of blocks and the best k of it, for one row of choices
//   merge   the best k of all slices
//
// Scores go through memory and are not chosen from inside `score`, because four of the five granularities need the
// totals before they can aggregate; this way they all take one path, for any k. It costs little: per block and query
// row 4 bytes are written and read, against m * D * 2 bytes of keys that G rows share, and while a token is decoded
// they do not leave the second-level cache. All granularities are done here, none on the host: a row of choices stands
// for `token_span` tokens and `head_span` query heads.
//
// Keys lie in panels (D, 64), as f16 keys do in the snapshots of src/index/snapshot.rs. A lane reads eight consecutive
// keys' values of one dimension at once; eight lanes read a dimension, a warp four of them, so that its loads are the
// widest there are and many are under way. What the lanes of the four summed up for a key is added at the end. A tile is
// some consecutive blocks that lie together and are scored by the same queries (older blocks share one set, recent ones
// have their own); it says where its keys are, so that documents, chunks and recent blocks are one launch.
//
// The best k are those above the k-th best score, which is found bit by bit (a bit is set if at least k reach what it
// makes), and the first ones of just that score. No candidate is moved, so that they keep their order.
//
// Grid. score: (tiles * strips of ROWS query rows, Hkv), strips of a tile next to each other so that they find its keys
// in the second-level cache; SCORE_WARPS warps, each takes a panel. total: a warp a query row. choose: a warp a slice of
// a row of choices. merge: rows of choices, MERGE_WARPS warps each.
//
// Shared memory. score: 4 ROWS (D + keys of the largest tile) bytes, at most 40 KB with D = 256 and 1024 keys (a tile
// has 256, or one block). choose: 4 bytes for each block of a slice, for each warp. merge: 4 bytes for each warp, twice.
// total: none.
//
// Versions tried, on an H100 (docs/performance.md): lanes that read two keys' values; loops that the compiler was to
// unroll; 2 and 8 warps; 4 and 16 loads, and loads ahead of the work on those before; choices by sorting.

constexpr unsigned PANEL = 64;
// Keys of a lane.
constexpr unsigned LANE_KEYS = 8;
// Lanes that read a dimension of a panel, and dimensions that a warp reads at once.
constexpr unsigned PANEL_LANES = PANEL / LANE_KEYS;
constexpr unsigned WARP_DIMS = WARP / PANEL_LANES;
constexpr unsigned SCORE_WARPS = 4;
constexpr unsigned SCORE_THREADS = SCORE_WARPS * WARP;
// Query rows that score a key while it is in a register: few where there are no more, for those that are not there cost
// as much as others.
constexpr unsigned FEW_ROWS = 4;
constexpr unsigned MANY_ROWS = 8;
// Loads of a lane that are under way at once. Compilers do not bring them about by themselves.
constexpr unsigned LOADS = 8;
// Thread blocks whose registers have room in a multiprocessor.
constexpr unsigned FEW_ROWS_BLOCKS = 6;
constexpr unsigned MANY_ROWS_BLOCKS = 4;
// Blocks of a slice.
constexpr unsigned SLICE = 4 * WARP;
constexpr unsigned MERGE_WARPS = 32;
constexpr unsigned MERGE_THREADS = MERGE_WARPS * WARP;

static_assert(WARP_DIMS == 4, "two steps add up what the lanes have of a key");

struct Tile {
    // (L * Hkv, piece_panels, D, PANEL): halves or signed bytes.
    const void* values;
    // (L * Hkv, piece_panels, PANEL), for bytes only.
    const float* scales;
    // Panels of each piece.
    unsigned piece_panels;
    // First key, counted within a piece.
    unsigned key;
    unsigned blocks;
    // Of the first block, among the N.
    unsigned position;
    // Which queries.
    unsigned set;
    // m, or fewer if its only block is shorter.
    unsigned keys_per_block;
};

struct ScoreArguments {
    // (tiles)
    const Tile* tiles;
    // (sets, T, Hq, D)
    const float* queries;
    // (Hkv, T * G, N), out.
    float* scores;
    // (Hkv, T * G, tiles), out.
    float* tile_totals;
    // N
    unsigned blocks;
    unsigned tile_count;
    // Keys of the largest tile.
    unsigned tile_keys;
    unsigned tokens;
    unsigned query_heads;
    unsigned kv_heads;
    // layer * Hkv
    unsigned first_piece;
    unsigned head_dim;
    // Otherwise the maximum.
    unsigned log_sum_exp;
    float softmax_scale;
};

struct TotalArguments {
    // (rows, tiles)
    const float* tile_totals;
    // (rows), out.
    float* totals;
    unsigned rows;
    unsigned tile_count;
};

struct ChooseArguments {
    // (Hkv, T * G, N)
    const float* scores;
    // (Hkv, T * G)
    const float* totals;
    // (rows of choices, slices, kept) ordered scores and positions, out; those of a slice in order, then 0 if it has fewer.
    uint2* candidates;
    unsigned rows;
    unsigned blocks;
    unsigned slices;
    unsigned kept;
    unsigned tokens;
    unsigned query_heads;
    unsigned kv_heads;
    unsigned token_span;
    unsigned head_span;
    // Whether shares add up; otherwise the largest counts.
    unsigned add;
};

struct MergeArguments {
    // (rows of choices, count)
    const uint2* candidates;
    // (rows of choices, k), out.
    unsigned* positions;
    // (rows of choices, k), out.
    float* scores;
    unsigned count;
    unsigned k;
};

// Sums of ROWS queries (D, ROWS) over the lane's dimensions of its keys of a panel (D, PANEL).
template <typename Eight, unsigned ROWS>
static __device__ __forceinline__ void lane_sums(
    const Eight* __restrict__ panel, const float4* __restrict__ queries, unsigned head_dim,
    float (&sums)[LANE_KEYS][ROWS]) {
    const unsigned lane = threadIdx.x % WARP;
#pragma unroll
    for (unsigned key = 0; key < LANE_KEYS; key++) {
#pragma unroll
        for (unsigned row = 0; row < ROWS; row++) sums[key][row] = 0;
    }
    const unsigned first_dim = lane / PANEL_LANES, eight = lane % PANEL_LANES;
    for (unsigned first = first_dim; first - first_dim < head_dim; first += LOADS * WARP_DIMS) {
        Eight eights[LOADS];
#pragma unroll
        for (unsigned i = 0; i < LOADS; i++) {
            const unsigned d = first + i * WARP_DIMS;
            if (d < head_dim) eights[i] = panel[d * PANEL_LANES + eight];
        }
#pragma unroll
        for (unsigned i = 0; i < LOADS; i++) {
            const unsigned d = first + i * WARP_DIMS;
            if (d >= head_dim) break;
            float keys[LANE_KEYS];
            widen(eights[i], keys);
#pragma unroll
            for (unsigned row = 0; row < ROWS; row += 4) {
                const float4 query = queries[(d * ROWS + row) / 4];
#pragma unroll
                for (unsigned key = 0; key < LANE_KEYS; key++) {
                    sums[key][row] = fmaf(query.x, keys[key], sums[key][row]);
                    sums[key][row + 1] = fmaf(query.y, keys[key], sums[key][row + 1]);
                    sums[key][row + 2] = fmaf(query.z, keys[key], sums[key][row + 2]);
                    sums[key][row + 3] = fmaf(query.w, keys[key], sums[key][row + 3]);
                }
            }
        }
    }
}

// Adds up what this lane and that `apart` from it have of COUNT keys; either is left with half of the keys, this one
// with the upper half if `upper`.
template <unsigned COUNT, unsigned ROWS>
static __device__ __forceinline__ void halve(float (&sums)[LANE_KEYS][ROWS], unsigned apart, bool upper) {
#pragma unroll
    for (unsigned key = 0; key < COUNT / 2; key++) {
#pragma unroll
        for (unsigned row = 0; row < ROWS; row++) {
            const float low = sums[key][row], high = sums[key + COUNT / 2][row];
            sums[key][row] = (upper ? high : low) + __shfl_xor_sync(ALL_LANES, upper ? low : high, apart);
        }
    }
}

// The lanes that share a block's m keys: a power of two up to WARP.
static __device__ __forceinline__ unsigned lanes_of_block(unsigned keys) {
    unsigned lanes = 1;
    while (lanes < keys && lanes < WARP) lanes *= 2;
    return lanes;
}

template <typename Eight, bool SCALED, unsigned ROWS>
static __device__ __forceinline__ void score(const ScoreArguments& a) {
    const unsigned group = a.query_heads / a.kv_heads, rows = a.tokens * group, head = blockIdx.y;
    const unsigned strips = (rows + ROWS - 1) / ROWS;
    const unsigned tile_index = blockIdx.x / strips, first_row = blockIdx.x % strips * ROWS;
    const unsigned strip_rows = min(ROWS, rows - first_row);
    const Tile tile = a.tiles[tile_index];
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float* queries = reinterpret_cast<float*>(shared_memory);  // (D, ROWS)
    float* products = queries + ROWS * a.head_dim;             // (ROWS, tile_keys)

    for (unsigned row = warp; row < ROWS; row += SCORE_WARPS) {
        const unsigned of_all = first_row + row;
        const size_t token = size_t(tile.set) * a.tokens + of_all / group;
        const float* from = a.queries + (token * a.query_heads + head * group + of_all % group) * a.head_dim;
        for (unsigned d = lane; d < a.head_dim; d += WARP) {
            queries[d * ROWS + row] = row < strip_rows ? from[d] * a.softmax_scale : 0;
        }
    }
    __syncthreads();

    const unsigned keys = tile.blocks * tile.keys_per_block;
    const unsigned last_panel = (tile.key + keys - 1) / PANEL;
    const size_t piece = size_t(a.first_piece + head) * tile.piece_panels;
    const bool first_upper = lane & PANEL_LANES, second_upper = lane & 2 * PANEL_LANES;
    for (unsigned panel = tile.key / PANEL + warp; panel <= last_panel; panel += SCORE_WARPS) {
        const Eight* values = static_cast<const Eight*>(tile.values) + (piece + panel) * a.head_dim * PANEL_LANES;
        float sums[LANE_KEYS][ROWS];
        lane_sums<Eight, ROWS>(values, shared_memory, a.head_dim, sums);
        halve<LANE_KEYS, ROWS>(sums, PANEL_LANES, first_upper);
        halve<LANE_KEYS / 2, ROWS>(sums, 2 * PANEL_LANES, second_upper);
        const unsigned in_panel = lane % PANEL_LANES * LANE_KEYS + first_upper * 4 + second_upper * 2;
#pragma unroll
        for (unsigned i = 0; i < LANE_KEYS / WARP_DIMS; i++) {
            // Keys of the panel that lie before the tile wrap around and are too large as well.
            const unsigned key = panel * PANEL + in_panel + i - tile.key;
            if (key >= keys) continue;
            const float scale = SCALED ? tile.scales[(piece + panel) * PANEL + in_panel + i] : 1;
#pragma unroll
            for (unsigned row = 0; row < ROWS; row++) products[row * a.tile_keys + key] = sums[i][row] * scale;
        }
    }
    __syncthreads();

    // A warp takes a row, some lanes a block.
    const unsigned width = lanes_of_block(tile.keys_per_block), at_once = WARP / width;
    for (unsigned row = warp; row < strip_rows; row += SCORE_WARPS) {
        const size_t to = size_t(head) * rows + first_row + row;
        float* scores = a.scores + to * a.blocks + tile.position;
        // Of the lane's blocks so far.
        float top = -infinity(), sum = 0;
        for (unsigned first = 0; first < tile.blocks; first += at_once) {
            const unsigned block = first + lane / width;
            const float* of_block = products + row * a.tile_keys + block * tile.keys_per_block;
            // All lanes take part in the shuffles; those behind the last block have no keys.
            const unsigned count = block < tile.blocks ? tile.keys_per_block : 0;
            float score = -infinity();
            for (unsigned i = lane % width; i < count; i += width) score = fmaxf(score, of_block[i]);
            score = lanes_max(score, width);
            if (a.log_sum_exp && tile.keys_per_block > 1) {
                float inner = 0;
                for (unsigned i = lane % width; i < count; i += width) inner += expf(of_block[i] - score);
                score += logf(lanes_sum(inner, width));
            }
            if (block < tile.blocks && lane % width == 0) {
                scores[block] = score;
                const float higher = fmaxf(top, score);
                sum = sum * expf(top - higher) + expf(score - higher);
                top = higher;
            }
        }
        const float highest = lanes_max(top, WARP);
        sum = lanes_sum(sum * expf(top - highest), WARP);
        if (lane == 0) a.tile_totals[to * a.tile_count + tile_index] = highest + logf(sum);
    }
}

extern "C" __global__ void __launch_bounds__(SCORE_THREADS, FEW_ROWS_BLOCKS) score_few_f16(ScoreArguments a) {
    score<uint4, false, FEW_ROWS>(a);
}

extern "C" __global__ void __launch_bounds__(SCORE_THREADS, FEW_ROWS_BLOCKS) score_few_int8(ScoreArguments a) {
    score<uint2, true, FEW_ROWS>(a);
}

extern "C" __global__ void __launch_bounds__(SCORE_THREADS, MANY_ROWS_BLOCKS) score_many_f16(ScoreArguments a) {
    score<uint4, false, MANY_ROWS>(a);
}

extern "C" __global__ void __launch_bounds__(SCORE_THREADS, MANY_ROWS_BLOCKS) score_many_int8(ScoreArguments a) {
    score<uint2, true, MANY_ROWS>(a);
}

extern "C" __global__ void __launch_bounds__(THREADS) total(TotalArguments a) {
    const unsigned row = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (row >= a.rows) return;
    const TopSum total = warp_top_sum(a.tile_totals + size_t(row) * a.tile_count, a.tile_count);
    if (threadIdx.x % WARP == 0) a.totals[row] = total.top + logf(total.sum);
}

// log(e^a + e^b)
static __device__ __forceinline__ float add_logs(float a, float b) {
    const float low = fminf(a, b), high = fmaxf(a, b);
    return low == -infinity() ? high : high + log1pf(expf(low - high));
}

// A score as a number that is greater where the score is. None is 0, which stands for no score.
static __device__ __forceinline__ unsigned ordered(float score) {
    const unsigned bits = __float_as_uint(score);
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

static __device__ __forceinline__ float score_of(unsigned ordered) {
    return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffff : ~ordered);
}

// Who chooses together: the threads of a warp.
struct Warp {
    static constexpr unsigned SIZE = WARP;

    __device__ unsigned rank() const { return threadIdx.x % WARP; }

    // The sum of what all say.
    __device__ unsigned sum(unsigned number) { return __reduce_add_sync(ALL_LANES, number); }

    // The bits of what any of them says.
    __device__ unsigned any(unsigned bits) { return __reduce_or_sync(ALL_LANES, bits); }

    // How many of lower rank say so. Adds to `all` how many do.
    __device__ unsigned before(bool vote, unsigned& all) {
        const unsigned lanes = __ballot_sync(ALL_LANES, vote);
        all += __popc(lanes);
        return __popc(lanes & ((1u << rank()) - 1));
    }
};

// Who chooses together: the threads of a thread block of MERGE_WARPS. What its warps tell each other goes through two
// rows of shared memory that are used in turns, so that one barrier is enough each time.
struct Block {
    unsigned (*of_warps)[MERGE_WARPS];
    unsigned turn;

    static constexpr unsigned SIZE = MERGE_THREADS;

    __device__ unsigned rank() const { return threadIdx.x; }

    // What the warp says whose number is the lane's.
    __device__ unsigned exchange(unsigned of_warp) {
        turn ^= 1;
        if (threadIdx.x % WARP == 0) of_warps[turn][threadIdx.x / WARP] = of_warp;
        __syncthreads();
        return of_warps[turn][threadIdx.x % WARP];
    }

    __device__ unsigned sum(unsigned number) { return Warp().sum(exchange(Warp().sum(number))); }

    __device__ unsigned any(unsigned bits) { return Warp().any(exchange(Warp().any(bits))); }

    __device__ unsigned before(bool vote, unsigned& all) {
        unsigned in_warp = 0;
        const unsigned before = Warp().before(vote, in_warp), of_warp = exchange(in_warp);
        all += Warp().sum(of_warp);
        return before + Warp().sum(threadIdx.x % WARP < threadIdx.x / WARP ? of_warp : 0);
    }
};

static_assert(MERGE_WARPS == WARP, "a lane reads what a warp says");

// A slice's scores as `ordered` values; 0 where there is none.
struct SliceScores {
    const unsigned* values;

    // So that loops over them are none.
    static __device__ constexpr unsigned count() { return SLICE; }

    __device__ unsigned operator[](unsigned i) const { return values[i]; }
};

// Those of candidates.
struct CandidateScores {
    const uint2* candidates;
    unsigned number;

    __device__ unsigned count() const { return number; }

    __device__ unsigned operator[](unsigned i) const { return candidates[i].x; }
};

// Chosen are the scores above a bar and the first `equal` of just the bar.
struct Bar {
    unsigned score;
    unsigned equal;
};

// Of the best k of more than k scores. All of the team must call it.
template <typename Team, typename Scores>
static __device__ __forceinline__ Bar bar_of_best(const Scores& scores, unsigned k, Team& team) {
    // What all have in common needs no votes.
    unsigned ones = 0, zeros = 0;
#pragma unroll 4
    for (unsigned i = team.rank(); i < scores.count(); i += Team::SIZE) {
        const unsigned score = scores[i];
        if (score != 0) ones |= score, zeros |= ~score;
    }
    ones = team.any(ones);
    zeros = team.any(zeros);
    const unsigned differing = 32 - __clz(ones & zeros);
    unsigned reached = differing < 32 ? ones >> differing << differing : 0;
    for (unsigned bit = differing; bit-- > 0;) {
        const unsigned next = reached | 1u << bit;
        unsigned reach = 0;
#pragma unroll 4
        for (unsigned i = team.rank(); i < scores.count(); i += Team::SIZE) reach += scores[i] >= next;
        reach = team.sum(reach);
        if (reach == k) return {next - 1, 0};
        if (reach > k) reached = next;
    }
    unsigned above = 0;
    for (unsigned i = team.rank(); i < scores.count(); i += Team::SIZE) above += scores[i] > reached;
    return {reached, k - team.sum(above)};
}

// Calls put(place, i) for each chosen score, the places counted in order. All of the team must call it, and get their
// number.
template <typename Team, typename Scores, typename Put>
static __device__ __forceinline__ unsigned put_best(const Scores& scores, const Bar& bar, Team& team, Put put) {
    unsigned above_before = 0, equal_before = 0;
    for (unsigned first = 0; first < scores.count(); first += Team::SIZE) {
        const unsigned i = first + team.rank(), score = i < scores.count() ? scores[i] : 0;
        unsigned above_all = above_before, equal_all = equal_before;
        const unsigned above = above_before + team.before(score > bar.score, above_all);
        const unsigned equal = equal_before + team.before(score == bar.score, equal_all);
        const bool chosen = score > bar.score || (score == bar.score && equal < bar.equal);
        if (chosen) put(above + min(equal, bar.equal), i);
        above_before = above_all;
        equal_before = equal_all;
    }
    return above_before + min(equal_before, bar.equal);
}

// The share of a block in a row of choices.
static __device__ float share(const ChooseArguments& a, unsigned row, unsigned block) {
    const unsigned group = a.query_heads / a.kv_heads, head_rows = a.query_heads / a.head_span;
    const unsigned first_token = row / head_rows * a.token_span, first_head = row % head_rows * a.head_span;
    float share = -infinity();
    for (unsigned token = first_token; token < first_token + a.token_span; token++) {
        for (unsigned head = first_head; head < first_head + a.head_span; head++) {
            const size_t from = (size_t(head / group) * a.tokens + token) * group + head % group;
            const float one = a.scores[from * a.blocks + block] - a.totals[from];
            share = a.add ? add_logs(share, one) : fmaxf(share, one);
        }
    }
    return share;
}

extern "C" __global__ void __launch_bounds__(THREADS) choose(ChooseArguments a) {
    const unsigned slice = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (slice >= a.rows * a.slices) return;
    const unsigned row = slice / a.slices, first = slice % a.slices * SLICE;
    const unsigned count = min(SLICE, a.blocks - first);
    Warp warp;
    unsigned* shares = reinterpret_cast<unsigned*>(shared_memory) + threadIdx.x / WARP * SLICE;  // (SLICE)
    for (unsigned i = warp.rank(); i < SLICE; i += WARP) shares[i] = i < count ? ordered(share(a, row, first + i)) : 0;
    __syncwarp();
    const SliceScores scores = {shares};
    uint2* best = a.candidates + size_t(slice) * a.kept;
    Bar bar = {0, 0};
    if (count > a.kept) bar = bar_of_best(scores, a.kept, warp);
    const auto put = [=](unsigned place, unsigned i) { best[place] = {shares[i], first + i}; };
    const unsigned used = put_best(scores, bar, warp, put);
    for (unsigned i = used + warp.rank(); i < a.kept; i += WARP) best[i] = {0, 0};
}

extern "C" __global__ void __launch_bounds__(MERGE_THREADS) merge(MergeArguments a) {
    const uint2* candidates = a.candidates + size_t(blockIdx.x) * a.count;
    Block block = {reinterpret_cast<unsigned (*)[MERGE_WARPS]>(shared_memory), 0};
    const CandidateScores scores = {candidates, a.count};
    const size_t to = size_t(blockIdx.x) * a.k;
    Bar bar = {0, 0};
    if (a.count > a.k) bar = bar_of_best(scores, a.k, block);
    put_best(scores, bar, block, [=](unsigned place, unsigned i) {
        a.positions[to + place] = candidates[i].y;
        a.scores[to + place] = score_of(candidates[i].x);
    });
}
