//! Attention over pages against plain loops in double precision.

use half::f16;
use landmarkdb::cuda::{Page, PageLayout, PagedAttention, PartialAttention, Piece, Runner, attend};
use landmarkdb::{DType, Normalisation};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Both read the same stored values: only f32 sums and exponentials of values of a few units differ.
const TOLERANCE_F16: f64 = 2e-5;
const TOLERANCE_INT8: f64 = 2e-5;

const NORMALISATIONS: [Normalisation; 3] = [Normalisation::Plain, Normalisation::Grouped, Normalisation::Hidden];

/// Random queries over random pages, of which each row reads some.
#[derive(Clone, Debug)]
struct Case {
    int8: bool,
    head_dim: usize,
    block_tokens: usize,
    tokens: usize,
    query_heads: usize,
    k: usize,
    sharing: usize,
    half: usize,
}

/// One page as the definition reads it, each `(T, D)`.
struct Decoded {
    k: Vec<f64>,
    v: Vec<f64>,
}

struct Tables {
    /// `(T, Hq, D)`
    queries: Vec<f32>,
    /// `(T, Hq / sharing, k)`
    page_of: Vec<u32>,
    /// `(T, Hq / sharing, k)`
    rotation_of: Vec<u32>,
    /// `(rotations, 2, half)`
    rotations: Vec<f32>,
}

const PAGES: usize = 5;
const ROTATIONS: usize = 4;

impl Case {
    fn check<R: Runner<Error: std::fmt::Debug>>(&self, runner: &R) {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let (pages, decoded) = self.fill(runner, &mut rng);
        let rows = self.tokens * self.query_heads;
        let entries = rows / self.sharing * self.k;
        let angles: Vec<f32> = (0..ROTATIONS * self.half).map(|_| rng.random_range(-3.0..3.0)).collect();
        let rotation =
            |angles: &[f32]| [angles.iter().map(|a| a.cos()).collect(), angles.iter().map(|a| a.sin()).collect()];
        let tables = Tables {
            queries: (0..rows * self.head_dim).map(|_| rng.random_range(-3.0..3.0)).collect(),
            page_of: (0..entries).map(|_| rng.random_range(0..PAGES as u32)).collect(),
            rotation_of: (0..entries).map(|_| rng.random_range(0..ROTATIONS as u32)).collect(),
            rotations: angles.chunks(self.half.max(1)).flat_map(rotation).flat_map(|part: Vec<f32>| part).collect(),
        };
        for normalisation in NORMALISATIONS {
            let attention = PagedAttention {
                tokens: self.tokens as u32,
                query_heads: self.query_heads as u32,
                queries: &tables.queries,
                k: self.k as u32,
                sharing: self.sharing as u32,
                layout: self.layout(),
                pages: &pages.iter().collect::<Vec<_>>(),
                page_of: &tables.page_of,
                rotation_of: &tables.rotation_of,
                rotations: &tables.rotations,
                half: self.half as u32,
                normalisation,
                softmax_scale: self.softmax_scale(),
            };
            let PartialAttention { out, lse } = attend(runner, &attention).unwrap();
            assert_eq!((out.len(), lse.len()), (rows * self.head_dim, rows), "{self:?}");
            for (row, (out, &lse)) in out.chunks_exact(self.head_dim).zip(&lse).enumerate() {
                let (want, want_lse) = self.defined(row, &tables, &decoded, normalisation);
                self.compare(out, lse, &want, want_lse, normalisation);
            }
        }
    }

    fn layout(&self) -> PageLayout {
        let dtype = if self.int8 { DType::Int8 } else { DType::F16 };
        PageLayout { dtype, block_tokens: self.block_tokens, head_dim: self.head_dim }
    }

    fn softmax_scale(&self) -> f32 {
        (self.head_dim as f32).powf(-0.5)
    }

    fn compare(&self, out: &[f32], lse: f32, want: &[f64], want_lse: f64, normalisation: Normalisation) {
        let tolerance = if self.int8 { TOLERANCE_INT8 } else { TOLERANCE_F16 };
        let near = |got: f32, want: f64| got as f64 == want || (got as f64 - want).abs() < tolerance;
        assert!(near(lse, want_lse), "lse {lse} for {want_lse}, {normalisation}, {self:?}");
        for (&got, &want) in out.iter().zip(want) {
            assert!(near(got, want), "{got} for {want}, {normalisation}, {self:?}");
        }
    }

