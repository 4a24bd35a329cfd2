//! Which keys are nearest to a query? An index of the FAISS library over the keys of one layer and KV head. The only module
//! that knows the library.

use std::ffi::c_int;
use std::path::Path;

use faiss::index::autotune::ParameterSpace;
use faiss::index::io::{read_index, write_index};
use faiss::index::{IndexImpl, index_factory};
use faiss::{Index, MetricType};

/// What the number of a search's steps is called, by kind of index.
const EFFORTS: [&str; 2] = ["nprobe", "efSearch"];

/// Keys of one layer and KV head, searched by inner product. A key is known by its place among those that were added.
pub(super) struct Nearest(IndexImpl);

// SAFETY: this is its declaration in omp.h; it takes any number.
unsafe extern "C" {
    /// Of the OpenMP that FAISS is linked with; for the calling thread.
    safe fn omp_set_num_threads(threads: c_int);
}

/// That FAISS runs here and takes a description of an index.
///
/// # Errors
/// FAISS's own words, or what the processor lacks.
pub(super) fn check(factory: &str, dim: usize) -> Result<(), String> {
    empty(factory, dim).map(drop)
}

fn empty(factory: &str, dim: usize) -> Result<IndexImpl, String> {
    has_instructions()?;
    index_factory(dim as u32, factory, MetricType::InnerProduct).map_err(|error| words(&error))
}

/// The library is compiled for what .cargo/config.toml says.
fn has_instructions() -> Result<(), String> {
    #[cfg(target_arch = "x86_64")]
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")) {
        return Err("FAISS was built for processors with AVX2, FMA and F16C, and this one lacks them".into());
    }
    Ok(())
}

/// FAISS's message without the place in its source.
fn words(error: &faiss::error::Error) -> String {
    let message = error.to_string();
    let said = message.rsplit_once(": ").map_or(message.as_str(), |(_, said)| said);
    format!("FAISS says: {}", said.trim())
}

impl Nearest {
    /// Over keys `(count, D)`.
    pub(super) fn build(factory: &str, dim: usize, keys: &[f32]) -> Result<Nearest, String> {
        omp_set_num_threads(1);
        let mut index = empty(factory, dim)?;
        if !index.is_trained() {
            index.train(keys).map_err(|error| words(&error))?;
        }
        index.add(keys).map_err(|error| words(&error))?;
        Ok(Nearest(index))
    }

    /// What [`Nearest::write`] wrote; the caller has checked that the file is whole.
    pub(super) fn read(path: &Path) -> Result<Nearest, String> {
        has_instructions()?;
        read_index(utf8(path)?).map(Nearest).map_err(|error| words(&error))
    }

    pub(super) fn write(&self, path: &Path) -> Result<(), String> {
        write_index(&self.0, utf8(path)?).map_err(|error| words(&error))
    }

    /// How much a search looks at. Says nothing to an index that looks at everything.
    pub(super) fn set_effort(&mut self, effort: u32) {
        let Ok(parameters) = ParameterSpace::new() else { return };
        for name in EFFORTS {
            // An index has one of them, or none.
            let _ = parameters.set_index_parameter(&self.0, name, effort);
        }
    }

    /// The `count` keys with the largest products `(queries, count)` for queries `(queries, D)`, -1 where fewer were found.
    pub(super) fn search(&self, queries: &[f32], dim: usize, count: usize) -> Result<Vec<i64>, String> {
        assert_eq!(dim, self.0.d() as usize, "queries are as long as keys");
        let rows = queries.len() / dim;
        let (mut products, mut keys) = (vec![0f32; rows * count], vec![-1i64; rows * count]);
        // Two threads of OpenMP wait for each other whenever something else runs; rayon has given this thread its share.
        omp_set_num_threads(1);
        // SAFETY: the index lives as long as `self`, whose searches change nothing (FAISS allows them at the same time on
        // indexes in main memory); `queries` has rows x D values, and both results have room for rows x count.
        let code = unsafe {
            faiss_sys::faiss_Index_search(
                self.0.inner_ptr(),
                rows as i64,
                queries.as_ptr(),
                count as i64,
                products.as_mut_ptr(),
                keys.as_mut_ptr(),
            )
        };
        if code == 0 { Ok(keys) } else { Err(format!("FAISS failed to search (code {code})")) }
    }
}

fn utf8(path: &Path) -> Result<&str, String> {
    path.to_str().ok_or_else(|| format!("FAISS takes paths in UTF-8 only, found {}", path.display()))
}
