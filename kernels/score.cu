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
//   choose  shares of a slice of blocks and its best k, for one row of choices
//   merge   the best k of all slices
//
// Scores go through memory and are not chosen from inside `score`, because four of the five granularities need the
// totals before they can aggregate; this way they all take one path, for any k. It costs little: per block and query
// row 4 bytes are written and read, against m * D * 2 bytes of keys that G rows share, and while a token is decoded
// they do not leave the second-level cache. All granularities are done here, none on the host: a row of choices stands
// for `token_span` tokens and `head_span` query heads.
//
// Keys lie in panels (D, 64), as f16 keys do in the snapshots of src/index/snapshot.rs, so that a warp reads 64
// consecutive numbers of one dimension, two a lane, and no sum crosses lanes. A tile is some consecutive blocks that lie
// together and meet the same queries (older blocks share one set, recent ones have their own); it says where its keys
// are, so that documents, chunks and recent blocks are one launch.
//
// Grid. score: (tiles * strips of ROWS query rows, Hkv), strips of a tile next to each other so that they find its keys
// in the second-level cache; a warp takes a panel. total: a warp a query row. choose: (slices * rows of choices), a
// thread a block. merge: rows of choices.
//
// Shared memory. score: 4 ROWS (D + keys of the largest tile) bytes, at most 40 KB with D = 256 and 1024 keys (a tile
// has 512, or one block). choose, merge: 8 bytes for each entry of the queue, a power of two that is at least
// k + THREADS, and 16 more: at most 16 KB and those 16. total: none.
//
// Versions tried: this one. No GPU has run or timed it yet; its answers were checked on a CPU.

// Query rows that meet a key while it is in a register. More would cost registers, fewer would leave the reads alone
// with too little to do when G = 8.
constexpr unsigned ROWS = 8;
constexpr unsigned PANEL = 64;
// Blocks of a slice.
constexpr unsigned SLICE = 1024;

static_assert(ROWS == WARPS, "a warp takes the log-sum-exp of a row");
static_assert(PANEL == 2 * WARP, "a lane takes two keys of a panel");

struct Tile {
    // (L * Hkv, piece_panels, D, PANEL): halves or signed bytes.
    const void* numbers;
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
    // Makes the size a multiple of an address, as compilers would.
    unsigned unused;
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
    unsigned keys_per_block;
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
    // (rows of choices, slices, kept), out; the best first, 0 where a slice has fewer.
    unsigned long long* candidates;
    unsigned blocks;
    unsigned slices;
    unsigned kept;
    // Entries of the queue.
    unsigned capacity;
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
    const unsigned long long* candidates;
    // (rows of choices, k), out.
    unsigned* positions;
    // (rows of choices, k), out.
    float* scores;
    unsigned count;
    unsigned k;
    unsigned capacity;
};

struct Pair {
    float a;
    float b;
};

static __device__ __forceinline__ Pair widen(char2 pair) {
    return {float(pair.x), float(pair.y)};
}

static __device__ __forceinline__ Pair widen(ushort2 pair) {
    return {widen(pair.x), widen(pair.y)};
}

// Scores of ROWS queries (D, ROWS) against the lane's two keys of a panel (D, PANEL).
template <typename Two>
static __device__ __forceinline__ void score_panel(
    const Two* __restrict__ panel, const float4* __restrict__ queries, unsigned head_dim, Pair (&sums)[ROWS]) {
    const unsigned lane = threadIdx.x % WARP;
    for (unsigned row = 0; row < ROWS; row++) sums[row] = {0, 0};
#pragma unroll 8
    for (unsigned d = 0; d < head_dim; d++) {
        const Pair key = widen(panel[d * WARP + lane]);
        const float4 low = queries[2 * d], high = queries[2 * d + 1];
        const float query[ROWS] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (unsigned row = 0; row < ROWS; row++) {
            sums[row].a = fmaf(query[row], key.a, sums[row].a);
            sums[row].b = fmaf(query[row], key.b, sums[row].b);
        }
    }
}

// The lanes that share a block's m keys: a power of two up to WARP.
static __device__ __forceinline__ unsigned lanes_of_block(unsigned keys) {
    unsigned lanes = 1;
    while (lanes < keys && lanes < WARP) lanes *= 2;
    return lanes;
}