    fn fill<R: Runner<Error: std::fmt::Debug>>(
        &self,
        runner: &R,
        rng: &mut ChaCha8Rng,
    ) -> (Vec<Page<R::Memory>>, Vec<Decoded>) {
        let dim = self.head_dim;
        let (mut pages, mut decoded) = (Vec::new(), Vec::new());
        for page in 0..PAGES {
            // Every other is a tail, the first of them as short as there are.
            let tokens = match page {
                1 => 1,
                3 => rng.random_range(1..self.block_tokens),
                _ => self.block_tokens,
            };
            if self.int8 {
                let mut bytes = || (0..tokens * dim).map(|_| rng.random_range(-127i8..=127)).collect::<Vec<_>>();
                let (k, v) = (bytes(), bytes());
                let mut scales = |count| (0..count).map(|_| rng.random_range(0.002..0.02f32)).collect::<Vec<_>>();
                let (k_scales, v_scales) = (scales(dim), scales(tokens));
                let piece = Piece::Int8 { k: &k, k_scales: &k_scales, v: &v, v_scales: &v_scales };
                pages.extend(Page::upload(runner, self.layout(), &[piece]).unwrap());
                let of = |i: usize, number: i8, scales: &[f32]| number as f64 * scales[i] as f64;
                decoded.push(Decoded {
                    k: k.iter().enumerate().map(|(i, &number)| of(i % dim, number, &k_scales)).collect(),
                    v: v.iter().enumerate().map(|(i, &number)| of(i / dim, number, &v_scales)).collect(),
                });
            } else {
                let halves: Vec<f16> =
                    (0..2 * tokens * dim).map(|_| f16::from_f32(rng.random_range(-2.0..2.0))).collect();
                pages.extend(
                    Page::upload(
                        runner,
                        self.layout(),
                        &[Piece::F16 { k: &halves[..halves.len() / 2], v: &halves[halves.len() / 2..] }],
                    )
                    .unwrap(),
                );
                let wide = |halves: &[f16]| halves.iter().map(|half| half.to_f64()).collect();
                let (k, v) = halves.split_at(tokens * dim);
                decoded.push(Decoded { k: wide(k), v: wide(v) });
            }
        }
        (pages, decoded)
    }

    /// One row's `(out (D), lse)`, straight from the definition.
    fn defined(&self, row: usize, t: &Tables, pages: &[Decoded], normalisation: Normalisation) -> (Vec<f64>, f64) {
        let (dim, half) = (self.head_dim, self.half);
        let plain: Vec<f64> =
            t.queries[row * dim..][..dim].iter().map(|&number| number as f64 * self.softmax_scale() as f64).collect();
        // (weight before division, page, token)
        let mut weights = Vec::new();
        let mut sum = 0.0;
        for rank in 0..self.k {
            let entry = row / self.sharing * self.k + rank;
            let (page, rotation) = (&pages[t.page_of[entry] as usize], t.rotation_of[entry] as usize);
            let mut query = plain.clone();
            for i in 0..half {
                let cos = t.rotations[rotation * 2 * half + i] as f64;
                let sin = t.rotations[rotation * 2 * half + half + i] as f64;
                query[i] = plain[i] * cos - plain[i + half] * sin;
                query[i + half] = plain[i + half] * cos + plain[i] * sin;
            }
            let exps: Vec<f64> =
                page.k.chunks(dim).map(|k| k.iter().zip(&query).map(|(k, q)| k * q).sum::<f64>().exp()).collect();
            let has_landmark = exps.len() == self.block_tokens && normalisation != Normalisation::Plain;
            let inner = &exps[..exps.len() - has_landmark as usize];
            let inner_sum: f64 = inner.iter().sum();
            let is_grouped = has_landmark && normalisation == Normalisation::Grouped;
            let mass = if is_grouped { exps[exps.len() - 1] } else { inner_sum };
            sum += mass;
            weights.extend(inner.iter().enumerate().map(|(token, e)| (mass * e / inner_sum, page, token)));
        }
        let mut out = vec![0.0; dim];
        for (weight, page, token) in weights {
            let values = &page.v[token * dim..][..dim];
            out.iter_mut().zip(values).for_each(|(out, value)| *out += weight / sum * value);
        }
        (out, sum.ln())
    }
}

