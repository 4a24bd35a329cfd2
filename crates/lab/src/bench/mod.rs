//! How fast is it here? Lookups, reads of stored K and V, decode steps and first tokens, beside other programs that do the same
//! in the same minute; and the page that tells the figures.
//!
//! Inputs are random by seed or captured from a model, times are percentiles. A measurement takes plain settings and gives a
//! report whose fields are the JSON of the program's command.

// What figures are made of.
mod error;
mod page_cache;
mod percentile;
mod readable;

// What they are compared with.
mod bandwidth;
mod case;
mod first_token;
mod machine;
mod peers;

// What is measured.
mod decode;
mod lookup;
mod payload;
mod serving;

// What is told of it.
mod page;

pub use case::{Keys, Shape, Sizes};
pub use decode::{DecodeReport, DecodeSettings, Place, StepTime, decode};
pub use error::BenchError;
pub use first_token::FirstToken;
pub use lookup::{LookupReport, LookupResult, LookupSettings, Skipped, Way, lookup};
pub use machine::{Machine, peak_flops, today};
pub use page::{Benchmarks, Figures, Section, page};
pub use payload::{PayloadReport, PayloadResult, PayloadSettings, payload};
pub use peers::{CallFigures, DecodeFigures, DecodePeer, Peer, PeerResult, PeerSettings, Speed};
pub use percentile::percentile;
pub use readable::{count, plural, size};
