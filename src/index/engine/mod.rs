//! How do collections differ in what answers their lookups? One engine is one file here, and one row of the table `engines!` in
//! `types`, from which [`Engine`], its words, its number on the wire and [`engine`] are made.
//!
//! To add one: write the file, declare it below, add its row before the last of the table (engines are stored by their place, and
//! `last` exists in tests alone), and its number to
//! `proto/landmark/v1/types.proto`.

use std::fmt::Debug;
use std::sync::Arc;

use super::{Compression, Found, Query};
use crate::types::{DType, Engine, FaissIndex, engines};

pub mod cuda;
pub mod faiss;
mod flat;
#[cfg(test)]
mod last;
mod sq;

/// What an engine does differently from others; what it does not say is as for `flat`.
pub trait SearchEngine: Debug + Send + Sync {
    /// Whether this program, on this machine, can do it for keys of D values.
    ///
    /// # Errors
    /// Why not, and what to do about it.
    fn check(&self, _head_dim: usize) -> Result<(), String> {
        Ok(())
    }

    /// As what keys are scanned, where not as they are stored.
    fn compression(&self, _key_dtype: DType) -> Option<Compression> {
        None
    }

    /// The indexes that it asks for every long document, which are then in [`Scoped`](super::Scoped).
    fn indexes(&self) -> Option<&FaissIndex> {
        None
    }

    /// Whether a GPU is asked first: for choices, and for attention over the chosen blocks.
    fn asks_gpu(&self) -> bool {
        false
    }

    /// Chooses the blocks of every row, on the CPU.
    fn search(&self, query: &Query<'_>) -> Found;
}

macro_rules! implementations {
    ($(
        $(#[$about:meta])*
        $name:ident $(($setting:ident))? = $number:literal, $word:literal in $file:ident $(if $cfg:meta)?;
    )+) => {
        /// What implements an engine.
        pub fn engine(engine: &Engine) -> Arc<dyn SearchEngine> {
            match engine {
                $(
                    $(#[cfg($cfg)])?
                    Engine::$name $((setting @ $setting { .. }))? => Arc::new($file::$name $(($setting::clone(setting)))?),
                )+
            }
        }
    };
}

engines!(implementations);
