//! Percentiles of times.

/// The value below which a share of the sorted values lies, to the nearest rank. NaN if there are none.
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    match sorted.len() {
        0 => f64::NAN,
        count => sorted[((count - 1) as f64 * share).round() as usize],
    }
}