template <typename Two, bool SCALED>
static __device__ __forceinline__ void score(const ScoreArguments& a) {
    const unsigned group = a.query_heads / a.kv_heads, rows = a.tokens * group, head = blockIdx.y;
    const unsigned strips = (rows + ROWS - 1) / ROWS;
    const unsigned tile_index = blockIdx.x / strips, first_row = blockIdx.x % strips * ROWS;
    const unsigned strip_rows = min(ROWS, rows - first_row);
    const Tile tile = a.tiles[tile_index];
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float* queries = reinterpret_cast<float*>(shared_memory);  // (D, ROWS)
    float* products = queries + ROWS * a.head_dim;             // (ROWS, tile_keys)

    for (unsigned i = threadIdx.x; i < ROWS * a.head_dim; i += THREADS) {
        const unsigned within = i / a.head_dim, d = i % a.head_dim, row = first_row + within;
        float number = 0;
        if (within < strip_rows) {
            const size_t token = size_t(tile.set) * a.tokens + row / group;
            const size_t from = token * a.query_heads + head * group + row % group;
            number = a.queries[from * a.head_dim + d] * a.softmax_scale;
        }
        queries[d * ROWS + within] = number;
    }
    __syncthreads();

    const unsigned keys = tile.blocks * a.keys_per_block;
    const unsigned last_panel = (tile.key + keys - 1) / PANEL;
    const size_t piece = size_t(a.first_piece + head) * tile.piece_panels;
    for (unsigned panel = tile.key / PANEL + warp; panel <= last_panel; panel += WARPS) {
        const Two* numbers = static_cast<const Two*>(tile.numbers) + (piece + panel) * a.head_dim * WARP;
        Pair sums[ROWS];
        score_panel(numbers, shared_memory, a.head_dim, sums);
        Pair scale = {1, 1};
        if (SCALED) {
            const float* scales = tile.scales + (piece + panel) * PANEL + 2 * lane;
            scale = {scales[0], scales[1]};
        }
        // Keys of the panel that lie before the tile wrap around and are too large as well.
        const unsigned key = panel * PANEL + 2 * lane - tile.key;
#pragma unroll
        for (unsigned row = 0; row < ROWS; row++) {
            if (key < keys) products[row * a.tile_keys + key] = sums[row].a * scale.a;
            if (key + 1 < keys) products[row * a.tile_keys + key + 1] = sums[row].b * scale.b;
        }
    }
    __syncthreads();

    const size_t head_row = size_t(head) * rows + first_row;
    float* scores = a.scores + head_row * a.blocks + tile.position;  // (strip_rows, N), from the tile's first block on
    const unsigned width = lanes_of_block(a.keys_per_block), pairs = strip_rows * tile.blocks;
    for (unsigned first = 0; first < pairs; first += THREADS / width) {
        const unsigned pair = first + threadIdx.x / width;
        const unsigned row = pair / tile.blocks, block = pair % tile.blocks;
        const float* of_block = products + row * a.tile_keys + block * a.keys_per_block;
        // All lanes take part in the shuffles; those behind the last pair have no keys.
        const unsigned count = pair < pairs ? a.keys_per_block : 0;
        float score = -infinity();
        for (unsigned i = threadIdx.x % width; i < count; i += width) score = fmaxf(score, of_block[i]);
        score = lanes_max(score, width);
        if (a.log_sum_exp) {
            float sum = 0;
            for (unsigned i = threadIdx.x % width; i < count; i += width) sum += expf(of_block[i] - score);
            score += logf(lanes_sum(sum, width));
        }
        if (pair < pairs && threadIdx.x % width == 0) scores[size_t(row) * a.blocks + block] = score;
    }
    __syncthreads();

    if (warp < strip_rows) {
        const TopSum total = warp_top_sum(scores + size_t(warp) * a.blocks, tile.blocks);
        if (lane == 0) a.tile_totals[(head_row + warp) * a.tile_count + tile_index] = total.top + logf(total.sum);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) score_f16(ScoreArguments a) {
    score<ushort2, false>(a);
}

extern "C" __global__ void __launch_bounds__(THREADS) score_int8(ScoreArguments a) {
    score<char2, true>(a);
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

// A score and a position as one number: the better candidate is the greater number, of equal scores the earlier
// position. No candidate is 0.
static __device__ __forceinline__ unsigned long long candidate(float score, unsigned position) {
    const unsigned bits = __float_as_uint(score);
    const unsigned ordered = bits >> 31 ? ~bits : bits | 0x80000000;
    return static_cast<unsigned long long>(ordered) << 32 | ~position;
}

static __device__ __forceinline__ float score_of(unsigned ordered) {
    return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffff : ~ordered);
}

// Sorts `count` numbers, a power of two, in descending order: the whole thread block, by bitonic merges.
static __device__ void sort(unsigned long long* numbers, unsigned count) {
    for (unsigned run = 2; run <= count; run *= 2) {
        for (unsigned stride = run / 2; stride > 0; stride /= 2) {
            __syncthreads();
            for (unsigned i = threadIdx.x; i < count / 2; i += THREADS) {
                const unsigned low = i / stride * stride * 2 + i % stride, high = low + stride;
                const unsigned long long a = numbers[low], b = numbers[high];
                const bool descending = (low & run) == 0;
                if ((a < b) == descending) {
                    numbers[low] = b;
                    numbers[high] = a;
                }
            }
        }
    }
    __syncthreads();
}

// The best k candidates so far, in shared memory. Candidates that beat the k-th best are written behind them; when
// there might be no room for another THREADS, the queue is sorted and cut to k.
struct Queue {
    // (capacity)
    unsigned long long* entries;
    unsigned* used;
    unsigned capacity;
    unsigned k;
    // What a candidate has to exceed.
    unsigned long long bar;
};

static __device__ Queue empty_queue(unsigned capacity, unsigned k) {
    unsigned long long* entries = reinterpret_cast<unsigned long long*>(shared_memory);
    Queue queue = {entries, reinterpret_cast<unsigned*>(entries + capacity), capacity, k, 0};
    if (threadIdx.x == 0) *queue.used = 0;
    __syncthreads();
    return queue;
}

// Sorts the best k to the front and drops the others. The whole thread block.
static __device__ void cut(Queue& queue) {
    const unsigned used = *queue.used;
    for (unsigned i = used + threadIdx.x; i < queue.capacity; i += THREADS) queue.entries[i] = 0;
    sort(queue.entries, queue.capacity);
    if (used >= queue.k) queue.bar = queue.entries[queue.k - 1];
    if (threadIdx.x == 0) *queue.used = min(used, queue.k);
    __syncthreads();
}

// One candidate of each thread, or 0. The whole thread block.
static __device__ void offer(Queue& queue, unsigned long long candidate) {
    if (candidate > queue.bar) queue.entries[atomicAdd(queue.used, 1u)] = candidate;
    __syncthreads();
    const bool full = *queue.used + THREADS > queue.capacity;
    // Nobody may add before everybody has seen that.
    __syncthreads();
    if (full) cut(queue);
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
    const unsigned row = blockIdx.x / a.slices, slice = blockIdx.x % a.slices;
    const unsigned end = min(a.blocks, (slice + 1) * SLICE);
    Queue queue = empty_queue(a.capacity, a.kept);
    for (unsigned first = slice * SLICE; first < end; first += THREADS) {
        const unsigned block = first + threadIdx.x;
        offer(queue, block < end ? candidate(share(a, row, block), block) : 0);
    }
    cut(queue);
    unsigned long long* best = a.candidates + size_t(blockIdx.x) * a.kept;
    for (unsigned i = threadIdx.x; i < a.kept; i += THREADS) best[i] = queue.entries[i];
}

extern "C" __global__ void __launch_bounds__(THREADS) merge(MergeArguments a) {
    const unsigned long long* candidates = a.candidates + size_t(blockIdx.x) * a.count;
    Queue queue = empty_queue(a.capacity, a.k);
    for (unsigned first = 0; first < a.count; first += THREADS) {
        const unsigned i = first + threadIdx.x;
        offer(queue, i < a.count ? candidates[i] : 0);
    }
    cut(queue);
    // With its halves swapped, the greater candidate is the earlier one.
    unsigned sorted = 1;
    while (sorted < a.k) sorted *= 2;
    for (unsigned i = threadIdx.x; i < sorted; i += THREADS) {
        const unsigned long long best = queue.entries[i];
        queue.entries[i] = i < a.k ? best << 32 | best >> 32 : 0;
    }
    sort(queue.entries, sorted);
    for (unsigned i = threadIdx.x; i < a.k; i += THREADS) {
        const size_t to = size_t(blockIdx.x) * a.k + i;
        a.positions[to] = ~static_cast<unsigned>(queue.entries[i] >> 32);
        a.scores[to] = score_of(static_cast<unsigned>(queue.entries[i]));
    }
}