/// Every head dim, block length and number of blocks, rows that share their entries, dimensions that are not rotated.
pub fn shapes<R: Runner<Error: std::fmt::Debug>>(runner: &R) {
    for int8 in [false, true] {
        for (head_dim, block_tokens, tokens, query_heads, k, sharing, half) in [
            (1, 2, 1, 1, 1, 1, 0),
            (5, 3, 2, 3, 0, 3, 2),
            (64, 64, 1, 8, 3, 8, 32),
            (64, 17, 2, 6, 9, 3, 16),
            (80, 50, 1, 5, 4, 1, 40),
            (128, 64, 3, 2, 2, 1, 64),
            (256, 33, 1, 7, 5, 7, 128),
            (256, 2, 0, 4, 1, 1, 128),
            (8, 1024, 1, 1, 2, 1, 4),
        ] {
            Case { int8, head_dim, block_tokens, tokens, query_heads, k, sharing, half }.check(runner);
        }
    }
}

/// So many rows that each is one part.
pub fn many_rows<R: Runner<Error: std::fmt::Debug>>(runner: &R) {
    let case =
        Case { int8: false, head_dim: 3, block_tokens: 5, tokens: 130, query_heads: 4, k: 3, sharing: 2, half: 1 };
    case.check(runner);
}

/// What would read beyond its memory is refused before anything runs.
pub fn refusals<R: Runner<Error: std::fmt::Debug>>(runner: &R) {
    let layout = PageLayout { dtype: DType::F16, block_tokens: 2, head_dim: 4 };
    let zeros = [f16::ZERO; 8];
    let page = |layout, values: &[f16]| Page::upload(runner, layout, &[Piece::F16 { k: values, v: values }]);
    let pages = Page::upload(runner, layout, &[Piece::F16 { k: &zeros, v: &zeros }; 2]).unwrap();
    assert!(page(layout, &zeros[..7]).is_err(), "part of a token");
    assert!(page(layout, &zeros[..4]).is_ok(), "a shorter block");
    assert!(
        page(layout, &[]).is_err() && page(layout, &[f16::ZERO; 12]).is_err(),
        "no token, and more than a block has"
    );
    assert!(page(PageLayout { dtype: DType::Int8, ..layout }, &zeros).is_err(), "a page of another dtype");
    assert!(page(PageLayout { dtype: DType::F32, ..layout }, &zeros).is_err(), "numbers that no kernel reads");
    assert!(page(PageLayout { head_dim: 257, ..layout }, &[f16::ZERO; 2 * 257]).is_err(), "too large a head dim");
    assert!(page(PageLayout { block_tokens: 1, ..layout }, &zeros[..4]).is_err(), "a landmark and nothing else");
    let attention =
        |page: u32, rotation: u32, sharing: u32, half: u32, layout: PageLayout, pages: &[&Page<R::Memory>]| {
            let attention = PagedAttention {
                tokens: 1,
                query_heads: 2,
                queries: &vec![1.0; 2 * layout.head_dim],
                k: 1,
                sharing,
                layout,
                pages,
                page_of: &[0, page][..2 / sharing as usize],
                rotation_of: &[rotation, 0][..2 / sharing as usize],
                rotations: &[0.0; 8],
                half,
                normalisation: Normalisation::Plain,
                softmax_scale: 1.0,
            };
            attend(runner, &attention).is_err()
        };
    let pages: Vec<&Page<R::Memory>> = pages.iter().collect();
    let refused = |page, rotation, sharing, half| attention(page, rotation, sharing, half, layout, &pages);
    assert!(!refused(1, 1, 1, 2));
    assert!(refused(2, 1, 1, 2), "a page beyond the last");
    assert!(refused(1, 2, 1, 2), "a rotation beyond the last");
    assert!(refused(1, 1, 1, 3), "more dimensions rotated than there are");
    assert!(!refused(1, 3, 1, 1), "the last of four rotations of one pair each");
    assert!(refused(1, 4, 1, 1), "a rotation beyond four of one pair each");
    assert!(refused(1, 1, 3, 2), "heads that are not whole groups of sharers");
    for (longer, what) in [
        (PageLayout { block_tokens: 3, ..layout }, "pages of fewer tokens"),
        (PageLayout { head_dim: 5, ..layout }, "pages of a smaller head dim"),
        (PageLayout { dtype: DType::Int8, ..layout }, "pages of other numbers"),
    ] {
        assert!(attention(1, 1, 1, 2, longer, &pages), "{what}");
    }
}
